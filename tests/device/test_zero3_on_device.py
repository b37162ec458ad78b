"""ZeRO on ranks with a pretended device each: DeepSpeed's partition, gathers, hooks and steps; the masks of CPUs."""

from __future__ import annotations

import json
import signal
from collections import Counter

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.config.pst import Override, PSTConfig
from pst_ds.config.toml import load_run
from pst_ds.core.quantization import Grid
from pst_ds.masks.layer_stats import measure
from pst_ds.masks.scales import update_scales
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel import sharding, stop_signals
from pst_ds.parallel.engine import build_engine
from pst_ds.parallel.launch import launch_environment
from pst_ds.train import run as run_module
from pst_ds.train.run import StoppedError, prepare, train_prepared
from tests.nn.expert_families import tiny_model

from .pretended import NAME, counts, streams, to_device, to_host
from .tiny import tiny_llama

pytestmark = [pytest.mark.device, pytest.mark.zero3]
OFFLOAD = {
    "offload_param": {"device": "cpu", "pin_memory": True}, "offload_optimizer": {"device": "cpu", "pin_memory": True}
}  # fmt: skip
ZERO = {
    "3": {"stage3_param_persistence_threshold": 0},
    "3 persistent": {"stage3_param_persistence_threshold": 1 << 20},
    "3 offload": {**OFFLOAD, "stage3_param_persistence_threshold": 0},
    "2": {"stage": 2},
    "3 hpZ": {"stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": 2},
    "3 whole": {"stage3_param_persistence_threshold": 0},
}
PATTERNS = {"q_proj": "row", "k_proj": "2:4", "v_proj": "4x4", "o_proj": "stack", "gate_proj": "matrix"}

WITH_MUCH = (
    'pst.magnitude="activation"',
    'pst.update_embeddings=["word_embeddings"]', "model.gradient_checkpointing=true",
    "model.gradient_checkpointing_reentrant=true", "model.activation_offload=true", "schedule.cooldown_fraction=0.4",
    'quantization.values="int8"',
)  # fmt: skip
"""Settings by which a run has calibration, an updated embedding, offloaded activations and rounding."""


def _model(num_shards, num_layers=2, grid=None, **settings):
    """On the CPU, with factors that are not zero; the same in every call."""
    model = tiny_llama(num_layers)
    inject_pst(model, PSTConfig(modules_to_save=(), **settings), num_shards=num_shards, grid=grid)
    for layer in pst_layers(model).values():
        for _, param in layer.factor_parameters():
            param.data = torch.randn_like(param) * 0.05
    return model


def _ds_config(kind, dtype=torch.float32):
    zero = {"stage": 3, "overlap_comm": True, "reduce_bucket_size": 1 << 16, **ZERO[kind]}
    return {
        "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16}, "zero_optimization": zero,
    }  # fmt: skip


def _engine(model, kind, dtype=torch.float32):
    """DeepSpeed's, which moves the model to its accelerator."""
    with sharding.copying_frozen(1 if kind == "3 whole" else 0):
        return build_engine(model.to(dtype), _groups(model), ds_config=_ds_config(kind, dtype))


def _groups(model):
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1e-2, "name": "all"}]


def _tokens(engine, rank):
    tokens = torch.arange(24).view(2, 12).add(7 * rank) % 40
    return to_device(tokens) if next(engine.module.parameters()).device.type == NAME else tokens


def _shards(model):
    """Where the shards of weights, masks and factors are."""
    found = {}
    for layer in pst_layers(model).values():
        for name, param in (("weight", layer.weight), ("mask", layer.pst_mask), *layer.factor_parameters()):
            found.setdefault(name, set()).add(sharding.shard_of(param).values.device.type)
    return found


def _trained(world_size, kind):
    """Per step: loss, gradient norm, masks. Then the masters, where the shards were, and the device of the weights."""
    engine = _engine(_model(1 if kind == "2" else world_size), kind)
    tokens, steps = _tokens(engine, torch.distributed.get_rank()), []
    for sparsity in (0.2, 0.5):
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        masks = update_masks(engine.module, sparsity)
        steps.append((float(loss), float(engine.get_global_grad_norm()), masks))
    trained = [param for param in engine.module.parameters() if param.requires_grad]
    masters = [to_host(values).clone() for values in sharding.fp32_masters(trained)]
    return steps, masters, _shards(engine.module)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("kind", "world_size"), [("3", 2), ("3 persistent", 2), ("3 offload", 2), ("3 hpZ", 4), ("3 whole", 2), ("2", 2)]
)
def test_training_steps_are_those_of_cpus(run_ranks, run_on_device, kind, world_size):
    on_cpus = run_ranks(_trained, world_size, world_size, kind)
    on_devices = run_on_device(_trained, world_size, world_size, kind)
    for (steps, masters, shards), (own_steps, own_masters, own_shards) in zip(on_cpus, on_devices, strict=True):
        assert [masks for *_, masks in own_steps] == [masks for *_, masks in steps]
        for (*numbers, _), (*own_numbers, _) in zip(steps, own_steps, strict=True):
            assert own_numbers == pytest.approx(numbers, rel=1e-4)
        for own, other in zip(own_masters, masters, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)
        assert all(places == {"cpu"} for places in shards.values())
        assert own_shards["weight"] == ({"cpu"} if "offload" in kind else {NAME})


def _with_experts_divided(kind):
    """As :func:`_trained`: losses, gradient norms and masks, then scales and figures of the layers."""
    import deepspeed

    model = tiny_model("gpt_oss")
    deepspeed.zero.Init(module=model, config_dict_or_path={**_ds_config(kind), "train_batch_size": 4})
    engine = _engine(inject_pst(model, PSTConfig(), grid=Grid(8, None), expert_parallel=2), kind)
    tokens, steps, masks = _tokens(engine, torch.distributed.get_rank()), [], []
    for sparsity in (0.2, 0.5):
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        steps += [float(loss), float(engine.get_global_grad_norm())]
        masks.append(update_masks(engine.module, sparsity))
    scales, figures = update_scales(engine.module), measure(engine.module, with_scores=True)
    return masks, [*steps, *scales.errors, *figures.correlation, *figures.score_norm, *figures.update_norm]


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["3", "3 offload"])
def test_experts_divided_among_ranks_train_as_on_cpus(run_ranks, run_on_device, kind):
    on_cpus = run_ranks(_with_experts_divided, 2, kind)
    for (masks, numbers), (own_masks, own_numbers) in zip(
        on_cpus, run_on_device(_with_experts_divided, 2, kind), strict=True
    ):
        assert own_masks == masks
        assert own_numbers == pytest.approx(numbers, rel=1e-4)


def _of_all_patterns(num_shards):
    overrides = [Override(modules=(name,), pattern=pattern) for name, pattern in PATTERNS.items()]
    return _model(num_shards, pattern="global", overrides=overrides)


def _updated(world_size, kind, dtype):
    return _two_updates(_engine(_of_all_patterns(world_size), kind, dtype))


def _two_updates(engine):
    """Of each of two mask updates: its stats, and the logits under the new masks."""
    found = []
    engine.eval()
    for sparsity in (0.3, 0.6):
        masks = update_masks(engine.module, sparsity)
        with torch.no_grad():
            logits = engine(input_ids=_tokens(engine, 0)).logits
        found.append((masks, to_host(logits).clone()))
    return found


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("3", torch.float32), ("3", torch.bfloat16), ("3 offload", torch.bfloat16)], ids=str
)
def test_masks_of_every_pattern_are_those_of_one_process_on_the_cpu(run_on_device, kind, dtype):
    """On three ranks, whose borders cut rows, groups and blocks."""
    model = _of_all_patterns(1).to(dtype)
    expected = _two_updates(build_engine(model, _groups(model), ds_config=None))
    for found in run_on_device(_updated, 3, 3, kind, dtype):
        for (masks, logits), (own_masks, own_logits) in zip(expected, found, strict=True):
            assert own_masks == masks
            torch.testing.assert_close(own_logits, logits)


def _all_figures(model):
    """Masks; numbers: errors of the scales of rounded weights, and figures of the layers."""
    masks, scales = update_masks(model, 0.5), update_scales(model)
    figures = measure(model, with_scores=True)
    numbers = [*scales.errors, *figures.correlation, *figures.score_norm, *figures.update_norm, *figures.weight_norm]
    return masks, numbers


def _figures_of_rank(world_size, kind):
    return _all_figures(_engine(_model(world_size, grid=Grid(8, 32)), kind).module)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["3", "3 offload"])
def test_masks_scales_and_figures_are_those_of_one_process_on_the_cpu(run_on_device, kind):
    model = _model(1, grid=Grid(8, 32))
    masks, numbers = _all_figures(build_engine(model, _groups(model), ds_config=None).module)
    for own_masks, own_numbers in run_on_device(_figures_of_rank, 2, 2, kind):
        assert own_masks == masks
        assert own_numbers == pytest.approx(numbers, rel=1e-6)


def _waits(kind, pattern):
    """How often a second mask update has the host wait, by line: of models of one layer, and of three."""
    found = []
    for num_layers in (1, 3):
        engine = _engine(_model(2, num_layers, pattern=pattern), kind)
        update_masks(engine.module, 0.3)
        before = counts.waits.copy()
        update_masks(engine.module, 0.5)
        found.append(dict(counts.waits - before))
    return found


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("kind", "pattern", "most"), [("3", "matrix", 7), ("3", "row", 2), ("3", "4x4", 8), ("3 offload", "matrix", 0)]
)
def test_the_host_waits_as_often_for_many_layers_as_for_few(run_on_device, kind, pattern, most):
    for few, many in run_on_device(_waits, 2, kind, pattern):
        assert few == many
        assert sum(few.values()) <= most


def _train(folder, *settings, resume=False):
    run = load_run("tests/data/world_size.toml", [f"output_dir={folder}", "train.num_steps=6", *settings])
    return train_prepared(prepare(run, launch_environment()), resume=resume, quiet=True)


def _stop_and_go_on(folder, *settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stop_signals, "_asked_by", signal.SIGUSR1)  # after the first step
        with pytest.raises(StoppedError):
            _train(folder, *settings)
    return _train(folder, *settings, resume=True)


def _losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["event"] == "step"}


def _final(folder):
    """The last checkpoint's masks, by layer, and the device that it was trained on."""
    checkpoint = read_checkpoint(folder / "checkpoints" / "final")
    masks = {name: bits.tolist() for name, bits in dict(checkpoint.masks).items()}
    return masks, checkpoint.state.device_type


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("train", "config", "settings"),
    [(_train, "zero3_offload.json", WITH_MUCH), (_stop_and_go_on, "zero3.json", ())],
    ids=["offloaded, with much", "stopped"],
)
def test_a_run_file_trains_as_on_cpus(run_ranks, run_on_device, tmp_path, train, config, settings):
    """Partitioned while it loads, through checkpoints, evaluation and statistics, to the result."""
    cpu, folder = tmp_path / "cpu", tmp_path / "device"
    expected, _ = run_ranks(_train, 2, str(cpu), 'deepspeed_config="ds_configs/zero3_cpu.json"', *settings)
    found, _ = run_on_device(train, 2, str(folder), f'deepspeed_config="ds_configs/{config}"', *settings)
    for key in ("mask_checksum", "optimizer_bytes_per_rank"):
        assert found[key] == expected[key]
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-4)
    assert _losses(folder) == pytest.approx(_losses(cpu), rel=1e-4)
    assert _final(folder) == (_final(cpu)[0], NAME)


def _waits_before_the_optimizer(folder, *settings):
    """What the host waits for between the backward pass and the optimizer in each batch, and from there to the next."""
    found, build, at = ([], []), run_module.build, [Counter()]

    def watched(*args, **named):
        engine = build(*args, **named)
        for action, waits in (("backward", found[1]), ("step", found[0])):
            setattr(engine, action, _noting(getattr(engine, action), waits))
        return engine

    def _noting(action, waits):
        def noting(*args):
            waits.append(counts.waits - at[0])
            result = action(*args)
            at[0] = Counter(counts.waits)
            return result

        return noting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "build", watched)
        _train(folder, "train.num_steps=3", "train.log_interval=3", *settings)
    return found


def test_the_host_waits_for_nothing_between_the_backward_pass_and_the_optimizer(run_on_device, tmp_path):
    config = 'deepspeed_config="ds_configs/zero3.json"'
    for before_step, after_step in run_on_device(_waits_before_the_optimizer, 2, str(tmp_path), config):
        assert before_step == [Counter()] * 3
        assert any("train/loop.py" in place and "tolist" in place for place in after_step[1])  # the loss is read there


def _races(waits):
    """Where gathers read masks that a stream which runs late has yet to write."""
    engine = _engine(_model(2), "3")
    masks = [layer.pst_mask for layer in pst_layers(engine.module).values()]
    streams.watched = {sharding.shard_of(mask).values.untyped_storage().data_ptr() for mask in masks}
    if not waits:
        get_accelerator().synchronize = lambda: None
    for mask in masks:
        sharding.write_shard(mask, ~sharding.shard_of(mask).values)
    next(iter(pst_layers(engine.module).values()))(to_device(torch.randn(2, 64)))  # nothing else makes the host wait
    return streams.races


def test_gathers_come_after_what_is_written_to_shards_on_a_stream_that_runs_late(run_on_device):
    assert run_on_device(_races, 2, True) == [[], []]
    assert all(run_on_device(_races, 2, False))
