"""Whether autograd is at work, which torch says nowhere in public."""

from __future__ import annotations

import torch


def in_backward_pass() -> bool:
    """Return whether this thread is inside a backward pass.

    A forward pass that runs there is one of a checkpointed block, repeated for its gradients.
    """
    return torch._C._current_graph_task_id() != -1
