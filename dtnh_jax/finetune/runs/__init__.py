"""Many trainings in one run folder, which an interruption does not lose."""
