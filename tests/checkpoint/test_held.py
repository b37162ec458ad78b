"""States that are held after each step, and the one that all ranks can save while a step is under way."""

from __future__ import annotations

import pytest
import torch

from pst_ds.checkpoint import writer as checkpoint_writer
from pst_ds.checkpoint.format import CheckpointState, read_checkpoint
from pst_ds.checkpoint.held import NEVER, HeldSave, HeldStates
from pst_ds.checkpoint.restore import weight_scales
from pst_ds.config.pst import PSTConfig
from pst_ds.core.bits import pack_shard
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel.engine import build_engine
from pst_ds.parallel.ranks import barrier, rank


class _Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(12, 9), torch.nn.Linear(9, 12)])
        self.classifier = torch.nn.Linear(12, 2)

    def forward(self, x):
        return self.classifier(torch.tanh(self.layers[1](torch.tanh(self.layers[0](x)))))


def _engine():
    torch.manual_seed(0)
    model = inject_pst(_Net(), PSTConfig())
    params = [p for p in model.parameters() if p.requires_grad]
    return build_engine(model, [{"params": params, "lr": 1e-2, "name": "all"}], ds_config=None)


def _step(engine):
    engine.backward(engine(torch.ones(4, 12)).square().sum())
    engine.step()


def _state(engine, step):
    scales = weight_scales(engine.module)
    return CheckpointState(
        step, 0.5, False, "fp32", "cpu", "base", "f00d", ["a", "b"], scales, {}, progress={"batch": step}
    )


def _now(engine):
    """What a checkpoint has of the engine."""
    params = engine.module.named_parameters()
    values = {n: getattr(p, "fp32_master", p).detach().flatten().clone() for n, p in params if p.requires_grad}
    return values | {f"mask {n}": layer.pst_mask.clone() for n, layer in pst_layers(engine.module).items()}


def _saved(folder, names):
    checkpoint = read_checkpoint(folder)
    masks = {f"mask {n}": checkpoint.mask_shard(n, 1, 0) for n in checkpoint.contents.masks}
    return masks | {n: checkpoint.trained[n].flatten() for n in names if n not in masks}


@pytest.mark.parametrize("last", [1, 2, 3, 4, 5, 6])
def test_the_last_state_is_saved_with_its_own_masks(tmp_path, last):
    """Masks change after the third step and the fourth, and are shared by the states in between."""
    engine, said = _engine(), []
    held, masks = HeldStates(tmp_path, engine), object()
    for step in range(1, last + 1):
        _step(engine)
        if step in (3, 4):
            masks = object()
            for layer in pst_layers(engine.module).values():
                keep = torch.rand(layer.layout.numel) < 0.6
                layer.pst_mask.data.copy_(pack_shard(keep, layer.pst_mask.numel()))
        held.hold(_state(engine, step), masks)
        wanted = _now(engine)
    _step(engine)
    for layer in pst_layers(engine.module).values():
        layer.pst_mask.data.zero_()
    assert held.save(said.append) == HeldSave(last)
    assert [state.step for state in said] == [last]
    found = _saved(tmp_path / f"step-{last:08d}", wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_nothing_is_held_before_the_first_step(tmp_path):
    assert HeldStates(tmp_path, _engine()).save(pytest.fail) == HeldSave(NEVER)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path):
    engine = _engine()
    held = HeldStates(tmp_path, engine)
    _step(engine)
    held.hold(_state(engine, 1), None)
    (tmp_path / "step-00000001").mkdir()
    assert held.save(pytest.fail) == HeldSave(1)
    assert list((tmp_path / "step-00000001").iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    engine = _engine()
    held = HeldStates(tmp_path, engine)
    _step(engine)
    held.hold(_state(engine, 1), None)

    def full(path, pieces):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "write_pieces", full)
    assert held.save(pytest.fail) == HeldSave(1, "rank 0: [Errno 28] No space left on device")
    assert list(tmp_path.iterdir()) == []


def _ahead(folder, steps):
    """Hold as many steps as ``steps`` says of this rank, and save; what held what was saved, and what is on disk."""
    engine, at = _engine(), {}
    held = HeldStates(folder, engine)
    for step in range(1, steps[rank()] + 1):
        _step(engine)
        held.hold(_state(engine, step), None)
        at[step] = _now(engine)
    result = held.save(lambda state: None)
    held.hold(_state(engine, 9), None)  # too late
    barrier()
    wanted = at[result.step]
    found = _saved(folder / f"step-{result.step:08d}", wanted)
    return result, [name for name in wanted if not torch.equal(found[name], wanted[name])]


@pytest.mark.zero3
@pytest.mark.parametrize("steps", [(5, 5), (6, 5), (5, 6)])
def test_ranks_save_the_last_step_that_all_have_ended(run_ranks, tmp_path, steps):
    assert run_ranks(_ahead, 2, tmp_path / "run", steps) == [(HeldSave(5), [])] * 2
