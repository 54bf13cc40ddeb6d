"""The command `dtnh lm`: fine-tunes language models, and measures what they forget."""
