"""Let blocks recompute their activations in the backward pass, all of them or the first ones."""

from torch import nn

from pst_ds.errors import InputError


def recompute_activations(
    model: nn.Module, *, num_blocks: int | None = None, reentrant: bool = False, preserve_rng_state: bool = True
) -> None:
    """Let the first ``num_blocks`` blocks of a transformers model recompute their activations; None for all blocks.

    The last ones are those that keep theirs, since the backward pass frees these before it recomputes the first block.
    Their number then adds to the peak of memory without the activations of a block that is recomputed.

    Args:
        model: a model of transformers.
        num_blocks: number of blocks, from 1 to that of :func:`blocks_of`.
        reentrant: use torch's older checkpointing, which nests a backward pass in the backward pass.
        preserve_rng_state: recompute dropout with the same random numbers.

    Raises:
        InputError: the model has fewer blocks.
    """
    model.gradient_checkpointing_enable(  # type: ignore[operator]
        gradient_checkpointing_kwargs={"use_reentrant": reentrant, "preserve_rng_state": preserve_rng_state}
    )
    if num_blocks is None:
        return
    blocks = blocks_of(model)
    if num_blocks > len(blocks):
        raise InputError(
            f"model.recomputed_blocks = {num_blocks}, and {type(model).__name__} has {len(blocks)} blocks that can "
            "recompute their activations. Set a smaller number, or leave it out for all of them"
        )
    for block in blocks[num_blocks:]:
        block.gradient_checkpointing = False  # type: ignore[assignment]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules of ``model`` that can recompute their activations, in the order of the model."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
