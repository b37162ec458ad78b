"""DeepSpeed settings that PST refuses, and those that are not what the run file says."""

from __future__ import annotations

import json
from typing import Any

from .workshop import Workshop, Wrong, setting


def _config(*, verb: str = "train", **table: Any):
    """The arguments of a run whose DeepSpeed JSON has the settings of ``table`` too."""

    def arguments(shop: Workshop) -> list[str]:
        good = {"zero_optimization": {"stage": 3}}
        path = shop.file("ds.json", json.dumps({**good, **table}))
        return shop.train(f"deepspeed_config={path}", verb=verb)

    return arguments


def _zero(**settings: Any) -> Any:
    return _config(zero_optimization={"stage": 3, **settings})


_FILE = "{tmp}/ds.json"
DEEPSPEED = {
    "a DeepSpeed file that is not there": Wrong(
        setting("deepspeed_config=no.json"), "deepspeed_config", "'no.json'", "Name a JSON file"
    ),
    "a DeepSpeed file that is a folder": Wrong(
        setting("deepspeed_config={made}/plain"), "deepspeed_config", "{made}/plain", "Name a JSON file"
    ),
    "a DeepSpeed file that is not JSON": Wrong(
        lambda shop: shop.train(f"deepspeed_config={shop.file('ds.json', '{]')}"), _FILE, "line 1 column 2", "JSON"
    ),
    "a DeepSpeed file in another encoding": Wrong(
        lambda shop: shop.train(f"deepspeed_config={shop.file('ds.json', bytes([123, 255]))}"), _FILE, "0xff", "JSON"
    ),
    "a DeepSpeed file of a list": Wrong(
        lambda shop: shop.train(f"deepspeed_config={shop.file('ds.json', '[]')}"), _FILE, "a list", "not an object: {…}"
    ),
    "a DeepSpeed section that is a number": Wrong(
        _config(zero_optimization=3), f"{_FILE}: zero_optimization", "3", "Fix: write"
    ),
    "a ZeRO stage that is none": Wrong(
        _zero(stage=4), f"{_FILE}: zero_optimization.stage", "4", "must be 0, 1, 2 or 3"
    ),
    "quantised ZeRO weights": Wrong(
        _zero(zero_quantized_weights=True), "zero_optimization.zero_quantized_weights", "true", "Fix: remove it"
    ),
    "quantised frozen weights": Wrong(
        _zero(zero_quantized_nontrainable_weights=True),
        "zero_optimization.zero_quantized_nontrainable_weights",
        "true",
        "Fix: remove it",
    ),
    "parameters on NVMe": Wrong(
        _zero(offload_param={"device": "nvme"}), "zero_optimization.offload_param.device", '"nvme"', 'Fix: use "cpu"'
    ),
    "optimizer states on NVMe": Wrong(
        _zero(offload_optimizer={"device": "nvme"}),
        "zero_optimization.offload_optimizer.device",
        '"nvme"',
        'Fix: use "cpu"',
    ),
    "ZenFlow": Wrong(_zero(zenflow={"topk_ratio": 0.1}), "zero_optimization.zenflow", "{…}", "Fix: remove it"),
    "MiCS": Wrong(_zero(mics_shard_size=2), "zero_optimization.mics_shard_size", "2", "Fix: remove it"),
    "AutoTP": Wrong(
        _config(tensor_parallel={"autotp_size": 2}), "tensor_parallel.autotp_size", "2", "Fix: remove tensor_parallel"
    ),
    "AutoEP": Wrong(
        _config(expert_parallel={"enabled": True, "autoep_size": 2}),
        "expert_parallel.enabled",
        "true",
        "Fix: remove expert_parallel",
    ),
    "DeepCompile": Wrong(_config(compile={"deepcompile": True}), "compile.deepcompile", "true", "Fix: remove it"),
    "an optimizer in the JSON": Wrong(
        _config(optimizer={"type": "Muon"}), f"{_FILE}: optimizer", "{…}", "set train.score_learning_rate"
    ),
    "a scheduler in the JSON": Wrong(
        _config(scheduler={"type": "WarmupLR"}), f"{_FILE}: scheduler", "{…}", "set train.learning_rate_warmup_fraction"
    ),
    "DeepSpeed's compression": Wrong(
        _config(compression_training={"a": 1}), "compression_training", "{…}", "PST does the pruning"
    ),
    "elasticity": Wrong(_config(elasticity={"enabled": True}), "elasticity", "{…}", "Fix: remove it"),
    "fp16 without a GPU": Wrong(
        _config(fp16={"enabled": True}), "fp16.enabled", "true", "Fix: use bf16", without_gpu=True
    ),
    "bf16 in the JSON and fp32 in the run file": Wrong(
        _config(bf16={"enabled": True}), f"{_FILE} has bf16.enabled", "true", 'Fix: write "auto"'
    ),
    "a batch in the JSON that is another": Wrong(
        _config(train_batch_size=16), f"{_FILE} has train_batch_size", "16", "tests/data/world_size.toml makes it 24"
    ),
    "clipping in the JSON that is another": Wrong(
        _config(gradient_clipping=0.5), f"{_FILE} has gradient_clipping", "0.5", 'Fix: write "auto"'
    ),
}
