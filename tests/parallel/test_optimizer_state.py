"""What every engine's optimizer holds is found: each trained value once, with its master and its moments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pst_ds.parallel import optimizer_state, sharding
from pst_ds.parallel.engine import build_engine
from pst_ds.parallel.optimizer_state import KINDS, MASTER
from pst_ds.parallel.ranks import rank, world_size

SHAPES = {"one.weight": (7, 5), "one.bias": (7,), "two.weight": (11, 7), "three.weight": (3, 11), "three.bias": (3,)}
"""Odd sizes; two.bias is frozen."""


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three = nn.Linear(5, 7), nn.Linear(7, 11), nn.Linear(11, 3)
        self.two.bias.requires_grad_(False)

    def forward(self, x):
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


def _engine(stage, dtype, steps, **zero):
    """After ``steps`` steps on the same batches on every rank; stage None is the engine of one process."""
    model = _Net().to(dtype)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 4, "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16}, "zero_optimization": {"stage": stage, **zero},
    }  # fmt: skip
    groups = [
        {"params": [p for n, p in named if n.startswith("one")], "lr": 1e-2, "name": "a"},
        {"params": [p for n, p in named if not n.startswith("one")], "lr": 1e-3, "name": "b"},
    ]
    engine = build_engine(model, groups, ds_config=None if stage is None else config)
    for i in range(steps):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(i)).to(dtype)
        engine.backward(engine(x).float().square().sum())
        engine.step()
    return engine, [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]


def _held(stage, dtype, steps, zero):
    """Return of a rank: fragments as (name, start, stop), their values by kind, Adam's counts, whole masters by the
    other way, DeepSpeed's own whole moments or None."""
    engine, named = _engine(stage, dtype, steps, **zero)
    fragments = optimizer_state.local_fragments(engine, named)
    values = {k: [v.clone() for v in optimizer_state.values(engine, fragments, k)] for k in KINDS}
    masters = dict(zip((n for n, _ in named), sharding.fp32_masters([p for _, p in named]), strict=True))
    own = None
    if stage in (1, 2, 3) and steps:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if stage < 3:  # DeepSpeed looks for moments after the first group's first step, when the others have none yet
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        own = {k: {n: safe_get_full_optimizer_state(p, k).clone() for n, p in named} for k in KINDS[1:]}
        own[MASTER] = {n: safe_get_full_fp32_param(p).clone() for n, p in named}
    steps_of = optimizer_state.adam_steps(engine, fragments)
    replicated = optimizer_state.is_replicated(p for _, p in named)
    return [(p.name, p.start, p.stop) for p in fragments], values, steps_of, masters, own, replicated


def _whole(outcomes, kind):
    """Every value put where its fragment says; and how often each was held."""
    whole = {n: torch.full((torch.Size(shape).numel(),), float("nan")) for n, shape in SHAPES.items()}
    times = {n: torch.zeros(flat.numel(), dtype=torch.int) for n, flat in whole.items()}
    for fragments, values, *_ in outcomes:
        for (name, start, stop), found in zip(fragments, values[kind], strict=True):
            assert found.dtype == torch.float32
            assert found.shape == (stop - start,)
            whole[name][start:stop] = found
            times[name][start:stop] += 1
    return {n: flat.view(SHAPES[n]) for n, flat in whole.items()}, times


def _assert_complete(outcomes, held, dtype):
    """Fragments hold every value ``held`` times, and all that is in them is what others say."""
    for kind in KINDS:
        whole, times = _whole(outcomes, kind)
        assert {n: set(count.tolist()) for n, count in times.items()} == {n: {held} for n in SHAPES}
        for _, _, _, masters, own, _ in outcomes:
            if kind == MASTER:
                assert all(torch.equal(whole[n], masters[n]) for n in SHAPES)
            if own is not None:
                assert all(torch.equal(whole[n], own[kind][n].view(SHAPES[n])) for n in SHAPES), kind
    whole, _ = _whole(outcomes, MASTER)
    if dtype == torch.bfloat16:  # it is the master, of which the model has a rounded copy
        assert not torch.equal(whole["one.weight"], whole["one.weight"].bfloat16().float())


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
def test_one_process_holds_everything_whole(dtype):
    outcome = _held(None, dtype, 3, {})
    fragments, values, steps, _, _, replicated = outcome
    assert fragments == [(n, 0, torch.Size(shape).numel()) for n, shape in SHAPES.items()]
    assert replicated
    assert steps == dict.fromkeys(SHAPES, 3)
    _assert_complete([outcome], 1, dtype)
    reference = _Net()
    groups = [{"params": list(reference.one.parameters()), "lr": 1e-2}, {"params": [reference.two.weight], "lr": 1e-3}]
    adam = torch.optim.Adam([*groups, {"params": list(reference.three.parameters()), "lr": 1e-3}])
    for i in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(i))
        adam.zero_grad()
        reference(x).square().sum().backward()
        adam.step()
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.15}
    for i, (name, param) in enumerate((n, p) for n, p in reference.named_parameters() if n in SHAPES):
        assert fragments[i][0] == name
        torch.testing.assert_close(values["exp_avg"][i], adam.state[param]["exp_avg"].flatten(), **tolerance)
        torch.testing.assert_close(values[MASTER][i], param.detach().flatten(), **tolerance)


STAGES = {
    "0": (0, {}), "1": (1, {}), "2": (2, {}), "3": (3, {"stage3_param_persistence_threshold": 0}),
    "3-persistent": (3, {"stage3_param_persistence_threshold": 10**5}),
    "3-groups": (3, {"stage3_param_persistence_threshold": 0, "sub_group_size": 40}),
    "3-offload": (3, {"offload_optimizer": {"device": "cpu"}}),
}  # fmt: skip


def _every_stage(dtype, names):
    return {name: _held(STAGES[name][0], dtype, 3, STAGES[name][1]) for name in names}


@pytest.mark.zero3
@pytest.mark.parametrize(
    ("world", "dtype", "names"),
    [(2, torch.bfloat16, list(STAGES)), (2, torch.float32, ["0", "2", "3"]), (3, torch.bfloat16, ["1", "3"])],
    ids=["2-bf16", "2-fp32", "3-bf16"],
)
def test_ranks_hold_every_value_once_with_deepspeed_s_own_masters_and_moments(run_ranks, world, dtype, names):
    alone = _held(None, dtype, 3, {})
    by_rank = run_ranks(_every_stage, world, dtype, names)
    for name in names:
        outcomes = [found[name] for found in by_rank]
        assert {outcome[-1] for outcome in outcomes} == {name == "0"}  # replicated
        _assert_complete(outcomes, world if name == "0" else 1, dtype)
        for fragments, _, steps, *_ in outcomes:
            order = [list(SHAPES).index(n) for n, _, _ in fragments]
            assert order == sorted(order)
            # DeepSpeed's stage 0 begins with a step of zeros in bf16, and Adam's bias correction counts it
            assert steps == dict.fromkeys((n for n, _, _ in fragments), 3 + (name == "0" and dtype == torch.bfloat16))
        for kind in KINDS:  # all ranks had the same batches, so one process ends near there
            whole, _ = _whole(outcomes, kind)
            for fragment, flat in zip(alone[0], alone[1][kind], strict=True):
                wanted = flat.view(SHAPES[fragment[0]])
                largest = float(wanted.abs().max())
                tolerance = 1e-5 if dtype == torch.float32 else 0.1
                torch.testing.assert_close(whole[fragment[0]], wanted, rtol=0, atol=tolerance * largest)


def _before_the_first_step(names):
    """Moments and counts where there are none yet, and after they are prepared and written."""
    found = {}
    for name in names:
        stage, zero = STAGES[name] if name != "local" else (None, {})
        engine, named = _engine(stage, torch.bfloat16, 0, **zero)
        fragments = optimizer_state.local_fragments(engine, named)
        fresh = [optimizer_state.values(engine, fragments, kind) for kind in KINDS[1:]]
        zeros = all(not view.any() for views in fresh for view in views)
        counts = set(optimizer_state.adam_steps(engine, fragments).values())
        optimizer_state.prepare_moments(engine, fragments, dict.fromkeys(SHAPES, 5))
        for i, kind in enumerate(KINDS):
            for view in optimizer_state.values(engine, fragments, kind):
                view.copy_(torch.arange(view.numel()) + 1000.0 * i + 100 * rank())
        again = [
            all(v.tolist() == [j + 1000.0 * i + 100 * rank() for j in range(v.numel())] for v in views)
            for i, views in enumerate(optimizer_state.values(engine, fragments, kind) for kind in KINDS)
        ]
        found[name] = (zeros, counts, again, set(optimizer_state.adam_steps(engine, fragments).values()), world_size())
    return found


@pytest.mark.zero3
def test_views_of_moments_are_the_engine_s_own_once_they_are_prepared(run_ranks):
    assert _before_the_first_step(["local"]) == {"local": (True, {0}, [True] * 3, {5}, 1)}
    names = ["0", "1", "3-groups", "3-offload"]
    for found in run_ranks(_before_the_first_step, 2, names):
        assert found == {name: (True, {int(name == "0")}, [True] * 3, {5}, 2) for name in names}


def test_a_fragment_is_cut_to_the_part_within_a_range():
    owner = torch.arange(100.0)
    fragment = optimizer_state.Fragment("a", 10, 20, owner, 50)
    for start in range(30):
        for stop in range(start, 30):
            part = fragment.cut(start, stop)
            wanted = [i for i in range(start, stop) if 10 <= i < 20]
            assert list(range(part.start, part.stop)) == wanted
            assert owner[part.offset : part.offset + part.stop - part.start].tolist() == [i + 40 for i in wanted]
