"""Modules that replace a model's tables of rows: embeddings with an update, and quantised frozen tables."""
