"""Choose the share of feed-forward channels that makes a model faster by a given factor.

The work of a token is one multiplication per weight that it meets, and what an engine spends on everything else, in the
same unit: attention, norms, activations, caches. That is proportional to the width, and to the number of blocks.
"""

from collections.abc import Sequence

from torch import nn
from transformers import AutoModel

from pst_ds.config.one_shot import ENGINES
from pst_ds.config.pst import PSTConfig
from pst_ds.config.run import RunConfig
from pst_ds.errors import InputError
from pst_ds.nn.base_model import Pretrained
from pst_ds.nn.cut_config import cut_config
from pst_ds.nn.model_structure import experts_per_token, model_width, text_config
from pst_ds.nn.targets import Target, resolve_targets
from pst_ds.prune.blocks import find_blocks
from pst_ds.train.resolved import load_model_config

OVERHEADS = dict(zip(ENGINES, (2300, 4000, 0, 0), strict=True))
"""Other work per token, block and unit of width. Fitted to OpenVINO int8 (MiniLM) and to llama.cpp Q8_0 (SmolLM2-135M)
on AMD EPYC; on GPUs only weights are counted, so the true speed-up is smaller."""
STEPS = 16
"""Shares are multiples of 1 / STEPS for which the widths divide."""


def share_for(run: RunConfig, speedup: float, target: str) -> tuple[float, float]:
    """Return the largest share of the channels with at least this ``speedup`` in ``target``, and its expected speed-up.

    Raises InputError if no share has it.
    """
    full = _work(run, None, target)
    fastest = 1.0
    refused = None
    for part in range(STEPS - 1, 0, -1):
        try:
            found = full / _work(run, part / STEPS, target)
        except InputError as error:  # a width that does not divide
            refused = error
            continue
        if found >= speedup:
            return part / STEPS, found
        fastest = found
    if fastest == 1.0 and refused:  # no width divides, which says more than the speed-up
        raise refused
    raise InputError(
        f"speedup = {speedup} for {target}: fewer feed-forward channels make {run.model.path} at most {fastest:.2f} "
        "times as fast. Ask for less"
    )


def _work(run: RunConfig, share: float | None, target: str) -> float:
    """Return the work of a token, in multiplications, with a ``share`` of the channels. Raises InputError."""
    model = bare_model(run, share)
    layers = resolve_targets(model, PSTConfig())
    text = text_config(model)
    _, blocks = find_blocks(model, [layer.name for layer in layers])
    width = model_width(model)
    outputs = 0
    if run.task_facts.predicts_tokens:
        outputs = text.vocab_size  # a classifier has a few outputs only
    return met_weights(model, layers) + width * (outputs + OVERHEADS[target] * len(blocks))


def bare_model(run: RunConfig, share: float | None) -> nn.Module:
    """Return the run's pretrained model without a head, with a ``share`` of its channels, on the meta device.

    Raises InputError if its config cannot express the cut.
    """
    config = load_model_config(run, [], None)
    if share is not None:
        cut_config(config, share)
    return Pretrained(run.model.path, "model.path").shapes(AutoModel, config)


def met_weights(model: nn.Module, layers: Sequence[Target]) -> float:
    """Return the weights of ``layers`` that a token is multiplied with: k of E experts."""
    chosen = experts_per_token(text_config(model))
    met = 0.0
    for layer in layers:
        share = 1.0
        if layer.is_stack:
            share = min(1.0, chosen / layer.layout.num_experts)
        met += layer.layout.numel * share
    return met
