"""``pst-ds prune --bits``: weights on a grid, whose codes and scales get into every export without a further loss."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pst_ds.cli.main import main
from pst_ds.core.quantization import dequantize, grid_of, quantize, unpack_nibbles
from tests.pairs import every_pair

CAUSAL = "tests/data/causal_lm.toml"
DATA = Path(__file__).resolve().parents[1] / "data"
WIDE = {"llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}, "gpt2": {"n_embd": 64}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def base(tiny, tmp_path):
    """``base(family, dtype)``: the words that make it the model of the run file."""

    def make(family: str = "llama", dtype: str = "bf16") -> list[str]:
        folder = tmp_path / "base"
        tiny(family, **WIDE[family]).to(DTYPES[dtype]).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(DATA / "tiny-llama" / name, folder / name)
        return ["--set", f"model.path={json.dumps(str(folder))}"]

    return make


def _prune(capsys, out, *words, method="sparsegpt"):
    capsys.readouterr()
    command = ["prune", CAUSAL, "--method", method, "--out", str(out), "--samples", "12", "--json", *words]
    assert main(command) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def _export(out, source, *words):
    assert main(["export", str(source), "--out", str(out), *words]) == 0
    return out


def _said_by(capsys, *words):
    """The one line of a command that ends with exit code 2."""
    capsys.readouterr()
    assert main([*map(str, words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def _tensors(folder):
    (path,) = [path for path in folder.glob("*.safetensors") if path.name != "scales.safetensors"]
    return load_file(path)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("family", "dtype", "bits", "group"),
    [("llama", "bf16", "4", "64"), ("llama", "fp32", "4", "32"), ("llama", "fp16", "8", "row"),
     ("gpt2", "bf16", "8", "32"), ("gpt2", "bf16", "4", "row")],
)  # fmt: skip
def test_an_export_is_the_pruned_folder_to_the_bit(capsys, tmp_path, base, family, dtype, bits, group):
    words = ["--pattern", "2:4", "--bits", bits, "--group", group]
    result = _prune(capsys, tmp_path / "out", *base(family, dtype), *words)
    values = f"int{bits}"
    assert (result["values"], result["group"]) == (values, group if group == "row" else int(group))
    pruned, scales = _tensors(tmp_path / "out"), load_file(tmp_path / "out" / "scales.safetensors")
    layers = json.loads((tmp_path / "out" / "pruning.json").read_text())["layers"]
    assert {f"{layer['name']}.scales" for layer in layers} == scales.keys()
    assert all(layer["zeros"] >= layer["pruned"] == layer["shape"][0] * layer["shape"][1] // 2 for layer in layers)
    codes = {}
    for layer in layers:
        weight, mine = pruned[f"{layer['name']}.weight"], scales[f"{layer['name']}.scales"]
        matrix = weight.t() if family == "gpt2" else weight
        codes[layer["name"]], _ = quantize(matrix, None, grid_of(values, group), mine)
        assert torch.equal(dequantize(codes[layer["name"]], mine, matrix.dtype), matrix)
    for packing in ("bitmask", "2:4", "dense"):
        packed, back = (tmp_path / f"{packing.replace(':', '')}-{name}" for name in ("packed", "back"))
        stored = _tensors(_export(packed, tmp_path / "out", "--format", packing, "--values", values, "--group", group))
        assert all(torch.equal(stored[name], tensor) for name, tensor in scales.items())
        if packing == "dense":
            for name, own in codes.items():
                held = stored[f"{name}.codes"]
                assert torch.equal(held if bits == "8" else unpack_nibbles(held, own.shape[1]), own)
        entries = json.loads((packed / "pst_manifest.json").read_text())["tensors"]
        if dtype == "fp32":  # which code * scale is exact in
            assert {entry["rounding_error"] for entry in entries if entry["values"]} == {0.0}
        plain = _tensors(_export(back, packed))
        assert plain.keys() == pruned.keys()
        assert all(torch.equal(plain[name], tensor) for name, tensor in pruned.items())
    assert main(["verify", str(packed)]) == 0


def test_plain_formats_and_other_programs_have_the_same_weights(capsys, tmp_path, base):
    _prune(capsys, tmp_path / "out", *base("llama", "bf16"), "--sparsity", "0.5", "--bits", "4", "--group", "32")
    pruned = _tensors(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(pruned[name], tensor) for name, tensor in model.state_dict().items() if name in pruned)
    for name, words in (("bitmask", ["--format", "bitmask"]), ("plain", [])):
        _export(tmp_path / name, tmp_path / "out", *words)
        assert not (tmp_path / name / "scales.safetensors").exists()
        back = _tensors(_export(tmp_path / f"{name}-back", tmp_path / name))
        assert all(torch.equal(back[key], tensor) for key, tensor in pruned.items())
    words = ["--format", "compressed-tensors", "--values", "int4", "--group", "32"]
    theirs = _tensors(_export(tmp_path / "theirs", tmp_path / "out", *words))
    scales = load_file(tmp_path / "out" / "scales.safetensors")
    found = {name: tensor for name, tensor in theirs.items() if name.endswith("weight_scale")}
    assert found
    assert all(torch.equal(t, scales[n.replace("weight_scale", "scales")]) for n, t in found.items())


def test_rounding_keeps_the_zeros_that_are_there(capsys, tmp_path, base):
    where = base("llama", "fp32")
    _prune(capsys, tmp_path / "zeros", *where, "--pattern", "2:4", method="wanda")
    model = ["--set", f"model.path={json.dumps(str(tmp_path / 'zeros'))}"]
    result = _prune(capsys, tmp_path / "out", *model, "--keep-zeros", "--bits", "4")
    assert (result["pattern"], result["sparsity_requested"], result["group"]) == ("zeros", None, 64)
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert {(layer["pattern"], layer["sparsity_requested"]) for layer in record["layers"]} == {("zeros", 0.5)}
    before, after = _tensors(tmp_path / "zeros"), _tensors(tmp_path / "out")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"{layer['name']}.weight" for layer in record["layers"]}
    for name in changed:
        assert bool((after[name][before[name] == 0] == 0).all())
        assert ((after[name] == 0) & (before[name] != 0)).float().mean() < 0.1
    _export(tmp_path / "packed", tmp_path / "out", "--format", "2:4", "--values", "int4")
    again = ["--set", f"model.path={json.dumps(str(tmp_path / 'out'))}"]
    _prune(capsys, tmp_path / "again", *again, "--keep-zeros", "--bits", "8")  # which is a folder as any other
    assert main(["inspect", str(tmp_path / "again")]) == 0


def test_a_dense_model_can_be_rounded_alone(capsys, tmp_path, base):
    result = _prune(capsys, tmp_path / "out", *base(), "--sparsity", "0", "--bits", "8")
    assert (result["sparsity_requested"], result["values"], result["group"]) == (0.0, "int8", "row")
    assert result["pruned_weights"] == 0
    _export(tmp_path / "packed", tmp_path / "out", "--values", "int8")


def test_words_that_do_not_go_together(capsys, tmp_path, base):
    where = [*base(), "--samples", "12", "--out", tmp_path / "out"]

    def said(*words, method="sparsegpt"):
        line = _said_by(capsys, "prune", CAUSAL, "--method", method, *where, *words)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
        return line

    for method in ("wanda", "magnitude", "alps"):
        assert "quantise the folder with --method sparsegpt and --keep-zeros" in said("--bits", "4", method=method)
    assert "--group 32 is for quantised weights. Set --bits 4 or 8 too" in said("--group", "32")
    assert "--keep-zeros prunes nothing more, so there is nothing to do. Set --bits 4 or 8 too" in said("--keep-zeros")
    both = said("--keep-zeros", "--bits", "4", "--sparsity", "0.5", "--pattern", "row")
    assert "--keep-zeros keeps the mask that the folder has. Remove --sparsity 0.5 and --pattern row" in both
    groups = said("--bits", "4", "--group", "128")
    assert "model.layers.0.self_attn.q_proj: groups of 128 do not divide 64 inputs; take 32 or 64 or row" in groups
    assert "Choose another group, or exclude the layer with pst.exclude_modules" in groups


def _with_weight(folder, name, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def _with_scales(folder, change):
    path = folder / "scales.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


UP = "model.layers.1.mlp.up_proj"


def _add_layer(tensors):
    tensors["lm.scales"] = tensors[f"{UP}.scales"].clone()


DAMAGE = {
    "a weight off the grid": (
        lambda f: _with_weight(f, f"{UP}.weight", lambda t: t[3, 5:6].fill_(0.1234)),
        rf"{UP}.weight does not match .*pruning.json, which says .*row 3, input 5 is 0.1235\d*, not an",
    ),
    "a weight that is not finite": (
        lambda f: _with_weight(f, f"{UP}.weight", lambda t: t[3, 5:6].fill_(float("nan"))), "is not finite in fp32"
    ),
    "a scale of zero": (lambda f: _with_scales(f, lambda t: t[f"{UP}.scales"][2, 1:2].fill_(0.0)),
                        f"{UP}.scales: scale 5 is 0; scales are at least"),
    "an infinite scale": (lambda f: _with_scales(f, lambda t: t[f"{UP}.scales"][0, 0:1].fill_(float("inf"))),
                          f"{UP}.scales: scale 0 is inf; scales are"),
    "scales of another grid": (lambda f: _with_scales(f, lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:, :1]
                                                                             .contiguous()})),
                               r"up_proj\.scales: scales are torch\.bfloat16 of shape \(128, 2\), got .*\(128, 1\)"),
    "wide scales": (lambda f: _with_scales(f, lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].float()})),
                    r"got torch\.float32"),
    "a layer's scales gone": (lambda f: _with_scales(f, lambda t: t.pop(f"{UP}.scales")), f"lacks {UP}.scales. Prune"),
    "no scales": (lambda f: (f / "scales.safetensors").unlink(), "scales.safetensors is missing, although"),
    "half a file": (lambda f: (f / "scales.safetensors").write_bytes((f / "scales.safetensors").read_bytes()[:-3]),
                    "scales.safetensors is damaged"),
    "other values": (lambda f: _with_record(f, values="int3"), "pruning.json is damaged.*int8 or int4, got 'int3'"),
    "no group": (lambda f: _with_record(f, group=7), "pruning.json is damaged.*a group is 32, 64, 128 or row, got 7"),
    "no layers": (lambda f: _with_record(f, layers=3), "pruning.json is damaged"),
    "a layer that there is not": (
        lambda f: (_with_layers(f, lambda layers: layers[-1].update(name="lm")), _with_scales(f, _add_layer)),
        "lists lm, a layer that the model does not have",
    ),
    "a layer without its shape": (lambda f: _with_layers(f, lambda layers: layers[0].pop("shape")),
                                  r"pruning.json is damaged: 'layers\.0\.shape' is missing. Prune the model again"),
}  # fmt: skip


def _with_record(folder, **changes):
    path = folder / "pruning.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _with_layers(folder, change):
    layers = json.loads((folder / "pruning.json").read_text())["layers"]
    change(layers)
    _with_record(folder, layers=layers)


@pytest.fixture(scope="module")
def on_grid(tmp_path_factory):
    """A folder of int4 in groups of 32."""
    import transformers

    top = tmp_path_factory.mktemp("on_grid")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=48, initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(top / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DATA / "tiny-llama" / name, top / "base" / name)
    words = ["--set", f"model.path={json.dumps(str(top / 'base'))}", "--bits", "4", "--group", "32"]
    command = ["prune", CAUSAL, "--method", "sparsegpt", "--out", str(top / "out"), "--samples", "12", *words]
    assert main(command) == 0
    return top / "out"


@every_pair
@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("packing", ["bitmask", "compressed-tensors"])
def test_where_exactness_was_promised_and_cannot_be_had(capsys, tmp_path, on_grid, name, packing):
    damage, message = DAMAGE[name]
    folder = Path(shutil.copytree(on_grid, tmp_path / "folder"))
    damage(folder)
    words = ["export", folder, "--values", "int4", "--group", "32", "--out", tmp_path / "out", "--format", packing]
    line = _said_by(capsys, *words)
    assert re.search(message, line), line
    assert str(folder) in line
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_another_grid_would_round_twice(capsys, tmp_path, on_grid):
    for words in (["--values", "int8"], ["--values", "int4"], ["--values", "int4", "--group", "64"]):
        line = _said_by(capsys, "export", on_grid, "--out", tmp_path / "out", *words)
        assert "Set --values int4 and --group 32" in line
    assert not (tmp_path / "out").exists()
    _export(tmp_path / "tables", on_grid, "--embeddings", "int8")  # which are on no grid yet
    folder = Path(shutil.copytree(on_grid, tmp_path / "folder"))
    _with_record(folder, values=None)  # as docs/how-to/methods.md says
    _export(tmp_path / "anew", folder, "--values", "int8")
