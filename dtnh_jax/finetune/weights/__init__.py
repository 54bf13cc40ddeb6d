"""Pretrained weights: which there are, and how their files are read."""
