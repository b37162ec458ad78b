"""The quantizer through which transformers loads a packed folder."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from pst_ds.formats.base_weights import is_text_part
from pst_ds.inference.hf.config import QUANT_METHOD, PackedWeightsConfig
from pst_ds.inference.hf.layers import clear_cast_zeros, end_loading, make_dense, named_groups, put_sparse_layers
from pst_ds.inference.hf.loaded_keys import LoadedKeys
from pst_ds.inference.hf.tables import end_tables
from pst_ds.inference.hf.weight_files import (
    Groups,
    PackedFolderError,
    loaded_dtype,
    outside_base_model,
    packed_groups,
    read_headers,
    reread_parts,
)
from pst_ds.inference.runtime import SparseLinear, sparse_layers
from pst_ds.third_party import patch

_LOG = logging.getLogger(__name__)


class PackedWeightsQuantizer(HfQuantizer):
    """Loads packed weights: kept in :class:`SparseLinear`, or unpacked into the model's own layers.

    What transformers calls, in order: :meth:`update_device_map` settles ``load_as``; the config hooks name the weight
    file; ``_process_model_before_weight_loading`` reads the headers and puts empty sparse layers in place; when every
    tensor is read :meth:`_finish` compares the keys, checks every packed weight and unpacks those that shall be dense;
    ``_process_model_after_weight_loading`` leaves no trace of the loading.
    """

    def __init__(self, quantization_config: PackedWeightsConfig, **kwargs: object):
        super().__init__(copy.copy(quantization_config), **kwargs)
        if not self.pre_quantized:
            raise PackedFolderError(
                "PackedWeightsConfig is for folders with packed weights, and this config.json has no "
                "quantization_config of pst_ds. Load it without, or pack it: pst-ds export DIR --format bitmask."
            )
        self._taken: dict[str, nn.Module] = {}
        self._groups: Groups = {}
        self._finished = False

    # before the model is built

    def validate_environment(self, *args: object, device_map: Any = None, **kwargs: object) -> None:
        """Refuses settings in config.json that this version does not read, and offloading to disk."""
        self.quantization_config.check_folder()
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise PackedFolderError(_NO_DISK)

    def update_device_map(self, device_map: Any) -> Any:
        """Leaves the device map as it is; settles ``load_as`` = "auto", which depends on it."""
        config = self.quantization_config
        if config.load_as == "auto":
            is_fast = config.format == "bitmask" and config.values is None
            config.load_as = "sparse" if is_fast and _is_on_cpu(device_map) else "dense"
            if config.values is not None:
                _LOG.warning(_UNPACKS, config.values)
        return device_map

    # One of these two is called by every transformers 5, before it looks for the weight file.

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        config.transformers_weights = self.quantization_config.weights_file
        return config

    update_attn_implementation = update_tp_plan

    # around the loading

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: object
    ) -> None:
        if not checkpoint_files:
            raise PackedFolderError(
                "packed weights are loaded from their folder; state_dict= and gguf_file= are not read"
            )
        headers = read_headers(checkpoint_files)
        is_other = type(model).__name__ not in (model.config.architectures or ())
        has_heads = is_other and bool(outside_base_model(headers, model.base_model_prefix))
        is_part = is_text_part(model, Path(checkpoint_files[0]).parent)
        self._groups = named_groups(model, packed_groups(headers, self.quantization_config.format))
        tied = getattr(model, "all_tied_weights_keys", {})
        self._taken = put_sparse_layers(model, self._groups, self.quantization_config.format, {*tied, *tied.values()})
        keys = LoadedKeys(model, has_heads=has_heads, is_part=is_part)
        model._adjust_missing_and_unexpected_keys = functools.partial(  # type: ignore[method-assign]
            self._finish, model, keys, model._adjust_missing_and_unexpected_keys
        )
        # transformers 5.0 does not cast renamed tensors of what it thinks is packed already
        self.pre_quantized = hasattr(HfQuantizer, "get_new_dtype")

    def _finish(self, model: PreTrainedModel, keys: LoadedKeys, adjust: Any, *loading_info: Any) -> Any:
        """In the place of transformers' own step, the last one before the model is spread over its devices."""
        del model._adjust_missing_and_unexpected_keys
        self.pre_quantized = True
        result = adjust(*loading_info)
        keys.compare(model, loading_info[0] if result is None else result)
        end_tables(model, self._groups)
        for name, layer in sparse_layers(model).items():
            self._check(name, layer)
        if self.quantization_config.dequantize:
            make_dense(model, self._taken)
        self._groups, self._finished = {}, True
        return result

    def _check(self, name: str, layer: SparseLinear) -> None:
        form = layer.format
        if any(tensor.is_meta for tensor in layer.state_dict().values()):
            raise PackedFolderError(f"{name}: {_NO_DISK}")
        end_loading(layer)
        if layer.is_quantized:
            layer.dtype = loaded_dtype(layer)
        reread_parts(layer, form, self._groups[name])
        if getattr(layer, form.values_name).dtype != self._groups[name][form.values_name].dtype:
            clear_cast_zeros(layer)
        layer.check(name)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: object) -> None:
        if not self._finished:
            import transformers

            raise RuntimeError(
                f"transformers {transformers.__version__} loads models in a way that this pst-ds does not know: "
                "the packed weights were not checked. Install transformers>=5.0 of a version that pst-ds names."
            )
        model.config.__dict__.pop("transformers_weights", None)

    # afterwards

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """``model.dequantize()``: unpacks a model that was kept sparse, in place; ``dtype`` casts all of it."""
        make_dense(model, self._taken)
        self.remove_quantization_config(model)
        return model if dtype is None else model.to(dtype)

    def is_serializable(self, *args: object, **kwargs: object) -> bool:
        """Refuses: save_pretrained would name the file model.safetensors, and transformers would load it as random."""
        raise PackedFolderError(
            "save_pretrained: a model whose weights are kept packed is not saved by transformers. Call "
            "model.dequantize() first, which gives an ordinary dense folder (pst-ds export packs it again), or copy "
            "the packed folder."
        )

    @property
    def is_trainable(self) -> bool:
        return False


_UNPACKS = (
    "%s weights are unpacked into plain dense layers, since PyTorch has no fast kernel for them. ONNX Runtime (pst-ds "
    "export --format onnx) and the native decoder (pst_ds.inference.decoder, pst-ds generate) compute with them packed"
)
_NO_DISK = "offloading packed weights to disk is not supported: leave 'disk' out of device_map, or use the dense export"


def _is_on_cpu(device_map: Any) -> bool:
    if device_map is None:
        return True
    if isinstance(device_map, str):  # "auto", "balanced", ...: transformers prefers an accelerator
        return not torch.accelerator.is_available()
    return all(str(device) == "cpu" for device in device_map.values())


def register() -> None:
    """Registers the config and the quantizer, once a process."""
    if QUANT_METHOD in auto.AUTO_QUANTIZER_MAPPING and QUANT_METHOD in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    auto.register_quantization_config(QUANT_METHOD)(PackedWeightsConfig)
    auto.register_quantizer(QUANT_METHOD)(PackedWeightsQuantizer)
    patch(auto.AutoHfQuantizer, "merge_quantization_configs", lambda merge: staticmethod(_with_load_as(merge)))


def _with_load_as(merge: Any) -> Any:
    """transformers' ``merge_quantization_configs`` that keeps ``load_as`` of the user's config.

    transformers keeps loading-time settings of a closed list of its own config classes only, and has no registration
    for more; of any other class it takes what the folder says and drops what the user said.
    """

    @functools.wraps(merge)
    def merged(quantization_config: Any, quantization_config_from_args: Any = None) -> Any:
        if isinstance(quantization_config_from_args, PackedWeightsConfig):
            config = merge(quantization_config, None)
            if isinstance(config, PackedWeightsConfig):
                config.load_as = quantization_config_from_args.load_as
                return config
        return merge(quantization_config, quantization_config_from_args)

    return merged
