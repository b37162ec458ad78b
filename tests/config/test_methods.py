"""The rivals as methods of a run file: what each trains and prunes, and that no export loses a zero."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.cli.main import main
from pst_ds.config.methods import METHODS
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.core.bits import unpack_range
from pst_ds.masks.base_zeros import masks_of_zeros
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import build_engine
from pst_ds.parallel.launch import LaunchEnvironment, launch_environment
from pst_ds.train.run import build, prepare, train_prepared

RUN_FILE = "tests/data/world_size.toml"
FULL = ("dense", "magnitude", "gmp")
SPARSE = [name for name, method in METHODS.items() if method.masks != "none"]


def _run(folder, *overrides):
    run = load_run(RUN_FILE, [f"output_dir={json.dumps(str(folder))}", *overrides])
    return train_prepared(prepare(run, launch_environment()), quiet=True)


def _built(folder, *overrides):
    run = load_run(RUN_FILE, ["deepspeed_config=", f"output_dir={json.dumps(str(folder))}", *overrides])
    return build(prepare(run, LaunchEnvironment(0, 1, 0))).module


def _mask(layer):
    bits = sharding.shard_of(layer.pst_mask).values
    return unpack_range(bits, layer.layout.numel, layer.num_shards, 0, layer.layout.numel).view(layer.layout.shape)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "experts"])  # which needs a mixture
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.few(2)
def test_every_method_trains_exports_and_verifies(tmp_path, capsys, method, precision):
    settings = [
        f"method={method}", "deepspeed_config=", f"output_dir={tmp_path / 'run'}", f"train.precision={precision}",
        "train.num_steps=8", "train.update_learning_rate=0.01", 'pst.modules_to_save=["classifier"]',
    ]  # fmt: skip
    options = [word for setting in settings for word in ("--set", setting)]
    assert main(["train", RUN_FILE, *options]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--json"]) == 0
    exported = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["verify", str(tmp_path / "out"), "--against", str(tmp_path / "run"), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert verified["reloaded_equal"]
    asked = 0.8 if method in SPARSE else 0.0
    assert exported["sparsity_requested"] == asked
    assert exported["sparsity_measured"] == pytest.approx(asked, abs=0.01)
    trained = json.loads((tmp_path / "run" / "result.json").read_text())["trained_parameters"]
    assert (trained >= _num_weights()) == (method in FULL)


def _num_weights():
    run = load_run(RUN_FILE, ["deepspeed_config="])
    module = build(prepare(run, LaunchEnvironment(0, 1, 0))).module
    return sum(layer.layout.numel for layer in pst_layers(module).values())


def test_lora_is_pefts(tmp_path):
    """Same start, same batch: the loss and every gradient are those of PEFT's own layers."""
    peft = pytest.importorskip("peft", reason="PEFT comes with the extra bench, which test brings")
    from transformers import AutoModelForSequenceClassification

    ours = _built(tmp_path, "method=lora", "pst.update_rank=4", "pst.beta=0.5")
    theirs = AutoModelForSequenceClassification.from_pretrained("tests/data/tiny-bert", dtype=torch.float32)
    theirs.load_state_dict(_plain(ours), strict=True)
    names = list(pst_layers(ours))
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=names, task_type="SEQ_CLS", lora_dropout=0.0)
    theirs = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for name, layer in pst_layers(ours).items():
            assert not layer.pst_U.any()  # LoRA starts with one matrix at zero
            layer.pst_U.normal_(generator=torch.Generator().manual_seed(1))
            lora = theirs.base_model.model.get_submodule(name)
            lora.lora_B["default"].weight.copy_(layer.pst_U)
            lora.lora_A["default"].weight.copy_(layer.pst_V)
    batch = {"input_ids": torch.tensor([[2, 5, 9, 3], [2, 7, 3, 0]]), "labels": torch.tensor([0, 1])}
    losses = []
    for model in (ours.eval(), theirs.eval()):
        loss = model(**batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, layer in pst_layers(ours).items():
        lora = theirs.base_model.model.get_submodule(name)
        for mine, other in ((layer.pst_U, lora.lora_B), (layer.pst_V, lora.lora_A)):
            grad = other["default"].weight.grad
            assert float((mine.grad - grad).norm()) <= 1e-4 * float(grad.norm()) + 1e-9, name


def _plain(module):
    return {n: v for n, v in module.state_dict().items() if ".pst_" not in n}


def test_gmp_ranks_the_fp32_masters(tmp_path):
    """In bf16 a step of Adam is often lost in the weight; the masters have it, and the masks follow them."""
    module = _built(tmp_path, "method=gmp", "train.precision=bf16")
    layer = next(iter(pst_layers(module).values()))
    master = layer.weight.fp32_master
    with torch.no_grad():
        master.copy_(1.0 + 1e-3 * torch.randn(master.shape, generator=torch.Generator().manual_seed(0)))
        layer.weight.copy_(master)
    assert layer.weight.unique().numel() < 5  # the masters differ by less than bf16 can tell
    update_masks(module, 0.5)
    order = master.detach().abs().flatten().argsort(stable=True)
    assert not _mask(layer).flatten()[order[: layer.layout.numel // 2]].any()


def test_a_fixed_mask_of_zeros_is_the_base_models(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = AutoModelForSequenceClassification.from_pretrained("tests/data/tiny-bert")
    generator = torch.Generator().manual_seed(0)
    masks = {}
    with torch.no_grad():
        for name, module in base.named_modules():
            if isinstance(module, nn.Linear) and ".layer." in name:
                keep = torch.rand(module.weight.shape, generator=generator) > 0.4
                module.weight.mul_(keep)
                masks[name] = keep & (module.weight != 0)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained("tests/data/tiny-bert").save_pretrained(tmp_path / "base")
    zeros = 1.0 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    common = [
        f'model.path="{tmp_path / "base"}"', 'pst.initial_mask="zeros"', "deepspeed_config=", "train.num_steps=4",
        "schedule.initial_sparsity=0.0",
    ]  # fmt: skip
    for method in ("masked-lora", "magnitude"):
        found = _run(tmp_path / method, f"method={method}", f"schedule.final_sparsity={zeros:.4f}", *common)
        assert found["sparsity_in_masks"] == pytest.approx(zeros, abs=1e-9)
        saved = read_checkpoint(tmp_path / method / "checkpoints" / "final").masks
        for name, keep in masks.items():
            assert torch.equal(unpack_range(saved[name], keep.numel(), 1, 0, keep.numel()).bool(), keep.flatten()), name
    with pytest.raises(ConfigError, match=rf"final_sparsity = 0.9, but {zeros:.4f} of the pruned weights"):
        _run(tmp_path / "other", "method=masked-lora", "schedule.final_sparsity=0.9", *common)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["pst.initial_mask=zeros"], "with a fixed mask ('magnitude', 'masked-lora')"),
        *(([f"method={gone}"], f"method = '{gone}' must be one of 'pst'") for gone in ("movement", "spp")),
        (["pst.full_scores=true"], 'no longer supported: set method = "pst"'),
        (["pst.bias=all"], "no longer supported: name the modules"),
        (["pst.multiplicative_update=true"], 'no longer supported: set method = "masked-lora"'),
        (["method=gpm"], "method = 'gpm' must be one of 'pst', 'dense', 'lora'"),
        (["pst.magnitude=wanda"], "pst.magnitude = 'wanda' must be one of"),
        (["method=gmp", "pst.frozen_magnitude=true"], "frozen_magnitude = true ranks by the pretrained weights"),
        (["pst.calibration_examples=0"], "calibration_examples = 0 must be at least 1"),
        (["pst.magnitude=none"], "pst.magnitude = 'none' must be one of"),
        (
            ["method=masked-lora", "pst.initial_mask=zeros", "pst.magnitude=activation"],
            'which pst.initial_mask = "zeros" does not use',
        ),
        (
            ["method=gmp", "pst.pattern=global", "schedule.final_sparsity=0.99"],
            "(method = 'gmp') is more than schedule.final_sparsity = 0.99 keeps",
        ),
        (
            ['pst.overrides=[{modules=["query"], pattern="global"}]', "schedule.final_sparsity=0.99"],
            'pst.min_kept_share = 0.02 of every matrix of pattern "global"',
        ),
    ],
)
def test_settings_that_a_method_cannot_have_are_refused(settings, said):
    with pytest.raises(ConfigError) as error:
        load_run(RUN_FILE, settings)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        ["method=masked-lora", "pst.initial_mask=zeros"],
        ["method=gmp", "schedule.initial_sparsity=0.5"],
        ["method=gmp", "pst.pattern=global", "schedule.final_sparsity=0.99", "pst.min_kept_share=0.005"],
    ],
)
def test_settings_that_a_method_can_have_are_not_refused(settings):
    assert load_run(RUN_FILE, settings)


def test_a_global_pattern_can_be_trained(tmp_path):
    result = _run(
        tmp_path, "deepspeed_config=", "pst.pattern=global", "train.num_steps=4", "schedule.final_sparsity=0.5"
    )
    assert result["sparsity_in_masks"] == pytest.approx(0.5, abs=1e-3)


RIVALS = ("gmp", "masked-lora")


def _all_rivals(folder):
    return [_run(folder / method, f"method={method}", "train.num_steps=6") for method in RIVALS]


def _lines(folder, event):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.mark.zero3
@pytest.mark.thorough
def test_methods_do_not_depend_on_the_world_size(run_ranks, tmp_path):
    """Losses agree, and the first masks to the bit; later ones may follow roundings of the gradient's sum."""
    one, two = (run_ranks(_all_rivals, world_size, tmp_path / str(world_size))[0] for world_size in (1, 2))
    for method, alone, shared in zip(RIVALS, one, two, strict=True):
        folders = [tmp_path / str(world_size) / method for world_size in (1, 2)]
        losses, others = ([line["loss"] for line in _lines(folder, "step")] for folder in folders)
        assert losses == pytest.approx(others, abs=2e-3), method
        assert alone["trained_parameters"] == shared["trained_parameters"]
        assert alone["sparsity_in_masks"] == shared["sparsity_in_masks"]
        first, other = (_lines(folder, "mask_update")[0]["mask_checksum"] for folder in folders)
        assert first == other, method


class _Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(48, 36), nn.Linear(36, 48)) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def _ranked(stage, world_size):
    """{pattern: (checksum, zeros)} of bf16 models after two steps that few of their weights show."""
    return {pattern: _after_two_steps(stage, world_size, pattern) for pattern in ("matrix", "2:4", "3x3")}


def _after_two_steps(stage, world_size, pattern):
    torch.manual_seed(0)
    settings = ["method=gmp", f"pst.pattern={pattern}", "pst.modules_to_save=[]", "schedule.final_sparsity=0.5"]
    run = load_run(RUN_FILE, settings)
    model = inject_pst(
        _Stack().to(torch.bfloat16), run.mask_method.pst_config(run.pst), num_shards=world_size if stage == 3 else 1
    )
    trained = [param.requires_grad_() for param in model.parameters() if param.dtype.is_floating_point]
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1 << 16},
    }  # fmt: skip
    engine = build_engine(model, [{"params": trained, "lr": 1e-4}], ds_config=config)
    for seed in range(2):  # every rank has the same input, so that the gradient's mean is exact
        x = torch.randn(4, 48, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
        engine.backward(engine(x).float().square().mean())
        engine.step()
    stats = update_masks(engine.module, 0.5)
    return stats.checksum, stats.num_pruned


@pytest.mark.zero3
def test_masks_of_trained_weights_are_the_same_at_every_stage(run_ranks):
    """Shards of the fp32 masters, with their neighbours' values for groups and blocks that straddle a shard."""
    alone = run_ranks(_ranked, 1, 0, 1)[0]
    for world_size, stage in ((2, 1), (2, 3)):
        assert run_ranks(_ranked, world_size, stage, world_size)[0] == alone, stage


def _zeros_on_ranks(folder):
    run = load_run(RUN_FILE, [f"output_dir={folder}", "method=masked-lora", "pst.initial_mask=zeros"])
    module = build(prepare(run, launch_environment())).module
    for layer in pst_layers(module).values():
        shard = sharding.shard_of(layer.weight)
        index = torch.arange(shard.start, shard.start + shard.values.numel())
        shard.values[index % 7 < 3] = 0.0
    stats = masks_of_zeros(module)
    return stats.checksum, stats.num_pruned


@pytest.mark.zero3
def test_masks_of_zeros_are_the_same_for_every_world_size(run_ranks, tmp_path):
    found = {run_ranks(_zeros_on_ranks, world, str(tmp_path / str(world)))[0] for world in (1, 3)}
    assert len(found) == 1
