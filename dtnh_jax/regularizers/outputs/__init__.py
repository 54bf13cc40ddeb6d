"""Regularizers of a network's outputs, and the loss for held-out gradients."""
