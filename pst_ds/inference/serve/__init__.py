"""HTTP server for a model folder: text with or without per-user adapters, labels, embeddings."""
