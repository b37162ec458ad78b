"""The quantizer through which transformers loads a packed folder."""

import copy
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import LoadStateDictInfo
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from pst_ds.errors import shortened
from pst_ds.formats.base_weights import is_text_part
from pst_ds.hf.config import QUANT_METHOD, PackedWeightsConfig
from pst_ds.hf.layers import finish_layer, make_dense, put_sparse_layers
from pst_ds.hf.tables import restore_tables
from pst_ds.hf.weight_files import (
    Groups,
    PackedFolderError,
    StoredTensor,
    named_groups,
    outside_base_model,
    packed_groups,
    read_headers,
)
from pst_ds.runtime import sparse_layers
from pst_ds.storage_format import storage_format
from pst_ds.writing.encoding import ExportError, encoding_of_config

DeviceMap = dict[str, object] | None
_LOG = logging.getLogger(__name__)
_UNPACKS = (
    "%s weights are unpacked into plain dense layers, since PyTorch has no fast kernel for them. ONNX Runtime (pst-ds "
    "export --format onnx) and the native decoder (pst_ds.inference.decoder, pst-ds generate) compute with them packed"
)
_NO_DISK = "offloading packed weights to disk is not supported. Remove 'disk' from device_map, or use the dense export"


class PackedWeightsQuantizer(HfQuantizer):
    """Loads packed weights into :class:`SparseLinear`, or unpacked into the model's layers.

    transformers calls, in this order: :meth:`update_device_map`, which resolves ``load_as``; a config hook, which names
    the weight file; ``_process_model_before_weight_loading``, which reads the headers and inserts empty sparse layers;
    :meth:`_finish` once every tensor is read, which compares the keys, checks every packed weight and unpacks those to
    be dense; ``_process_model_after_weight_loading``, which cleans up.
    """

    def __init__(self, quantization_config: PackedWeightsConfig, **kwargs: object):
        # A copy, because "auto" is resolved for this load only, and the user may load with the config again.
        super().__init__(copy.copy(quantization_config), **kwargs)
        if not self.pre_quantized:
            raise PackedFolderError(
                "PackedWeightsConfig is for folders with packed weights, and this config.json has no "
                "quantization_config of pst_ds. Load it without, or pack it: pst-ds export DIR --format bitmask."
            )
        self._replaced: dict[str, nn.Module] = {}
        self._groups: Groups = {}
        self._shapes: dict[str, torch.Size] = {}
        self._finished = False

    def validate_environment(self, *args: object, device_map: DeviceMap = None, **kwargs: object) -> None:
        """Raise PackedFolderError for unsupported settings in config.json, and for offloading to disk."""
        try:
            encoding_of_config(self.quantization_config.to_dict())
        except ExportError as error:
            raise PackedFolderError(f"config.json: quantization_config: {error}") from None
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise PackedFolderError(_NO_DISK)

    def update_device_map(self, device_map: DeviceMap) -> DeviceMap:
        """Return the device map unchanged; resolve ``load_as`` = "auto", which depends on it."""
        config = self.quantization_config
        if config.load_as == "auto":
            is_fast = storage_format(str(config.format)).is_faster_packed_on_cpu and config.values is None
            config.load_as = "dense"
            if is_fast and _is_on_cpu(device_map):
                config.load_as = "sparse"
            # With an explicit "dense", the user has asked for it.
            if config.values is not None:
                _LOG.warning(_UNPACKS, config.values)
        return device_map

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Name the weight file, which transformers looks for next."""
        config.transformers_weights = self.quantization_config.weights_file
        return config

    update_attn_implementation = update_tp_plan  # each version of transformers 5 calls one of the two

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: object
    ) -> None:
        if not checkpoint_files:
            raise PackedFolderError("packed weights are loaded from their folder. Remove state_dict= and gguf_file=")
        headers = read_headers(checkpoint_files)
        packing = self.quantization_config.format
        expected = _expected_prefix(model, headers, Path(checkpoint_files[0]).parent)
        self._groups = named_groups(model, packed_groups(headers, packing))
        tied = getattr(model, "all_tied_weights_keys", {})
        self._replaced = put_sparse_layers(model, self._groups, packing, {*tied, *tied.values()})
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        # transformers has no hook between the reading of tensors and the move to devices. It calls this method of the
        # model there, so a replacement on the object, which removes itself, is the hook.
        model._adjust_missing_and_unexpected_keys = functools.partial(  # type: ignore[method-assign]
            self._finish, model, expected, model._adjust_missing_and_unexpected_keys
        )
        # Without get_new_dtype, transformers does not cast renamed tensors of a model that it takes for quantised.
        self.pre_quantized = hasattr(HfQuantizer, "get_new_dtype")

    def _finish(
        self,
        model: PreTrainedModel,
        expected: str | None,
        adjust: Callable[[LoadStateDictInfo], None],
        info: LoadStateDictInfo,
    ) -> None:
        """Replace transformers' own step, the last one before the model is moved to its devices.

        ``expected``: prefix of the tensors that the model must have; None for the text part of a model of text and
        images, whose files have more.
        """
        del model._adjust_missing_and_unexpected_keys
        self.pre_quantized = True
        adjust(info)
        self._require_same_keys(model, expected, info)
        restore_tables(model, self._groups)
        for name, layer in sparse_layers(model).items():
            # A tensor that is offloaded to disk stays on the meta device.
            if any(tensor.is_meta for tensor in layer.state_dict().values()):
                raise PackedFolderError(f"{name}: {_NO_DISK}")
            finish_layer(name, layer, self._groups[name])
        if self.quantization_config.dequantize:
            make_dense(model, self._replaced)
        self._groups = {}
        self._finished = True

    def _require_same_keys(self, model: PreTrainedModel, expected: str | None, info: LoadStateDictInfo) -> None:
        """Raise PackedFolderError, naming a tensor, unless the files have the tensors of the model.

        transformers initialises missing ones randomly. ``info`` has its sets of keys after its own exceptions.
        """
        kind = type(model).__name__
        if info.missing_keys:
            fix = "Export again."
            saved = model.config.architectures or ()
            if saved and kind not in saved:
                fix = f"The folder holds {', '.join(saved)}: load it with that class, or export the model you want."
            absent = shortened(sorted(info.missing_keys), 3)
            raise PackedFolderError(f"{absent}: missing in the folder; {kind} would have random values there. {fix}")
        extra: list[str] = []
        if expected is not None:
            extra = sorted(name for name in info.unexpected_keys if name.startswith(expected))
        if extra:
            raise PackedFolderError(
                f"{shortened(extra, 3)}: in the folder, but {kind} has no such tensor. Does config.json belong to "
                "another model?"
            )
        self._require_same_shapes(model, info)

    def _require_same_shapes(self, model: PreTrainedModel, info: LoadStateDictInfo) -> None:
        """Raise PackedFolderError, naming tensors, if some were loaded with another shape than the model has."""
        loaded = {name: tensor.shape for name, tensor in model.state_dict().items()}
        # mismatched_keys lacks tensors that transformers has replaced by some of another shape.
        misshapen = {str(key[0]) for key in info.mismatched_keys}
        for name, shape in loaded.items():
            if shape != self._shapes.get(name):
                misshapen.add(name)
        if misshapen:
            names = sorted(misshapen)
            wanted = tuple(self._shapes.get(names[0], ()))
            raise PackedFolderError(f"{shortened(names, 3)}: not of the shape {wanted} that {type(model).__name__} has")

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: object) -> None:
        # A version that does not call the replaced method must not return weights that were never checked.
        if not self._finished:
            raise RuntimeError(
                f"transformers {transformers.__version__} loads models in a way that this pst-ds does not support: "
                "the packed weights were not checked. Install a version of transformers that pst-ds supports."
            )
        model.config.__dict__.pop("transformers_weights", None)

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Unpack a model that was kept sparse, in place, for ``model.dequantize()``; ``dtype`` casts all of it."""
        make_dense(model, self._replaced)
        self.remove_quantization_config(model)
        if dtype is None:
            return model
        return nn.Module.to(model, dtype)

    def is_serializable(self, *args: object, **kwargs: object) -> bool:
        """Raise PackedFolderError: save_pretrained would write a file that transformers loads as random weights."""
        raise PackedFolderError(
            "save_pretrained: transformers cannot save a model whose weights are packed. Call model.dequantize() "
            "first, which gives an ordinary dense folder (pst-ds export packs it again), or copy the packed folder."
        )

    @property
    def is_trainable(self) -> bool:
        return False


def _expected_prefix(model: PreTrainedModel, headers: Mapping[str, StoredTensor], folder: Path) -> str | None:
    """Return the prefix of the tensors in ``folder`` that ``model`` must have; None if it may lack any of them."""
    if is_text_part(model, folder):
        return None
    is_other_class = type(model).__name__ not in (model.config.architectures or ())
    if is_other_class and outside_base_model(headers, model):
        # The head of the saved class is not a part of this model.
        return f"{model.base_model_prefix}."
    return ""


def _is_on_cpu(device_map: object) -> bool:
    """Return whether transformers puts the whole model on the CPU."""
    if isinstance(device_map, dict):
        return all(str(device) == "cpu" for device in device_map.values())
    # "auto", "balanced", ...: transformers prefers an accelerator
    return device_map is None or not torch.accelerator.is_available()


def register() -> None:
    """Register the config and the quantizer with transformers, once per process, as its plug-ins do."""
    if QUANT_METHOD in auto.AUTO_QUANTIZER_MAPPING and QUANT_METHOD in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    auto.register_quantization_config(QUANT_METHOD)(PackedWeightsConfig)
    auto.register_quantizer(QUANT_METHOD)(PackedWeightsQuantizer)
