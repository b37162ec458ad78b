"""Choice of how a product with a packed weight is computed, from measurements (docs/background/results.md)."""

from __future__ import annotations

import torch

from pst_ds.inference.runtime import native

BACKENDS = ("native", "csr", "expand")
"""Our CPU kernel on bits; torch's CSR product; a dense product with the weight expanded some rows at a time."""
NATIVE_UP_TO = {torch.bfloat16: 1 << 62, torch.float32: 128}
"""Most vectors in a product for which our kernel is faster than expanding the weight."""
CSR_UP_TO, CSR_FROM_SPARSITY = 32, 0.8
"""Up to this many vectors and from this sparsity, torch's fp32 CSR product is faster than expanding. Dense layers beat
both.
"""


def backend_for(format_name: str, dtype: torch.dtype, device_type: str, vectors: int, density: float) -> str:
    """Return the fastest of :data:`BACKENDS` for a product of ``vectors`` vectors with a weight of this ``density``."""
    if device_type != "cpu":
        return "expand"
    if format_name == "csr":
        few = vectors <= CSR_UP_TO and density <= 1 - CSR_FROM_SPARSITY
        return "csr" if few and dtype != torch.float64 else "expand"
    if dtype not in NATIVE_UP_TO or native.library() is None:
        return "expand"
    return "native" if vectors <= NATIVE_UP_TO[dtype] else "expand"
