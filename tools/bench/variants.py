"""The models whose training steps benchmarks compare: one per method, otherwise equal."""

from __future__ import annotations

import argparse
import ctypes
import gc
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.nn.targets import resolve_targets
from pst_ds.parallel import ranks, sharding
from pst_ds.parallel.ds_config import RunNumbers, load_deepspeed_config, resolve_deepspeed_config
from pst_ds.parallel.engine import Engine, build_engine, optimizer_bytes
from tools.bench.timing import status_bytes, timed

AnyShape = TypeVar("AnyShape", bound="Shape")
METHODS = ("pst", "full_finetuning", "lora", "plain")
DTYPE = torch.bfloat16
LEARNING_RATE = 1e-5
MAX_BUCKET = 50_000_000
"""Elements of ZeRO's gradient bucket (at most the trained weights) and of an optimizer group."""
DS_CONFIG = Path(__file__).resolve().parents[2] / "ds_configs" / "zero3_cpu.json"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama, the batch per rank, and the method's settings."""

    hidden: int = 2048
    intermediate: int = 5504
    layers: int = 8
    heads: int = 16
    vocabulary: int = 8192
    sequence: int = 1024
    batch: int = 2
    rank: int = 8
    sparsity: float = 0.9
    checkpointing: bool = False
    attention: str = "sdpa"


def add_shape_options(parser: argparse.ArgumentParser, cls: type[Shape]) -> None:
    """Add an option for every field of ``cls``, which :func:`shape_of` reads."""
    for field in fields(cls):
        name = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(name, action="store_true")
        else:
            parser.add_argument(name, type=type(field.default), default=field.default)


def shape_of(arguments: argparse.Namespace, cls: type[AnyShape]) -> AnyShape:
    return cls(**{field.name: getattr(arguments, field.name) for field in fields(cls)})


def zero3_settings(num_trainable: int, dtype: torch.dtype = DTYPE) -> dict[str, Any]:
    """Return ds_configs/zero3_cpu.json for one micro-batch per rank. Layers are gathered in the forward and again in
    the backward pass, as for a model that is too large to stay gathered.
    """
    world = ranks.world_size()
    numbers = RunNumbers(world, 1, 1, 0.0, dtype == torch.bfloat16, min(num_trainable, MAX_BUCKET))
    settings = resolve_deepspeed_config(
        load_deepspeed_config(DS_CONFIG), numbers, source=str(DS_CONFIG), run_file="benchmark"
    )
    zero = settings["zero_optimization"]
    assert isinstance(zero, dict)
    zero |= {
        "stage3_max_live_parameters": 100_000_000,
        "stage3_max_reuse_distance": 0,
        "sub_group_size": MAX_BUCKET,  # Adam's temporaries: with the default, 4 GB where every weight trains
    }
    return settings


def zero3_engine(model: nn.Module) -> Engine:
    """Wrap ``model`` in DeepSpeed's ZeRO-3 with torch's AdamW on fp32 masters. Collective."""
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = zero3_settings(sum(map(sharding.full_numel, trained)), trained[0].dtype)
    return build_engine(model, [{"params": trained, "lr": LEARNING_RATE}], ds_config=settings)


def random_llama(shape: Shape, dtype: torch.dtype = DTYPE, *, partitioned: bool = True, **more: Any) -> nn.Module:
    """Build a Llama with random weights, ``partitioned`` over the ranks by ``zero.Init``, or whole. Collective."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.integrations import HfDeepSpeedConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.sequence,
        attention_dropout=0.0,
        use_cache=False,
        **more,
    )
    # transformers finds it through a weak reference
    keep_alive = HfDeepSpeedConfig(zero3_settings(MAX_BUCKET, dtype)) if partitioned else None
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=shape.attention)
    del keep_alive
    if shape.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def build_model(method: str, shape: Shape) -> nn.Module:
    """Build the model of ``method`` with random weights. Collective."""
    from tools.bench.baselines import PlainPST, replace_linears

    model = random_llama(shape)
    if method == "full_finetuning":
        return model.requires_grad_(True)
    if method == "pst":
        return inject_pst(model, PSTConfig(score_rank=shape.rank, update_rank=shape.rank))
    targets = [(target.name, target.module) for target in resolve_targets(model, PSTConfig())]
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        names = sorted({name.rpartition(".")[2] for name, _ in targets})
        lora = LoraConfig(r=shape.rank, lora_alpha=shape.rank, lora_dropout=0.0, target_modules=names)
        return get_peft_model(model, lora, autocast_adapter_dtype=False)
    model.requires_grad_(False)
    replace_linears(model, targets, PlainPST, shape.rank, shape.sparsity)
    return model


class Variant:
    """A method on this rank: its engine and a fixed random batch. Construction is collective."""

    def __init__(self, method: str, shape: Shape):
        import peft  # noqa: F401  every method starts from the same imports
        import transformers.models.llama.modeling_llama  # noqa: F401

        self._memory_at_start = resident_bytes()
        self._start(method, shape, build_model(method, shape))
        reset_peak()

    def _start(self, method: str, shape: Shape, model: nn.Module) -> None:
        self.method, self.shape = method, shape
        self.trainables = sum(sharding.full_numel(p) for p in model.parameters() if p.requires_grad)
        self.engine = zero3_engine(model)
        if method == "pst":
            update_masks(self.engine.module, shape.sparsity)
        generator = torch.Generator().manual_seed(ranks.rank())
        tokens = torch.randint(shape.vocabulary, (shape.batch, shape.sequence), generator=generator)
        self.tokens = tokens.to(sharding.shard_of(next(model.parameters())).values.device)

    def step(self) -> dict[str, float]:
        """Return the seconds of each part of a step after a barrier; ``cpu_*`` is CPU time.

        ``step`` excludes PST's ``mask_update``, which follows every step. Collective.
        """
        seconds: dict[str, float] = {}
        ranks.barrier()
        with timed(seconds, "forward"):
            loss = self.engine(input_ids=self.tokens, labels=self.tokens).loss
        with timed(seconds, "backward"):
            self.engine.backward(loss)
        del loss
        with timed(seconds, "optimizer"):
            self.engine.step()
        for kind in ("", "cpu_"):
            seconds[f"{kind}step"] = sum(seconds[f"{kind}{part}"] for part in ("forward", "backward", "optimizer"))
        if self.method == "pst":
            ranks.barrier()
            with timed(seconds, "mask_update"):
                update_masks(self.engine.module, self.shape.sparsity)
        return seconds

    def facts(self) -> dict[str, int]:
        """Return bytes and counts on this rank; ``memory`` is the peak without imports and base weights."""
        shards = self._base_weight_shard_bytes()
        found = {
            "memory": peak_bytes() - self._memory_at_start - shards,
            "weight_shards": shards,
            "optimizer_state": optimizer_bytes(self.engine),
            "trainables": self.trainables,
        }
        layers = pst_layers(self.engine.module).values()
        if layers:
            found["masks"] = sum(sharding.shard_of(layer.pst_mask).values.nbytes for layer in layers)
        return found

    def _base_weight_shard_bytes(self) -> int:
        """Return this rank's share of the model that every method starts from."""
        with torch.device("meta"):
            from transformers import LlamaForCausalLM

            whole = LlamaForCausalLM(getattr(self.engine.module, "config"))  # noqa: B009
        size = DTYPE.itemsize
        return sum(-(-p.numel() // ranks.world_size()) * size for p in whole.parameters())


def resident_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return status_bytes("VmRSS")


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return status_bytes("VmHWM")


def reset_peak() -> None:
    """Reset the peak memory, so that it excludes building the model."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # without permission, the peak includes building the model, for every method
        Path("/proc/self/clear_refs").write_text("5")
