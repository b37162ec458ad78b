"""Open a pretrained model: its config, its shapes on the meta device, its weights."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pst_ds.errors import InputError, first_line, shortened
from pst_ds.file_names import ADDITIONS_FILE
from pst_ds.formats import hub
from pst_ds.nn.config_values import require_plausible_config, require_plausible_generation
from pst_ds.nn.folder_facts import PRUNING_RECORD
from pst_ds.nn.sharded_weights import read_by_every_rank

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Dtypes by their names in settings and arguments."""
_MISMATCH = re.compile(r"size mismatch for (\S+): copying a param with shape torch\.Size\(\[([\d, ]*)\]\)")


@dataclass(frozen=True, slots=True)
class Pretrained:
    """Place of a pretrained model, and the setting that names it; every error starts with both."""

    path: str
    """A folder, or a name on the hub."""
    setting: str = ""
    """A setting such as "model.path"; "" for an argument of the command."""

    def __str__(self) -> str:
        return f"{self.setting} = {self.path!r}" if self.setting else self.path

    @property
    def _looked_in(self) -> str:
        return f"(looked in {Path(self.path).absolute()})"

    def require_place(self) -> None:
        """Raise InputError for a path that neither exists nor is spelled like a name on the hub."""
        if not self.path:
            raise InputError(f"{self} is empty; name a model folder, or a model on the hub")
        is_path = self.path.count("/") > 1 or self.path.startswith((".", "/", "~"))
        if is_path and not Path(self.path).exists():
            raise InputError(f"{self} does not exist {self._looked_in}; name a model folder, or a model on the hub")

    def config(self, **options: object) -> PreTrainedConfig:
        """Return the config as transformers reads it. Raises InputError."""
        from transformers import AutoConfig

        self.require_place()
        require_plausible_config(Path(self.path) / "config.json")
        require_plausible_generation(Path(self.path) / "generation_config.json")
        try:
            return AutoConfig.from_pretrained(self.path, **options)
        except Exception as error:  # strange values make transformers raise anything
            self.require_file(hub.CONFIG_FILE)
            raise InputError(
                f"{self} has no config.json that transformers can read, as a folder {self._looked_in} or on the hub: "
                f"{first_line(error)}. Name a folder with a config.json, or a model on the hub"
            ) from error

    def require_file(self, name: str) -> None:
        """Raise InputError if this is a name on the hub, and its file ``name`` can be neither found nor downloaded."""
        if not hub.is_hub_name(self.path):
            return
        try:
            hub.require_file(self.path, name)
        except InputError as error:
            raise type(error)(f"{self} is not a folder {self._looked_in}, nor a model on the hub: {error}") from error

    def download(self) -> Path:
        """Return the folder with the model's files, after a download of those that the hub's cache lacks.

        Raises InputError, and NotDownloadedError if the hub cannot be reached.
        """
        if not hub.is_hub_name(self.path):
            return Path(self.path)
        try:
            return hub.downloaded(self.path)
        except InputError as error:
            raise type(error)(
                f"{self} is not a folder {self._looked_in}, and cannot be read from the hub: {error}"
            ) from error

    def require_dense(self, config: PreTrainedConfig) -> None:
        """Raise InputError for a packed or quantised model, or one with additions, such as a prompt."""
        if (Path(self.path) / ADDITIONS_FILE).is_file():
            raise InputError(
                f"{self} has trained modules in {ADDITIONS_FILE}, which would be lost. Name a model without them"
            )
        quantization = getattr(config, "quantization_config", None)
        if not quantization:
            return
        # A table in the file, or a config object of transformers.
        table = quantization if isinstance(quantization, dict) else vars(quantization)
        method = table.get("quant_method")
        if method == "pst_ds":
            raise InputError(
                f"{self} is packed, and its weights cannot be ranked. Make it dense: pst-ds export {self.path} "
                "--format dense --out DIR"
            )
        method_name = getattr(method, "value", method)  # an enum of transformers, or a string
        raise InputError(f"{self} is quantised ({method_name}), and its weights cannot be ranked. Name the original")

    def shapes(
        self, kind: Any, config: PreTrainedConfig, *, dtype: torch.dtype | None = None, purpose: str = "", fix: str = ""
    ) -> nn.Module:
        """Return a model of ``kind``, a class or an Auto class of transformers, on the meta device.

        Raises InputError with ``purpose`` and ``fix``.
        """
        # Classes of models only have the private method.
        make = getattr(kind, "from_config", None) or kind._from_config
        options: dict[str, torch.dtype] = {}
        if dtype is not None:
            options["dtype"] = dtype
        try:
            with torch.device("meta"):
                return make(config, **options)
        except Exception as error:  # strange values make transformers raise anything
            raise InputError(f"{self}{purpose} cannot be built: {first_line(error)}. {fix}".rstrip()) from error

    def load(
        self, kind: Any, misfit: str, *, linear_later: bool = False, **options: object
    ) -> tuple[PreTrainedModel, list[str]]:
        """Return a model of ``kind`` with its pretrained weights, and the names of the tensors missing in the files.

        Args:
            kind: a class or an Auto class of transformers.
            misfit: fix for a tensor in the files of another shape than in the model, which is an InputError.
            linear_later: under ZeRO-3, leave weights of linear layers in the files until
                :func:`~pst_ds.nn.sharded_weights.read_now`, which :func:`~pst_ds.nn.inject.inject_pst` calls.
            options: arguments of ``from_pretrained``.
        """
        from safetensors import SafetensorError

        folder = self.download()
        if folder != Path(self.path):
            # the revision that was downloaded, also if the hub has a newer one by now
            options |= {"revision": folder.name, "local_files_only": True}
        try:
            with read_by_every_rank(later=linear_later):
                model, info = kind.from_pretrained(
                    self.path,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # refused below, by name
                    **options,
                )
            differing = [f"{name} of shape {tuple(shape)}" for name, shape, _ in sorted(info["mismatched_keys"])]
        except InputError:
            raise
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise InputError(
                f"{self} cannot be loaded {self._looked_in}: {first_line(error)}. Name a folder with whole weights"
            ) from error
        except RuntimeError as error:  # how transformers reports other shapes under ZeRO-3
            differing = []
            for name, numbers in _MISMATCH.findall(str(error)):
                shape = tuple(int(number) for number in numbers.split(", "))
                differing.append(f"{name} of shape {shape}")
            if not differing:
                self._require_buildable(kind)
                raise
        except Exception:  # strange values make transformers raise anything
            self._require_buildable(kind)
            raise
        if differing:
            raise InputError(f"{self} has {', '.join(differing[:3])}; its config.json gives another shape. {misfit}")
        return model, sorted(info["missing_keys"])

    def _require_buildable(self, kind: Any) -> None:
        """Raise InputError if a model of ``kind`` cannot be built from the config, without weights."""
        self.shapes(
            kind, self.config(local_files_only=True), fix="Correct config.json, or copy it from the original model"
        )

    def require_whole(self, model: nn.Module, missing: list[str], fix: str) -> None:
        """Raise InputError, with the ``fix``, if tensors of ``model`` are ``missing`` in the files."""
        if missing:
            lacking = f"{self} lacks {shortened(missing)}, which a {type(model).__name__} has"
            raise InputError(f"{lacking}: there would be random values. {fix}")


def pruning_record(path: str | Path) -> dict[str, object]:
    """Return the record of ``pst-ds prune``, or of a run that pruned, in a folder; empty if missing or damaged.

    Its values are not validated: compare them only. :mod:`~pst_ds.nn.folder_facts` has typed ones.
    """
    try:
        record = json.loads((Path(path) / PRUNING_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def architecture(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class that ``config`` names first; None if transformers does not have it."""
    import transformers

    names = getattr(config, "architectures", None) or [""]
    return getattr(transformers, names[0], None)
