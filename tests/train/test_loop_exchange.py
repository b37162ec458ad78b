"""Between the backward pass and the optimizer nothing waits; a loss that is not finite moves no weight all the same."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pst_ds.config.toml import load_run
from pst_ds.parallel import sharding
from pst_ds.parallel.launch import launch_environment
from pst_ds.parallel.ranks import rank
from pst_ds.train import run as run_module
from pst_ds.train.divergence import DivergedError
from pst_ds.train.run import prepare, train_prepared

_NAMES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "broadcast_object_list", "gather", "monitored_barrier", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "scatter",
)  # fmt: skip
COLLECTIVES = [name for name in _NAMES if hasattr(dist, name)]
READS = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "cpu")
STARTED = "all_gather_into_tensor, not waited for"
SYNCHRONOUS = {"zero_optimization": {"stage": 2, "compute_grad_norm": False}}
"""An engine that applies gradients which are not finite."""


class _Watched:
    """What is asked of other ranks and of the device, between the last backward pass of a batch and its optimizer step,
    and after the step until the next batch."""

    def __init__(self, patch, accumulation):
        self.before_step, self.after_step = [], []
        self._into = None
        self._passes = 0
        self._accumulation = accumulation
        for name in COLLECTIVES:
            patch.setattr(dist, name, self._collective(name, getattr(dist, name)))
        patch.setattr(dist.Work, "wait", self._noted("wait", dist.Work.wait))
        for name in READS:
            patch.setattr(Tensor, name, self._noted(name, getattr(Tensor, name)))

    def engine(self, engine):
        """Watch an engine's passes and steps."""
        backward, step = engine.backward, engine.step

        def watched_backward(loss):
            self._into = None
            backward(loss)
            self._passes += 1
            if self._passes % self._accumulation == 0:
                self._into = []
                self.before_step.append(self._into)

        def watched_step():
            self._into = None
            step()
            if self._passes % self._accumulation == 0:
                self._into = []
                self.after_step.append(self._into)

        engine.backward, engine.step = watched_backward, watched_step
        return engine

    def _noted(self, name, action):
        def noted(*args, **kwargs):
            if self._into is not None:
                self._into.append(name)
            return action(*args, **kwargs)

        return noted

    def _collective(self, name, action):
        def noted(*args, **kwargs):
            if self._into is not None:
                self._into.append(f"{name}, not waited for" if kwargs.get("async_op") else name)
            return action(*args, **kwargs)

        return noted


def _run(folder, *settings):
    return load_run("tests/data/world_size.toml", [f"output_dir={json.dumps(str(folder))}", *settings])


def _watched(folder, accumulation, *settings):
    """What each batch of a short run asks for, before and after its optimizer step."""
    quiet = ["train.num_steps=4", "train.log_interval=4", "layer_statistics.interval=-1", "checkpoint.interval=0"]
    quiet += ["schedule.update_interval=100", "schedule.cooldown_fraction=0", "eval.interval=-1"]
    prepared = prepare(
        _run(folder, *quiet, f"train.gradient_accumulation_steps={accumulation}", *settings), launch_environment()
    )
    build = run_module.build
    with pytest.MonkeyPatch.context() as patch:
        watched = _Watched(patch, accumulation)
        patch.setattr(run_module, "build", lambda *args, **named: watched.engine(build(*args, **named)))
        train_prepared(prepared, quiet=True)
    return watched.before_step, watched.after_step


@pytest.mark.zero3
@pytest.mark.few(1)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("config", ["ds_configs/zero3_cpu.json", "ds_configs/zero2.json"])
def test_no_rank_waits_between_the_backward_pass_and_the_optimizer(run_ranks, tmp_path, config, accumulation):
    for before, after in run_ranks(_watched, 2, tmp_path, accumulation, f"deepspeed_config={config}"):
        assert before == [[STARTED]] * 4
        assert all(batch[:2] == ["wait", "tolist"] for batch in after)
        assert not any(name.startswith("all_gather_into_tensor") for name in after[1])


@pytest.mark.zero3
def test_a_rank_waits_there_if_the_engine_would_apply_what_is_not_finite(run_ranks, tmp_path):
    settings = _config(tmp_path, SYNCHRONOUS)
    for before, _ in run_ranks(_watched, 2, tmp_path / "run", 1, *settings):
        assert before == [[STARTED, "wait", "tolist"]] * 4


def test_one_process_reads_the_loss_after_the_optimizer(tmp_path):
    before, after = _watched(tmp_path, 2, "deepspeed_config=")
    assert before == [[]] * 4
    assert all(batch[0] == "tolist" for batch in after)


def _config(folder, config):
    """The settings of a run with this DeepSpeed config, without gradient clipping."""
    folder.mkdir(exist_ok=True)
    path = folder / "deepspeed_of_test.json"
    path.write_text(json.dumps(config))
    return [f"deepspeed_config={json.dumps(str(path))}", "train.gradient_clipping=0"]


def _values_around_a_bad_loss(folder, *settings):
    """Message of a run whose loss is infinite in batch 3 on the last rank, with finite gradients; whether every
    parameter has the value that it had before the batch, and is finite."""
    prepared = prepare(_run(folder, "train.num_steps=6", *settings), launch_environment())
    build, kept = run_module.build, {}

    def spoiled(*args, **named):
        engine = build(*args, **named)
        batches = iter(range(1, 100))

        def spoil(module, inputs, output):
            if next(batches) == 3:
                kept["before"] = [sharding.shard_of(param).values.clone() for param in module.parameters()]
                if rank() == 1:
                    output.loss = output.loss + math.inf  # unlike a product, this has the gradient 1

        engine.module.register_forward_hook(spoil)
        return engine

    def unchanged(engine):
        now = [sharding.shard_of(param).values for param in engine.module.parameters()]
        kept["unchanged"] = all(map(torch.equal, now, kept["before"]))
        kept["finite"] = all(bool(values.isfinite().all()) for values in now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "build", spoiled)
        patch.setattr(run_module, "release", unchanged)
        with pytest.raises(DivergedError) as caught:
            train_prepared(prepared, quiet=True)
    return str(caught.value), kept["unchanged"], kept["finite"]


ENGINES = {
    "zero3": ["deepspeed_config=ds_configs/zero3_cpu.json", "train.gradient_clipping=0"],
    "zero2": ["deepspeed_config=ds_configs/zero2.json", "train.gradient_clipping=0"],
    "zero2 in bf16": ["deepspeed_config=ds_configs/zero2.json", "train.precision=bf16"],
}


@pytest.mark.zero3
@pytest.mark.few(2)
@pytest.mark.parametrize("name", [*ENGINES, "stage 0", "unchecked"])
def test_an_infinite_loss_with_finite_gradients_moves_no_weight(run_ranks, tmp_path, name):
    settings = ENGINES.get(name) or _config(tmp_path, {} if name == "stage 0" else SYNCHRONOUS)
    for message, is_unchanged, is_finite in run_ranks(_values_around_a_bad_loss, 2, tmp_path / "run", *settings):
        assert "the loss of batch 3 is not finite on rank 1 (after 2 applied steps)" in message
        assert is_unchanged
        assert is_finite
    assert not (tmp_path / "run/checkpoints/final").exists()
