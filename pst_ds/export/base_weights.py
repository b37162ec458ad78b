"""The tensors of a pretrained model's files, one at a time, under the names the model gives them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.errors import InputError

_OLD_ENDINGS = ((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta"))


class BaseWeights:
    """Reads single tensors of a model folder (safetensors, or PyTorch files) without loading the rest."""

    def __init__(self, path: str | Path, base_model_prefix: str):
        self._folder = _local_folder(path)
        self._prefix = base_model_prefix + "." if base_model_prefix else ""
        self._file_of = _index(self._folder)
        self._open: dict[str, Any] = {}

    def find(self, name: str) -> str | None:
        """The file's name for the model's tensor ``name``: with or without the base model's prefix; None if absent."""
        candidates = [name, name.removeprefix(self._prefix), self._prefix + name]
        for candidate in candidates:
            for new, old in (("", ""), *_OLD_ENDINGS):
                if candidate.endswith(new):
                    spelled = candidate[: len(candidate) - len(new)] + old
                    if spelled in self._file_of:
                        return spelled
        return None

    def read(self, name: str) -> Tensor:
        """The tensor under the file's own ``name``."""
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = _open_file(self._folder / file)
        return self._open[file](name)

    def copy_if_there(self, name: str, folder: Path) -> None:
        """Copy a file of the model's that is no weight file into ``folder``."""
        if (self._folder / name).is_file():
            shutil.copyfile(self._folder / name, folder / name)


def saved_tensors(model: nn.Module, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What ``save_pretrained`` writes for the model's ``tensor``, by name; ``tensor`` may be on the meta device.

    transformers builds some models of other tensors than their files hold: it renames them, or stacks the experts of a
    layer in one Parameter. This is its own way back.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, {name: tensor})  # type: ignore[arg-type]


def _local_folder(path: str | Path) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:  # the run has loaded it, so it is in the cache
        return Path(snapshot_download(str(path), local_files_only=True))
    except Exception as error:
        raise InputError(f"base model {str(path)!r} is neither a folder nor in the hub's cache") from error


def _index(folder: Path) -> dict[str, str]:
    """File of each tensor."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            return json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return dict.fromkeys(_names(folder / name), name)
    raise InputError(f"{folder.absolute()} has no model.safetensors or pytorch_model.bin")


def _names(path: Path) -> list[str]:
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return list(file.keys())
    return list(torch.load(path, mmap=True, weights_only=True, map_location="cpu"))


def _open_file(path: Path) -> Any:
    """A function from a tensor's name to the tensor."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        return safe_open(path, "pt").get_tensor
    return torch.load(path, mmap=True, weights_only=True, map_location="cpu").__getitem__
