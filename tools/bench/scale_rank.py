"""One rank of ``scale.py``: build a model with random weights shard by shard, train it and update its masks."""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.masks.update import update_masks
from pst_ds.nn.flat_factors import flatten_factors
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import Engine, build_engine, optimizer_bytes
from pst_ds.parallel.launch import init_distributed, launch_environment, shut_down
from pst_ds.parallel.ranks import all_gather_objects, barrier, rank, world_size
from tools.bench.timing import status_bytes

DRAW_ELEMENTS = 1 << 20
COPY_ELEMENTS = 1 << 25
"""Elements of the copy that measures memory bandwidth: more than fits in caches."""
IMPORTS = (
    "transformers.models.llama.modeling_llama",
    "transformers.integrations",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "functorch.compile",
    "torch._inductor.compile_fx",
    "torch._thread_safe_fork",
)
"""Modules that transformers and deepspeed.initialize import lazily; imported first, so that they do not count."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("job", type=Path)
    args = parser.parse_args()
    job = json.loads(args.job.read_text())
    for name in IMPORTS:
        importlib.import_module(name)

    torch.set_num_threads(job["threads"])
    memory = Memory()
    init_distributed(launch_environment())
    result = measure(job, memory)
    everyone = all_gather_objects(result)
    if rank() == 0:
        written = Path(job["result"]).with_suffix(".partial")
        written.write_text(json.dumps(everyone))
        written.rename(job["result"])
    barrier()
    shut_down()


class Memory:
    """Resident memory in bytes, minus that after the imports."""

    def __init__(self) -> None:
        self.base = status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        self.phases: dict[str, dict[str, int]] = {}

    def phase(self, name: str) -> None:
        """End a phase: record its peak and what is resident now."""
        found = {"peak": status_bytes("VmHWM") - self.base, "now": status_bytes("VmRSS") - self.base}
        before = self.phases.get(name, found)
        self.phases[name] = {key: max(value, before[key]) for key, value in found.items()}
        Path("/proc/self/clear_refs").write_text("5")  # the next peak starts from here

    @property
    def peak(self) -> int:
        return max(phase["peak"] for name, phase in self.phases.items() if name != "rates")


class Gathers:
    """Counter of the bytes that DeepSpeed gathers."""

    def __init__(self) -> None:
        from deepspeed.runtime.zero import partition_parameters

        self.bytes, gather = 0, partition_parameters._dist_allgather_fn

        def counted(shard: torch.Tensor, whole: torch.Tensor, *more: Any) -> Any:
            self.bytes += whole.nbytes
            return gather(shard, whole, *more)

        partition_parameters._dist_allgather_fn = counted

    def taken(self) -> int:
        """Return the bytes since the last call."""
        found, self.bytes = self.bytes, 0
        return found


def measure(job: dict[str, Any], memory: Memory) -> dict[str, Any]:
    rates = machine_rates(job)
    memory.phase("rates")
    started = time.perf_counter()
    model, keep_alive = build(job)
    memory.phase("build")
    inject_pst(model, PSTConfig(modules_to_save=()))
    memory.phase("inject")
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1e-3}]
    flatten_factors(model, groups)
    engine = build_engine(model, groups, ds_config=job["ds_config"])
    memory.phase("initialize")
    seconds = {"build": time.perf_counter() - started}
    torch.manual_seed(rank())
    tokens = torch.randint(0, job["model"]["vocab_size"], (job["batch"], job["sequence"]))
    times: dict[str, list[float]] = {"step": [], "update": []}
    gathers = Gathers()
    for i in range(1 + job["repeats"]):
        times["step"].append(timed(lambda: step(engine, tokens)))
        gathered = gathers.taken()
        memory.phase("step")
        sparsity = 0.5 + 0.02 * i
        times["update"].append(timed(lambda: update_masks(engine.module, sparsity)))  # noqa: B023
        memory.phase("update")
        gathers.taken()
    seconds |= {f"first_{name}": values[0] for name, values in times.items()}
    seconds |= {name: statistics.median(values[1:] or values) for name, values in times.items()}
    del keep_alive
    return {
        "rank": rank(),
        "seconds": seconds,
        "phases": memory.phases,
        "peak": memory.peak,
        "base": memory.base,
        "gathered": gathered,
        "held": held(engine),
        "rates": rates,
    }


def machine_rates(job: dict[str, Any]) -> dict[str, float]:
    """Measure products, copies and gathers of the model's largest layer while every rank does the same.

    Returns FLOPs, bytes read or written, and bytes received, all per second, and the latency in seconds. Collective.
    """
    outputs, inputs = job["model"]["intermediate_size"], job["model"]["hidden_size"]
    weight = torch.randn(outputs, inputs).bfloat16()
    x = torch.randn(job["batch"] * job["sequence"], inputs).bfloat16()
    y = x @ weight.t()
    whole, shard = torch.empty(world_size() * weight.numel() // 2, dtype=torch.bfloat16), weight.flatten()

    large, copy = (torch.zeros(COPY_ELEMENTS, dtype=torch.bfloat16) for _ in range(2))

    def products() -> None:
        torch.nn.functional.linear(x, weight)
        y @ weight
        y.t() @ x

    def median(work: Callable[[], Any]) -> float:
        return statistics.median([timed(work) for _ in range(6)][1:])

    own = shard[: whole.numel() // world_size()]
    gather = median(lambda: torch.distributed.all_gather_into_tensor(whole, own)) if world_size() > 1 else 0.0
    return {
        "flops": 6 * x.shape[0] * weight.numel() / median(products),
        "memory_bytes": 2 * copy.nbytes / median(lambda: copy.copy_(large)),
        "network_bytes": (whole.nbytes - own.nbytes) / gather if gather else 0.0,
        "latency": median(lambda: torch.distributed.all_reduce(torch.zeros(1))),
    }


def timed(work: Callable[[], Any]) -> float:
    barrier()
    start = time.perf_counter()
    work()
    barrier()
    return time.perf_counter() - start


def step(engine: Engine, tokens: torch.Tensor) -> None:
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
    assert engine.was_step_applied()


def build(job: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Build the model with random weights; each rank only draws its own shards."""
    import deepspeed
    from transformers.initialization import no_init_weights
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import prevent_arange_dtype_change

    keep_alive = HfDeepSpeedConfig(job["ds_config"])
    with no_init_weights(), prevent_arange_dtype_change(), deepspeed.zero.Init(config_dict_or_path=job["ds_config"]):
        model = model_of(job["model"])
    draw(model)
    if job["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model, keep_alive


def model_of(settings: dict[str, Any]) -> Any:
    """Build the causal language model of a config with these ``settings``, including "model_type", in bf16."""
    from transformers import AutoConfig
    from transformers.modeling_utils import local_torch_dtype
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.for_model(**settings, dtype=torch.bfloat16, use_cache=False)
    with local_torch_dtype(torch.bfloat16):
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return kind(config)


def draw(model: nn.Module) -> None:
    """Draw this rank's shard of every matrix and stack from N(0, 0.02**2); norms stay one."""
    generator = torch.Generator().manual_seed(rank())
    scratch = torch.empty(DRAW_ELEMENTS)
    for param in model.parameters():
        if len(sharding.full_shape(param)) > 1:
            for chunk in sharding.shard_of(param).values.split(DRAW_ELEMENTS):
                chunk.copy_(scratch[: chunk.numel()].normal_(0.0, 0.02, generator=generator))


def held(engine: Engine) -> dict[str, int]:
    """Return the bytes of this rank's tensors after a step."""
    params = dict(engine.module.named_parameters())
    masks = {n for n in params if n.endswith("pst_mask")}
    size = {n: sharding.shard_of(p).values.nbytes for n, p in params.items()}
    return {
        "weights": sum(b for n, b in size.items() if n not in masks),
        "masks": sum(b for n, b in size.items() if n in masks),
        "optimizer": optimizer_bytes(engine),
        "pruned_weights": sum(layer.layout.numel for layer in pst_layers(engine.module).values()),
        "world_size": world_size(),
    }


if __name__ == "__main__":
    main()
