"""`python -m dtnh_jax.benchmarks` runs `dtnh_jax.studies.benchmarks`."""

import sys

from dtnh_jax import _cli

if __name__ == "__main__":
    sys.exit(_cli.run("dtnh_jax.studies.benchmarks.command", sys.argv[1:]))
