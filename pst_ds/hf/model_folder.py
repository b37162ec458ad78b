"""Open a model folder, dense or packed, for ``generate``, ``serve`` and ``bench``: config, model, tokenizer."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pst_ds.core.packings import DENSE
from pst_ds.data.generation import end_tokens
from pst_ds.data.tokens.tokenize import open_tokenizer
from pst_ds.errors import InputError
from pst_ds.formats.base_weights import BaseWeights
from pst_ds.hf.config import LoadAs, PackedWeightsConfig
from pst_ds.nn.addition import load_additions, read_additions
from pst_ds.nn.base_model import DTYPES, Pretrained, architecture
from pst_ds.nn.folder_facts import sparsity_of
from pst_ds.storage_format import STORAGE_FORMATS, storage_format

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""Inputs of an encoder, each (batch, tokens) int64."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder with a readable config.json."""

    path: Path
    config: PreTrainedConfig
    format: str
    """"dense", the format of its packed weights, or "codes" for a dense folder of quantised values."""
    is_plain: bool
    """True if transformers loads it without pst-ds: its weights are dense and not quantised."""

    @property
    def is_causal(self) -> bool:
        names = self.config.architectures or ()
        return any(name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in names)

    @property
    def omits_pruned(self) -> bool:
        """True if its packed format omits pruned weights, so that it can be loaded sparse."""
        return self.format in STORAGE_FORMATS.names and storage_format(self.format).omits_pruned

    @property
    def values(self) -> str | None:
        """Dtype of quantised values, "int8" or "int4"; None for floats."""
        dtype = _quantization(self.config).get("values")
        if dtype is None:
            return None
        return str(dtype)

    @property
    def sparsity(self) -> float:
        """Sparsity of the pruned layers, as the folder's own record says; 0 without one. Raises InputError."""
        return sparsity_of(self.path)

    @property
    def weight_file_bytes(self) -> int:
        """Size of the model's weight files. Raises InputError for a missing or damaged one."""
        # A plain folder does not name its weight file: transformers knows what it may be called.
        weights_file = _quantization(self.config).get("weights_file") or ""
        return BaseWeights(self.path, "", str(weights_file)).file_bytes

    @property
    def extra_tokens(self) -> int:
        """Positions of the model that its additions take in every sequence. Raises InputError for a damaged file."""
        additions = read_additions(self.path, with_tensors=False)
        return sum(saved.extra_tokens for saved in additions.values())

    def require_causal(self) -> None:
        """Raise InputError for a model that cannot generate text."""
        if not self.is_causal:
            names = ", ".join(self.config.architectures or ("nothing",))
            raise InputError(f"{self.path}: config.json names {names}, no causal language model. Name another folder")

    def load(self, load_as: LoadAs = "auto", dtype: str | None = None, device: str = "cpu") -> PreTrainedModel:
        """Return the model in eval mode, in ``dtype``, a key of :data:`DTYPES`, or the folder's. Raises InputError."""
        if load_as == "sparse" and self.is_plain:
            raise InputError(f"{self.path}: its weights are dense. Pack them with pst-ds export --format bitmask")
        quantization_config: PackedWeightsConfig | None = None
        if not self.is_plain:
            quantization_config = PackedWeightsConfig(load_as=load_as)
        device_map: dict[str, str] | None = None
        if device != "cpu":  # a device map needs accelerate's hooks, which the CPU does without
            device_map = {"": device}
        model, _ = Pretrained(str(self.path)).load(
            architecture(self.config) or transformers.AutoModel,
            "Name one that the config belongs to",
            dtype=DTYPES[dtype] if dtype else "auto",
            local_files_only=True,
            quantization_config=quantization_config,
            device_map=device_map,
        )
        # An addition's module is connected to the loaded model, which transformers makes without it.
        load_additions(model, self.path)
        return model.eval()

    def end_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the tokens that end a text: the folder's generation config has them, or its tokenizer."""
        try:
            generation = transformers.GenerationConfig.from_pretrained(self.path)
        except OSError:  # the folder has no generation_config.json; older ones have its settings in config.json
            generation = transformers.GenerationConfig.from_model_config(self.config)
        tokens = end_tokens(generation)
        if not tokens and tokenizer.eos_token_id is not None:
            return [tokenizer.eos_token_id]
        return tokens

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer. Raises InputError."""
        fix = "Copy tokenizer.json and tokenizer_config.json from the original model"
        return open_tokenizer(self.path, str(self.path), fix)


def open_model_folder(path: str | Path) -> ModelFolder:
    """Open a folder by its config.json. Raises InputError."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder (looked in {path.absolute()})")
    # A run folder has no config.json. Without this, the message would not say how to get one.
    if (path / "run.toml").is_file():
        raise InputError(f"{path} is a run folder. Export its model first: pst-ds export {path} --out DIR")
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is not a model folder: config.json is missing. Name another folder")
    config = Pretrained(str(path)).config(local_files_only=True)
    quantization = _quantization(config)
    method = quantization.get("quant_method")
    if quantization and method != "pst_ds":
        raise InputError(f"{path}: quantised with {method!r}. Name a folder that is dense, or packed by pst-ds")
    packing = str(quantization.get("format", DENSE))
    # Formats that do not mark tensors have the name "dense", which here is for float weights.
    if quantization and packing in STORAGE_FORMATS.names and not storage_format(packing).marks_tensors:
        packing = "codes"
    return ModelFolder(path, config, packing, is_plain=not quantization)


def input_names(model: PreTrainedModel) -> list[str]:
    """Return those :data:`INPUTS`, in this order, that a model's forward accepts and has a table for."""
    takes = inspect.signature(model.forward).parameters
    names = [name for name in INPUTS if name in takes]
    # With one type, as in RoBERTa, 0 is the only valid value, and the model's default.
    if getattr(model.config, "type_vocab_size", 0) < 2 and "token_type_ids" in names:
        names.remove("token_type_ids")
    return names


def _quantization(config: PreTrainedConfig) -> dict[str, object]:
    """Return the quantization_config of a transformers config; empty without one."""
    # A dict as in config.json, or an object once transformers has loaded a model with the config.
    quantization = getattr(config, "quantization_config", None) or {}
    if isinstance(quantization, dict):
        return dict(quantization)
    return dict(quantization.to_dict())
