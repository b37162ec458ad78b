"""pst-ds: Parameter-efficient Sparse Training (arXiv 2205.11005) on DeepSpeed ZeRO-3.

The public API for scripts (docs/reference/api.md); ``pst_ds.hf`` has the part for transformers.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "Criterion": "core.criteria.criterion",
    "CubicSchedule": "core.schedule",
    "ExportSettings": "export.export_run",
    "Grid": "core.quantization",
    "MaskUpdater": "masks.schedule_driver",
    "OneShotSchedule": "core.schedule",
    "PSTConfig": "config.pst",
    "PruneConfig": "config.one_shot",
    "RoundingSchedule": "core.schedule",
    "export_run": "export.export_run",
    "inject_pst": "nn.inject",
    "load": "inference.loading",
    "load_pretrained": "checkpoint.adapter",
    "merge_and_unload": "nn.merge",
    "plan": "planning.plan",
    "print_trainable_parameters": "nn.merge",
    "prune_model": "train.one_shot.pruning",
    "prune_pretrained": "train.one_shot.scripts",
    "pst_optimizer": "nn.optimizer",
    "pst_parameter_groups": "nn.optimizer",
    "save_pretrained": "checkpoint.adapter",
    "train_run": "train.run",
    "adapter_checkpoints": "nn.adapter_checkpoints",
    "verify": "export.verify",
}

__all__ = ["__version__", *_HOMES]


if TYPE_CHECKING:
    from pst_ds.checkpoint.adapter import load_pretrained as load_pretrained
    from pst_ds.checkpoint.adapter import save_pretrained as save_pretrained
    from pst_ds.config.one_shot import PruneConfig as PruneConfig
    from pst_ds.config.pst import PSTConfig as PSTConfig
    from pst_ds.core.criteria.criterion import Criterion as Criterion
    from pst_ds.core.quantization import Grid as Grid
    from pst_ds.core.schedule import CubicSchedule as CubicSchedule
    from pst_ds.core.schedule import OneShotSchedule as OneShotSchedule
    from pst_ds.core.schedule import RoundingSchedule as RoundingSchedule
    from pst_ds.export.export_run import ExportSettings as ExportSettings
    from pst_ds.export.export_run import export_run as export_run
    from pst_ds.export.verify import verify as verify
    from pst_ds.inference.loading import load as load
    from pst_ds.masks.schedule_driver import MaskUpdater as MaskUpdater
    from pst_ds.nn.adapter_checkpoints import adapter_checkpoints as adapter_checkpoints
    from pst_ds.nn.inject import inject_pst as inject_pst
    from pst_ds.nn.merge import merge_and_unload as merge_and_unload
    from pst_ds.nn.merge import print_trainable_parameters as print_trainable_parameters
    from pst_ds.nn.optimizer import pst_optimizer as pst_optimizer
    from pst_ds.nn.optimizer import pst_parameter_groups as pst_parameter_groups
    from pst_ds.planning.plan import plan as plan
    from pst_ds.train.one_shot.pruning import prune_model as prune_model
    from pst_ds.train.one_shot.scripts import prune_pretrained as prune_pretrained
    from pst_ds.train.run import train_run as train_run
else:

    def __getattr__(name: str) -> object:
        """Import ``name``, and torch with it, on first use."""
        if name not in _HOMES:
            raise AttributeError(f"module 'pst_ds' has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"pst_ds.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
