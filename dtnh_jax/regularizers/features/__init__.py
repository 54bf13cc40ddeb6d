"""Regularizers of feature maps, towards those of the pretrained network."""
