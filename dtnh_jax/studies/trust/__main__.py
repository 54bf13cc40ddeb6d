"""`python -m dtnh_jax.studies.trust` is the command `dtnh study`."""

import sys

from dtnh_jax import _cli

if __name__ == "__main__":
    sys.exit(_cli.main(["study", *sys.argv[1:]]))
