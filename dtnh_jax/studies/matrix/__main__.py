"""`python -m dtnh_jax.studies.matrix` is the command `dtnh matrix`."""

import sys

from dtnh_jax import _cli

if __name__ == "__main__":
    sys.exit(_cli.main(["matrix", *sys.argv[1:]]))
