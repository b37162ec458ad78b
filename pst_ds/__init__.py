"""pst-ds: Parameter-efficient Sparse Training (arXiv 2205.11005) on DeepSpeed ZeRO-3.

What a script of your own needs is here (docs/in-your-script.md); ``pst_ds.hf`` has what is for transformers' Trainer.
"""

from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "CubicSchedule": "core.schedule",
    "MaskUpdater": "masks.updater",
    "OneShotSchedule": "core.schedule",
    "PSTConfig": "config.pst",
    "inject_pst": "nn.inject",
    "load_pretrained": "checkpoint.adapter",
    "merge_and_unload": "nn.merge",
    "print_trainable_parameters": "nn.merge",
    "pst_optimizer": "nn.optimizer",
    "pst_parameter_groups": "nn.optimizer",
    "save_pretrained": "checkpoint.adapter",
    "adapter_checkpoints": "nn.adapter_checkpoints",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Imports what is asked for, and torch with it, only then."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pst_ds' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"pst_ds.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
