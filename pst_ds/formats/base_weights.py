"""Read single tensors of a model folder, and map names between a model and its files."""

import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from pst_ds.errors import InputError, first_line
from pst_ds.formats import hub
from pst_ds.formats.safetensors_file import Slot, TensorFile

_WeightFile = TensorFile | dict[str, Tensor]
_OLD_ENDINGS = ((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta"))
"""Endings of names in transformers, and those that checkpoints converted from TensorFlow have."""


class BaseWeights:
    """Read single tensors of a model folder (safetensors, or PyTorch files) without loading the rest."""

    def __init__(self, path: str | Path, base_model_prefix: str, index: str = "", *, reads_values: bool = True):
        """Find the files of a model; download them first if it is on the hub.

        Args:
            path: model folder, or name of a model on the hub.
            base_model_prefix: prefix of the base model's tensors, such as "model".
            index: weight file or index of several, if it is not one that transformers looks for.
            reads_values: False if only names, dtypes and shapes are needed: then nothing large is downloaded.

        Raises InputError, and NotDownloadedError if the hub cannot be reached.
        """
        self._prefix = f"{base_model_prefix}.".removeprefix(".")
        self._sizes: dict[str, hub.TensorSize] = {}
        remote: hub.RemoteHeaders | None = None
        if not reads_values:
            remote = hub.remote_headers(path)
        if remote is None:
            self.folder = hub.downloaded(path)
            self._file_of = _index(self.folder, index)
        else:
            self.folder = remote.folder
            self._file_of = remote.file_of
            self._sizes = remote.sizes
        self.names = self._file_of.keys()
        """Names in the files, in the order of the files."""
        self._open: dict[str, _WeightFile] = {}

    @property
    def file_bytes(self) -> int:
        """Size of the weight files in bytes. Raises InputError for a missing file."""
        nbytes = 0
        for name in sorted(set(self._file_of.values())):
            file = self.folder / name
            if not file.is_file():
                raise InputError(f"{file} is missing")
            nbytes += file.stat().st_size
        return nbytes

    def find(self, name: str) -> str | None:
        """Return the name in the files of the model's tensor ``name``, with or without the prefix; None if absent."""
        return _spelled(name, self._prefix, self._file_of)

    def size(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return dtype and shape of a tensor, by its name in the files, without reading its values."""
        if name in self._sizes:
            return self._sizes[name]
        slot = _tensors_of(self._file(name))[name]
        return slot.dtype, tuple(slot.shape)

    def read(self, name: str) -> Tensor:
        """Read a tensor, by its name in the files; from safetensors into new memory."""
        file = self._file(name)
        if isinstance(file, TensorFile):
            return file.read(name)
        return file[name]

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Read rows [first, last) of a tensor (..., columns), viewed as the matrix (rows, columns)."""
        file = self._file(name)
        if isinstance(file, TensorFile):
            return file.read_rows(name, first, last)
        return file[name].flatten(0, -2)[first:last]

    def _file(self, name: str) -> _WeightFile:
        """Return the opened file that holds a tensor. Raises InputError if it lacks a tensor of the index."""
        file = self._file_of[name]
        if file not in self._open:
            opened = _opened(self.folder / file)
            listed = {tensor for tensor, where in self._file_of.items() if where == file}
            missing = listed - set(_tensors_of(opened))
            if missing:
                raise InputError(f"{self.folder / file} lacks {min(missing)}, which the index lists. Copy it again")
            self._open[file] = opened
        return self._open[file]

    def copy_if_there(self, name: str, folder: Path) -> None:
        """Copy a small file of the model into ``folder``, if it exists."""
        if (self.folder / name).is_file():
            shutil.copyfile(self.folder / name, folder / name)


def is_text_part(model: nn.Module, folder: Path) -> bool:
    """Return whether the config of ``model`` is the text config of the model in ``folder``.

    If so, :func:`saved_tensors` then returns the names in the complete model, as far as transformers knows them.
    """
    from transformers import AutoConfig
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not (folder / "config.json").is_file():
        return False
    config = AutoConfig.from_pretrained(folder)
    model_class = type(model.config)
    if model_class is type(config) or config.sub_configs.get("text_config") is not model_class:
        return False
    # without this attribute, which loading sets, transformers reverts no change of a prefix
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)  # type: ignore
    return True


def saved_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that ``save_pretrained`` writes for these tensors of the model, by name.

    transformers renames some tensors when it loads a model, or stacks the experts of a layer in one Parameter; this
    reverts it. A renamed tensor is the same object. Tensors may be on the meta device.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(tensors))  # type: ignore[arg-type]


def names_in_files(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the model's names of ``tensors`` by their names in saved files; tensors that are split are omitted."""
    name_of = {id(tensor): name for name, tensor in tensors.items()}  # a renamed tensor stays the same object
    name_of_saved: dict[str, str] = {}
    for saved, tensor in saved_tensors(model, tensors).items():
        if id(tensor) in name_of:
            name_of_saved[saved] = name_of[id(tensor)]
    return name_of_saved


def may_be_missing(model: nn.Module, name: str) -> bool:
    """Return whether transformers allows files without the tensor ``name``."""
    # attributes without a public name, in which a class of transformers lists tensors that it computes itself
    rules = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]  # type: ignore[misc]
    return any(re.search(rule, name) for rule in rules)


def tensors_lacking(model: nn.Module, in_files: Collection[str]) -> list[str]:
    """Return the tensors of ``model``, by their names in saved files, that ``in_files`` lacks; tied ones once."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}.".removeprefix(".")
    state = model.state_dict(keep_vars=True)

    def is_there(name: str) -> bool:
        return may_be_missing(model, name) or _spelled(name, prefix, in_files) is not None

    lacking: dict[str, Tensor] = {}
    for names in _tied(state.items()):
        # files have a tied tensor under one of its names
        if not any(map(is_there, names)):
            lacking |= {name: state[name] for name in names}
    # files may have it under the names of an older or another class, such as single experts
    still_lacking: list[str] = []
    for names in _tied(saved_tensors(model, lacking).items()):
        if not any(name in in_files for name in names):
            still_lacking.append(min(names))
    return still_lacking


def _tied(tensors: Iterable[tuple[str, Tensor]]) -> list[list[str]]:
    """Group the names of each distinct tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors:
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def _spelled(name: str, prefix: str, known: Collection[str]) -> str | None:
    """Return the spelling of ``name`` in ``known``: with or without ``prefix``, and with a new or an old ending."""
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        for new, old in (("", ""), *_OLD_ENDINGS):
            if candidate.endswith(new):
                spelled = candidate[: len(candidate) - len(new)] + old
                if spelled in known:
                    return spelled
    return None


def _index(folder: Path, named: str) -> dict[str, str]:
    """Return the file of each tensor. Raises InputError."""
    candidates = [named] if named else hub.WEIGHT_FILES
    for name in candidates:
        path = folder / name
        if not path.is_file():
            continue
        if name.endswith(".json"):
            return hub.weight_map(path)
        return dict.fromkeys(_tensors_of(_opened(path)), name)
    raise InputError(f"{folder.absolute()} has no {named or 'model.safetensors or pytorch_model.bin'}")


def _tensors_of(file: _WeightFile) -> Mapping[str, Slot | Tensor]:
    """Return the tensors of a file by name; of a safetensors file their places."""
    if isinstance(file, TensorFile):
        return file.slots
    return file


def _opened(path: Path) -> _WeightFile:
    """Open a safetensors file, or map the tensors of a PyTorch file. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{path} is missing")
    if path.suffix == ".safetensors":
        return TensorFile(path)
    try:
        # weights_only, because a pickle of unknown origin can run any code
        return torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
        raise InputError(f"{path} is damaged: {first_line(error)}") from None
