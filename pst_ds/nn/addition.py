"""The extension point "addition": a trained module next to the layers of a model, such as a prompt.

An addition attaches one module to a model of transformers, and connects it by hooks. The module is part of the model
from then on: its parameters are in optimizer groups, in checkpoints and in ZeRO-3's shards like those of any layer, and
losses, generation and evaluation need not know it. Exports have a file for all additions next to the plain model.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pst_ds.config.additions import ADDITIONS, AdditionSettings, read_settings
from pst_ds.errors import InputError
from pst_ds.file_names import ADDITIONS_FILE
from pst_ds.nn.model_structure import modules_of
from pst_ds.parallel import sharding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pst_ds.config.run import RunConfig

_METADATA = "pst_additions"
"""Key of the safetensors metadata with the facts of all additions, as JSON."""


class AddedModule(nn.Module):
    """Base of the modules that additions attach. All of its parameters are trained."""

    addition: str = ""
    """Name of the addition that attached it."""
    settings: AdditionSettings
    """Settings of that addition, with the peak learning rate of the module's optimizer group."""
    bypassed: bool = False
    """True while the model must compute as it did before the module was attached."""
    extra_tokens: int = 0
    """Positions that it adds to every sequence, out of those that the model has."""

    def facts(self) -> dict[str, object]:
        """Return what :meth:`ModelAddition.restore` needs besides settings and parameters, as JSON values.

        Must work on the meta device.
        """
        return {}

    def extended_mask(self, mask: Tensor) -> Tensor:
        """Return ``mask`` (sequences, tokens), 0 for padding, with the positions that the module adds."""
        return mask


class ModelAddition(ABC):
    """Base class of additions, made from the table ``[additions.NAME]`` of a run file."""

    settings_class: ClassVar[type[AdditionSettings]] = AdditionSettings
    """Class of the table's settings."""

    def __init__(self, name: str, settings: AdditionSettings):
        """``name``: the addition's name in the registry."""
        self.name = name
        self.settings = settings

    @property
    def module_name(self) -> str:
        """Attribute under which :meth:`attach` and :meth:`restore` put the module into the model.

        Tensors under this name are not part of the plain model that an export writes.
        """
        return f"pst_{self.name.replace('-', '_')}"

    def conflicts(self, run: RunConfig) -> Iterator[str]:
        """Yield a message for each setting of the run that does not fit the addition."""
        yield from ()

    @abstractmethod
    def attach(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, seed: int) -> AddedModule:
        """Put a new module under :attr:`module_name` into ``model``, and connect it. Return the module.

        The model may be on the meta device, and then the module must be too. Under ``zero.Init`` its parameters are
        partitioned, and the call is collective; ``sharding.gathered`` gathers those that are read. The new parameters
        are whole: the caller partitions them, with the values of rank 0.

        Args:
            model: a model of transformers, with PST layers if the run has them.
            tokenizer: the run's tokenizer.
            seed: the run's seed. Initial values must depend on nothing else that differs between ranks or runs.

        Raises InputError for a model that cannot have the module.
        """

    @abstractmethod
    def restore(self, model: nn.Module, facts: Mapping[str, object], tensors: Mapping[str, Tensor]) -> AddedModule:
        """Put the module of an export into the plain ``model``, and connect it, as :meth:`attach` does.

        Args:
            facts: what :meth:`AddedModule.facts` returned.
            tensors: the module's parameters by name, on the CPU, with the dtype in which the run computed.

        Raises InputError, or KeyError and ValueError for damaged facts.
        """


def addition_called(name: str, settings: AdditionSettings) -> ModelAddition:
    """Return the addition called ``name``. Raises InputError for one that is unknown or cannot be imported."""
    addition: ModelAddition = ADDITIONS.get(name)(name, settings)
    return addition


def attach_additions(
    model: nn.Module, additions: Mapping[str, AdditionSettings], tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> None:
    """Attach each of ``additions`` to ``model``, in their order. Collective under ``zero.Init``. Raises InputError."""
    if not additions:
        return
    like = next(model.parameters())
    for name, settings in additions.items():
        addition = addition_called(name, settings)
        module = addition.attach(model, tokenizer, seed)
        _require_named(model, module, addition)
        module.addition = name
        module.settings = settings
        module.train(model.training)
        sharding.split_as(like, module.parameters())


def _require_named(model: nn.Module, module: AddedModule, addition: ModelAddition) -> None:
    """Raise InputError if an addition has not put its module where tensors are known not to be the plain model's."""
    names = [name for name, other in model.named_modules() if other is module]
    if not names or names[0].rpartition(".")[2] != addition.module_name:
        raise InputError(
            f"the addition {addition.name!r} ({type(addition).__name__}) must put its module into the model under the "
            f"name {addition.module_name!r}. Correct its attach()"
        )


def added_modules(model: nn.Module) -> dict[str, AddedModule]:
    """Return the modules that additions attached to ``model``, by name in the model."""
    return modules_of(model, AddedModule)


def extra_tokens_of(model: nn.Module) -> int:
    """Return the positions that additions take in every sequence of ``model``."""
    return sum(module.extra_tokens for module in added_modules(model).values())


def inputs_of_layers(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``batch`` with its optional ``attention_mask`` as the layers of ``model`` see it.

    Sums over the inputs of layers omit padding by this mask, and these inputs have the positions of additions too.
    """
    changed = dict(batch)
    for module in added_modules(model).values():
        if "attention_mask" in changed:
            changed["attention_mask"] = module.extended_mask(changed["attention_mask"])
    return changed


# What an export has next to the plain model


@dataclass(frozen=True, slots=True)
class SavedAddition:
    """One addition of an export."""

    settings: dict[str, object]
    """Settings with which the run made it, as JSON values."""
    facts: dict[str, object]
    extra_tokens: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """The module's parameters by name; empty if only the facts were read."""


def saved_additions(model: nn.Module, values: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, SavedAddition]:
    """Return the additions of ``model``, which may be on the meta device, with trained ``values``, for an export.

    Args:
        values: trained tensors by their names in the model.
        dtype: dtype in which the model computes.
    """
    saved: dict[str, SavedAddition] = {}
    for place, module in added_modules(model).items():
        tensors: dict[str, Tensor] = {}
        for name, _ in module.named_parameters():
            tensors[name] = values[f"{place}.{name}"].to(dtype)
        saved[module.addition] = SavedAddition(
            settings=asdict(module.settings), facts=module.facts(), extra_tokens=module.extra_tokens, tensors=tensors
        )
    return saved


def write_additions(folder: Path, additions: Mapping[str, SavedAddition]) -> None:
    """Write the file of ``additions`` into an export; without additions there is no such file."""
    if not additions:
        return
    tensors: dict[str, Tensor] = {}
    about: dict[str, dict[str, object]] = {}
    for name, saved in additions.items():
        about[name] = {"settings": saved.settings, "facts": saved.facts, "extra_tokens": saved.extra_tokens}
        for part, values in saved.tensors.items():
            tensors[f"{name}.{part}"] = values.contiguous()
    save_file(tensors, folder / ADDITIONS_FILE, metadata={_METADATA: json.dumps(about, ensure_ascii=False)})


def read_additions(folder: str | Path, *, with_tensors: bool = True) -> dict[str, SavedAddition]:
    """Return the additions of an export by name; empty without any. Raises InputError for a damaged file."""
    path = Path(folder) / ADDITIONS_FILE
    if not path.is_file():
        return {}
    saved: dict[str, SavedAddition] = {}
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()[_METADATA])
            # the facts alone say whether an export can have the additions, before hours of work
            keys = list(file.keys()) if with_tensors else []
            for name, entry in about.items():
                tensors: dict[str, Tensor] = {}
                for key in keys:
                    if key.startswith(f"{name}."):
                        tensors[key.removeprefix(f"{name}.")] = file.get_tensor(key)
                saved[name] = SavedAddition(
                    settings=dict(entry["settings"]),
                    facts=dict(entry["facts"]),
                    extra_tokens=int(entry["extra_tokens"]),
                    tensors=tensors,
                )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}. Export the model again") from None
    return saved


def load_additions(model: nn.Module, folder: str | Path) -> None:
    """Attach the additions of an export to ``model``, which transformers has loaded from the same ``folder``.

    Does nothing for a folder without additions. Their parameters are frozen, and have the dtype and the device of the
    model's embeddings. Raises InputError for a damaged file, or one that belongs to another model.
    """
    for name, saved in read_additions(folder).items():
        addition = addition_called(name, read_settings(name, saved.settings))
        try:
            module = addition.restore(model, saved.facts, saved.tensors)
        except (KeyError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{Path(folder) / ADDITIONS_FILE} is damaged: {error}. Export the model again") from None
        table = model.get_input_embeddings().weight  # type: ignore[operator]
        module.to(device=table.device, dtype=table.dtype)
        module.addition = name
        module.settings = addition.settings
        module.requires_grad_(False)
        module.train(model.training)
