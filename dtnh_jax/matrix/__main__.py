"""The command `dtnh matrix`, also `python -m dtnh_jax.matrix`."""

import sys

from dtnh_jax.finetune.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["matrix", *sys.argv[1:]]))
