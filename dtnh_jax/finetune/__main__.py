"""`python -m dtnh_jax.finetune` is the console script `dtnh`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("dtnh_jax._cli", run_name="__main__")
