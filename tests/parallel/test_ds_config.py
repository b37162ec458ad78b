"""DeepSpeed's JSON: what is refused and what the run file fills in."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pst_ds.parallel import ds_config
from pst_ds.parallel.ds_config import (
    DeepSpeedConfigError,
    RunNumbers,
    load_deepspeed_config,
    resolve_deepspeed_config,
    validate_deepspeed_config,
    zero_stage,
)
from pst_ds.parallel.launch import use_cpu_without_accelerator
from pst_ds.planning.memory import zero_settings

NUMBERS = RunNumbers(
    train_batch_size=24,
    train_micro_batch_size_per_gpu=6,
    gradient_accumulation_steps=2,
    gradient_clipping=1.0,
    bf16=True,
    num_trainable=2_820_096,
)
SHIPPED = {"zero2": 2, "zero3": 3, "zero3_cpu": 3, "zero3_lean": 3, "zero3_offload": 3}
"""ZeRO stage of each file of ds_configs/."""


def _nested(dotted, value):
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


def _refusal(config):
    with pytest.raises(DeepSpeedConfigError) as caught:
        validate_deepspeed_config(config, source="my/ds.json")
    return str(caught.value)


def _resolve(config, **numbers):
    changed = RunNumbers(**{**{f: getattr(NUMBERS, f) for f in NUMBERS.__slots__}, **numbers})
    return resolve_deepspeed_config(config, changed, source="my/ds.json", run_file="my/run.toml")


REFUSED = [
    ("zero_optimization.zero_quantized_weights", True, "true", "remove it"),
    ("zero_optimization.zero_quantized_nontrainable_weights", True, "true", "remove it"),
    ("zero_optimization.offload_param.device", "nvme", '"nvme"', 'use "cpu"'),
    ("zero_optimization.offload_param.device", "NVMe", '"NVMe"', 'use "cpu"'),
    ("zero_optimization.offload_optimizer.device", "nvme", '"nvme"', 'use "cpu"'),
    ("zero_optimization.zenflow", {"topk_ratio": 0.1}, "{…}", "remove it"),
    ("tensor_parallel.autotp_size", 2, "2", "remove tensor_parallel"),
    ("expert_parallel.enabled", True, "true", "remove expert_parallel"),
    ("compile.deepcompile", True, "true", "remove it"),
    ("optimizer", {"type": "Muon"}, "{…}", "train.score_learning_rate"),
    ("scheduler", {"type": "WarmupLR"}, "{…}", "train.learning_rate_warmup_fraction"),
    ("compression_training", {"sparse_pruning": {}}, "{…}", "PST does the pruning"),
    ("elasticity", {"enabled": True}, "{…}", "remove it"),
    ("zero_optimization.mics_shard_size", 2, "2", "remove it"),
]


@pytest.mark.parametrize(("key", "value", "shown", "fix"), REFUSED)
def test_a_refusal_names_file_key_value_reason_and_fix(key, value, shown, fix):
    message = _refusal(_nested(key, value))
    assert message.startswith(f"my/ds.json: {key} = {shown} cannot be used with PST: ")
    _, _, after = message.partition(" Fix: ")
    assert fix in after


def test_every_refusal_is_tried_above():
    assert {refusal.key for refusal in ds_config._REFUSALS} == {key for key, *_ in REFUSED}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zero_optimization.zero_quantized_weights", False),
        ("zero_optimization.zero_quantized_nontrainable_weights", False),
        ("zero_optimization.offload_param.device", "cpu"),
        ("zero_optimization.offload_param.device", "none"),
        ("zero_optimization.offload_optimizer.device", "cpu"),
        ("zero_optimization.mics_shard_size", -1),
        ("tensor_parallel.autotp_size", 1),
        ("tensor_parallel.autotp_size", 0),
        ("expert_parallel.enabled", False),
        ("compile.deepcompile", False),
        ("optimizer", "auto"),
        ("scheduler", None),
        ("wall_clock_breakdown", True),
    ],
)
def test_what_is_off_or_harmless_is_not_refused(key, value):
    validate_deepspeed_config(_nested(key, value))


@pytest.mark.parametrize("stage", [4, -1, "3", 1.5, [3]])
def test_an_unknown_stage_is_refused(stage):
    message = _refusal({"zero_optimization": {"stage": stage}})
    assert message == f"my/ds.json: zero_optimization.stage = {stage!r} must be 0, 1, 2 or 3"


def test_fp16_is_refused_on_cpu_and_beside_our_precision(monkeypatch):
    monkeypatch.setattr(ds_config, "_has_accelerator", lambda: False)
    assert "fp16.enabled = true, but the CPU has no fp16 training. Fix: use bf16" in _refusal(
        {"fp16": {"enabled": True}}
    )
    with pytest.raises(DeepSpeedConfigError, match=r"my/ds\.json has fp16.*my/run\.toml.*Fix: remove fp16"):
        _resolve({"fp16": {"enabled": True}})
    validate_deepspeed_config({"fp16": {"enabled": False}})


def test_auto_and_absent_are_filled_from_the_run():
    auto = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
    }
    before = copy.deepcopy(auto)
    for config in (auto, {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}):
        resolved = _resolve(config)
        assert resolved["train_batch_size"] == 24
        assert resolved["train_micro_batch_size_per_gpu"] == 6
        assert resolved["gradient_accumulation_steps"] == 2
        assert resolved["gradient_clipping"] == 1.0
        assert resolved["bf16"] == {"enabled": True}
        assert resolved["zero_optimization"]["reduce_bucket_size"] == 2_820_096
        assert "auto" not in json.dumps(resolved)
    assert auto == before
    assert _resolve(auto, bf16=False)["bf16"] == {"enabled": False}


@pytest.mark.parametrize("own", [None, {"classes": ["a.Block"]}])
def test_a_leaf_class_of_the_model_takes_the_place_of_deepspeeds_own_at_stage_3(own):
    zero = {"stage": 3} | ({"leaf_module": own} if own else {})
    resolved = _resolve({"zero_optimization": zero}, leaf_class="a.Stack")
    assert resolved["zero_optimization"]["leaf_module"] == (own or {"classes": ["a.Stack"]})
    for stage, leaf in ((2, "a.Stack"), (3, "")):
        assert (
            "leaf_module" not in _resolve({"zero_optimization": {"stage": stage}}, leaf_class=leaf)["zero_optimization"]
        )


def test_the_same_number_in_both_files_is_no_contradiction():
    assert _resolve({"train_batch_size": 24, "gradient_clipping": 1})["train_batch_size"] == 24


@pytest.mark.parametrize(
    ("key", "value", "stated", "ours"),
    [
        ("train_batch_size", 32, "32", "24"),
        ("train_micro_batch_size_per_gpu", 1, "1", "6"),
        ("gradient_accumulation_steps", 4, "4", "2"),
        ("gradient_clipping", 0.5, "0.5", "1.0"),
        ("bf16.enabled", False, "false", "true"),
    ],
)
def test_a_contradiction_names_both_files_and_both_values(key, value, stated, ours):
    with pytest.raises(DeepSpeedConfigError) as caught:
        _resolve(_nested(key, value))
    message = str(caught.value)
    assert (
        message == f'my/ds.json has {key} = {stated}, but my/run.toml makes it {ours}. Fix: write "auto" in my/ds.json'
    )


def test_a_small_bucket_has_a_floor_and_a_stated_one_stands():
    auto = {"zero_optimization": {"reduce_bucket_size": "auto"}}
    assert _resolve(auto, num_trainable=100)["zero_optimization"]["reduce_bucket_size"] == 1 << 16
    stated = {"zero_optimization": {"reduce_bucket_size": 12345}}
    assert _resolve(stated)["zero_optimization"]["reduce_bucket_size"] == 12345


def test_auto_sizes_are_deepspeeds_where_the_model_is_large():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = (
        "reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
        "stage3_max_live_parameters", "stage3_max_reuse_distance", "zero_hpz_partition_size",
    )  # fmt: skip
    auto = {"stage": 3, **dict.fromkeys(names, "auto")}
    resolved = _resolve({"zero_optimization": auto}, num_trainable=7_000_000_000)
    theirs, planned = DeepSpeedZeroConfig(**resolved["zero_optimization"]), zero_settings(resolved, 2, "nccl")
    assert theirs.reduce_bucket_size == planned.reduce_bucket_size == 500_000_000
    assert theirs.prefetch_bucket_size == planned.prefetch_bucket_size
    assert theirs.param_persistence_threshold == planned.persistence_threshold
    assert theirs.max_live_parameters == planned.max_live_parameters
    assert theirs.max_reuse_distance == planned.max_reuse_distance
    assert theirs.reduce_bucket_size == DeepSpeedZeroConfig().reduce_bucket_size


def test_our_optimizer_is_passed_in_and_not_left_to_the_json():
    resolved = _resolve({"optimizer": "auto", "scheduler": "auto"})
    assert "optimizer" not in resolved
    assert "scheduler" not in resolved
    offloading = _resolve({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}})
    assert offloading["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("config", "stage"), [(None, 0), ({}, 0), ({"zero_optimization": {}}, 0), ({"zero_optimization": {"stage": 2}}, 2)]
)
def test_zero_stage(config, stage):
    assert zero_stage(config) == stage


def test_the_shipped_configs_are_those_below():
    assert {path.name for path in Path("ds_configs").iterdir()} == {f"{name}.json" for name in SHIPPED}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_load_and_leave_to_the_run_file_what_is_its(name):
    path = f"ds_configs/{name}.json"
    config = load_deepspeed_config(path)
    assert zero_stage(config) == SHIPPED[name]
    resolved = resolve_deepspeed_config(config, replace(NUMBERS, train_batch_size=8 * 6 * 2), source=path, run_file="r")
    assert "auto" not in json.dumps(resolved)
    assert resolved["train_batch_size"] == 96
    bucket = 10_000_000 if name == "zero3_lean" else NUMBERS.num_trainable
    assert resolved["zero_optimization"]["reduce_bucket_size"] == bucket
    use_cpu_without_accelerator()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    DeepSpeedZeroConfig(**resolved["zero_optimization"])  # refuses a name that DeepSpeed does not know


@pytest.mark.parametrize(("ranks", "fits"), [(1, True), (3, True), (8, True), (12, False), (16, True), (20, False)])
def test_hpz_groups_must_share_out_the_ranks(ranks, fits):
    config = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}
    if fits:
        _resolve(config, train_batch_size=ranks * 6 * 2)
        return
    with pytest.raises(DeepSpeedConfigError) as caught:
        _resolve(config, train_batch_size=ranks * 6 * 2)
    assert str(caught.value) == (
        f"my/ds.json: zero_optimization.zero_hpz_partition_size = 8 does not divide the {ranks} ranks. Fix: make it "
        "the number of ranks on a node, or 1 to keep no second copies"
    )


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 2}, "zero_optimization.stage = 2, and train.expert_parallel = 4 needs ZeRO-3. Fix: make it 3"),
        ({"stage": 3, "zero_quantized_gradients": True}, "zero_quantized_gradients = true, and train.expert_parallel"),
    ],
)
def test_experts_on_ranks_need_zero_3_without_what_deepspeed_cannot_partition(zero, message):
    with pytest.raises(DeepSpeedConfigError, match=re.escape(message)):
        _resolve({"zero_optimization": zero}, expert_parallel=4)
    _resolve({"zero_optimization": {"stage": 3}}, expert_parallel=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{'stage': 3}", "is not JSON"),
        ("[1]", "holds a list, not an object"),
        ("3", "holds a int, not an object"),
        ('{"elasticity": {"enabled": true}}', "elasticity = {…} cannot be used"),
        ('{"zero_optimization": 3}', "zero_optimization = 3 must be an object"),
        ('{"bf16": true}', "bf16 = true must be an object"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(DeepSpeedConfigError) as caught:
        load_deepspeed_config(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_missing_file_says_where_it_looked(tmp_path):
    with pytest.raises(DeepSpeedConfigError, match=r"deepspeed_config = '.*' is not a file \(looked in /"):
        load_deepspeed_config(tmp_path / "nothere.json")
