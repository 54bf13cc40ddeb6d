"""Experiments and measurements: in the repository only, not in the wheel."""
