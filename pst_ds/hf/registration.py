"""Makes transformers know packed folders."""

from __future__ import annotations

import functools
from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)

from pst_ds.hf.config import QUANT_METHOD, PackedWeightsConfig
from pst_ds.hf.quantizer import PackedWeightsQuantizer


def register() -> None:
    """Registers the config and the quantizer, once a process."""
    if QUANT_METHOD in AUTO_QUANTIZER_MAPPING and QUANT_METHOD in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    register_quantization_config(QUANT_METHOD)(PackedWeightsConfig)
    register_quantizer(QUANT_METHOD)(PackedWeightsQuantizer)
    AutoHfQuantizer.merge_quantization_configs = staticmethod(  # type: ignore[method-assign]
        _with_load_as(AutoHfQuantizer.merge_quantization_configs)
    )


def _with_load_as(merge: Any) -> Any:
    """transformers' ``merge_quantization_configs`` that keeps ``load_as`` of the user's config.

    transformers keeps loading-time settings of a closed list of its own config classes only, and has no registration
    for more; of any other class it takes what the folder says and drops what the user said.
    """

    @functools.wraps(merge)
    def merged(quantization_config: Any, quantization_config_from_args: Any = None) -> Any:
        if not isinstance(quantization_config_from_args, PackedWeightsConfig):
            return merge(quantization_config, quantization_config_from_args)
        config = merge(quantization_config, None)
        if isinstance(config, PackedWeightsConfig):
            config.load_as = quantization_config_from_args.load_as
            return config
        return merge(quantization_config, quantization_config_from_args)

    return merged
