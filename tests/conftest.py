"""Settings of every test: eight CPU devices and no silent broadcasting.

Most of the time goes into compiling programs that run once. So LLVM is told not to
optimize them, and code for fusions comes from the older of XLA's two emitters, where
XLA still has it: that takes half the time. What is fused, collectives and memory stay
as they are.
"""

import importlib.metadata
import os

FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    # On two busy cores that takes longer than usual.
    "--xla_cpu_collective_call_terminate_timeout_seconds=120",
]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # A flag that XLA does not know would end the process.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")

os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's threads, by default one a device. A device may wait for the others in several
# sums at once: with as few threads as that, all of them can wait for each other.
os.environ.setdefault("NPROC", "64")

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
