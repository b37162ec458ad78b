"""Runs that remove whole experts: their routers, teacher and exports, ranks, stops and refused settings."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pst_ds import MaskUpdater, OneShotSchedule, PSTConfig, inject_pst
from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.cli.main import main
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.errors import InputError
from pst_ds.nn.inject import bypassed
from pst_ds.nn.router import pst_routers
from pst_ds.parallel.launch import launch_environment
from pst_ds.train.resume import RunProgress
from pst_ds.train.run import masked_model, prepare, prepare_single, train_prepared
from pst_ds.train.run_folder import open_trained
from tests.nn.expert_families import tiny_model
from tests.train.stopping import stopping
from tests.train.test_resume import _differing, _values
from tests.writing.test_gguf import byte_level

RUN_FILE, STOP_AT = "tests/data/causal_lm.toml", 5
SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS = {
    "mixtral": lambda **more: transformers.MixtralConfig(**SIZES, **more, num_local_experts=6),
    "qwen3_moe": lambda **more: transformers.Qwen3MoeConfig(
        **SIZES, **more, num_experts=6, moe_intermediate_size=32, head_dim=16, norm_topk_prob=True
    ),
    "olmoe": lambda **more: transformers.OlmoeConfig(**SIZES, **more, num_experts=6),
    "gpt_oss": lambda **more: transformers.GptOssConfig(
        **SIZES, **more, num_local_experts=6, head_dim=16, layer_types=["full_attention"] * 2
    ),
}  # fmt: skip
FROZEN = ("train.update_learning_rate=0",)
EXAMPLES = "pst.calibration_examples"
AT_ONCE = ("schedule.initial_sparsity=0.5", f"{EXAMPLES}=100000")
IDS = torch.arange(40).view(4, 10) % 24


def _save_base(folder, family="mixtral"):
    tokenizer = byte_level()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](vocab_size=len(tokenizer)))
    for param in model.parameters():
        param.data.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _settings(folder, base, *more):
    return [
        "method=experts", f"output_dir={json.dumps(str(folder))}", f"model.path={json.dumps(str(base))}",
        "data.train=tests/data/validation.jsonl", "data.validation=", "data.max_length=16", "train.batch_size=6",
        "train.num_steps=10", "schedule.update_interval=1", "schedule.final_sparsity=0.5",
        "schedule.warmup_fraction=0.1", "checkpoint.interval=0", *more,
    ]  # fmt: skip


def _train(folder, base, *more, resume=False):
    run = load_run(RUN_FILE, _settings(folder, base, *more))
    return train_prepared(prepare(run, launch_environment()), resume=resume, quiet=True)


def _stopped(folder, base, *more):
    """Train until a signal on the last rank asks to stop, between two removals."""
    with stopping(STOP_AT):
        _train(folder, base, *more)


def _goes_on(folder, base, *more):
    return _train(folder, base, *more, resume=True)


def _masked(folder, base, *more):
    run = load_run(RUN_FILE, ["deepspeed_config=", *_settings(folder, base, *more)])
    checkpoint = read_checkpoint(folder / "checkpoints" / "final")
    return masked_model(prepare_single(open_trained(run, checkpoint)[0]), checkpoint)


def _checksums(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["mask_checksum"] for line in lines if line["event"] == "mask_update"}


def _tensors(path):
    if path.suffix == ".gguf":
        return {t.name: torch.from_numpy(t.data.copy()) for t in pytest.importorskip("gguf").GGUFReader(path).tensors}
    (file,) = path.glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module", params=CONFIGS)
def trained(request, tmp_path_factory):
    """(run folder, base folder) of a run that distils from itself."""
    top = tmp_path_factory.mktemp(request.param)
    base = _save_base(top / "base", request.param)
    _train(top / "run", base, "deepspeed_config=", "distillation.weight=0.5", "train.update_learning_rate=0.01")
    return top / "run", base


@torch.no_grad()
def test_removed_experts_get_no_token_and_the_teacher_keeps_all(trained):
    folder, base = trained
    model, plain, chosen = _masked(folder, base), AutoModelForCausalLM.from_pretrained(base), {}
    result = json.loads((folder / "result.json").read_text())
    for name, router in pst_routers(model).items():
        router.register_forward_hook(lambda _, __, outputs, name=name: chosen.__setitem__(name, outputs[2]))
        zeros = [result["expert_zeros"][f"{router.experts}.{stack}"] for stack in ("gate_up_proj", "down_proj")]
        kept = [[expert for expert, number in enumerate(numbers) if number == 0] for numbers in zeros]
        assert kept[0] == kept[1] == router.kept.tolist()
        assert len(kept[0]) == 3
        assert router.pst_U.abs().sum() > 0
    model(IDS)
    for name, router in pst_routers(model).items():
        assert set(chosen[name].unique().tolist()) <= set(router.kept.tolist())
    with bypassed(model):
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_an_export_is_an_ordinary_smaller_mixture(trained, tmp_path, capsys):
    folder, base = trained
    command = ["export", str(folder), "--checkpoint", "final"]
    assert main([*command, "--out", str(tmp_path / "dense")]) == 0
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config.get("num_local_experts", config.get("num_experts")) == 3
    smaller, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(smaller(IDS).logits, _masked(folder, base)(IDS).logits, rtol=1e-5, atol=1e-6)
    assert main(["verify", str(tmp_path / "dense"), "--against", str(folder), "--checkpoint", "final", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["differing_weights"], said["reloaded_equal"]) == (0, True)
    for name, options in {
        "int8": ("--values", "int8"), "int4": ("--values", "int4", "--group", "32"),
        "theirs": ("--format", "compressed-tensors", "--values", "int8"), "model.gguf": ("--format", "gguf"),
        "small.gguf": ("--format", "gguf", "--values", "int8"),
    }.items():  # fmt: skip
        if "gguf" in name and config["model_type"] == "gpt_oss":
            continue
        paths = [tmp_path / source / name for source in ("run", "folder")]
        for source, path in zip((command, ["export", str(tmp_path / "dense")]), paths, strict=True):
            path.parent.mkdir(exist_ok=True)
            assert main([*source, *options, "--out", str(path)]) == 0, name
        ours, theirs = map(_tensors, paths)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_a_ramp_that_starts_at_its_end_is_reap(tmp_path):
    """The same experts as pst-ds prune --method reap removes on the same sequences, and the same weights."""
    base = _save_base(tmp_path / "base")
    _train(tmp_path / "run", base, "deepspeed_config=", *FROZEN, *AT_ONCE)
    assert list(_checksums(tmp_path / "run")) == [0, *range(2, 9)]
    assert len(set(_checksums(tmp_path / "run").values())) == 1
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "exported")]) == 0
    sets = [word for setting in _settings(tmp_path / "run", base, "method=pst") for word in ("--set", setting)]
    samples = len(prepare(load_run(RUN_FILE, ["deepspeed_config=", *sets[1::2]]), launch_environment()).load("train"))
    reap = ["--method", "reap", "--samples", str(samples), "--out", str(tmp_path / "reap")]
    assert main(["prune", RUN_FILE, *sets, *reap]) == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("exported", "reap"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.zero3
def test_all_numbers_of_ranks_remove_the_same_experts_also_after_a_stop(run_ranks, tmp_path):
    base = _save_base(tmp_path / "base", "qwen3_moe")
    run_ranks(_train, 1, tmp_path / "1", base, *FROZEN)
    run_ranks(_train, 2, tmp_path / "2", base, *FROZEN, "train.expert_parallel=2")
    run_ranks(_stopped, 3, tmp_path / "3", base, *FROZEN)
    run_ranks(_goes_on, 2, tmp_path / "3", base, *FROZEN)
    expected = _checksums(tmp_path / "1")
    assert len(set(expected.values())) == 3
    assert _checksums(tmp_path / "2") == _checksums(tmp_path / "3") == expected


@pytest.mark.parametrize("examples", [1, 20])
def test_scores_are_of_all_tokens_so_far(tmp_path, examples):
    """A batch may lack the text of an expert, which would have no token in it and be removed."""
    base, seen = _save_base(tmp_path / "base"), {}
    for interval in (1, 100):
        folder = tmp_path / str(interval)
        _stopped(folder, base, "deepspeed_config=", f"schedule.update_interval={interval}", f"{EXAMPLES}={examples}")
        progress = RunProgress.read(read_checkpoint(folder / "checkpoints" / f"step-{STOP_AT:08d}"))
        seen[interval] = {sum(tokens) for _, tokens in progress.loop.expert_sums.values()}
    assert seen[1] == seen[100]
    (tokens,) = seen[1]
    per_sequence = 16 * SIZES["num_experts_per_tok"]
    assert tokens == per_sequence * (examples + 6 * STOP_AT)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.zero3)])
def test_a_run_stopped_between_removals_ends_with_the_same_bits(run_ranks, tmp_path, ranks):
    base = _save_base(tmp_path / "base")
    more = ("schedule.update_interval=3", "train.update_learning_rate=0.01", "model.gradient_checkpointing=true")
    more = more if ranks > 1 else (*more, "deepspeed_config=")
    whole = run_ranks(_train, ranks, tmp_path / "whole", base, *more)
    run_ranks(_stopped, ranks, tmp_path / "stopped", base, *more)
    resumed = run_ranks(_goes_on, ranks, tmp_path / "stopped", base, *more)
    for one, other in zip(whole, resumed, strict=True):
        assert one["mask_checksum"] == other["mask_checksum"]
    assert _checksums(tmp_path / "whole") == _checksums(tmp_path / "stopped")
    assert _differing(_values(tmp_path / "whole"), _values(tmp_path / "stopped")) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (['pst.pattern="2:4"'], "pst.pattern is about single weights. Remove it"),
        (['pst.magnitude="activation"'], "pst.magnitude is about single weights"),
        (['pst.overrides=[{modules = ["down_proj"], final_sparsity = 0.5}]'], "equally many experts of every block"),
        (["schedule.solves=2"], 'is for method = "pst"'),
        (['start.method="alps"', "schedule.initial_sparsity=0.5"], "before the first step set schedule.initial_spars"),
        (["method=pst", 'pst.pattern="experts"'], 'pst.pattern = "experts" is for method = "experts"'),
        (["schedule.final_sparsity=0.9"], "schedule.final_sparsity = 0.9 leaves 1 experts"),
        (['pst.exclude_modules="experts"'], "removes experts of every block, and .*experts stays dense"),
        (['pst.modules_to_save=["gate"]'], "no single router that .* outside modules_to_save"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, message):
    base = _save_base(tmp_path / "base")
    with pytest.raises((ConfigError, InputError), match=message):
        prepare(
            load_run(RUN_FILE, _settings(tmp_path / "run", base, "deepspeed_config=", *settings)), launch_environment()
        )


def test_models_and_scripts_that_cannot_are_refused():
    config = PSTConfig(pattern="experts")
    with pytest.raises(InputError, match="no stacks of experts"):
        inject_pst(AutoModelForCausalLM.from_pretrained("tests/data/tiny-llama"), config)
    with pytest.raises(InputError, match=r"there is no single router .* with pst-ds prune --method reap"):
        inject_pst(tiny_model("lfm2_moe"), config)  # its blocks pass the router a bias
    with pytest.raises(InputError, match="only runs of pst-ds train"):
        MaskUpdater(inject_pst(tiny_model("mixtral"), config), OneShotSchedule(0.5))
