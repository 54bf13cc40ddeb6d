"""What the library costs on an accelerator, and whether it is right there."""
