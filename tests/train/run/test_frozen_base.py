"""A run with model.base_bits or model.embedding_bits: it trains, goes on, and exports as one over a folder of the
rounded weights would."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pst_ds.cli.main import main
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.core.quantization import Grid, grid_of, round_to_grid
from pst_ds.errors import InputError
from pst_ds.nn.base_model import DTYPES
from pst_ds.parallel.launch import launch_environment
from pst_ds.train.run import prepare, train_prepared

INT4 = ("model.base_bits=4", 'model.base_group="row"')
EMBEDDING_TOO = (*INT4, "model.embedding_bits=4")


def run_of(folder, *more, steps=8):
    return load_run(
        "tests/data/world_size.toml",
        [
            f"output_dir={json.dumps(str(folder))}", "deepspeed_config=", f"train.num_steps={steps}",
            "schedule.cooldown_fraction=0.25", "checkpoint.interval=4", *more,
        ],
    )  # fmt: skip


def trained(folder, *more, resume=False):
    return train_prepared(prepare(run_of(folder, *more), launch_environment()), quiet=True, resume=resume)


def rounded_folder(folder, precision, parts=("encoder.",)):
    """tests/data/tiny-bert with what 4 bits, a scale a row, leave in ``precision`` of weights with such names."""
    shutil.copytree("tests/data/tiny-bert", folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if any(part in name for part in parts) and tensor.dim() == 2:
            tensors[name] = round_to_grid(tensor.to(DTYPES[precision]), None, Grid(4))
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["losses"] for line in lines if "losses" in line}


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("precision", "settings", "parts"),
    [
        ("fp32", INT4, ("encoder.",)),
        ("bf16", INT4, ("encoder.",)),
        ("bf16", EMBEDDING_TOO, ("encoder.", "word_embeddings")),
        ("fp32", ("model.embedding_bits=4", 'model.base_group="row"'), ("word_embeddings",)),
    ],
)
def test_it_is_a_run_over_the_rounded_weights(tmp_path, precision, settings, parts):
    """Losses, masks and exported weights, bit for bit; and the export is what the masked model computes."""
    base = rounded_folder(tmp_path / "base", precision, parts)
    one, other = tmp_path / "coded", tmp_path / "plain"
    result = trained(one, *settings, f"train.precision={precision}")
    same = trained(other, f"model.path={json.dumps(str(base))}", f"train.precision={precision}")
    assert result["mask_checksum"] == same["mask_checksum"]
    assert result["trained_parameters"] == same["trained_parameters"]
    assert losses(one) == losses(other)
    for run in (one, other):
        assert main(["export", str(run), "--checkpoint", "final", "--out", str(run / "out")]) == 0
    assert main(["verify", str(one / "out"), "--against", str(one), "--checkpoint", "final"]) == 0
    exported, of_plain = (load_file(run / "out" / "model.safetensors") for run in (one, other))
    assert exported.keys() == of_plain.keys()
    assert all(torch.equal(exported[name], of_plain[name]) for name in exported)


def forget_the_end(folder):
    """As if the run had been killed between its two checkpoints."""
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    (folder / "checkpoints" / "final").unlink(missing_ok=True)


def test_a_run_that_goes_on_ends_as_if_nothing_had_happened(tmp_path):
    whole = trained(tmp_path / "whole", *INT4)
    trained(tmp_path / "cut", *INT4)
    forget_the_end(tmp_path / "cut")
    again = trained(tmp_path / "cut", *INT4, resume=True)
    assert again["mask_checksum"] == whole["mask_checksum"]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for other in ("model.base_bits=8", "model.embedding_bits=4"):
        with pytest.raises(InputError, match=other.partition("=")[0].replace(".", r"\.")):
            trained(tmp_path / "cut", *INT4, other, resume=True)


def on_ranks(folder, resume=False):
    return trained(folder, *EMBEDDING_TOO, "deepspeed_config=ds_configs/zero3_cpu.json", resume=resume)


@pytest.mark.thorough
@pytest.mark.zero3
def test_ranks_hold_shards_of_it_and_go_on_and_export(run_ranks, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    trained(one, *EMBEDDING_TOO)
    whole, _ = run_ranks(on_ranks, 2, two)
    first, second = losses(one), losses(two)
    assert first.keys() == second.keys()
    assert [v for step in second for v in second[step]] == pytest.approx([v for s in first for v in first[s]], abs=1e-3)
    forget_the_end(two)
    again, _ = run_ranks(on_ranks, 2, two, True)
    assert again["mask_checksum"] == whole["mask_checksum"]
    assert losses(two) == second
    assert main(["export", str(two), "--checkpoint", "final", "--out", str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out"), "--against", str(two), "--checkpoint", "final"]) == 0


def language_run(folder, *more):
    run = load_run("tests/data/causal_lm.toml", [
        f"output_dir={json.dumps(str(folder))}", "deepspeed_config=", "train.num_steps=4", "checkpoint.interval=4",
        "train.batch_size=6", *INT4, "model.embedding_bits=8", *more,
    ])  # fmt: skip
    return train_prepared(prepare(run, launch_environment()), quiet=True)


def language_ranks(folder):
    return language_run(folder, "deepspeed_config=ds_configs/zero3_cpu.json")


@pytest.mark.thorough
@pytest.mark.zero3
def test_a_language_model_multiplies_with_a_head_of_few_bits_on_any_number_of_ranks(run_ranks, tmp_path):
    language_run(tmp_path / "1")
    for world_size in (2, 3):
        folder = tmp_path / str(world_size)
        run_ranks(language_ranks, world_size, folder)
        flat, same = ([v for step in losses(run).values() for v in step] for run in (folder, tmp_path / "1"))
        assert flat == pytest.approx(same, abs=1e-3)
    for folder in (tmp_path / "1", tmp_path / "3"):
        assert main(["export", str(folder), "--checkpoint", "final", "--out", str(folder / "out")]) == 0
        assert main(["verify", str(folder / "out"), "--against", str(folder), "--checkpoint", "final"]) == 0
    one, three = (load_file(tmp_path / n / "out" / "model.safetensors") for n in ("1", "3"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(one[name], three[name])
        base = load_file("tests/data/tiny-llama/model.safetensors")[name]
        assert torch.equal(one[name], round_to_grid(base, None, Grid(8)))


@pytest.mark.thorough
def test_rounding_to_the_same_grid_ends_in_the_format(tmp_path):
    """[quantization] over a base in few bits: the file's codes are those that were trained."""
    folder, out = tmp_path / "run", tmp_path / "out"
    trained(folder, *INT4, 'quantization.values="int4"', 'quantization.group="row"')
    assert main(["export", str(folder), "--checkpoint", "final", "--format", "bitmask", "--out", str(out)]) == 0
    assert main(["verify", str(out), "--against", str(folder), "--checkpoint", "final"]) == 0
    rounded_later = tmp_path / "later"
    trained(rounded_later, *INT4)
    export = ["export", str(rounded_later), "--checkpoint", "final", "--values", "int4", "--group", "row"]
    assert main([*export, "--out", str(tmp_path / "out2")]) == 0
    assert main(["verify", str(tmp_path / "out2"), "--against", str(rounded_later), "--checkpoint", "final"]) == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["model.base_bits=5"], "base_bits = 5 must be one of 16, 8, 4"),
        (["model.base_group=64"], "base_group = 64 does nothing with model.base_bits = 16"),
        (["model.base_bits=4", "model.base_group=48"], "base_group = 48 must be one of"),
        (["model.base_bits=4", "method=dense"], "method = 'dense' trains every weight. Set method to one of"),
        (["model.base_bits=8", "method=gmp"], "method = 'gmp' trains every weight"),
        (["model.base_bits=8", "pst.train_weights=true"], "trains every weight"),
        (["model.embedding_bits=8", "method=dense"], "embedding_bits = 8 quantises frozen weights, and method"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, said):
    with pytest.raises(ConfigError, match=said):
        run_of(tmp_path, *settings)


def test_a_group_that_does_not_divide_is_refused_before_training(tmp_path):
    with pytest.raises(InputError, match="the base: groups of 64 do not divide 32 inputs; take 32 or row"):
        prepare(run_of(tmp_path, "model.base_bits=4"), launch_environment())


def test_a_base_that_another_library_has_rounded_is_named(tmp_path):
    folder = tmp_path / "gptq"
    shutil.copytree("tests/data/tiny-bert", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match=r"quantised \(gptq\)"):
        prepare(run_of(tmp_path / "run", *INT4, f"model.path={json.dumps(str(folder))}"), launch_environment())


@pytest.mark.parametrize("missing", ["embeddings.word_embeddings", "encoder.layer.0.output.dense"])
def test_random_weights_in_few_bits_are_refused_as_others_are(tmp_path, missing):
    folder = tmp_path / "base"
    shutil.copytree("tests/data/tiny-bert", folder)
    (file,) = folder.glob("*.safetensors")
    tensors = {name: tensor for name, tensor in load_file(file).items() if f"{missing}.weight" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    settings = (*EMBEDDING_TOO, f"model.path={json.dumps(str(folder))}")
    with pytest.raises(ConfigError, match=f"{missing}: it would be random and never trained"):
        trained(tmp_path / "run", *settings)


def test_defaults_of_the_grid():
    assert grid_of("int4") == Grid(4, 64)
    assert grid_of("int8") == Grid(8)
