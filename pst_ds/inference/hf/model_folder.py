"""A model folder, dense or packed, as ``generate`` and ``bench`` open it: what it holds, its model, its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pst_ds.core.packings import DENSE
from pst_ds.errors import InputError, first_line
from pst_ds.export.prompt_file import attach_saved_prompt
from pst_ds.formats.base_weights import BaseWeights
from pst_ds.inference.hf.config import PackedWeightsConfig
from pst_ds.nn.base_model import DTYPES, Pretrained, architecture

LOAD_AS = ("auto", "sparse", "dense")


class ModelFolderError(InputError):
    """A model folder that cannot be opened, or not for this purpose; the message names it."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder with a config.json that was read."""

    path: Path
    config: PreTrainedConfig
    format: str
    """"dense", that of its packed weights, or "codes" of a dense folder of values on a grid."""

    @property
    def is_causal(self) -> bool:
        names = self.config.architectures or ()
        return any(name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in names)

    @property
    def values(self) -> str | None:
        """The grid of its packed values, "int8" or "int4"; None where they are floats."""
        found = _quantization(self.config).get("values")
        return None if found is None else str(found)

    @property
    def weight_file_bytes(self) -> int:
        """The size of the files that the model is loaded from. Raises InputError for one that is missing or damaged."""
        packed = _quantization(self.config).get("weights_file") or ""
        return BaseWeights(self.path, "", str(packed)).file_bytes

    def require_causal(self) -> None:
        if not self.is_causal:
            names = ", ".join(self.config.architectures or ("nothing",))
            raise ModelFolderError(
                f"{self.path}: {names} in config.json is no causal language model, and no other writes text"
            )

    def load(self, load_as: str = "auto", dtype: str | None = None, device: str = "cpu") -> PreTrainedModel:
        """The model in eval mode. ``dtype``: a key of :data:`DTYPES`; None takes the folder's.

        Raises InputError, with what was wrong with the files.
        """
        options: dict[str, Any] = {"dtype": DTYPES[dtype] if dtype else "auto", "local_files_only": True}
        if self.format != DENSE:
            options["quantization_config"] = PackedWeightsConfig(load_as=load_as)  # type: ignore[arg-type]
        elif load_as == "sparse":
            raise ModelFolderError(
                f"{self.path}: its weights are dense. Pack them: pst-ds export {self.path} --format bitmask --out DIR"
            )
        if device != "cpu":
            options["device_map"] = {"": device}
        kind = architecture(self.config) or transformers.AutoModel
        model, _ = Pretrained(str(self.path)).load(kind, "Name one that the config belongs to", **options)
        attach_saved_prompt(model, self.path)
        return model.eval()

    def tokenizer(self) -> Any:
        """Return the tokenizer. Raises ModelFolderError where there is none."""
        try:
            return transformers.AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelFolderError(
                f"{self.path}: no tokenizer that can be read ({first_line(error)}). Copy tokenizer.json and "
                "tokenizer_config.json from the model it was made of."
            ) from None


def open_model_folder(path: str | Path) -> ModelFolder:
    """Open a folder by its config.json. Raises InputError."""
    path = Path(path)
    if not path.is_dir():
        raise ModelFolderError(f"{path}: no such folder (looked in {path.absolute()})")
    if (path / "run.toml").is_file():
        raise ModelFolderError(f"{path} is a run folder. Make a model of it first: pst-ds export {path} --out DIR")
    if not (path / "config.json").is_file():
        raise ModelFolderError(f"{path}: config.json is missing, so it is no model folder")
    config = Pretrained(str(path)).config(local_files_only=True)
    quantization = _quantization(config)
    method = quantization.get("quant_method")
    if quantization and method != "pst_ds":
        raise ModelFolderError(f"{path}: its weights are quantized with {method!r}; dense and pst_ds folders are read")
    packing = str(quantization.get("format", DENSE)) if quantization else DENSE
    return ModelFolder(path, config, "codes" if quantization and packing == DENSE else packing)


def _quantization(config: PreTrainedConfig) -> dict[str, Any]:
    """The quantization_config of a transformers config; empty without one."""
    found = getattr(config, "quantization_config", None) or {}
    return dict(found) if isinstance(found, dict) else dict(found.to_dict())
