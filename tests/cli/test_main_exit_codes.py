"""The verbs in this process: exit codes, the one message of wrong input, and the JSON on the last line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.cli.main import main
from tests.pairs import every_pair

RUN_FILE = "tests/data/world_size.toml"
ONE_PROCESS = ("--set", "deepspeed_config=", "--set", "train.num_steps=6", "--set", "schedule.update_interval=1")
UPDATED = ("--set", "pst.update_embeddings=['word_embeddings']")
ROOT = Path(__file__).resolve().parents[2]


def _last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with an updated embedding that evaluated before the end, so that "best" and "final" differ; its export."""
    top = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        at = ("--set", f"output_dir={json.dumps(str(top / 'run'))}")
        rates = {"score": 1e-2, "update": 0.1, "embedding": 2e-4, "head": 5e-4}  # the last steps make it worse
        settings = [f"train.{name}_learning_rate={rate}" for name, rate in rates.items()]
        settings += ["schedule.cooldown_fraction=0.5", 'pst.modules_to_save=["classifier"]']
        more = (*(word for setting in settings for word in ("--set", setting)), *UPDATED)
        assert main(["train", RUN_FILE, "--quiet", *ONE_PROCESS, *at, *more, "--set", "eval.interval=3"]) == 0
        assert main(["export", str(top / "run"), "--out", str(top / "export"), "--checkpoint", "final"]) == 0
    best, final = (read_checkpoint((top / "run" / "checkpoints" / n).resolve()).trained for n in ("best", "final"))
    assert any(not torch.equal(best[name], final[name]) for name in final)
    return top


def _wrong(tmp_path, *settings):
    at = ("--set", f"output_dir={json.dumps(str(tmp_path / 'run'))}")
    return [RUN_FILE, *ONE_PROCESS, *at, *(word for setting in settings for word in ("--set", setting))]


def _assert_refused(capsys, arguments, *parts):
    """Exit code 2, nothing on stdout, and one line on stderr that holds all of ``parts``."""
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.strip()]
    assert line.startswith(f"pst-ds {arguments[0]}: ")
    for part in parts:
        assert part in line
    assert "Traceback" not in said.err
    assert said.out == ""


WRONG = {
    "a missing model folder": (
        ["model.path=./no/such/model"],
        ("model.path = './no/such/model' does not exist", f"looked in {ROOT}/", "name a model folder"),
    ),
    "a model that only the hub could have": (
        ["model.path=no-such-model"],
        ("model.path = 'no-such-model'", f"looked in {ROOT}/no-such-model", "on the hub"),
    ),
    "an attention that is none": (
        ["model.attn_implementation=egar"],
        ("model.attn_implementation = 'egar' and task 'classification' cannot be built", "eager"),
    ),
    "a tokenizer that is not there": (
        ["model.tokenizer=/no/tokenizer"],
        ("model.tokenizer = '/no/tokenizer' does not exist",),
    ),
    "an unknown key": (
        ["schedule.final_sparsty=0.5"],
        (": unknown key 'schedule.final_sparsty'. Did you mean 'final_sparsity'?",),
    ),
    "no label column": (
        ["data.label_column=class"],
        ("tests/data/train.jsonl has no column 'class'", "data.label_column", "Columns: text, label"),
    ),
    "a target that matches nothing": (
        ["pst.target_modules=['q_porj']"],
        ("target_modules ['q_porj'] matched no linear layer", "Names seen: query, key, value, dense"),
    ),
    "an embedding that is not there": (
        ["pst.update_embeddings=['word_embedings']"],
        (": update_embeddings names 'word_embedings'", "Did you mean 'word_embeddings'?"),
    ),
    "an update of embeddings without a rank": (
        ["pst.update_embeddings=['word_embeddings']", "pst.update_rank=0"],
        (": pst.update_embeddings = ['word_embeddings'] with update_rank = 0 updates nothing",),
    ),
    "a sparsity of 1.2": (["schedule.final_sparsity=1.2"], ("schedule.final_sparsity = 1.2 must be in [0, 1)",)),
    "a missing data file": (["data.train=no.jsonl"], ("data.train = 'no.jsonl' does not exist (looked in",)),
    "a batch larger than the data": (["train.batch_size=480"], ("240 examples", "train.batch_size = 480")),
    "a batch that cannot be shared": (
        ["train.gradient_accumulation_steps=25"],
        ("train.batch_size = 24", "25 accumulation steps", "make it 25 or more"),
    ),
    "a missing DeepSpeed config": (["deepspeed_config=no.json"], ("deepspeed_config = 'no.json' is not a file",)),
}


@every_pair
@pytest.mark.parametrize("verb", ["train", "plan"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_2_and_one_message_with_place_value_and_fix(tmp_path, capsys, verb, case):
    settings, parts = WRONG[case]
    _assert_refused(capsys, [verb, *_wrong(tmp_path, *settings)], *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_refused_deepspeed_key_is_2(tmp_path, capsys, verb):
    config = tmp_path / "ds.json"
    config.write_text('{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}')
    arguments = [verb, *_wrong(tmp_path, f"deepspeed_config={json.dumps(str(config))}")]
    _assert_refused(
        capsys, arguments, f"{config}: zero_optimization.zero_quantized_weights = true", "mask bits", "Fix: remove it"
    )


def test_ranks_without_deepspeed_are_2(tmp_path, capsys, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    _assert_refused(capsys, ["train", *_wrong(tmp_path)], "2 ranks, but deepspeed_config is not set", "zero3_cpu.json")


def test_only_rank_0_speaks(tmp_path, capsys, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert main(["train", *_wrong(tmp_path, "train.num_stepz=3")]) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("verb", ["train", "plan", "eval", "export"])
def test_a_run_that_is_not_there_is_2(tmp_path, capsys, verb):
    more = ["--out", str(tmp_path / "out")] if verb == "export" else []
    _assert_refused(capsys, [verb, "no/such.toml", *more], "run file 'no/such.toml' does not exist", f"{ROOT}/no/such")
    _assert_refused(capsys, [verb, str(tmp_path), *more], f"{str(tmp_path)!r} is not a run folder: run.toml is missing")
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_of_a_run_is_2(made, tmp_path, capsys):
    run, export = str(made / "run"), str(made / "export")
    _assert_refused(
        capsys, ["eval", run, "--checkpoint", "step-9"], "no checkpoint 'step-9' in", "There are: best, final, "
    )
    _assert_refused(capsys, ["export", run, "--out", run], "exists and is not an export. Name another", "--out")
    _assert_refused(capsys, ["export", run, "--out", f"{run}/run.toml"], "run.toml exists and is not an export")
    _assert_refused(capsys, ["eval", run, "--set", "data.test=no.csv"], "data.test = 'no.csv' does not exist")
    _assert_refused(capsys, ["verify", str(tmp_path)], "is not an export: pst_manifest.json is missing")
    assert main(["verify", export, "--against", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_another_base_model_is_2(made, tmp_path, capsys):
    base = Path(shutil.copytree("tests/data/tiny-bert", tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"})
    run = ["export", str(made / "run"), "--out", str(tmp_path / "out"), "--set", f"model.path={json.dumps(str(base))}"]
    _assert_refused(capsys, run, "is not the base model that", "its fingerprint differs", "Set model.path to the")


@pytest.mark.parametrize("rank", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank", "1"], []])
def test_the_rank_of_a_launcher_is_not_taken_for_the_verb(rank, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*rank, "trian", "run.toml"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("pst-ds: unknown verb 'trian'; there are init, plan, ")
    assert "Did you mean 'train'?" in said


@pytest.mark.parametrize(
    "arguments",
    [[], ["prune"], ["train"], ["train", RUN_FILE, "--stes=3"], ["export", "x"], ["eval", "x", "--split=a"]],
)
def test_arguments_that_argparse_refuses_are_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("pst-ds")
    assert said.endswith(" --help\n")
    assert said.count("\n") == 1


@pytest.mark.few(1)
@pytest.mark.parametrize(("precision", "bytes_each"), [("fp32", 8), ("bf16", 12)])
@pytest.mark.parametrize("method", ["pst", "dense", "magnitude"])
def test_plan_says_what_train_then_measures(tmp_path, capsys, method, precision, bytes_each):
    arguments = [*_wrong(tmp_path, f"method={method}", f"train.precision={precision}"), *UPDATED, "--json"]
    assert main(["plan", *arguments]) == 0
    plan = _last_json(capsys)
    embedding = {"name": "bert.embeddings.word_embeddings", "rows": 37, "width": 32, "factor_parameters": 8 * (37 + 32)}
    assert plan["updated_embeddings"] == ([embedding] if method == "pst" else [])
    assert not (tmp_path / "run").exists()  # it starts nothing
    assert main(["train", *arguments, "--quiet"]) == 0
    result = _last_json(capsys)
    assert plan["optimizer_bytes_per_rank"] == result["optimizer_bytes_per_rank"]
    saved = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints" / "final").iterdir())
    assert 0 < plan["checkpoint_bytes"] - saved < 10**6
    assert plan["trained_parameters"] == result["trained_parameters"]
    assert result["optimizer_bytes_per_rank"] == bytes_each * result["trained_parameters"]
    base = sum(t.numel() for t in load_file("tests/data/tiny-bert/model.safetensors").values())
    pooler, head = 32 * 32 + 32, 32 * 2 + 2
    factors = sum((8 + 8 + 1) * (o + i) for o, i in 2 * ([(32, 32)] * 4 + [(60, 32), (32, 60)])) + 8 * (37 + 32)
    assert result["trained_parameters"] == (factors + pooler if method == "pst" else base) + head
    asked = 0.0 if method == "dense" else 0.8
    assert (result["method"], result["steps"], result["sparsity_requested"]) == (method, 6, asked)
    assert asked - 0.001 < result["sparsity_in_masks"] <= asked
    assert len(plan["layers"]) == (0 if method == "dense" else 12)


def test_plan_shows_the_run(capsys, tmp_path):
    zero3 = "deepspeed_config=ds_configs/zero3_cpu.json"
    assert main(["plan", *_wrong(tmp_path, zero3), *UPDATED, "--ranks", "2", "--json"]) == 0
    text = capsys.readouterr().out
    plan = json.loads(text.splitlines()[-1])
    assert plan["ranks"] == 2
    assert plan["micro_batch_size"] == 12
    assert plan["num_steps"] == 6
    assert plan["num_examples"] == 240
    assert plan["trained_in_full"] == ["bert.pooler", "classifier"]
    assert plan["pruned_parameters"] == 2 * (4 * 32 * 32 + 2 * 60 * 32)
    assert plan["schedule"]["final_sparsity"] == 0.8
    assert plan["schedule"]["last_update"] == 5
    assert plan["schedule"]["sparsity_at"]["6"] == 0.8
    layer = {entry["name"]: entry for entry in plan["layers"]}["bert.encoder.layer.1.output.dense"]
    assert (layer["out_features"], layer["in_features"], layer["factor_parameters"]) == (32, 60, 17 * 92)
    for words in (
        "12 layers to prune",
        "bert.encoder.layer.*.output.dense  2 times 32 x 60",
        "updated: bert.embeddings.word_embeddings  37 x 32, 552 factor parameters",
        "trained in full: bert.pooler, classifier",
    ):
        assert words in text


def test_plan_lists_no_embedding_unless_one_is_updated(capsys, tmp_path):
    assert main(["plan", *_wrong(tmp_path), "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text.splitlines()[-1])["updated_embeddings"] == []
    assert "low-rank update" not in text


def test_every_verb_ends_with_one_json_object(made, tmp_path, capsys):
    assert main(["--local_rank=0", "eval", str(made / "run"), "--split", "validation", "--json"]) == 0
    evaluated = _last_json(capsys)
    assert (evaluated["examples"], evaluated["split"]) == (61, "validation")
    assert Path(evaluated["checkpoint"]) == (made / "run" / "checkpoints" / "best").resolve()
    lines = [json.loads(line) for line in (made / "run" / "metrics.jsonl").read_text().splitlines()]
    (at_best,) = [
        line for line in lines if line["event"] == "evaluation" and line["step"] == _result(made)["best_step"]
    ]
    assert evaluated["accuracy"] == at_best["eval/accuracy"]
    assert main(["export", str(made / "run"), "--out", str(tmp_path / "e"), "--json", "--dtype", "bf16"]) == 0
    exported = _last_json(capsys)
    assert exported["export_dir"] == str(tmp_path / "e")
    assert exported["sparsity_measured"] == _result(made)["sparsity_in_masks"]
    assert main(["verify", str(tmp_path / "e"), "--json"]) == 0
    assert _last_json(capsys)["pruned_tensors"] == 12


@pytest.fixture(scope="module")
def packed(made):
    """The export of the run's last checkpoint, packed as bitmask; a second, packed as csr from the first."""
    assert main(["export", str(made / "run"), "--format", "bitmask", "--out", str(made / "bitmask"),
                 "--checkpoint", "final"]) == 0  # fmt: skip
    assert main(["export", str(made / "bitmask"), "--format", "csr", "--out", str(made / "csr")]) == 0
    return {"bitmask": made / "bitmask", "csr": made / "csr"}


@pytest.mark.parametrize("kind", ["bitmask", "csr"])
def test_a_packed_export_is_verified_dense_and_kept_sparse(made, packed, capsys, kind):
    folder = str(packed[kind])
    assert main(["verify", folder, "--against", str(made / "run"), "--checkpoint", "final", "--json"]) == 0
    said = capsys.readouterr().out
    verified = json.loads(said.splitlines()[-1])
    assert (verified["kind"], verified["packed_tensors"], verified["reloaded_equal"]) == (kind, 12, True)
    assert verified["differing_weights"] == verified["differing_predictions"] == 0
    assert verified["max_logit_difference"] == 0.0
    kept = verified["kept_sparse"]
    assert (kept["layers"], kept["differing_weights"]) == (12, 0)
    assert 0.0 <= kept["max_logit_difference"] <= kept["allowed_logit_difference"] < 1e-3
    assert "kept sparse: 0 of 12 layers differ" in said
    assert main(["verify", folder, "--against", str(made / "run"), "--checkpoint", "best", "--limit", "5"]) == 1


def test_logits_kept_sparse_that_rounding_does_not_explain_fail(made, packed, capsys, monkeypatch):
    from pst_ds.runtime import SparseLinear

    forward = SparseLinear.forward
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x: forward(self, x) * 1.01)
    assert main(["verify", str(packed["bitmask"]), "--against", str(made / "run"), "--checkpoint", "final"]) == 1
    assert "kept sparse, its logits differ by more than rounding explains" in capsys.readouterr().err


def test_logits_of_a_dense_export_that_rounding_does_not_explain_fail(made, capsys, monkeypatch):
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: forward(self, x) * 1.0001)  # PST layers are none
    assert main(["verify", str(made / "export"), "--against", str(made / "run"), "--checkpoint", "final"]) == 1
    said = capsys.readouterr()
    assert "0 of 13 weight tensors differ, 0 predictions differ" in said.out
    assert "checkpoint final: its logits differ by more than rounding explains" in said.err


def test_verify_does_not_depend_on_where_a_file_has_its_weights(made, packed, capsys, monkeypatch):
    """On some processors a product is summed in another order where a matrix begins within a line of memory."""
    linear = torch.nn.functional.linear

    def by_address(x, weight, bias=None):
        return linear(x, weight, bias) * (1 + 2.0**-22 if weight.data_ptr() % 64 else 1.0)

    monkeypatch.setattr(torch.nn.functional, "linear", by_address)
    for export in (made / "export", packed["bitmask"]):
        assert main(["verify", str(export), "--against", str(made / "run"), "--checkpoint", "final", "--json"]) == 0
        assert _last_json(capsys)["max_logit_difference"] == 0.0


def test_a_packed_export_that_was_damaged_is_2(made, packed, tmp_path, capsys):
    folder = Path(shutil.copytree(packed["bitmask"], tmp_path / "packed"))
    path = folder / "pst_bitmask.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    _assert_refused(capsys, ["verify", str(folder)], "its SHA-256 differs")
    (folder / "pst_manifest.json").unlink()
    _assert_refused(capsys, ["verify", str(folder)], "is not an export: pst_manifest.json is missing")


def test_a_model_folder_takes_no_settings_of_a_run(packed, tmp_path, capsys):
    export = ["export", str(packed["bitmask"]), "--out", str(tmp_path / "out")]
    _assert_refused(
        capsys, [*export, "--checkpoint", "best"], "a model folder has no settings", "Remove --set and --checkpoint"
    )
    _assert_refused(capsys, [*export, "--set", "model.path=x"], "a model folder has no settings")
    _assert_refused(capsys, [*export, "--format", "2:4"], 'Train with pst.pattern = "2:4"')
    with pytest.raises(SystemExit):
        main([*export, "--shard-bytes", "0"])
    assert "'0' is not a whole number of at least 1" in capsys.readouterr().err


def _result(made):
    return json.loads((made / "run" / "result.json").read_text())


def test_without_json_the_last_line_is_for_people(made, capsys):
    assert main(["verify", str(made / "export")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"{made / 'export'}: 41 tensors as in the manifest, sparsity 0.799" in last


def test_verify_gives_both_models_the_attention_of_the_run(made, capsys):
    compared = ["verify", str(made / "export"), "--against", str(made / "run"), "--checkpoint", "final", "--json"]
    for kind in ("eager", "sdpa"):
        assert main([*compared, "--set", f"model.attn_implementation={kind}"]) == 0
        assert _last_json(capsys)["max_logit_difference"] == 0.0, kind


def test_verify_holds_the_export_against_its_checkpoint_and_no_other(made, capsys):
    run, export = str(made / "run"), str(made / "export")
    assert main(["verify", export, "--against", run, "--checkpoint", "final", "--json"]) == 0
    verified = _last_json(capsys)
    assert verified["reloaded_equal"] is True
    assert verified["differing_weights"] == verified["differing_predictions"] == 0
    assert (verified["compared_weights"], verified["examples"]) == (12 + 1, 61)
    assert main(["verify", export, "--against", run, "--checkpoint", "best", "--limit", "5", "--json"]) == 1
    said = capsys.readouterr()
    assert f"pst-ds verify: {export} is not the model in {run}, checkpoint best: 13 weight tensors and" in said.err
    assert "Traceback" not in said.err
    assert "13 of 13 weight tensors differ" in said.out  # the updated embedding too
    assert not said.out.splitlines()[-1].startswith("{")


def test_a_bug_of_ours_is_1_with_its_traceback(monkeypatch, capsys, tmp_path):
    from pst_ds.config import toml as run_file

    def broken(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr(run_file, "load_run", broken)
    assert main(["plan", *_wrong(tmp_path)]) == 1
    assert "RuntimeError: a bug" in capsys.readouterr().err.splitlines()[-1]


def test_a_diverging_run_is_1_with_one_message(tmp_path, capsys):
    arguments = _wrong(tmp_path, "train.update_learning_rate=1e30", "train.gradient_clipping=0")
    assert main(["train", *arguments, "--quiet"]) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert "lower the learning rate" in said.err.splitlines()[-1]
