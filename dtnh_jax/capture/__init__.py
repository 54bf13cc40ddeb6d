"""Captures and scales the outputs of layers in unmodified Flax networks."""
