"""Measures and checks the library on an accelerator."""
