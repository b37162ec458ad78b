"""A pruned model as a folder that plain transformers loads, with a record of what was pruned."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from pst_ds.atomic_files import atomic_folder, require_writable
from pst_ds.errors import InputError
from pst_ds.nn.base_model import PRUNING_RECORD, Pretrained, architecture
from pst_ds.prune.layer import PrunedLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD_FILE = PRUNING_RECORD
SCALES_FILE = "scales.safetensors"
"""The scales of a folder whose weights are on a grid, which its record names: (O, groups) bf16 of each layer."""
FORMAT = 1


def load_base(path: str, *, attn_implementation: str | None = None) -> PreTrainedModel:
    """Return the whole model that ``path`` says it is, on the CPU, in its own dtype and in evaluation mode.

    Raises InputError when it cannot be loaded, is quantised or lacks weights.
    """
    import transformers

    place = Pretrained(path, "model.path")
    config = place.config()
    place.require_dense(config)
    fix = 'Name in "architectures" of its config.json the class that it was saved from'
    kind = architecture(config) or transformers.AutoModel
    model, missing = place.load(kind, fix, dtype="auto", attn_implementation=attn_implementation)
    place.require_whole(model, missing, fix)
    return model.eval()


def require_free(out: Path, base: str) -> None:
    """``out`` must be free, an empty folder, or an earlier result. Raises InputError."""
    if out.resolve() == Path(base).resolve():
        raise InputError(f"--out {out} is the model to prune; name another folder")
    is_ours = (out / RECORD_FILE).is_file() and not (out / "pst_manifest.json").exists()
    if out.exists() and not (out.is_dir() and (is_ours or not any(out.iterdir()))):
        raise InputError(f"--out {out.absolute()} exists and was not written by pst-ds prune; name another folder")
    require_writable(out, f"--out {out}")


def record_of(layers: Sequence[PrunedLayer], about: Mapping[str, object]) -> dict[str, Any]:
    """Return the content of :data:`RECORD_FILE`: ``about`` the run, counts over all layers, and of each layer."""
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    return {
        "format": FORMAT,
        **about,
        "sparsity_measured": sum(layer.zeros for layer in layers) / weights,
        "pruned_weights": sum(layer.pruned for layer in layers),
        "weights": weights,
        "layers": [_facts(layer) for layer in layers],
    }


def _facts(layer: PrunedLayer) -> dict[str, object]:
    """What the record says of a layer: all but its scales, and what is of experts where there are none."""
    facts = {field.name: getattr(layer, field.name) for field in fields(layer) if field.name != "scales"}
    return {name: value for name, value in facts.items() if not name.startswith("expert_") or value}


def scales_of(layers: Sequence[PrunedLayer]) -> dict[str, Tensor]:
    """Return the content of :data:`SCALES_FILE`; nothing where no layer was rounded."""
    return {scales_name(layer.name): layer.scales for layer in layers if layer.scales is not None}


def scales_name(layer: str) -> str:
    """Return the name of a layer's scales in :data:`SCALES_FILE`."""
    return f"{layer}.scales"


def write_folder(
    model: PreTrainedModel,
    record: dict[str, Any],
    scales: dict[str, Tensor],
    out: Path,
    *,
    shard_bytes: int,
    unused: Mapping[str, Tensor],
    copy_beside: Callable[[Path], None],
) -> None:
    """Write ``out``, whole or not at all: weights in files of at most ``shard_bytes``, config, ``record``, ``scales``.

    ``unused``: tensors of the base model's files that ``model`` has none of, which are written as they are.
    ``copy_beside`` is given the folder to put the small files of the base model into: its tokenizer's, for one.
    """
    with atomic_folder(out) as folder:
        state = {**model.state_dict(), **unused} if unused else None
        model.save_pretrained(folder, max_shard_size=shard_bytes, state_dict=state)
        copy_beside(folder)
        if scales:
            save_file(scales, folder / SCALES_FILE)
        (folder / RECORD_FILE).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
