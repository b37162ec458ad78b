"""Run folders, checkpoints and exports that are not what a verb needs."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .workshop import BERT, Workshop, Wrong, words


def _run(verb: str, *patterns: str):
    """``verb`` of a copy of the good run without some of its files, to be written to {tmp}/out."""
    return lambda shop: _out(shop, verb, shop.without("run", *patterns))


def _damaged(verb: str, pattern: str = "checkpoints/step-00000004/shard-*"):
    return lambda shop: _out(shop, verb, shop.damaged("run", pattern))


def _out(shop: Workshop, verb: str, folder: Path, *more: str) -> list[str]:
    return [verb, str(folder), *(("--out", f"{shop.tmp}/out") if verb == "export" else ()), *more]


def _another_base(verb: str, *more: str):
    def arguments(shop: Workshop) -> list[str]:
        base = shop.model_with(lambda weights: weights["encoder.layer.0.output.dense.weight"].add_(1))
        return _out(shop, verb, shop.copied("run"), "--set", f"model.path={base}", *more)

    return arguments


def _resumed(*settings: str):
    return lambda shop: [
        "train", str(shop.copied("run")), "--resume", *(w for one in settings for w in ("--set", shop.filled(one)))
    ]  # fmt: skip


def _restarted_on_nan(shop: Workshop) -> list[str]:
    base = shop.model_with(lambda weights: weights["encoder.layer.0.output.dense.weight"][0].fill_(torch.nan))
    return ["train", str(shop.copied("run")), "--restart", "--set", f"model.path={base}"]


def _resumed_on_other_text(shop: Workshop) -> list[str]:
    lines = Path("tests/data/train.jsonl").read_text().splitlines(keepends=True)
    return _resumed(f"data.train={shop.file('train.jsonl', ''.join(reversed(lines)))}")(shop)


def _manifest(change) -> Workshop:
    def arguments(shop: Workshop) -> list[str]:
        folder = shop.copied("dense")
        path = folder / "pst_manifest.json"
        path.write_text(change(path.read_text()))
        return ["verify", str(folder)]

    return arguments


def _exported_into(name: str):
    return lambda shop: ["export", f"{shop.made}/run", "--out", shop.filled(name)]


RUNS = {
    "resume of a folder that is no run": Wrong(
        words("train", "{made}/plain", "--resume"), "{made}/plain", "run.toml is missing", "not a run folder"
    ),
    "resume of a run that is not there": Wrong(
        words("train", "{tmp}/run", "--resume"), "{tmp}/run", "does not exist", "name a run file or a run folder"
    ),
    "resume with another sparsity": Wrong(
        _resumed("schedule.final_sparsity=0.5"),
        "schedule.final_sparsity",
        "0.5",
        "Use the old value, or start a new run",
    ),
    "resume with another method": Wrong(_resumed("method=gmp"), "method", "'gmp'", "another output_dir"),
    "resume on other text": Wrong(
        _resumed_on_other_text, "data.train", "{tmp}/train.jsonl", "Restore the old file or setting"
    ),
    "resume from another base": Wrong(
        _another_base("train", "--resume"), "model.path", "{tmp}/model", "Set model.path to the folder of that model"
    ),
    "restart from a base with a NaN": Wrong(
        _restarted_on_nan, "bert.encoder.layer.0.output.dense.weight", "NaN", "the base model is damaged"
    ),
    "another place of a run folder": Wrong(
        lambda shop: ["train", str(shop.copied("run")), "--restart", "--set", "output_dir=runs/b"],
        "--set",
        "'output_dir=runs/b'",
        "name the run file '{tmp}/run/run.toml' to train elsewhere",
    ),
    "a folder with checkpoints": Wrong(
        lambda shop: ["train", str(shop.copied("run"))],
        "output_dir",
        "step-00000004",
        "--resume, start over with --restart",
    ),
    "a checkpoint that is not there": Wrong(
        words("eval", "{made}/run", "--checkpoint", "step-9"),
        "{made}/run/checkpoints",
        "'step-9'",
        "There are: best, final",
    ),
    "eval of a run that is not there": Wrong(
        words("eval", "no/run"), "'no/run'", "does not exist", "name a run file or a run folder"
    ),
    "eval of a run without checkpoints": Wrong(
        _run("eval", "checkpoints"), "{tmp}/run/checkpoints", "'best'", "train the run first"
    ),
    "eval of a damaged checkpoint": Wrong(
        _damaged("eval"), "shard-00001-of-00001.safetensors", "SHA-256", "Name another checkpoint"
    ),
    "eval of a damaged manifest": Wrong(
        _damaged("eval", "checkpoints/step-00000004/manifest.json"),
        "step-00000004/manifest.json",
        "SHA-256",
        "Name another checkpoint",
    ),
    "eval from another base": Wrong(
        _another_base("eval"), "model.path", "{tmp}/model", "Set model.path to the folder of that model"
    ),
    "eval of a checkpoint of other layers": Wrong(
        words("eval", "{made}/run", "--set", "pst.score_rank=4"),
        "{made}/run",
        "pst_A has shape (32, 8)",
        "the [pst] settings that it was trained with",
    ),
    "eval of another method": Wrong(
        words("eval", "{made}/run", "--set", "method=dense"),
        "{made}/run",
        "trained parameters differ",
        "use the method",
    ),
    "texts of a classifier": Wrong(
        words("eval", "{made}/run", "--texts", "{tmp}/texts.jsonl"), "--texts", "{tmp}/texts.jsonl", "Omit it"
    ),
}


EXPORTS = {
    "export of a run without checkpoints": Wrong(
        _run("export", "checkpoints"), "{tmp}/run/checkpoints", "'best'", "train the run first"
    ),
    "export of a damaged checkpoint": Wrong(
        _damaged("export"), "shard-00001-of-00001.safetensors", "SHA-256", "Name another checkpoint"
    ),
    "export of a checkpoint of another base": Wrong(
        _another_base("export"), "model.path", "{tmp}/model", "Set model.path to the folder of that model"
    ),
    "export of nothing": Wrong(
        words("export", "{tmp}/no", "--out", "{tmp}/out"),
        "{tmp}/no",
        "does not exist",
        "name a run file or a run folder",
    ),
    "export of a folder that is nothing": Wrong(
        words("export", "{made}/plain", "--out", "{tmp}/out"),
        "{made}/plain",
        "run.toml is missing",
        "config.json is missing",
    ),
    "an output that exists": Wrong(_exported_into("{made}/plain"), "{made}/plain", "exists", "Name another folder"),
    "an output that is the run": Wrong(_exported_into("{made}/run"), "{made}/run", "exists", "Name another folder"),
    "an output that is a file": Wrong(
        lambda shop: ["export", f"{shop.made}/run", "--out", shop.file("out", "")], "{tmp}/out", "exists", "--out"
    ),
    "an output below a file": Wrong(
        lambda shop: ["export", f"{shop.made}/run", "--out", shop.below_a_file("out")],
        "--out",
        "{tmp}/plain-file/out",
        "name a place elsewhere",
    ),
    "an output that is the input": Wrong(
        words("export", "{made}/dense", "--format", "bitmask", "--out", "{made}/dense"),
        "{made}/dense",
        "the folder to read",
        "--out",
    ),
    "2:4 of an unstructured mask": Wrong(
        words("export", "{made}/run", "--format", "2:4", "--out", "{tmp}/out"),
        "2:4",
        "2:4",
        'Train with pst.pattern = "2:4"',
    ),
    "settings of a model folder": Wrong(
        words("export", "{made}/dense", "--out", "{tmp}/out", "--checkpoint", "best"),
        "{made}/dense",
        "model folder",
        "Remove --set and --checkpoint",
    ),
    "export of a quantised folder": Wrong(
        lambda shop: [
            "export",
            str(shop.model(quantization_config={"quant_method": "gptq"})),
            "--out",
            f"{shop.tmp}/out",
        ],
        "{tmp}/model",
        "gptq",
        "before it was quantised",
    ),
    "verify of what is no export": Wrong(words("verify", BERT), BERT, "pst_manifest.json is missing", "not an export"),
    "verify of what is not there": Wrong(
        words("verify", "no/export"), "no/export", "pst_manifest.json is missing", "not an export"
    ),
    "verify of damaged weights": Wrong(
        lambda shop: ["verify", str(shop.damaged("dense", "model.safetensors"))], "{tmp}/dense", "SHA-256", "export"
    ),
    "verify of a manifest that is not JSON": Wrong(
        _manifest(lambda text: text[:100]), "{tmp}/dense/pst_manifest.json", "damaged", "Write it again"
    ),
    "verify of a manifest that was edited": Wrong(
        _manifest(lambda text: json.dumps({**json.loads(text), "step": 3})),
        "{tmp}/dense/pst_manifest.json",
        "damaged",
        "Export the model again",
    ),
    "verify against what is no run": Wrong(
        words("verify", "{made}/dense", "--against", "{made}/plain"),
        "{made}/plain",
        "run.toml is missing",
        "run folder",
    ),
    "verify against a run of another model": Wrong(
        words("verify", "{made}/dense", "--against", "{made}/causal"),
        "{made}/dense",
        "{made}/causal",
        "Name the run it came from",
    ),
    "verify against less than nothing": Wrong(
        words("verify", "{made}/dense", "--against", "{made}/run", "--limit", "-1"),
        "--limit",
        "'-1'",
        "a whole number of at least 1",
    ),
}
