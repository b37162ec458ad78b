"""Layers that compute with packed sparse weights, for inference."""

from pst_ds.runtime.linear import SparseLinear, sparse_layers

__all__ = ["SparseLinear", "sparse_layers"]
