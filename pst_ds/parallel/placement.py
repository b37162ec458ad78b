"""Decide where frozen weights and masks are held under ZeRO-3: over all ranks, in each node, or whole on each rank."""

MAX_SHARE = 0.5
"""Share of a rank's memory that its shards and its part of a copy in the node may fill by default. The rest is for what
no placement changes: gathered layers, activations and optimizer state."""


def copy_ranks(wanted: str, frozen_bytes: int, ranks: int, node_size: int, memory: float) -> int:
    """Return how many neighbouring ranks share a second copy of the frozen weights and masks.

    With 0 there are no copies, and weights are sharded over all ranks. The size of a node keeps gathers in the node; 1
    means a whole copy on every rank, which then gathers nothing. Copies in nodes need equally many ranks on each.

    Args:
        wanted: ``model.base_placement``. "auto" is "node" if that fits, else "sharded".
        frozen_bytes: Bytes of frozen weights and masks, unsharded.
        node_size: Ranks on a node; may exceed ``ranks``.
        memory: Bytes that a rank may use for all its tensors.
    """
    if wanted == "replicated" and ranks > 1:
        return 1
    if wanted == "sharded" or node_size >= ranks or ranks % node_size:
        return 0
    fits = 0 < frozen_bytes / ranks + frozen_bytes / node_size <= MAX_SHARE * memory
    if wanted == "node" or fits:
        return node_size
    return 0
