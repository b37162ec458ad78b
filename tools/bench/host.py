"""What the host does in a training step: calls of DeepSpeed's hooks, and seconds of the main thread per block.

A Llama whose products take next to no time, on ranks of one core each. A step of a large model on GPUs costs the host
the same, because hooks, launches and Python do not depend on the sizes of tensors.

    python -m tools.bench.host --json
    python -m tools.bench.host --json --stages 3 2 --layers 12
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pst_ds.config.pst import PSTConfig
from pst_ds.masks.update import update_masks
from pst_ds.nn.flat_factors import flatten_factors
from pst_ds.nn.inject import inject_pst
from pst_ds.nn.optimizer import pst_parameter_groups
from pst_ds.parallel import ranks, sharding
from pst_ds.parallel.ds_config import RunNumbers, load_deepspeed_config, resolve_deepspeed_config
from pst_ds.parallel.engine import build_engine
from tools.bench.ranks import Ranks
from tools.bench.timing import benchmark_parser, conditions, print_result
from tools.bench.variants import DTYPE, Shape, add_shape_options, random_llama, shape_of

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
VARIANTS = (
    ("a tensor per factor", False, ""),
    ("flat factors", True, ""),
    ("flat factors, blocks as leaves", True, "LlamaDecoderLayer"),
)
"""Name, whether the factors are flat, and the class of modules whose parameters ZeRO-3 gathers at once."""
BLOCKS = {"plain": False, "pruned, flat factors": True}
"""Blocks that are timed in one process without DeepSpeed, and whether PST prunes their layers."""
WARMUP = 3
"""Steps before the first that counts: ZeRO-3 records the order of its modules in the first ones."""


@dataclass(frozen=True, kw_only=True)
class SmallShape(Shape):
    hidden: int = 64
    intermediate: int = 176
    layers: int = 6
    heads: int = 4
    vocabulary: int = 256
    sequence: int = 16
    batch: int = 1


def main() -> None:
    arguments = _parser().parse_args()
    shape = shape_of(arguments, SmallShape)
    engines: dict[str, Any] = {}
    for stage in arguments.stages:
        for name, is_flat, leaf_class in VARIANTS:
            if leaf_class and stage != 3:
                continue
            name = f"stage {stage}, {name}"
            with Ranks(arguments.ranks, Steps, shape, stage, is_flat, leaf_class) as of_ranks:
                by_rank = of_ranks.call("measure", arguments.repeats)
            engines[name] = by_rank[0]
    blocks = {name: _block(shape, is_pruned, arguments.repeats) for name, is_pruned in BLOCKS.items()}
    measured = {"engines": engines, "blocks_without_deepspeed": blocks}
    report = {**conditions(shape=asdict(shape), dtype=str(DTYPE), ranks=arguments.ranks), **measured}
    print_result(report, as_json=arguments.json)


class Steps:
    """An engine on this rank, and the calls of its hooks. Construction is collective."""

    def __init__(self, shape: Shape, stage: int, is_flat: bool, leaf_class: str):
        import transformers.models.llama.modeling_llama  # noqa: F401

        self.shape = shape
        self.calls: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        model = self._model(stage)
        groups = pst_parameter_groups(model)
        num_trained = sum(sharding.full_numel(param) for group in groups for param in group["params"])
        if is_flat:
            flatten_factors(model, groups)
        self.trained_tensors = sum(len(group["params"]) for group in groups)
        self.engine = build_engine(model, groups, ds_config=_settings(stage, num_trained, leaf_class))
        update_masks(self.engine.module, shape.sparsity)
        generator = torch.Generator().manual_seed(ranks.rank())
        self.tokens = torch.randint(shape.vocabulary, (shape.batch, shape.sequence), generator=generator)
        self._patches = ExitStack()
        if stage == 3:
            self._count_hooks()

    def _model(self, stage: int) -> nn.Module:
        model = random_llama(self.shape, partitioned=stage == 3)
        return inject_pst(model, PSTConfig(score_rank=self.shape.rank, update_rank=self.shape.rank))

    def _count_hooks(self) -> None:
        coordinator = self.engine.optimizer.parameter_offload.get_param_coordinator()
        self._count(coordinator, "fetch_sub_module")
        self._count(coordinator, "release_sub_module")
        self._count(self.engine.optimizer, "reduce_ready_partitions_and_remove_grads")

    def _count(self, owner: Any, name: str) -> None:
        called = getattr(owner, name)

        @wraps(called)
        def counted(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = called(*args, **kwargs)
            self.calls[name] += 1
            self.seconds[name] += time.perf_counter() - start
            return result

        setattr(owner, name, counted)

    def measure(self, repeats: int) -> dict[str, Any]:
        """Return medians over ``repeats`` steps: milliseconds per block, and the calls of a step. Collective."""
        for _ in range(WARMUP):
            self._step()
        self.calls.clear()
        self.seconds.clear()
        parts: list[dict[str, float]] = [self._step() for _ in range(repeats)]
        medians = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
        per_block = {name: round(1000 * seconds / self.shape.layers, 2) for name, seconds in medians.items()}
        blocks = repeats * self.shape.layers
        inside = {name: round(1000 * seconds / blocks, 2) for name, seconds in self.seconds.items()}
        return {
            "milliseconds_per_block": per_block,
            "milliseconds_per_block_inside": inside,
            "calls_per_step": {name: count / repeats for name, count in self.calls.items()},
            "trained_tensors": self.trained_tensors,
        }

    def _step(self) -> dict[str, float]:
        seconds: dict[str, float] = {}
        ranks.barrier()
        wall = time.perf_counter()
        thread = time.thread_time()
        self._timed(seconds, "forward", lambda: self._forward())
        self._timed(seconds, "backward", lambda: self.engine.backward(self._loss))
        self._timed(seconds, "optimizer", lambda: self.engine.step())
        seconds["step"] = time.perf_counter() - wall
        seconds["main thread"] = time.thread_time() - thread
        return seconds

    def _forward(self) -> None:
        self._loss = self.engine(input_ids=self.tokens, labels=self.tokens).loss

    @staticmethod
    def _timed(seconds: dict[str, float], name: str, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        seconds[name] = time.perf_counter() - start


def _block(shape: Shape, is_pruned: bool, repeats: int) -> dict[str, float]:
    """Return milliseconds of this thread per block in a forward and a backward pass, and the operators per block."""
    model = random_llama(shape, partitioned=False)
    if is_pruned:
        model = inject_pst(model, PSTConfig(score_rank=shape.rank, update_rank=shape.rank))
        flatten_factors(model, pst_parameter_groups(model))
        update_masks(model, shape.sparsity)
    tokens = torch.randint(shape.vocabulary, (shape.batch, shape.sequence))

    def passes() -> tuple[float, float]:
        start = time.thread_time()
        loss = model(input_ids=tokens, labels=tokens).loss
        between = time.thread_time()
        loss.backward()
        end = time.thread_time()
        model.zero_grad(set_to_none=True)
        return between - start, end - between

    for _ in range(WARMUP):
        passes()
    times = [passes() for _ in range(repeats)]
    with _Operators() as operators:
        passes()
    milliseconds = [1000 * statistics.median(part) / shape.layers for part in zip(*times, strict=True)]
    forward, backward = (round(value, 2) for value in milliseconds)
    return {"forward": forward, "backward": backward, "operators": round(operators.number / shape.layers)}


class _Operators(TorchDispatchMode):
    """Count operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def _settings(stage: int, num_trained: int, leaf_class: str) -> dict[str, Any]:
    path = CONFIGS / f"zero{stage}.json"
    numbers = RunNumbers(
        train_batch_size=ranks.world_size(),
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=1,
        gradient_clipping=1.0,
        bf16=True,
        num_trainable=num_trained,
        leaf_class=leaf_class,
    )
    return resolve_deepspeed_config(load_deepspeed_config(path), numbers, source=str(path), run_file="benchmark")


def _parser() -> argparse.ArgumentParser:
    parser = benchmark_parser(__doc__, "python -m tools.bench.host")
    parser.add_argument("--stages", type=int, nargs="+", default=[3, 2], choices=[2, 3])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    add_shape_options(parser, SmallShape)
    return parser


if __name__ == "__main__":
    main()
