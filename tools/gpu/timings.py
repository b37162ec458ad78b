"""Sections of ``make gpu`` that measure times and memory, next to the predictions of ``pst-ds plan``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pst_ds.config.pst import PSTConfig
from pst_ds.core.quantization import Grid
from pst_ds.json_text import JsonObject
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel.ds_config import RunNumbers, load_deepspeed_config, resolve_deepspeed_config
from pst_ds.parallel.engine import Engine, build_engine, free_released, release
from pst_ds.parallel.launch import LaunchEnvironment, init_distributed, shut_down
from pst_ds.parallel.master_adamw import MasterAdamW
from pst_ds.planning.activations import trace_micro_batch
from pst_ds.planning.machines import Machine
from pst_ds.planning.memory import ZeroSettings, memory_plan, zero_settings
from pst_ds.planning.shapes import model_numbers
from pst_ds.planning.time import COUNTS, Batch, TimePlan, time_plan
from pst_ds.storage_format import packed_format
from tools.gpu.bench import Bench, Row, pruned_layers
from tools.packed_layers import packed_linear

SPARSITIES = (0.5, 0.8, 0.9)


def llama(bench: Bench) -> LlamaForCausalLM:
    """Return a Llama with random bf16 weights, the same in every call."""
    s = bench.sizes
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=s.hidden, intermediate_size=s.intermediate, num_hidden_layers=s.layers, use_cache=False,
        num_attention_heads=s.heads, num_key_value_heads=s.heads, vocab_size=s.vocabulary,
    )  # fmt: skip
    with bench.device:
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


def kernels(bench: Bench) -> Iterator[Row]:
    """Time the merge and the backward pass next to their predicted memory traffic, and launches of the host."""
    outputs, inputs = bench.sizes.matrix
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=False)).bfloat16()
    inject_pst(model, PSTConfig(modules_to_save=(), target_modules=("0",)))
    (layer,) = pst_layers(model.to(bench.device)).values()
    weights, few = outputs * inputs, 16

    def microseconds(what: str, seconds: float, predicted: float | None) -> Row:
        return {"what": f"{what}, us", "measured": seconds * 1e6,
                "predicted": None if predicted is None else predicted * 1e6}  # fmt: skip

    def traffic(name: str, more: int = 0) -> float | None:
        return bench.predicted(lambda m: weights * (getattr(COUNTS[m.code], name) + more) / m.memory_bytes)

    yield microseconds("M . W", bench.seconds(layer.masked_weight), traffic("merge_bytes"))
    x = torch.randn(few, inputs, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    backward = bench.seconds(lambda: torch.autograd.grad(y, x, dy, retain_graph=True))
    yield microseconds(f"backward of {few} tokens", backward, traffic("backward_bytes", 4))
    one = torch.zeros(1, device=bench.device)
    launch = bench.host_seconds(lambda: one.add_(1))
    yield microseconds("a launch of torch", launch, bench.predicted(lambda m: m.launch_seconds))
    small = pst_layers(pruned_layers(64).to(bench.device))["0"]
    yield microseconds("M . W of 64 x 64, on the host", bench.host_seconds(small.masked_weight), None)


def _trained(bench: Bench, kind: str) -> nn.Module:
    model: nn.Module = llama(bench)
    if kind == "pst":
        inject_pst(model, PSTConfig(modules_to_save=()))
    elif kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    return model


def planned(bench: Bench, machine: Machine, settings: JsonObject | None = None) -> tuple[TimePlan, int]:
    """Return the predicted times and peak bytes of a training step of :func:`llama` with these DeepSpeed settings."""
    model = inject_pst(nn.Module.to(llama(bench), "meta"), PSTConfig(modules_to_save=(), relative_magnitude=False))
    numbers, zero = model_numbers(model, device=machine.device), zero_settings(settings, 1, machine.backend)
    tokens = bench.sizes.tokens
    trace = trace_micro_batch(model, batch=1, sequence=tokens, checkpointing=False)
    batch = Batch(tokens, tokens, trace=trace)
    memory = memory_plan(numbers, zero, activations=trace.activations, device=machine.device)
    return time_plan(numbers, zero, batch, machine), memory.peak


def steps(bench: Bench) -> Iterator[Row]:
    """Time a step of PST, full fine-tuning and PEFT's LoRA on one device, with fp32 masters, and PST's peak memory."""
    predicted, peak = dict[str, float](), None
    if bench.machine is not None:
        times, peak = planned(bench, bench.machine)
        predicted = {"pst": times.step, "full": times.full_step}
    found: dict[str, float] = {}
    on_cuda = bench.device.type == "cuda"
    for kind in ("pst", "full", "lora"):
        try:
            model = _trained(bench, kind)
        except ImportError:
            yield {"what": f"step, {kind}", "measured": None, "why": "peft is not installed"}
            continue
        optimizer = MasterAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        ids = torch.randint(0, bench.sizes.vocabulary, (1, bench.sizes.tokens), device=bench.device)

        def step(model: nn.Module = model, optimizer: MasterAdamW = optimizer, ids: Tensor = ids) -> None:
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        found[kind] = bench.seconds(step)
        yield {"what": f"step, {kind}, ms", "measured": found[kind] * 1e3,
               "predicted": predicted[kind] * 1e3 if kind in predicted else None}  # fmt: skip
        if kind == "pst":
            held = bench.flushed.numel() if on_cuda else 0
            used = (torch.cuda.max_memory_allocated() - held) / 1e9 if on_cuda else None
            yield {"what": "peak memory, pst, GB", "measured": used, "predicted": peak and peak / 1e9}
        else:
            yield {"what": f"step, pst / {kind}", "measured": found["pst"] / found[kind],
                   "predicted": predicted["pst"] / predicted[kind] if kind in predicted else None}  # fmt: skip
        del model, optimizer, step


def deepspeed(bench: Bench) -> Iterator[Row]:
    """Time steps and mask updates of PST on ZeRO-3 with one rank, with and without offload, and their peak memory."""
    init_distributed(LaunchEnvironment(0, 1, 0))
    on_cuda, shares = bench.device.type == "cuda", itertools.cycle([0.3, 0.5])
    for name in ("zero3", "zero3_offload"):
        model = inject_pst(llama(bench), PSTConfig(modules_to_save=()), num_shards=1)
        trained = [param for param in model.parameters() if param.requires_grad]
        numbers, file = RunNumbers(1, 1, 1, 0.0, True, sum(p.numel() for p in trained)), f"ds_configs/{name}.json"
        settings = resolve_deepspeed_config(load_deepspeed_config(file), numbers, source=file, run_file="make gpu")
        times, peak = (None, None) if bench.machine is None else planned(bench, bench.machine, settings)
        engine = build_engine(model, [{"params": trained, "lr": 1e-5}], ds_config=settings)
        ids = torch.randint(0, bench.sizes.vocabulary, (1, bench.sizes.tokens), device=bench.device)

        def step(engine: Engine = engine, ids: Tensor = ids) -> None:
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()

        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        yield {"what": f"step, {name}, ms", "measured": bench.seconds(step) * 1e3,
               "predicted": times and times.step * 1e3}  # fmt: skip
        seconds = bench.seconds(lambda model=model: update_masks(model, next(shares)))  # type: ignore[misc]
        yield {"what": f"mask update, {name}, ms", "measured": seconds * 1e3,
               "predicted": times and times.update * 1e3}  # fmt: skip
        held = bench.flushed.numel() if on_cuda else 0
        used = (torch.cuda.max_memory_allocated() - held) / 1e9 if on_cuda else None
        yield {"what": f"peak memory, {name}, GB", "measured": used, "predicted": peak and peak / 1e9}
        release(engine)
        del model, trained, engine, step
        free_released()
    shut_down()


def updates(bench: Bench) -> Iterator[Row]:
    """Time mask updates of three matrices at three sizes."""
    for side in bench.sizes.updates:
        model, shares = pruned_layers(side).to(bench.device), itertools.cycle([0.3, 0.5])
        measured = bench.seconds(lambda model=model, shares=shares: update_masks(model, next(shares)))  # type: ignore[misc]
        numbers = model_numbers(model)
        predicted = bench.predicted(lambda m, n=numbers: time_plan(n, ZeroSettings(stage=None), Batch(1, 1), m).update)  # type: ignore[misc]
        yield {"what": f"mask update, 3 x {side} x {side}, ms", "measured": measured * 1e3,
               "predicted": None if predicted is None else predicted * 1e3}  # fmt: skip


def decode(bench: Bench) -> Iterator[Row]:
    """Time products of a few vectors with bf16 and quantised bitmask layers, relative to dense ones."""
    outputs, inputs = bench.sizes.matrix
    dense = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).bfloat16()
    there = dense.to(bench.device)
    for sparsity in SPARSITIES:
        kept = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(1)) >= sparsity
        for grid in (None, Grid(8), Grid(4)):
            form = "bitmask" if grid is None else packed_format("bitmask", grid)
            layer = packed_linear(dense * kept, None, form).to(bench.device)
            bytes_of_value = 2 if grid is None else grid.bits / 8
            for vectors in (1, 16):
                x = torch.randn(vectors, inputs, device=bench.device, dtype=torch.bfloat16)
                with torch.no_grad():
                    plain = bench.seconds(lambda x=x: torch.nn.functional.linear(x, there))  # type: ignore[misc]
                    packed = bench.seconds(lambda x=x, layer=layer: layer(x))  # type: ignore[misc]
                what = f"{vectors} x, dense / {'bf16' if grid is None else grid.values} bitmask at {sparsity:.0%}"
                bound = 2 / (bytes_of_value * (1 - sparsity) + 1 / 8)
                yield {"what": what, "measured": plain / packed, "predicted": bound}
