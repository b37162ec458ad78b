"""Merge PST layers into a plain model, and count trained parameters."""

import math
import warnings

import torch
from torch import Tensor, nn

from pst_ds.config.update_forms import BESIDE
from pst_ds.errors import InputError, shortened
from pst_ds.nn import experts, inject
from pst_ds.nn.adapter_checkpoints import whole_checkpoints
from pst_ds.nn.experts import PSTExpertStack
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.layer import CONSTANT_PARTS, PSTLayer
from pst_ds.nn.router import pst_routers
from pst_ds.nn.tables.coded import coded_tables, plain_tables
from pst_ds.nn.tables.embedding import PSTEmbedding
from pst_ds.nn.targets import places_by_module, put
from pst_ds.parallel import sharding
from pst_ds.parallel.steps import unwrapped


@torch.no_grad()
def merge_and_unload(model: nn.Module) -> nn.Module:
    """Replace the PST modules of a model by plain ones, in place.

    A PSTLinear becomes an ``nn.Linear`` or ``Conv1D`` with the weight M . W, bit-identical except that a kept -0.0
    becomes +0.0; a PSTExpertStack becomes a Parameter, a PSTEmbedding an ``nn.Embedding``, and a quantised table a
    plain module. The weights are frozen: training them without masks would lose the sparsity. Warns of layers that
    were never called, unless none was: the model may have computed something else. Not collective: each rank merges its
    model.

    Args:
        model: the model, or the DeepSpeed engine around it under ZeRO stages 0 to 2.

    Returns:
        The model, without the engine.

    Raises:
        InputError: the model is under ZeRO-3 or FSDP2, where no rank holds full weights, only a part was injected, or
            its update is next to the mask.
    """
    model = unwrapped(model)
    if inject.settled_layers(model):
        inject.injected_config(model)
    if pst_routers(model):
        raise InputError('merge_and_unload: pattern "experts" removes experts at the export. Use pst-ds export')
    if any(sharding.is_partitioned(param) for param in model.parameters()):
        raise InputError(
            "merge_and_unload needs whole weights, and ZeRO-3 or FSDP2 has them in shards. Call save_pretrained(model, "
            "FOLDER) on every rank, then in one process merge_and_unload(load_pretrained(BASE, FOLDER)); of a run of "
            "`pst-ds train`, use `pst-ds export`"
        )
    if inject.has_update_beside(model):
        raise InputError(
            f'merge_and_unload: update_form = "{BESIDE}" adds U V to each weight, so a merged one would have no zeros. '
            "Use save_pretrained(model, FOLDER), which keeps U V next to the masks"
        )
    idle = inject.layers_never_called(model)
    if 0 < len(idle) < len(pst_layers(model)):
        were = "was" if len(idle) == 1 else "were"
        them = "it" if len(idle) == 1 else "them"
        warnings.warn(
            f"{shortened(idle)} {were} merged, but no forward pass has called {them}. If other code reads the weight "
            "instead, the merged model differs from the trained one. Compare the two",
            stacklevel=2,
        )
    whole_checkpoints(model)  # a plain model saves all its weights
    plain_tables(model)
    for module, places in places_by_module(model).items():
        if isinstance(module, PSTLayer | PSTEmbedding):
            put(_plain(module), places)
    experts.switch_off(model.modules())
    inject.restore_fused_layers(model)
    for name in ("pst_config", "save_pretrained"):  # that of PSTCallback writes the adapter state
        vars(model).pop(name, None)
    return model


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of the merged model, on the meta device, by name."""
    layers = pst_layers(model)
    plain_names: dict[str, str] = {}
    for name, layer in layers.items():
        plain_names[f"{name}.weight"] = inject.plain_name(name, layer)
    tensors: dict[str, Tensor] = {}
    for name, param in model.named_parameters():
        if ".pst_" not in name:
            tensors[plain_names.get(name, name)] = param.to("meta")
    for name, layer in layers.items():
        if layer.weight is None:  # quantised: the layer has codes and scales instead of a weight
            plain = inject.plain_name(name, layer)
            tensors[plain] = torch.empty(layer.weight_shape, dtype=layer.dtype, device="meta")
    for name, buffer in inject.persistent_buffers(model).items():
        tensors[name] = buffer.to("meta")
    return tensors


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the number of trained parameters and of all parameters, in the format of PEFT.

    ``model`` may be an engine; under ZeRO-3 full parameters are counted. Quantised base weights count as weights; masks
    and scales do not count.
    """
    model = unwrapped(model)
    layers = pst_layers(model).values()
    tables = coded_tables(model).values()
    constants: set[nn.Parameter | None] = set()
    for module in (*layers, *tables):
        constants.update(getattr(module, part, None) for part in CONSTANT_PARTS)
    total = 0
    trained = 0
    for param in model.parameters():
        if param in constants:
            continue
        total += sharding.full_numel(param)
        if param.requires_grad:
            trained += sharding.full_numel(param)
    for layer in layers:
        if layer.weight is None:  # its codes are constants, and were not counted
            total += layer.layout.numel
    # Tied tables share their codes, and count once.
    numel_by_codes = {table.codes: math.prod(table.shape) for table in tables}
    total += sum(numel_by_codes.values())
    print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")


def _plain(module: PSTLayer | PSTEmbedding) -> nn.Module | nn.Parameter:
    """Return what replaces a PST module: a module with the merged weight, or for a stack of experts the weight."""
    plain: nn.Module
    if isinstance(module, PSTEmbedding):
        weight = nn.Parameter(module.updated_weight(), requires_grad=False)
        rows, width = weight.shape
        plain = nn.Embedding(rows, width, padding_idx=module.padding_idx, _weight=weight, _freeze=True)
        return plain.train(module.training)
    masked = module.masked_weight().add_(0.0)  # -0.0 becomes +0.0
    weight = nn.Parameter(masked.view(module.weight_shape), requires_grad=False)
    if isinstance(module, PSTExpertStack):
        return weight
    outputs = module.layout.out_features
    inputs = module.layout.in_features
    if module.layout.transposed:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):  # Conv1D would initialise a weight, which is replaced below
            plain = Conv1D(outputs, inputs)
    else:
        plain = nn.Linear(inputs, outputs, bias=False, device="meta")
    plain.weight = weight
    plain.register_parameter("bias", module.bias)
    return plain.train(module.training)
