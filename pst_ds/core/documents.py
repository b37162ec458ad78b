"""Causal attention within the documents of packed sequences, without a mask of all pairs of tokens."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from itertools import pairwise

import torch
from torch import Tensor

LONG = 8192
"""Tokens of a sequence from which attention goes from document to document: a mask takes a byte per pair, 64 MiB here,
and rules out fast kernels. In shorter sequences, launching kernels for many short documents would take longer."""
MOST_WITH_MASK = 32768
"""Longest sequence for which a mask of all pairs is accepted; it takes 1 GiB."""
Attention = Callable[..., tuple[Tensor, object]]
"""Attention of transformers, of a module, queries, keys and values, (rows, heads, length, width), and a mask."""


def is_long(tokens: int) -> bool:
    """Return whether attention in a sequence of so many tokens goes from document to document."""
    return tokens >= LONG


def document_mask(documents: Tensor) -> Tensor | None:
    """Return what :func:`by_document` takes as a mask, for the document of each token, (rows, length) int64.

    That is (rows, 1, length, length) bool; the table of documents, (documents, 3) int64 in host memory, for long
    sequences; or None for single documents. The host waits for the device.
    """
    if not bool((documents != documents[:, :1]).any()):
        return None
    if not is_long(documents.shape[1]):
        same = documents.unsqueeze(2) == documents.unsqueeze(1)
        return same.tril_().unsqueeze(1)
    # Borders of documents, (row, position), the start and the end of each row among them.
    borders = torch.nn.functional.pad(documents.diff(dim=1) != 0, (1, 1), value=True).nonzero().tolist()
    table: list[tuple[int, int, int]] = []
    for (row, start), (next_row, stop) in pairwise(borders):
        if row == next_row:  # the end of a row and the start of the next enclose nothing
            table.append((row, start, stop))
    return torch.tensor(table)


def by_document(attend: Attention) -> Attention:
    """Return ``attend``, which for a table of documents as mask computes each of its (row, start, stop) by itself.

    The result has the signature of ``attend``: some models pass the mask by position, others by keyword.
    """

    parameters = signature(attend)

    @wraps(attend)
    def attention(
        module: object,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, object]:
        if attention_mask is None or attention_mask.dtype != torch.int64:
            return attend(module, query, key, value, attention_mask, *args, **kwargs)
        # A document by itself needs no mask: causal attention is the default.
        call = parameters.bind(module, query, key, value, None, *args, **kwargs)
        bias = call.arguments.get("position_bias")  # (rows or 1, heads or 1, queries, keys)
        parts: list[Tensor] = []
        for row, start, stop in attention_mask.tolist():
            tokens = (slice(row, row + 1), slice(None), slice(start, stop))  # of (rows, heads, length, width)
            if bias is not None:
                row_bias = bias
                if len(bias) > 1:
                    row_bias = bias[row : row + 1]
                call.arguments["position_bias"] = row_bias[..., start:stop, start:stop]
            output = attend(module, query[tokens], key[tokens], value[tokens], *call.args[4:], **call.kwargs)[0]
            parts.append(output.flatten(0, 1))  # (1, tokens, heads, width) to (tokens, heads, width)
        # The documents of a table cover all tokens in order.
        return torch.cat(parts).unflatten(0, query.shape[:1] + query.shape[2:3]), None

    return attention
