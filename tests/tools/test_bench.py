"""The benchmarks measure what they say: the baselines compute their algorithms, and each script prints its keys."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.core.bits import unpack_range
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from tools.bench.baselines import PlainPST, replace_linears
from tools.bench.mask_update import PICKS, MaskUpdates, gathered_update, share_at
from tools.bench.mask_update import ratios as update_ratios
from tools.bench.ranks import Ranks
from tools.bench.train_step import fitting_layers, needed_gib, summary
from tools.bench.variants import METHODS, Shape, Variant

TINY = Shape(hidden=32, intermediate=48, layers=2, heads=2, vocabulary=64, sequence=8, batch=2, rank=2)
TINY_ARGUMENTS = [
    *("--hidden", "32", "--intermediate", "48", "--layers", "1", "--heads", "2", "--vocabulary", "64"),
    *("--sequence", "8"),
]


def twins(sparsity):
    """A PST layer with the paper's constants and the plain one, on the same weight and factors, random and fp32."""
    torch.manual_seed(1)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(24, 40)])
    plain = nn.Module()
    plain.layers = nn.ModuleList([nn.Linear(24, 40)])
    plain.load_state_dict(model.state_dict())
    replace_linears(plain, [("layers.0", plain.layers[0])], PlainPST, 3, sparsity)
    inject_pst(model, PSTConfig.paper(score_rank=3, update_rank=3, modules_to_save=()))
    (ours,) = pst_layers(model).values()
    theirs = plain.layers[0]
    theirs.weight.requires_grad_(False)
    with torch.no_grad():
        for name, param in ours.factor_parameters():
            other = getattr(theirs, name)
            other.normal_(std=0.2)
            param.copy_(other.view_as(param))
    update_masks(model, sparsity)
    return ours, theirs


def test_the_plain_algorithm_and_pst_compute_the_same_layer_and_gradients():
    ours, theirs = twins(0.6)
    x = torch.randn(2, 7, 24)
    results = []
    for layer in (ours, theirs):
        own = x.clone().requires_grad_()
        y = layer(own)
        (y * torch.sin(torch.arange(y.numel()).view_as(y))).sum().backward()
        results.append((y, own.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    for name, param in ours.factor_parameters():
        other = getattr(theirs, name).grad
        torch.testing.assert_close(param.grad, other.view_as(param), rtol=1e-3, atol=1e-3, msg=name)


def test_the_gathered_update_selects_what_ours_selects():
    ours, _ = twins(0.6)
    for name in PICKS:
        (mask,) = gathered_update([ours], 0.6, PICKS[name])
        own = unpack_range(ours.pst_mask.detach(), ours.layout.numel, ours.num_shards, 0, ours.layout.numel)
        assert torch.equal(own.bool(), mask), name
        assert int((~mask).sum()) == math.floor(0.6 * mask.numel())


def step_of_every_method():
    found = {}
    for method in METHODS:
        variant = Variant(method, TINY)
        found[method] = (variant.step(), variant.facts())
    return found


@pytest.mark.zero3
def test_every_method_takes_a_step_on_two_ranks(run_ranks):
    for by_method in run_ranks(step_of_every_method, 2):
        for method, (seconds, facts) in by_method.items():
            parts = {"forward", "backward", "optimizer", "step"} | ({"mask_update"} if method == "pst" else set())
            assert set(seconds) == parts | {f"cpu_{part}" for part in parts}
            assert seconds["step"] == pytest.approx(sum(seconds[p] for p in ("forward", "backward", "optimizer")))
            assert facts["optimizer_state"] == pytest.approx(facts["trainables"] * 12 / 2, rel=0.02), method
        block = 4 * 32 * 32 + 3 * 32 * 48
        factors = 2 * (4 * 2 * (32 + 32) + 3 * 2 * (32 + 48))  # of one pair, rank 2, two layers
        one_more = 2 * (4 * (32 + 32) + 3 * (32 + 48))  # R and C
        whole = 2 * 64 * 32 + 2 * block + 5 * 32
        trained = {method: facts["trainables"] for method, (_, facts) in by_method.items()}
        assert trained == {
            "pst": 2 * factors + one_more,
            "plain": 2 * factors + one_more,
            "lora": factors,
            "full_finetuning": whole,
        }
        assert by_method["pst"][1]["weight_shards"] == pytest.approx(whole, rel=0.01)  # two bytes, two ranks
        assert by_method["pst"][1]["masks"] == pytest.approx(2 * block / 8 / 2, rel=0.05)


def mask_update_round():
    measured = MaskUpdates(64)
    return measured.round(1), measured.agreement()


@pytest.mark.zero3
def test_a_round_of_mask_updates_on_two_ranks(run_ranks):
    for seconds, agreement in run_ranks(mask_update_round, 2):
        names = {"ours", "read", *PICKS}
        assert set(seconds) == names | {f"cpu_{name}" for name in names}
        assert agreement > 0.999


def test_a_baseline_that_memory_does_not_hold_runs_at_fewer_layers():
    shape = Shape()
    needs = [needed_gib("plain", replace(shape, layers=n)) for n in range(1, shape.layers + 1)]
    assert fitting_layers("plain", shape, free=1000.0) == shape.layers
    assert fitting_layers("plain", shape, free=needs[3] / 0.8 + 0.01) == 4
    assert fitting_layers("plain", shape, free=needs[0] / 0.8 - 0.01) == 0


def test_ratios_are_ours_over_theirs():
    def pair(baseline):
        ours = {"step": 2.0, "mask_update": 1.0, "cpu_step": 1.5, "cpu_mask_update": 0.3}
        return {
            "pst": {"seconds": ours, "bytes_per_rank": {"memory": 3}},
            baseline: {"seconds": {"step": 4.0, "cpu_step": 3.0}, "bytes_per_rank": {"memory": 12}},
        }

    report = summary({"not_run": {}, "pairs": {"lora": pair("lora"), "plain": pair("plain")}})
    assert report["ratios"] == {"lora": 0.5, "plain": 0.75}
    assert report["ratios_with_update"] == {"lora": 0.75, "plain": 0.75}
    assert report["ratios_without_update"] == {"lora": 0.5, "plain": 0.5}
    assert report["memory_ratios"] == {"lora": 0.25, "plain": 0.25}
    assert report["cpu_ratios"] == pytest.approx({"lora": 0.5, "plain": 0.6})


def test_the_ratio_of_ranks_is_taken_at_the_largest_size():
    def size(ranks, weights, seconds):
        measured = {"ours": seconds, "cpu_ours": seconds**2, "ours_after_10_steps": 2 * seconds}
        measured |= {
            f"{kind}{name}": 8.0 for kind in ("", "cpu_") for name in ("gather_topk", "gather_kthvalue", "read")
        }
        return {"ranks": ranks, "weights": weights, "seconds": measured}

    found = update_ratios([size(1, 10, 9.0), size(2, 10, 9.0), size(1, 20, 4.0), size(2, 20, 2.0)])
    assert found["ratios"]["two_ranks_over_one"] == 0.5
    assert found["ratios"]["gather_topk"] == 0.25
    assert found["cpu_ratios"]["two_ranks_over_one"] == 0.25
    assert found["cpu_ratios"]["read"] == 0.5
    assert found["after_10_steps"] == 2.0


def test_the_share_of_a_step_is_extrapolated_by_layers():
    def point(layers):  # a step of 1 + 2 s a layer, an update of 0.3 s a layer
        step, update = 1.0 + 2.0 * layers, 0.3 * layers
        return {"step": step, "cpu_step": step / 2, "mask_update": update, "cpu_mask_update": update / 4}

    found = share_at(10, {1: point(1), 3: point(3)}, after_10_steps=1.5)
    assert found["interval_1"] == pytest.approx(3.0 / 21.0)
    assert found["interval_10"] == pytest.approx(3.0 / 21.0 * 0.15)
    assert found["cpu_interval_1"] == pytest.approx(3.0 / 21.0 / 2)


def run_script(name, *arguments):
    """In an interpreter, from which ranks are spawned, as benchmarks are; of the others see ``forked_bench``."""
    command = [sys.executable, "-m", f"tools.bench.{name}", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.zero3
def test_train_step_prints_its_object_and_goes_on_from_earlier_results(forked_bench, tmp_path):
    results = tmp_path / "train_step.json"
    options = ["--ranks", "1", "--repeats", "1", "--results", str(results), *TINY_ARGUMENTS]
    found = forked_bench("train_step", "--methods", "lora", *options)
    assert set(found["ratios"]) == set(found["memory_ratios"]) == {"lora"}
    assert found["conditions"]["ranks"] == 1
    assert found["conditions"]["shape"]["hidden"] == 32
    assert {"hardware", "threads_per_rank", "versions", "zero_stage"} <= set(found["conditions"])
    assert found["pairs"]["lora"]["repeats"] == 1
    again = forked_bench("train_step", "--methods", "", *options)
    assert again["ratios"] == pytest.approx(found["ratios"], rel=0.01)


@pytest.mark.zero3
def test_mask_update_prints_its_object():
    found = run_script("mask_update", "--ranks", "2", "--widths", "32", "--repeats", "1", "--no-share")
    assert {"gather_topk", "gather_kthvalue", "read"} <= set(found["ratios"])
    (size,) = found["sizes"]
    assert size["weights"] == 8 * 32 * 32
    assert size["agreement"] > 0.999


@pytest.mark.zero3
def test_a_rank_that_fails_ends_the_benchmark_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)rank 0: Traceback.*ZeroDivisionError"):
        Ranks(1, divmod, 1, 0)


@pytest.mark.zero3
def test_a_rank_that_is_gone_is_reported():
    with Ranks(1, dict) as gone:
        assert gone.call("get", "key", 3) == [3]
        gone.workers[0].process.kill()
        gone.workers[0].process.join()
        with pytest.raises(RuntimeError, match="rank 0: the process ended"):
            gone.call("get", "key")
