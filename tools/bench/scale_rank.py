"""One rank of ``scale.py``: a Llama-shaped model with random weights, built shard by shard, trained and re-masked."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pst_ds.nn.config import PSTConfig
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel import zero3
from pst_ds.parallel.engine import Engine, build_engine, optimizer_bytes
from pst_ds.parallel.launch import init_distributed, launch_environment, shut_down
from pst_ds.parallel.ranks import all_gather_objects, barrier, rank, world_size
from pst_ds.train.mask_update import update_masks

DRAW_ELEMENTS = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("job", type=Path)
    args = parser.parse_args()
    job = json.loads(args.job.read_text())
    import deepspeed.runtime.engine
    import deepspeed.runtime.superoffload.superoffload_stage3
    import functorch.compile  # what deepspeed.initialize imports too: not memory of the model
    import torch._inductor.compile_fx
    import torch._thread_safe_fork
    import transformers.integrations
    from transformers import LlamaForCausalLM  # noqa: F401

    torch.set_num_threads(job["threads"])
    memory = Memory()
    init_distributed(launch_environment())
    result = measure(job, memory)
    everyone = all_gather_objects(result)
    if rank() == 0:
        Path(job["result"]).write_text(json.dumps(everyone))
    barrier()
    shut_down()


class Memory:
    """Resident memory above what the imports took, in bytes."""

    def __init__(self) -> None:
        self.base = _status("VmRSS")
        self.file = _status("RssFile")
        self.phases: dict[str, dict[str, int]] = {}

    def phase(self, name: str) -> None:
        """Ends a phase: its peak, and what is resident now."""
        self.phases[name] = {"peak": _status("VmHWM") - self.base, "now": _status("VmRSS") - self.base,
                             "file": _status("RssFile") - self.file}
        Path("/proc/self/clear_refs").write_text("5")  # the next peak starts from here
        self.modules = getattr(self, "modules", set(sys.modules))
        new = set(sys.modules) - self.modules
        self.modules = set(sys.modules)
        if rank() == 0: print(name, len(new), [m for m in new if 1], flush=True)
        if _available() < 1 << 30:
            sys.exit("less than 1 GiB of memory is left on this machine; stopping")

    @property
    def peak(self) -> int:
        return max(phase["peak"] for phase in self.phases.values())


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62


def measure(job: dict[str, Any], memory: Memory) -> dict[str, Any]:
    started = time.perf_counter()
    model, keep_alive = build(job)
    memory.phase("build")
    inject_pst(model, PSTConfig(modules_to_save=()))
    memory.phase("inject")
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1e-3}]
    engine = build_engine(model, groups, ds_config=job["ds_config"])
    memory.phase("initialize")
    seconds = {"build": time.perf_counter() - started}
    torch.manual_seed(rank())
    tokens = torch.randint(0, job["model"]["vocab_size"], (job["batch"], job["sequence"]))
    steps = [timed(lambda: step(engine, tokens)) for _ in range(1 + job["repeats"])]
    memory.phase("step")
    updates = [timed(lambda: update_masks(engine.module, 0.5 + 0.02 * i)) for i in range(job["repeats"])]
    memory.phase("update")
    seconds["step_after_update"] = timed(lambda: step(engine, tokens))
    memory.phase("step after the update")
    seconds |= {"first_step": steps[0], "step": statistics.median(steps[1:]), "update": statistics.median(updates)}
    del keep_alive
    return {"rank": rank(), "seconds": seconds, "phases": memory.phases, "peak": memory.peak, "base": memory.base,
            "held": held(engine)}  # fmt: skip


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
    """The model, of which each rank only ever draws its own shards."""
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import prevent_arange_dtype_change

    keep_alive = HfDeepSpeedConfig(job["ds_config"])
    config = LlamaConfig(**job["model"], dtype=torch.bfloat16, use_cache=False)
    with no_init_weights(), prevent_arange_dtype_change():
        with deepspeed.zero.Init(config_dict_or_path=job["ds_config"]):
            model = LlamaForCausalLM(config)
    draw(model)
    if job["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model, keep_alive


def draw(model: nn.Module) -> None:
    """N(0, 0.02**2) for every matrix, on its own shard; the norms are ones from their constructor."""
    generator = torch.Generator().manual_seed(rank())
    scratch = torch.empty(DRAW_ELEMENTS)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            for chunk in zero3.shard_of(module.weight).values.split(DRAW_ELEMENTS):
                chunk.copy_(scratch[: chunk.numel()].normal_(0.0, 0.02, generator=generator))


def held(engine: Engine) -> dict[str, int]:
    """Bytes that this rank's tensors hold after a step, counted from the tensors themselves."""
    params = dict(engine.module.named_parameters())
    masks = {n for n in params if n.endswith("pst_mask")}
    size = {n: zero3.shard_of(p).values.nbytes for n, p in params.items()}
    return {
        "weights": sum(b for n, b in size.items() if n not in masks),
        "masks": sum(b for n, b in size.items() if n in masks),
        "optimizer": optimizer_bytes(engine),
        "pruned_weights": sum(layer.layout.numel for layer in pst_layers(engine.module).values()),
        "world_size": world_size(),
    }


if __name__ == "__main__":
    main()
