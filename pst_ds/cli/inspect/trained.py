"""Trained parameters layer by layer for ``pst-ds inspect``; and adapter states, which ``save_pretrained`` writes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pst_ds.atomic_files import file_sha256
from pst_ds.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE
from pst_ds.cli.inspect.text import Facts, Inspection, Layer, sparsity_of
from pst_ds.core.bits import count_bits
from pst_ds.errors import InputError
from pst_ds.export.manifest import read_table
from pst_ds.formats.safetensors_file import TensorFile
from pst_ds.nn.adapter_checkpoints import MASK_BITS, SCALES

_OUTPUTS, _INPUTS = "ARU", "BCV"
"""Factors with a row per output of their layer, and with a column per input."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Mask:
    """The mask of a layer."""

    weights: int
    zeros: int
    nbytes: int


def trained_layers(
    trained: Shapes, masks: Mapping[str, Mask], pattern_of: Callable[[str], str], bytes_each: int
) -> list[Layer]:
    """Describe every module with trained parameters (``bytes_each`` on disk) or a mask."""
    counts: dict[str, int] = {}
    for name, shape in trained.items():
        owner = name.rpartition(".")[0]
        counts[owner] = counts.get(owner, 0) + math.prod(shape)
    layers: list[Layer] = []
    for name in {**counts, **masks}:
        mask, count = masks.get(name), counts.get(name, 0)
        layer: Layer = {
            "name": name,
            "shape": matrix_shape(name, trained),
            "dtype": "",
            "pattern": pattern_of(name) if mask else "",
            "weights": mask.weights if mask else count,
            "zeros": mask.zeros if mask else None,
            "bytes": bytes_each * count + (mask.nbytes if mask else 0),
            "trained": count,
        }
        layers.append(layer)
    return layers


def matrix_shape(name: str, trained: Shapes) -> list[int] | None:
    """Return the shape of a trained weight, or (O, I) from the factors; None without either."""
    if f"{name}.weight" in trained:
        return list(trained[f"{name}.weight"])
    outputs, inputs = (
        [trained[f"{name}.pst_{factor}"] for factor in factors if f"{name}.pst_{factor}" in trained]
        for factors in (_OUTPUTS, _INPUTS)
    )
    return [outputs[0][0], inputs[0][-1]] if outputs and inputs else None


def totals(layers: list[Layer]) -> Facts:
    """Return facts about all layers together."""
    pruned = [layer for layer in layers if layer["zeros"] is not None]
    return {
        "sparsity_measured": sparsity_of(pruned),
        "pruned_weights": sum(layer["weights"] for layer in pruned),
        "trained_parameters": sum(layer["trained"] for layer in layers),
    }


def adapter_state(path: Path) -> Inspection:
    """Describe an adapter state by its config and the masks in its file. Raises InputError for damaged ones."""
    table = read_table(path / CONFIG_FILE, f"{path / CONFIG_FILE} is missing")
    if not (path / WEIGHTS_FILE).is_file():
        raise InputError(f"{path / WEIGHTS_FILE} is missing")
    if file_sha256(path / WEIGHTS_FILE) != table.get("sha256"):
        raise InputError(f"{path / WEIGHTS_FILE} is damaged: its SHA-256 is not the one in {CONFIG_FILE}")
    file, ending = TensorFile(path / WEIGHTS_FILE), f".{MASK_BITS}"
    frozen = ending, f".{SCALES}"
    trained = {name: slot.shape for name, slot in file.slots.items() if not name.endswith(frozen)}
    masks = {}
    for name in file.slots:
        if name.endswith(ending):
            bits, shape = file.read(name), matrix_shape(name.removesuffix(ending), trained)
            weights = math.prod(shape) if shape else 8 * bits.numel()
            masks[name.removesuffix(ending)] = Mask(weights, weights - int(count_bits(bits, bits)[1]), bits.nbytes)
    config = table.get("pst_config") or {}
    pattern = "" if config.get("overrides") else str(config.get("pattern", ""))
    layers = trained_layers(trained, masks, lambda name: pattern, 4)
    known = ["step", "sparsity", "masks_frozen", "rounds", "dtype", "base_model_name_or_path", "base_fingerprint"]
    known += ["pst_ds_version"]
    facts = {**{key: table.get(key) for key in known}, **totals(layers), "pattern": config.get("pattern")}
    facts["file_bytes"] = (path / WEIGHTS_FILE).stat().st_size
    note = "its weight file is whole: its SHA-256 is as it should be"
    return Inspection(f"{path}: an adapter state, to be put onto its base model", facts, layers, note)
