"""The modules that ZeRO-3 should treat as leaves, whose parameters it gathers at once instead of module by module."""

from torch import nn

from pst_ds.nn.experts import expert_stacks
from pst_ds.nn.flat_factors import input_embeddings, owners_of_factors
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.model_structure import outermost_list


def leaf_classes(model: nn.Module, gathered_ahead: int) -> list[str]:
    """Return the classes to name as ZeRO-3's leaf modules, as "module.Class"; [] for none.

    A block with pruned layers is a leaf if ZeRO-3 gathers as many parameters ahead (``gathered_ahead``, its prefetch
    bucket) as the block has: it would gather the whole block at once anyway, but in a call for each of its modules. A
    larger block as a leaf would be gathered in part when it is needed, and the device would wait.

    In a mixture a stack of experts is the leaf, so that one is gathered at a time. A stack is one without a name too,
    but without the name of a class in the model DeepSpeed treats whole blocks of some families as leaves, or warns.

    Args:
        model: a model with PST modules and shapes that are not partitioned, such as on the meta device.
        gathered_ahead: in values.
    """
    stacks = expert_stacks(model)
    if stacks:
        return sorted({_name_of_class(stack) for stack in stacks.values()})
    blocks = _blocks_with_layers(model)
    if not blocks or not input_embeddings(model):
        return []
    factors = set(owners_of_factors(model))
    for block in blocks:
        params = list(block.parameters())
        if sum(param.numel() for param in params) > gathered_ahead:
            return []
        # the factors become one parameter outside the blocks; DeepSpeed reduces others of a leaf only at its end
        if any(param.requires_grad and param not in factors for param in params):
            return []
    return sorted({_name_of_class(block) for block in blocks})


def _blocks_with_layers(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that hold pruned layers, once each."""
    blocks: dict[nn.Module, None] = {}
    for name in pst_layers(model):
        stack = outermost_list(name, model)
        if stack:
            number = name.removeprefix(f"{stack}.").partition(".")[0]
            blocks[model.get_submodule(f"{stack}.{number}")] = None
    return list(blocks)


def _name_of_class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
