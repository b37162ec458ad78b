"""One-shot pruning in scripts: of a pretrained model before it is loaded, or of one that HF Trainer already has."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pst_ds.checkpoint.restore import base_fingerprint
from pst_ds.config.one_shot import CHANNELS, REAP, PruneConfig
from pst_ds.config.pst import PSTConfig
from pst_ds.core.patterns import parse_pattern
from pst_ds.errors import InputError
from pst_ds.nn.base_model import DTYPES, pruning_record
from pst_ds.nn.inject import injected_config, plain_name, pst_layers, renew_magnitude_scales
from pst_ds.parallel import zero3
from pst_ds.parallel.ranks import of_main
from pst_ds.prune.blocks import Batch
from pst_ds.prune.model_files import ModelFiles
from pst_ds.train.one_shot.pruning import PruneInput, digest_of_ranks, prune_files_of

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel

_LABELS = ("labels", "label", "label_ids")


def prune_pretrained(
    path: str | Path,
    out: str | Path,
    batches: Iterable[Mapping[str, object]],
    config: PruneConfig,
    *,
    pst: PSTConfig | None = None,
    precision: str = "bf16",
) -> Path:
    """Prune a pretrained model in one shot before training; return the folder ``out``, for ``from_pretrained``.

    Collective: all ranks share the work, and the result does not depend on their number. A call that was killed
    continues with the first block that is not finished; one that was finished before returns at once.

    Args:
        path: Model folder, or name of a cached model of the hub.
        out: Model folder to write.
        batches: Calibration data: arguments of the model's forward pass by name. Labels are ignored, and so are the
            batches of all ranks but 0, and examples after the first ``config.samples``.
        config: Method, sparsity and other settings.
        pst: Settings of ``inject_pst``, for targets, pattern and overrides.
        precision: Dtype of the blocks' computation: "bf16", "fp16" or "fp32".

    Raises, on all ranks, InputError, and FloatingPointError for values that are not finite.
    """
    pst, path, out = pst or PSTConfig(), str(path), Path(out)
    if (
        config.method != CHANNELS
        and config.sparsity is None
        and parse_pattern(config.pattern or pst.pattern).fixed_sparsity is None
    ):
        raise InputError("prune_pretrained: PruneConfig has no sparsity. Set one, such as sparsity=0.5")
    if precision not in DTYPES:
        raise InputError(f"precision = {precision!r} must be one of {', '.join(DTYPES)}")
    drawn = of_main(lambda: _first_examples(batches, config.samples)) if config.needs_data else []
    given = _input(path, pst, precision, drawn, config)
    if not _is_done(out, given):
        prune_files_of(given, out, config)
    return out


def prune_in_trainer(
    model: PreTrainedModel,
    base: str,
    out: Path,
    loader: DataLoader[Any],
    config: PruneConfig,
    *,
    sparsity: float,
    resumes: bool,
) -> None:
    """Give an injected model the weights of its ``base`` pruned into ``out``, now or in an earlier call. Collective.

    Args:
        loader: Calibration data, of which ``config.samples`` examples are drawn by ``config.seed``.
        sparsity: Applies unless ``config`` sets one.
        resumes: Whether training continues from a checkpoint, so that ``out`` must be there.

    Raises InputError, also for a model whose W0 is quantised or trained.
    """
    pst, layers = injected_config(model), pst_layers(model)
    if pst.train_weights or any(layer.weight is None for layer in layers.values()):
        raise InputError(
            "PSTCallback(start=...) replaces the frozen weights, and train_weights = True trains them, or base_grid "
            "has quantised them. Call pst_ds.prune_pretrained, and load the folder that it returns"
        )
    if config.method in (CHANNELS, REAP):
        raise InputError(
            f'PSTCallback(start=...) keeps the shapes of the live model, and method "{config.method}" changes them. '
            "Call pst_ds.prune_pretrained, and load the folder that it returns"
        )
    if config.sparsity is None:
        config = replace(config, sparsity=sparsity)
    if not config.sparsity:
        raise InputError(
            "PSTCallback(start=...) prunes to the sparsity of the schedule before the first step, which is 0. Give "
            "the schedule an initial_sparsity, or use PSTCallback(OneShotSchedule(...), start=...)"
        )
    dtype = next(iter(layers.values())).dtype
    precision = next((name for name, other in DTYPES.items() if other == dtype), "fp32")
    drawn = of_main(lambda: _draw(model, loader, config)) if config.needs_data else []
    given = _input(base, pst, precision, drawn, config)
    if not _is_done(out, given):
        if resumes:
            raise InputError(
                f"{out} does not match the model, the training data, its batches and PSTCallback(start=...), and the "
                "checkpoint to resume from continues from it. Restore the old values, or use another output_dir"
            )
        prune_files_of(given, out, config)
    load_base(model, out)


def _input(path: str, pst: PSTConfig, precision: str, drawn: Sequence[Batch], config: PruneConfig) -> PruneInput:
    """Return what is pruned; its facts tell a finished folder from that of another call. Collective."""
    about = repr(config), repr(pst), precision
    job = [*about, digest_of_ranks(drawn, "batches"), of_main(lambda: base_fingerprint(path))]
    return PruneInput(path, pst, 0.0, precision, lambda _: drawn, "batches", {"job": job})


def _is_done(out: Path, given: PruneInput) -> bool:
    return of_main(lambda: pruning_record(out).get("job")) == given.facts["job"]


@torch.no_grad()
def load_base(model: PreTrainedModel, folder: Path) -> None:
    """Give the pruned layers of an injected model the weights in another model folder, block by block. Collective.

    From then on ``folder`` is the model's base, which adapters name. Raises InputError for a folder without a weight.
    """
    files, prefix = ModelFiles(str(folder), None), model.base_model_prefix + "."
    known = dict(files.model.named_parameters())
    of_part: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, layer in pst_layers(model).items():
        own = plain_name(name, layer)
        found = next((n for n in (own, own.removeprefix(prefix), prefix + own) if n in known), None)
        if found is None or layer.weight is None:
            raise InputError(f"{folder} has no {own}, which the model has. Load the model from {folder}")
        of_part.setdefault(files.part_of(found.rpartition(".")[0]), []).append((found, layer.weight))
    for part, weights in of_part.items():
        with files.loaded(part):
            for name, weight in weights:
                whole = files.model.get_parameter(name).flatten()
                zero3.write_shard(weight, zero3.own_part(weight, whole).to(weight.device, weight.dtype))
    renew_magnitude_scales(model)
    model.name_or_path = model.config._name_or_path = str(folder)


def _draw(model: nn.Module, loader: DataLoader[Any], config: PruneConfig) -> list[Batch]:
    """Return batches of examples of a loader's dataset, as its collate function makes them. Raises InputError."""
    dataset: Any = loader.dataset
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed))
        examples = [dataset[i] for i in order[: config.samples].tolist()]
    else:
        examples = list(islice(dataset, config.samples))
    size, named = loader.batch_size or 1, inspect.signature(model.forward).parameters
    with torch.random.fork_rng(devices=[]):  # some collate functions draw random numbers
        torch.manual_seed(config.seed)
        batches = [loader.collate_fn(examples[at : at + size]) for at in range(0, len(examples), size)]
    batches = [{key: value for key, value in batch.items() if key in named} for batch in batches]
    wanting = next((batch for batch in batches if model.main_input_name not in batch), None)
    if wanting is not None:
        raise InputError(
            f"the Trainer's batches have no {model.main_input_name}, but {', '.join(wanting) or 'nothing known'}. "
            "Prune before the model is loaded, with pst_ds.prune_pretrained"
        )
    return _first_examples(batches, config.samples)


def _first_examples(batches: Iterable[Mapping[str, object]], samples: int) -> list[Batch]:
    """Return the tensors of the first ``samples`` examples, on the CPU, without labels. Raises InputError."""
    drawn: list[Batch] = []
    for batch in batches:
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k not in _LABELS}
        if not tensors:
            raise InputError(f"a calibration batch has no tensors besides labels, but {', '.join(batch) or 'nothing'}")
        drawn.append({key: value[:samples].cpu() for key, value in tensors.items()})
        samples -= len(next(iter(tensors.values())))
        if samples <= 0:
            return drawn
    if not drawn:
        raise InputError("batches is empty: there is no calibration data. Give at least one batch")
    return drawn
