"""Outputs of layers in Flax networks that nobody changed: picked out and scaled."""
