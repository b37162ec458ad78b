"""Norms of the layers' inputs, as plain hooks on the plain model count them; kept for a run that is continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModel, AutoTokenizer

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.config.pst import PSTConfig
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.core.bits import unpack_range
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel.launch import LaunchEnvironment, launch_environment
from pst_ds.train.calibration import NORMS_FILE, activation_norms, summed_squares
from pst_ds.train.run import build, prepare, train_prepared

RUN_FILE = "tests/data/world_size.toml"
ACTIVATION = ["pst.magnitude=activation", "pst.calibration_examples=16"]


def _by_hooks(module, task, examples, tokenizer):
    """One text at a time, so that there is no padding: norms of what the model's linear layers get."""
    squares = {}
    handles = []
    for name, layer in pst_layers(module).items():

        def add(_, args, name=name):
            squares[name] = squares.get(name, 0.0) + args[0].double().square().flatten(0, -2).sum(0)

        handles.append(layer.register_forward_pre_hook(add))
    with torch.no_grad():
        for i in range(12):
            module(**{k: v for k, v in task.collate(examples, [i], tokenizer).items() if k != "labels"})
    for handle in handles:
        handle.remove()
    return {name: (s.sqrt() / s.sqrt().mean()).float() for name, s in squares.items()}


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_norms_are_those_of_real_tokens_whatever_the_batches(tmp_path, batch_size):
    settings = ["deepspeed_config=", f"output_dir={json.dumps(str(tmp_path))}", f"eval.batch_size={batch_size}"]
    prepared = prepare(load_run(RUN_FILE, settings), LaunchEnvironment(0, 1, 0))
    engine = build(prepared)
    examples = prepared.load("train")
    expected = _by_hooks(engine.module.eval(), prepared.task, examples, prepared.tokenizer)
    update_masks(engine.module, 0.9)  # the norms are the dense model's all the same
    found = activation_norms(engine, prepared, examples, range(12))
    assert found.keys() == expected.keys()
    for name, norms in found.items():
        assert norms.shape == (pst_layers(engine.module)[name].layout.in_features,)
        assert torch.allclose(norms, expected[name], rtol=1e-4), name
        assert float(norms.mean()) == pytest.approx(1.0, abs=1e-5)
    assert engine.module.training


@pytest.mark.parametrize("method", ["masked-lora", "magnitude"])
def test_a_fixed_mask_ranks_weights_times_the_norms_of_a_plain_model(tmp_path, method):
    lines = Path("tests/data/train.jsonl").read_text().splitlines(keepends=True)[:12]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    data = [f'data.train="{tmp_path / "train.jsonl"}"', "data.validation=", "train.batch_size=12"]
    folder = tmp_path / "run"
    _train(folder, f"method={method}", *ACTIVATION, *data, "deepspeed_config=", "train.num_steps=1")
    masks = read_checkpoint(folder / "checkpoints" / "final").masks
    base = AutoModel.from_pretrained("tests/data/tiny-bert").eval()
    tokenizer = AutoTokenizer.from_pretrained("tests/data/tiny-bert")
    squares = {name.removeprefix("bert."): 0.0 for name in masks}
    for name in squares:
        base.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: squares.update({name: squares[name] + args[0].double().square().sum((0, 1))})
        )
    with torch.no_grad():
        for line in lines:
            text = json.loads(line)["text"]
            base(**tokenizer(text, truncation=True, max_length=32, return_tensors="pt"))
    for name, bits in masks.items():
        weight = base.get_submodule(name.removeprefix("bert.")).weight.detach()
        scores = (weight.double().abs() * squares[name.removeprefix("bert.")].sqrt()).flatten()
        kept = unpack_range(bits, weight.numel(), 1, 0, weight.numel()).bool()
        assert int((~kept).sum()) == int(0.8 * weight.numel())
        assert float(scores[kept].min()) >= float(scores[~kept].max()) * (1 - 1e-5), name
        plain = weight.abs().flatten()
        assert float(plain[kept].min()) < 0.9 * float(plain[~kept].max()), name


def _train(folder, *overrides, resume=False):
    run = load_run(RUN_FILE, [f"output_dir={json.dumps(str(folder))}", *overrides])
    return train_prepared(prepare(run, launch_environment()), quiet=True, resume=resume)


def test_a_continued_run_has_the_norms_it_began_with(tmp_path):
    settings = [
        *ACTIVATION,
        "deepspeed_config=",
        "checkpoint.interval=5",
        "checkpoint.keep_last=9",
        "train.num_steps=14",
    ]
    whole = _train(tmp_path / "whole", *settings)
    weight = _train(tmp_path / "weight", *settings, "pst.magnitude=weight")
    assert whole["mask_checksum"] != weight["mask_checksum"]
    folder = tmp_path / "whole"
    for name in ("checkpoints/step-00000014", "checkpoints/step-00000010"):
        shutil.rmtree(folder / name)
    for link in ("final", "latest", "best"):
        (folder / "checkpoints" / link).unlink(missing_ok=True)
    (folder / "checkpoints" / "latest").symlink_to("step-00000005")
    norms = (folder / NORMS_FILE).read_bytes()
    (folder / NORMS_FILE).unlink()
    with pytest.raises(ConfigError, match="needs the norms it started with"):
        _train(folder, *settings, resume=True)
    (folder / NORMS_FILE).write_bytes(norms)
    again = _train(folder, *settings, resume=True)
    assert again["mask_checksum"] == whole["mask_checksum"]
    assert (folder / NORMS_FILE).read_bytes() == norms


class _Toy(nn.Module):
    """Layers that are given numbers as they are, of which one is called twice, and one for some batches alone."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(24, 2) for name in ("twice", "even", "never")})
        inject_pst(self, PSTConfig(target_modules=("twice", "even", "never"), modules_to_save=()))

    @property
    def module(self):
        return self

    def forward(self, x):
        for part in (x, 3 * x):
            self.layers["twice"](part)
        if int(x[0, 0, 0]) % 2 == 0:
            self.layers["even"](x)


class _Numbers:
    """Examples of (length, 24) numbers whose squares are so far apart that the order of their sum can be seen."""

    pads = False

    def __init__(self, count):
        rng = torch.Generator().manual_seed(0)
        self.values = torch.randn(count, 3, 24, generator=rng) * 10.0 ** torch.randint(
            -9, 9, (count, 1, 24), generator=rng
        )
        self.values[:, 0, 0] = torch.arange(count)
        self.lengths = [3] * count

    def collate(self, examples, indices, tokenizer):
        return {"x": self.values[indices]}


def _sums_of_toy(indices):
    """Batches of one example each."""
    numbers = _Numbers(24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather_object", None)  # would hold the sums of every rank at once
        context = SimpleNamespace(task=numbers, run=SimpleNamespace(eval_batch_size=1), tokenizer=None, device="cpu")
        found = summed_squares(_Toy(), context, numbers, indices)
    return {name: sums.tolist() for name, sums in found.items()}


@pytest.mark.zero3
@pytest.mark.parametrize("count", [23, 2], ids=["many batches", "fewer batches than ranks"])
def test_sums_are_the_same_bits_on_any_number_of_ranks_and_are_not_gathered(run_ranks, count):
    alone = _sums_of_toy(range(count))
    assert any(alone["layers.twice"])
    assert any(alone["layers.even"])
    assert not any(alone["layers.never"])
    for ranks in (1, 2, 3):
        assert run_ranks(_sums_of_toy, ranks, range(count)) == [alone] * ranks


@pytest.mark.few(1)
@pytest.mark.zero3
@pytest.mark.parametrize("method", ["pst", "masked-lora"])
def test_two_ranks_count_the_same_norms(run_ranks, tmp_path, method):
    from safetensors.torch import load_file

    settings = [*ACTIVATION, "train.num_steps=6", f"method={method}"]
    run_ranks(_train, 2, tmp_path / "zero3", *settings)
    _train(tmp_path / "local", *settings, "deepspeed_config=")
    ours, alone = (load_file(tmp_path / name / NORMS_FILE) for name in ("zero3", "local"))
    assert ours.keys() == alone.keys()
    assert all(torch.allclose(ours[name], alone[name], rtol=1e-4) for name in ours)
    masks, others = (read_checkpoint(tmp_path / name / "checkpoints" / "final").masks for name in ("zero3", "local"))
    for name in masks:
        differ = sum(int(b).bit_count() for b in (masks[name] ^ others[name]).tolist())
        assert differ <= 0.02 * 8 * masks[name].numel(), name
