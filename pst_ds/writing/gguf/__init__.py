"""GGUF files, which llama.cpp reads: the model and its tokenizer."""
