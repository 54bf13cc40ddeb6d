"""From photographs on disk to batches in memory."""
