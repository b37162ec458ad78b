"""Read the settings of a DeepSpeed config that decide memory and traffic."""

from __future__ import annotations

from typing import Any

from pst_ds.parallel.ds_config import REDUCE_BUCKET, zero_stage
from pst_ds.planning.memory import ZeroSettings

_DEFAULTS = {
    "reduce_bucket_size": REDUCE_BUCKET,
    "stage3_prefetch_bucket_size": int(5e7),
    "stage3_param_persistence_threshold": int(1e5),
    "stage3_max_live_parameters": int(1e9),
    "stage3_max_reuse_distance": int(1e9),
}
"""Elements (DeepSpeed 0.19.8)."""


def zero_settings(config: dict[str, Any] | None, world_size: int, backend: str) -> ZeroSettings:
    """Read a resolved config (None: one process without DeepSpeed) on ``world_size`` ranks over "gloo" or "nccl"."""
    if config is None:
        return ZeroSettings(stage=None, world_size=world_size, backend=backend)
    section = config.get("zero_optimization") or {}
    reduce, prefetch, persist, live, reuse = (int(section.get(key, default)) for key, default in _DEFAULTS.items())
    return ZeroSettings(
        stage=zero_stage(config),
        world_size=world_size,
        backend=backend,
        reduce_bucket_size=reduce,
        prefetch_bucket_size=prefetch,
        persistence_threshold=persist,
        max_live_parameters=live,
        max_reuse_distance=reuse,
        offload_optimizer=_goes_to_cpu(section.get("offload_optimizer")),
        offload_param=_goes_to_cpu(section.get("offload_param")),
        secondary_partition=int(section.get("zero_hpz_partition_size", 1)),
    )


def _goes_to_cpu(section: dict[str, Any] | None) -> bool:
    return bool(section) and str((section or {}).get("device")).lower() == "cpu"
