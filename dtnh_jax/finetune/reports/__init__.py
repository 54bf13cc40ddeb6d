"""Finished runs as tables, figures, pages, exported networks and predictions."""
