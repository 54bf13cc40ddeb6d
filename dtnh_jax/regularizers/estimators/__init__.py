"""Estimators that some regularizers need; they run once, before training."""
