"""Low-rank updates beyond a single product: rows of an embedding, and gates of components."""
