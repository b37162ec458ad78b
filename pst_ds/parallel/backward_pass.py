"""Detect whether autograd's backward pass is running (torch has no public API for it)."""

from __future__ import annotations

import torch


def in_backward_pass() -> bool:
    """Return whether this thread is inside a backward pass.

    A forward pass inside one recomputes a checkpointed block.
    """
    return torch._C._current_graph_task_id() != -1
