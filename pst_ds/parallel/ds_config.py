"""DeepSpeed's JSON: read it, reject settings that PST cannot work with, and fill in the run file's settings."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pst_ds.errors import InputError
from pst_ds.json_text import JSON, JsonObject
from pst_ds.parallel.placement import copy_ranks

REDUCE_BUCKET = 500_000_000
"""DeepSpeed's default of ``reduce_bucket_size``, in elements."""


class DeepSpeedConfigError(InputError):
    """A DeepSpeed setting that PST rejects, or that contradicts the run file."""


@dataclass(frozen=True, slots=True)
class RunNumbers:
    """Settings that belong to the run file; the JSON has "auto" or the same value."""

    train_batch_size: int
    train_micro_batch_size_per_gpu: int
    gradient_accumulation_steps: int
    gradient_clipping: float
    bf16: bool
    num_trainable: int
    expert_parallel: int = 1
    """Ranks that divide the experts of a mixture among them."""
    leaf_class: str = ""
    """Module class that ZeRO-3 treats as a leaf where the JSON names none; "" for DeepSpeed's choice, which gathers all
    experts of a block, router included, at once."""


def _is_on(value: JSON) -> bool:
    return bool(value) and value != "auto"


def _is_nvme(value: JSON) -> bool:
    return str(value).lower() == "nvme"


@dataclass(frozen=True, slots=True)
class _Refusal:
    key: str
    reason: str
    fix: str = "remove it"
    is_refused: Callable[[JSON], bool] = _is_on


_ZERO = "zero_optimization"
_LEARNING_RATES = "train.score_learning_rate, train.update_learning_rate and train.head_learning_rate"
_REFUSALS = (
    _Refusal(f"{_ZERO}.zero_quantized_weights", "it would quantise mask bits and frozen weights, which are ranked"),
    _Refusal(f"{_ZERO}.zero_quantized_nontrainable_weights", "it would quantise the mask bits"),
    _Refusal(f"{_ZERO}.offload_param.device", "its swap buffers hold a single dtype", 'use "cpu"', _is_nvme),
    _Refusal(f"{_ZERO}.offload_optimizer.device", "checkpoints need Adam's moments in memory", 'use "cpu"', _is_nvme),
    _Refusal(f"{_ZERO}.zenflow", "it transposes the shards that masks follow"),
    _Refusal(f"{_ZERO}.mics_shard_size", "DeepSpeed removed MiCS", is_refused=lambda n: isinstance(n, int) and n > 0),
    _Refusal(
        "tensor_parallel.autotp_size",
        "it replaces the layers that PST prunes",
        "remove tensor_parallel",
        lambda size: _is_on(size) and size != 1,
    ),
    _Refusal("expert_parallel.enabled", "AutoEP replaces the experts that PST prunes", "remove expert_parallel"),
    _Refusal("compile.deepcompile", "it rewrites the gathers that the backward pass relies on"),
    _Refusal(
        "optimizer",
        "the run file owns the optimizer: AdamW with a learning rate for each group of factors",
        f"remove it and set {_LEARNING_RATES}",
        lambda value: value not in (None, "auto"),
    ),
    _Refusal(
        "scheduler",
        "the run file owns the learning-rate schedule",
        "remove it and set train.learning_rate_warmup_fraction",
        lambda value: value not in (None, "auto"),
    ),
    _Refusal("compression_training", "DeepSpeed removed it", "remove it; PST does the pruning"),
    _Refusal("elasticity", "DeepSpeed removed it"),
)
_KEYS = [*(refusal.key for refusal in _REFUSALS), "bf16.enabled", "fp16.enabled"]
_SECTIONS = sorted({key.rpartition(".")[0] for key in _KEYS if "." in key})


def load_deepspeed_config(path: str | Path) -> JsonObject:
    """Read the JSON object in ``path``, checked by :func:`validate_deepspeed_config`."""
    setting = f"deepspeed_config = {str(path)!r}"
    if not Path(path).is_file():
        raise DeepSpeedConfigError(
            f"{setting} is not a file (looked in {Path(path).absolute()}). Name a JSON file, such as "
            "ds_configs/zero3.json"
        )
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DeepSpeedConfigError(f"{setting} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise DeepSpeedConfigError(f"{setting} holds a {type(config).__name__}, not an object: {{…}}")
    validate_deepspeed_config(config, source=str(path))
    return config


def validate_deepspeed_config(config: JsonObject, *, source: str = "the DeepSpeed config") -> None:
    """Raise DeepSpeedConfigError for the first setting that PST cannot work with: its key, value, reason and fix."""
    for key in _SECTIONS:
        section = _look_up(config, key)
        if section is not None and not isinstance(section, dict):
            raise DeepSpeedConfigError(
                f"{source}: {key} = {json.dumps(section)} must be an object. Fix: write {{…}} or remove it"
            )
    for refusal in _REFUSALS:
        value = _look_up(config, refusal.key)
        if refusal.is_refused(value):
            shown = json.dumps(value) if not isinstance(value, dict) else "{…}"
            raise DeepSpeedConfigError(
                f"{source}: {refusal.key} = {shown} cannot be used with PST: {refusal.reason}. Fix: {refusal.fix}"
            )
    if _look_up(config, "fp16.enabled") is True and not _has_accelerator():
        raise DeepSpeedConfigError(f"{source}: fp16.enabled = true, but the CPU has no fp16 training. Fix: use bf16")
    stage = _look_up(config, "zero_optimization.stage") or 0
    if stage not in (0, 1, 2, 3):
        raise DeepSpeedConfigError(f"{source}: zero_optimization.stage = {stage!r} must be 0, 1, 2 or 3")


def zero_stage(config: JsonObject | None) -> int:
    """Return the ZeRO stage of a valid config; 0 for no config."""
    return _int_or(_look_up(config or {}, "zero_optimization.stage"), 0)


def resolve_deepspeed_config(config: JsonObject, numbers: RunNumbers, *, source: str, run_file: str) -> JsonObject:
    """Return a copy of ``config`` with every "auto" or absent setting of the run file filled in.

    Raises DeepSpeedConfigError naming both files where they disagree.
    """
    resolved = copy.deepcopy(config)
    owned: JsonObject = {
        "train_batch_size": numbers.train_batch_size,
        "train_micro_batch_size_per_gpu": numbers.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": numbers.gradient_accumulation_steps,
        "gradient_clipping": numbers.gradient_clipping,
    }
    for key, value in {**owned, "bf16.enabled": numbers.bf16}.items():
        stated = _look_up(resolved, key)
        if stated not in (None, "auto", value):
            raise DeepSpeedConfigError(
                f"{source} has {key} = {json.dumps(stated)}, but {run_file} makes it {json.dumps(value)}. Fix: write "
                f'"auto" in {source}'
            )
    bf16 = resolved.get("bf16")
    resolved |= {**owned, "bf16": {**(bf16 if isinstance(bf16, dict) else {}), "enabled": numbers.bf16}}
    if _look_up(resolved, "fp16.enabled") is True:
        raise DeepSpeedConfigError(
            f"{source} has fp16.enabled = true, but train.precision in {run_file} is bf16 or fp32. Fix: remove fp16"
        )
    section = resolved.get("zero_optimization")
    zero = section if isinstance(section, dict) else {}
    if zero.get("reduce_bucket_size") == "auto":
        zero["reduce_bucket_size"] = auto_reduce_bucket(numbers.num_trainable)
    for key in [key for key, value in zero.items() if value == "auto"]:
        del zero[key]  # DeepSpeed's default
    if numbers.leaf_class and zero_stage(resolved) == 3:
        zero.setdefault("leaf_module", {"classes": [numbers.leaf_class]})
    _refuse_uneven_hpz(zero, numbers, source)
    if numbers.expert_parallel > 1:
        _require_divisible_experts(resolved, numbers, source)
    for key in ("optimizer", "scheduler"):
        resolved.pop(key, None)
    resolved.setdefault("steps_per_print", 1 << 40)
    if zero.get("offload_optimizer"):
        resolved["zero_force_ds_cpu_optimizer"] = False
    return resolved


def place_frozen(
    config: JsonObject, wanted: str, frozen: int, ranks: int, node_size: int, memory: float, *, names: tuple[str, str]
) -> int:
    """Return :func:`copy_ranks` for a resolved ``config``, and enter it there as the size of hpZ's groups.

    A size that the config states decides if ``wanted`` is "auto". ``frozen``: bytes of frozen weights and masks.
    ``names``: the JSON and the run file, for messages. Raises DeepSpeedConfigError where they disagree.
    """
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict) or zero_stage(config) != 3:
        return 0
    stated = zero.get("zero_hpz_partition_size")
    offloads = _look_up(zero, "offload_param.device") == "cpu"
    if wanted == "auto" and stated is not None:
        size = min(_int_or(stated, 1), ranks)
        return size if size > 1 else 0
    if wanted == "replicated" and offloads:
        raise DeepSpeedConfigError(
            f'{names[1]}: model.base_placement = "replicated" keeps frozen weights on the device, but {names[0]} has '
            "zero_optimization.offload_param. Fix: remove it"
        )
    chosen = copy_ranks(wanted, frozen, ranks, node_size, 0.0 if offloads else memory)
    if stated not in (None, max(chosen, 1)):
        raise DeepSpeedConfigError(
            f"{names[0]} has zero_optimization.zero_hpz_partition_size = {json.dumps(stated)}, but {names[1]} has "
            f'model.base_placement = "{wanted}", which makes it {max(chosen, 1)}. Fix: write "auto" in {names[0]}'
        )
    zero["zero_hpz_partition_size"] = max(chosen, 1)
    return chosen


def auto_reduce_bucket(num_trainable: int) -> int:
    """Return the elements of the "auto" bucket, which ZeRO-3 allocates at once: as many as are trainable, at most
    :data:`REDUCE_BUCKET`. DeepSpeed reduces a larger gradient by itself."""
    return min(max(num_trainable, 1 << 16), REDUCE_BUCKET)


def _refuse_uneven_hpz(zero: JsonObject, numbers: RunNumbers, source: str) -> None:
    """Raise DeepSpeedConfigError for hpZ groups of unequal size; DeepSpeed has a bare assertion after loading."""
    size = _int_or(zero.get("zero_hpz_partition_size"), 1) or 1
    ranks = numbers.train_batch_size // (numbers.train_micro_batch_size_per_gpu * numbers.gradient_accumulation_steps)
    if ranks % min(size, ranks):
        raise DeepSpeedConfigError(
            f"{source}: zero_optimization.zero_hpz_partition_size = {size} does not divide the {ranks} ranks. Fix: "
            "make it the number of ranks on a node, or 1 to keep no second copies"
        )


def _require_divisible_experts(config: JsonObject, numbers: RunNumbers, source: str) -> None:
    """Raise DeepSpeedConfigError for settings with which DeepSpeed cannot partition the experts of a rank."""
    lead = f"train.expert_parallel = {numbers.expert_parallel} needs"
    if (stage := zero_stage(config)) != 3:
        raise DeepSpeedConfigError(f"{source}: zero_optimization.stage = {stage}, and {lead} ZeRO-3. Fix: make it 3")
    quantised = f"{_ZERO}.zero_quantized_gradients"
    if _look_up(config, quantised):
        raise DeepSpeedConfigError(f"{source}: {quantised} = true, and {lead} exact gradients. Fix: remove it")


def _int_or(value: JSON, default: int) -> int:
    return value if isinstance(value, int) else default


def _look_up(config: JsonObject, dotted: str) -> JSON:
    value: JSON = config
    for key in dotted.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()
