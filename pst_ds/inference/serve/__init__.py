"""HTTP server for a model folder and per-user adapters: the chat-completions protocol, in batches."""
