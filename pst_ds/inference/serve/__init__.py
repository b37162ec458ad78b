"""HTTP server for a model folder: the chat-completions protocol, in batches, for the base model and for per-user
adapters.
"""
