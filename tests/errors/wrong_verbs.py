"""Wrong inputs of the verbs that do not train: prune, generate, bench, inspect, init, doctor."""

from __future__ import annotations

from .workshop import BERT, Workshop, Wrong, words

_TRAIN = "tests/data/train.jsonl"


def _prune(*arguments: str, settings: tuple[str, ...] = ()):
    return lambda shop: shop.prune(*map(shop.filled, arguments), settings=tuple(map(shop.filled, settings)))


def _init(*arguments: str):
    return words("init", BERT, "--train", _TRAIN, "--out", "{tmp}/run.toml", *arguments)


def _generate(*arguments: str, folder: str = "{made}/causal-dense"):
    return words("generate", folder, *(arguments or ("--prompt", "the film")))


def _without_tokenizer(shop: Workshop) -> list[str]:
    return ["generate", str(shop.without("causal-dense", "tokenizer*")), "--prompt", "the film"]


_CUDA = {"DS_ACCELERATOR": "cuda"}
VERBS = {
    "prune on an accelerator that is not there": Wrong(
        _prune("--method", "magnitude"), "DS_ACCELERATOR", "'cuda'", "unset it", environment=_CUDA, without_gpu=True
    ),
    "generate on an accelerator that is not there": Wrong(
        _generate(), "DS_ACCELERATOR", "'cuda'", "unset it", environment=_CUDA, without_gpu=True
    ),
    "prune over all matrices": Wrong(
        _prune("--method", "magnitude", "--pattern", "global"),
        "pattern",
        '"global"',
        "Set --pattern matrix, row or 2:4",
    ),
    "prune by an unknown pattern": Wrong(
        _prune("--method", "magnitude", "--pattern", "rows"), "--pattern rows", "'rows'", 'there are "matrix"'
    ),
    "prune by an unknown method": Wrong(_prune("--method", "magntude"), "--method", "'magntude'", "magnitude"),
    "prune to a sparsity of 1": Wrong(
        _prune("--method", "wanda", "--sparsity", "1"), "--sparsity", "1.0", "must be in [0, 1)"
    ),
    "prune to a sparsity that the pattern does not have": Wrong(
        _prune("--method", "wanda", "--pattern", "2:4", "--sparsity", "0.7"), "--sparsity", "0.7", "Remove one of them"
    ),
    "prune by saliency where a pattern has one share": Wrong(
        _prune("--method", "wanda", "--pattern", "2:4", "--budgets", "saliency"),
        "--budgets",
        "2:4",
        "Set --budgets equal, or --pattern row or matrix",
    ),
    "prune to a grid by saliency": Wrong(
        _prune("--method", "sparsegpt", "--bits", "4", "--budgets", "saliency"), "--bits 4", "saliency", "Prune first"
    ),
    "prune by budgets of whole experts": Wrong(
        _prune("--method", "reap", "--budgets", "saliency"), "--budgets", "--method reap", "Remove it"
    ),
    "prune and reconstruct whole experts": Wrong(
        _prune("--method", "reap", "--reconstruct", "1"), "--reconstruct", "--method reap", "Remove it"
    ),
    "prune and reconstruct in no pass": Wrong(
        _prune("--method", "wanda", "--reconstruct", "0"), "--reconstruct", "'0'", "not a whole number of at least 1"
    ),
    "prune into the base": Wrong(
        _prune("--method", "magnitude", "--out", "tests/data/tiny-llama"),
        "--out",
        "tests/data/tiny-llama",
        "Name another folder",
    ),
    "prune into a folder that exists": Wrong(
        _prune("--method", "magnitude", "--out", "{made}/plain"), "--out", "{made}/plain", "Name another folder"
    ),
    "prune into a place below a file": Wrong(
        lambda shop: shop.prune("--method", "magnitude", "--out", shop.below_a_file("out")),
        "--out",
        "{tmp}/plain-file/out",
        "name a place elsewhere",
    ),
    "calibration with no text": Wrong(
        lambda shop: shop.prune("--method", "wanda", settings=(f"data.train={shop.file('train.jsonl', '')}",)),
        "data.train",
        "{tmp}/train.jsonl",
        "Add a row",
    ),
    "calibration with too little text": Wrong(
        _prune("--method", "wanda", "--samples", "9999"), "--samples", "9999", "Set --samples 93"
    ),
    "prune of a packed folder": Wrong(
        _prune("--method", "magnitude", settings=("model.path={made}/bitmask",)),
        "model.path",
        "{made}/bitmask",
        "pst-ds export",
    ),
    "prune of a model that is not there": Wrong(
        _prune("--method", "magnitude", settings=("model.path=./no/model",)),
        "model.path",
        "'./no/model'",
        "name a model folder",
    ),
    "text of a folder that is not there": Wrong(
        _generate(folder="no/model"), "no/model", "no such folder", "looked in"
    ),
    "text of an encoder": Wrong(_generate(folder=BERT), BERT, "BertModel", "causal language model"),
    "text of a run": Wrong(_generate(folder="{made}/causal"), "{made}/causal", "run folder", "pst-ds export"),
    "text of a folder without a tokenizer": Wrong(
        _without_tokenizer, "{tmp}/causal-dense", "no tokenizer", "Copy tokenizer.json"
    ),
    "an empty prompt": Wrong(_generate("--prompt", " "), "--prompt", "empty", "Give a text"),
    "a prompt longer than the model's": Wrong(
        _generate("--prompt", "film " * 60), "--prompt", "61 tokens", "Shorten it"
    ),
    "a temperature below 0": Wrong(
        _generate("--prompt", "a", "--temperature", "-1"), "--temperature", "-1", "at least 0"
    ),
    "a share of 0 to draw from": Wrong(_generate("--prompt", "a", "--top-p", "0"), "--top-p", "0", "above 0"),
    "dense weights to keep packed": Wrong(
        _generate("--prompt", "the", "--max-new-tokens", "2", "--load-as", "sparse"),
        "{made}/causal-dense",
        "dense",
        "pst-ds export",
    ),
    "a chat without a template": Wrong(
        _generate("--prompt", "the", "--chat"), "{made}/causal-dense", "no chat template", "Omit --chat"
    ),
    "text of a packed folder that is damaged": Wrong(
        lambda shop: ["generate", str(shop.without("bitmask", "pst_bitmask.safetensors")), "--prompt", "the"],
        "{tmp}/bitmask",
        "pst_bitmask.safetensors",
        "Export again",
    ),
    "bench of what is no model": Wrong(
        words("bench", "{made}/plain"), "{made}/plain", "config.json is missing", "model folder"
    ),
    "bench of more tokens than positions": Wrong(
        words("bench", "{made}/causal-dense", "--prompt-tokens", "40", "--new-tokens", "40"),
        "--prompt-tokens",
        "80",
        "Lower them",
    ),
    "bench of no sequences": Wrong(
        words("bench", "{made}/causal-dense", "--batch", "0"), "--batch", "'0'", "at least 1"
    ),
    "inspect of what is not there": Wrong(words("inspect", "{tmp}/run"), "'{tmp}/run'", "does not exist", "looked in"),
    "inspect of neither a folder nor a model of the hub": Wrong(
        words("inspect", "no/run"), "no/run", "is not a folder (looked in", "Run hf download no/run where"
    ),
    "inspect of what is nothing": Wrong(words("inspect", "{made}/plain"), "{made}/plain", "notes.md", "run.toml"),
    "inspect of a damaged checkpoint": Wrong(
        lambda shop: [
            "inspect",
            str(shop.damaged("run", "checkpoints/step-00000004/manifest.json") / "checkpoints/step-00000004"),
        ],
        "step-00000004/manifest.json",
        "SHA-256",
        "damaged",
    ),
    "a run file that exists": Wrong(
        lambda shop: ["init", BERT, "--train", _TRAIN, "--out", shop.file("run.toml", "")],
        "{tmp}/run.toml",
        "exists",
        "--force",
    ),
    "init without a model": Wrong(
        words("init", "--train", _TRAIN, "--out", "{tmp}/run.toml"), "required", "DIR", "pst-ds init --help"
    ),
    "init of a model that is not there": Wrong(
        words("init", "./no/model", "--train", _TRAIN, "--out", "{tmp}/run.toml"),
        "model.path",
        "'./no/model'",
        "name a model folder",
    ),
    "init on a file that is not there": Wrong(
        words("init", BERT, "--train", "no.csv", "--out", "{tmp}/run.toml"), "--train", "no.csv", "Name a local file"
    ),
    "init with a sparsity above 1": Wrong(_init("--sparsity", "2"), "--sparsity", "2.0", "must be in [0, 1)"),
    "init with an unknown pattern": Wrong(_init("--pattern", "rows"), "--pattern", "'rows'", 'there are "matrix"'),
    "init with a column that is not there": Wrong(
        _init("--label-column", "class", "--task", "classification"), "'class'", _TRAIN, "columns: text, label"
    ),
    "init with a label column that is not there": Wrong(
        _init("--label-column", "lable"), "--label-column", "'lable'", "Name one of the columns: text, label"
    ),
    "init of an encoder without a label column": Wrong(
        lambda shop: [
            *("init", BERT, "--out", f"{shop.tmp}/run.toml", "--train"),
            shop.rows("rows.jsonl", *[{"sentence": "the film", "stars": 3}] * 9),
        ],
        "{tmp}/rows.jsonl",
        "no column 'label'",
        "with --label-column: stars",
    ),
    "init into a place below a file": Wrong(
        lambda shop: ["init", BERT, "--train", _TRAIN, "--out", shop.below_a_file("run.toml")],
        "--out",
        "{tmp}/plain-file/run.toml",
        "name a place elsewhere",
    ),
    "init for ranks that the batch has no examples for": Wrong(
        _init("--ranks", "3", "--batch-size", "2"), "--batch-size", "2", "make it 3 or more"
    ),
    "doctor with a time that is none": Wrong(
        words("doctor", "--time-limit", "soon"), "--time-limit", "'soon'", "a number above 0"
    ),
    "doctor with no time": Wrong(words("doctor", "--time-limit", "0"), "--time-limit", "'0'", "a number above 0"),
}
