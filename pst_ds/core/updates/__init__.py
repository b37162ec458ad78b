"""Low-rank updates beyond a single product: rows of an embedding, per-sample updates."""
