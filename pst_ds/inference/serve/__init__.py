"""A model folder behind HTTP: the chat-completions protocol, in batches, for the base model and for its users."""
