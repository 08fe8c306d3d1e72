"""Look at a model before it trains: one forward and one backward pass on one batch."""
