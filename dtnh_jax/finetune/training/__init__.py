"""One training: objective, gradients, optimizer, compiled step and loop."""
