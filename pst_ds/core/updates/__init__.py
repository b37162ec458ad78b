"""Low-rank updates beyond a single product: rows of an embedding, gates of components, per-sample updates."""
