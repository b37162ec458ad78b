"""The loop on one process: sparsity in step with the schedule, skipped steps, divergence, and what is reported."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pst_ds.config.toml import load_run
from pst_ds.core.bits import unpack_range
from pst_ds.core.schedule import learning_rate_factor
from pst_ds.data.labelled import load_examples
from pst_ds.masks.update import mask_stats
from pst_ds.nn.inject import pst_layers
from pst_ds.parallel.engine import LocalEngine
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.train import loop as loop_module
from pst_ds.train.divergence import DivergedError
from pst_ds.train.loop import Loop, LoopState
from pst_ds.train.model import parameter_groups
from pst_ds.train.monitor.metrics import MetricsWriter
from pst_ds.train.objective import Objective
from pst_ds.train.run import build, prepare, train_prepared
from pst_ds.train.run_folder import open_checkpoint

SCORES, UPDATES = ("pst_A", "pst_B", "pst_R", "pst_C"), ("pst_U", "pst_V")


def _prepared(folder, *overrides):
    run = load_run(
        "tests/data/world_size.toml", ["deepspeed_config=", f"output_dir={json.dumps(str(folder))}", *overrides]
    )
    return prepare(run, LaunchEnvironment(0, 1, 0))


class _Ready:
    """A loop over a fresh tiny model, with the state after each applied step kept by ``seen``."""

    def __init__(self, folder, *overrides, seen=lambda module, state: None):
        prepared = _prepared(folder, *overrides)
        run = prepared.run
        self.engine = build(prepared)
        self.module = self.engine.module
        self.schedules = run.make_schedules(run.train.num_steps)
        examples = load_examples(run.data, "train", prepared.tokenizer, prepared.labels)
        self.metrics = MetricsWriter(Path(folder), num_steps=run.train.num_steps, is_main=True, quiet=True)
        self.folder = Path(folder)
        self.loop = Loop(
            prepared, self.engine, examples, self.schedules, self.metrics, Objective(prepared)
        )  # fmt: skip
        self.seen = seen

    def train(self):
        try:
            for state in self.loop.steps(LoopState()):
                self.seen(self.module, state)
            return state
        finally:
            self.metrics.close()


def _lines(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def _zeros(module):
    """Pruned weights of each matrix, counted in the mask bits one by one."""
    counts = []
    for layer in pst_layers(module).values():
        numel = layer.layout.numel
        mask = unpack_range(layer.pst_mask.detach(), numel, layer.num_shards, 0, numel)
        assert layer.layout.num_matrices == 1
        counts.append((numel, numel - int(mask.sum())))
    return counts


def _trained(module, endings):
    return {n: p.detach().clone() for n, p in module.named_parameters() if n.endswith(endings)}


def _poison(module, bad_calls):
    """Make one gradient infinite in the given backward passes."""
    calls = iter(range(10**6))
    param = next(p for n, p in module.named_parameters() if n.endswith("pst_V"))
    param.register_hook(lambda grad: grad * (math.inf if next(calls) in bad_calls else 1.0))


def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero():
    factors = [learning_rate_factor(step, 20, 0.25) for step in range(21)]
    assert factors[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    assert factors[5:] == pytest.approx([(20 - step) / 15 for step in range(5, 21)])
    assert min(factors[:-1]) > 0.0
    assert learning_rate_factor(25, 20, 0.25) == 0.0
    assert [learning_rate_factor(s, 4, 0.0) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.few(1)
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_after_k_applied_steps_the_masks_have_the_schedule_s_sparsity(tmp_path, accumulation):
    seen = {}
    ready = _Ready(
        tmp_path,
        f"train.gradient_accumulation_steps={accumulation}",
        "schedule.initial_sparsity=0.2",
        seen=lambda module, state: seen.__setitem__(state.step, _zeros(module)),
    )
    state = ready.train()
    assert state.step == 20
    assert ready.engine.global_steps == 20
    assert list(seen) == list(range(1, 21))
    for step, counts in seen.items():
        target = ready.schedules.sparsity_at(step)
        assert [zeros for _, zeros in counts] == [math.floor(target * numel) for numel, _ in counts], step
    assert [math.floor(0.2 * n) for n, _ in seen[1]] == [z for _, z in seen[1]]  # pruned before the first step
    assert [math.floor(0.8 * n) for n, _ in seen[16]] == [z for _, z in seen[16]]  # cool-down 0.2 of 20
    assert seen[15] != seen[16] == seen[20]
    assert state.masks.checksum == mask_stats(ready.module).checksum


@pytest.mark.few(1)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_skipped_step_moves_neither_step_nor_mask(tmp_path, accumulation):
    clean, skipping = {}, {}

    def remember(into):
        return lambda module, state: into.__setitem__(state.step, (state.batch, _zeros(module)))

    overrides = [f"train.gradient_accumulation_steps={accumulation}", "schedule.update_interval=1"]
    _Ready(tmp_path, *overrides, seen=remember(clean)).train()
    ready = _Ready(tmp_path, *overrides, seen=remember(skipping))
    bad_batches = (0, 6, 7, 12)
    _poison(ready.module, [batch * accumulation + accumulation - 1 for batch in bad_batches])
    state = ready.train()
    assert ready.engine.skipped_steps == 4
    assert (state.step, state.batch, ready.engine.global_steps) == (20, 24, 24)
    assert [batch for batch, _ in skipping.values()] == [b + 1 for b in range(24) if b not in bad_batches]
    assert [zeros for _, zeros in skipping.values()] == [zeros for _, zeros in clean.values()]
    assert _lines(tmp_path)[-1]["skipped_steps"] == 4


def test_a_skipped_step_changes_no_parameter(tmp_path):
    ready = _Ready(tmp_path, "train.num_steps=1", "schedule.warmup_fraction=0.0")
    before = {n: p.detach().clone() for n, p in ready.module.named_parameters()}
    _poison(ready.module, [0])
    ready.loop.engine.step, step = lambda: (step(), states.append(_same(ready.module, before))), ready.engine.step
    states = []
    ready.train()
    assert states == [True, False]


def _same(module, before):
    return all(torch.equal(p, before[n]) for n, p in module.named_parameters())


def test_a_run_that_only_skips_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module, "MAX_SKIPPED_IN_A_ROW", 5)
    ready = _Ready(tmp_path)
    _poison(ready.module, [*range(2, 6), *range(7, 100)])
    with pytest.raises(DivergedError, match=r"5 optimizer steps in a row .* \(after 3 applied steps\)"):
        ready.train()
    assert ready.engine.skipped_steps == 4 + 5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, value):
    ready = _Ready(tmp_path, "train.gradient_accumulation_steps=2")
    calls = iter(range(100))
    spoil = {5: value}  # the second micro-batch of the third step

    def forward(module, inputs, output):
        output.loss = output.loss * spoil.get(next(calls), 1.0)

    ready.module.register_forward_hook(forward)
    with pytest.raises(DivergedError) as caught:
        ready.train()
    message = str(caught.value)
    assert "the loss of batch 3 is not finite on rank 0 (after 2 applied steps)" in message
    assert "lower the learning rates" in message
    assert all(bool(p.isfinite().all()) for p in ready.module.parameters())


def test_embeddings_that_are_updated_have_a_rate_of_their_own(tmp_path):
    rates = {"score": 1e-2, "update": 2e-3, "embedding": 5e-4, "head": 3e-4}
    settings = (f"train.{name}_learning_rate={rate}" for name, rate in rates.items())
    ready = _Ready(tmp_path, 'pst.update_embeddings=["word_embeddings"]', *settings)
    groups = {g["name"]: g for g in parameter_groups(ready.module, ready.loop.run)}
    assert {name: g["peak_lr"] for name, g in groups.items()} == {
        "scores": 1e-2, "updates": 2e-3, "embeddings": 5e-4, "head": 3e-4,
    }  # fmt: skip
    embedding = ready.module.get_submodule("bert.embeddings.word_embeddings")
    assert [id(p) for p in groups["embeddings"]["params"]] == [id(embedding.pst_U), id(embedding.pst_V)]
    assert sum(len(g["params"]) for g in groups.values()) == sum(p.requires_grad for p in ready.module.parameters())


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_the_attention_is_the_one_asked_for(tmp_path, kind):
    ready = _Ready(tmp_path, f"model.attn_implementation={kind}")
    assert ready.module.config._attn_implementation == kind


def test_in_the_cool_down_scores_and_masks_stand_still_and_updates_go_on(tmp_path):
    seen, rates = {}, {}

    def remember(module, state):
        both = _trained(module, SCORES), _trained(module, UPDATES)
        seen[state.step] = (*both, mask_stats(module).checksum)
        rates[state.step] = {g["name"]: g["lr"] for g in ready.engine.optimizer.param_groups}

    ready = _Ready(tmp_path, seen=remember)
    ready.train()
    end = ready.schedules.masks.ramp_end
    assert end == 16
    for step in range(end + 1, 21):
        scores, updates, checksum = seen[step]
        assert rates[step]["scores"] == 0.0
        assert rates[step]["updates"] > 0.0
        assert all(torch.equal(p, seen[end][0][n]) for n, p in scores.items())
        assert checksum == seen[end][2]
        assert any(not torch.equal(p, seen[step - 1][1][n]) for n, p in updates.items())
    assert all(rates[step]["scores"] > 0.0 for step in range(1, end + 1))
    assert any(not torch.equal(p, seen[end - 1][0][n]) for n, p in seen[end][0].items())
    assert all(not layer.scores_train for layer in pst_layers(ready.module).values())
    factor = learning_rate_factor(9, 20, 0.06)
    peaks = {g["name"]: g["peak_lr"] for g in ready.engine.optimizer.param_groups}
    assert rates[10] == pytest.approx({name: peak * factor for name, peak in peaks.items()})


def test_only_factors_and_the_head_are_trained(tmp_path):
    ready = _Ready(tmp_path)
    before = {n: p.detach().clone() for n, p in ready.module.named_parameters()}
    ready.train()
    changed = {n for n, p in ready.module.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".pst_" in n or n.startswith(("classifier.", "bert.pooler."))}
    in_optimizer = sum(p.numel() for group in ready.engine.optimizer.param_groups for p in group["params"])
    assert in_optimizer == sum(before[n].numel() for n in changed if not n.endswith("pst_mask"))
    assert isinstance(ready.engine, LocalEngine)


def test_the_same_seed_is_the_same_run_and_another_is_not(tmp_path):
    losses = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        (tmp_path / name).mkdir()
        _Ready(tmp_path / name, f"seed={seed}", "model.dropout=0.1", "train.num_steps=4").train()
        losses.append([line["loss"] for line in _lines(tmp_path / name) if line["event"] == "step"])
    assert losses[0] == losses[1] != losses[2]


def test_the_factors_start_by_the_seed_of_the_run_unless_they_have_one(tmp_path):
    def start(*overrides):
        engine = build(_prepared(tmp_path, *overrides))
        return torch.cat([layer.pst_A.detach() for layer in pst_layers(engine.module).values()])

    first = start("seed=1")
    assert torch.equal(first, start("seed=2", "pst.seed=1"))
    assert not torch.equal(first, start("seed=2"))
    assert not torch.equal(first, start("seed=1", "pst.seed=0"))


def test_every_line_of_the_metrics_says_what_it_should(tmp_path):
    result = train_prepared(_prepared(tmp_path / "run", "eval.interval=5"), quiet=True)
    lines = _lines(tmp_path / "run")
    by_event = {name: [line for line in lines if line["event"] == name] for name in {line["event"] for line in lines}}
    assert by_event.keys() == {"step", "mask_update", "scores", "evaluation", "checkpoint"}
    schedule = load_run("tests/data/world_size.toml").make_schedules(20).masks
    steps = by_event["step"]
    assert [line["step"] for line in steps] == list(range(1, 21))
    for line in steps:
        expected = {
            "step", "seconds", "event", "ranks", "loss", "losses", "grad_norm", "lr/scores", "lr/updates", "lr/head",
            "sparsity/target", "sparsity/actual", "flip_rate", "tokens_per_second", "tokens_per_second_per_rank",
            "time/forward", "time/backward", "time/optimizer", "time/masks", "data_wait", "peak_memory_bytes",
            "skipped_steps",
        }  # fmt: skip
        assert line.keys() == expected
        assert math.isfinite(line["loss"])
        assert line["sparsity/target"] == schedule.sparsity_at(line["step"])
        assert line["sparsity/target"] - 0.001 < line["sparsity/actual"] <= line["sparsity/target"]
        assert line["tokens_per_second"] == line["tokens_per_second_per_rank"] > 0
        assert line["grad_norm"] > 0
        parts = [line[f"time/{part}"] for part in ("forward", "backward", "optimizer", "masks")]
        assert min(parts) >= 0.0
        assert 0.0 < sum(parts) <= 1.0
        assert line["peak_memory_bytes"] > 10 * 2**20
    updates = by_event["mask_update"]
    assert [line["step"] for line in updates] == [s for s in range(21) if schedule.updates_masks_at(s)] != []
    for line in updates:
        assert len(bytes.fromhex(line["mask_checksum"])) == 8
        assert 0.0 < line["flip_rate"] < 1.0
    assert len({line["mask_checksum"] for line in updates}) == len(updates)
    assert updates[-1]["mask_checksum"] == result["mask_checksum"]
    assert updates[-1]["sparsity/actual"] == result["sparsity_in_masks"]
    assert [line["step"] for line in by_event["evaluation"]] == [5, 10, 15, 20]
    assert result["metrics"] == {k: by_event["evaluation"][-1][f"eval/{k}"] for k in result["metrics"]}


def test_the_tensorboard_file_holds_the_same_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_prepared(_prepared(tmp_path, "train.log_interval=5"), quiet=True)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "lr/scores", "sparsity/actual", "flip_rate", "eval/accuracy"} <= set(board.Tags()["scalars"])
    logged = {line["step"]: line["loss"] for line in _lines(tmp_path) if line["event"] == "step"}
    assert list(logged) == [1, 5, 10, 15, 20]  # the first, every fifth, the last
    assert {e.step: e.value for e in board.Scalars("loss")} == pytest.approx(logged, rel=1e-6)


@pytest.mark.thorough
def test_the_loss_of_a_line_is_the_mean_since_the_line_before(tmp_path):
    fine, coarse = tmp_path / "fine", tmp_path / "coarse"
    for folder, interval in ((fine, 1), (coarse, 10)):
        folder.mkdir()
        _Ready(folder, f"train.log_interval={interval}", "train.gradient_accumulation_steps=2").train()
    each, means = ({n["step"]: n["loss"] for n in _lines(f) if n["event"] == "step"} for f in (fine, coarse))
    assert means[1] == each[1]
    assert means[10] == pytest.approx(sum(each[s] for s in range(2, 11)) / 9)
    assert means[20] == pytest.approx(sum(each[s] for s in range(11, 21)) / 10)


def test_the_run_folder_can_be_read_back(tmp_path):
    prepared = _prepared(tmp_path, "train.num_steps=2")
    result = train_prepared(prepared, quiet=True)
    assert load_run(tmp_path / "run.toml") == prepared.run.with_rates(
        width=prepared.width, num_steps=2, num_examples=len(prepared.load("train")), num_labels=2
    )
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert open_checkpoint(prepared.run, "final").state.labels == ["bad", "good"]


def test_inputs_that_wait_on_the_host_change_nothing(tmp_path, monkeypatch):
    packed = []
    pack = torch.autograd.graph.save_on_cpu

    class Counting(pack):
        def __init__(self, pin_memory=False):
            super().__init__(pin_memory)
            hook = self.pack_hook
            self.pack_hook = lambda tensor: packed.append(tensor.shape) or hook(tensor)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Counting)
    reentrant = ["model.gradient_checkpointing=true", "model.gradient_checkpointing_reentrant=true"]
    losses = []
    for name, more in (("kept", []), ("waiting", ["model.activation_offload=true"])):
        settings = [f"output_dir={tmp_path / name}", "deepspeed_config=", "train.num_steps=3", *reentrant, *more]
        run = load_run("tests/data/causal_lm.toml", settings)
        train_prepared(prepare(run, LaunchEnvironment(0, 1, 0)), quiet=True)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if line["event"] == "step"])
        assert bool(packed) == bool(more)
    assert losses[0] == losses[1]


def test_blocks_that_keep_their_activations_change_no_loss(tmp_path, monkeypatch):
    computed = []

    def count(block, *arguments):
        computed.append(type(block).__name__)

    losses = {}
    products = {}
    for name, more in {
        "none": [],
        "all": ["model.gradient_checkpointing=true"],
        "first": ["model.gradient_checkpointing=true", "model.recomputed_blocks=1"],
    }.items():
        computed.clear()
        settings = [f"output_dir={tmp_path / name}", "deepspeed_config=", "train.num_steps=2", *more]
        prepared = prepare(load_run("tests/data/causal_lm.toml", settings), LaunchEnvironment(0, 1, 0))
        with torch.nn.modules.module.register_module_forward_pre_hook(count):
            train_prepared(prepared, quiet=True)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in lines if line["event"] == "step"]
        products[name] = computed.count("LlamaMLP")
    assert losses["none"] == losses["all"] == losses["first"]
    blocks = (products["all"] - products["none"]) // 2  # a step recomputes each once
    assert blocks > 1
    assert products["first"] - products["none"] == 2
