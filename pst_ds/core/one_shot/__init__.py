"""One-shot masks from calibration examples: by a score per weight, by SparseGPT, which can also quantise, by ALPS."""
