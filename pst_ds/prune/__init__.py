"""One-shot pruning of a pretrained model on calibration text: magnitude, Wanda, SparseGPT, ALPS."""
