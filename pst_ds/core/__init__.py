"""The mathematics of PST on plain tensors: no files, no ranks, no DeepSpeed."""
