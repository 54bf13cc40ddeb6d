"""Benchmarks of time and memory: `python -m dtnh_jax.benchmarks`."""
