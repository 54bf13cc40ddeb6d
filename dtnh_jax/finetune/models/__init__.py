"""The networks, in linen, and low-rank adapters for them."""
