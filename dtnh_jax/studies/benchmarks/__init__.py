"""How long things take: `python -m dtnh_jax.benchmarks`."""
