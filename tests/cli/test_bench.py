"""``pst-ds bench`` on tiny models: what is counted, which variants there are, and what is refused. No speed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributions import Categorical, kl_divergence

from pst_ds.cli.bench import bench_text
from pst_ds.cli.main import main
from pst_ds.hf.model_folder import open_model_folder
from pst_ds.inference.decoder import Decoder, DecoderError

DATA = Path(__file__).resolve().parents[1] / "data"
SHORT = ("--prompt-tokens", "5", "--new-tokens", "4", "--repeats", "2")


def _with_zeros(source, out, sparsity):
    """A copy of a tiny model of which the matrices of the blocks are pruned."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    rng = torch.Generator().manual_seed(2)
    for name, tensor in tensors.items():
        if "layer" in name and tensor.dim() == 2:
            tensor[torch.rand(tensor.shape, generator=rng) < sparsity] = 0.0
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("models")
    _with_zeros(DATA / "tiny-llama", top / "half", 0.5)
    _with_zeros(DATA / "tiny-bert", top / "bert", 0.8)
    command = [
        "export",
        str(top / "half"),
        "--format",
        "bitmask",
        "--dtype",
        "bf16",
        "--out",
        str(top / "half-bitmask"),
    ]
    assert main(command) == 0
    for name in ("half", "bert"):
        packed = ["--format", "bitmask", "--values", "int8", "--out", str(top / f"{name}-int8")]
        assert main(["export", str(top / name), *packed]) == 0
    return top


def _bench(capsys, folder, *arguments):
    """(the result, the table's lines)."""
    capsys.readouterr()
    assert main(["bench", str(folder), *SHORT, *arguments, "--json"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    return json.loads(last), table


def _refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["bench", *map(str, arguments)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pst-ds bench: ")]
    return line


def test_a_decoder_whose_values_are_codes_runs_in_the_native_loop_too(folders, capsys):
    result, table = _bench(capsys, folders / "half-int8", "--batch", "1,2", "--threads", "1")
    rows = {(row["variant"], row["batch"]): row for row in result["rows"]}
    for batch in (1, 2):
        row = rows["native loop", batch]
        assert row["decode_tokens_per_second"] == pytest.approx(batch / row["decode_step_seconds"])
        assert row["file_bytes"] == rows["bitmask", batch]["file_bytes"]
        assert 0 < row["resident_bytes"] < rows["dense", batch]["resident_bytes"]
        assert row["decode_over_dense"] > 0
    assert any("native loop" in line for line in table)


@pytest.mark.parametrize("folder", ["half-bitmask", "bert-int8"])
@pytest.mark.few(1)
def test_there_is_no_native_loop_of_floats_or_encoders(folders, capsys, folder):
    result, _ = _bench(capsys, folders / folder)
    assert {row["variant"] for row in result["rows"]} >= {"dense", "bitmask"}
    assert not any(row["variant"] == "native loop" for row in result["rows"])


def test_a_model_that_the_loop_cannot_run_is_measured_without_it(folders, capsys, monkeypatch):
    def refuse(*_, **__):
        raise DecoderError("an odd layer")

    monkeypatch.setattr(Decoder, "from_pretrained", refuse)
    assert main(["bench", str(folders / "half-int8"), *SHORT]) == 0
    out = capsys.readouterr()
    assert "the native decoder is not measured: an odd layer" in out.err
    assert "native loop" not in out.out


def test_every_contestant_has_its_rates_and_ratios(folders, capsys):
    result, table = _bench(capsys, folders / "half-bitmask", "--batch", "1,3", "--threads", "1")
    rows = {(row["variant"], row["batch"]): row for row in result["rows"]}
    assert set(rows) == {(name, batch) for name in ("dense", "bitmask") for batch in (1, 3)}
    for stage in ("prefill", "decode"):
        rate = f"{stage}_tokens_per_second"
        assert rows["bitmask", 3][f"{stage}_over_dense"] == pytest.approx(
            rows["bitmask", 3][rate] / rows["dense", 3][rate]
        )
    for (_, batch), row in rows.items():
        assert row["threads"] == 1
        assert row["decode_tokens_per_second"] == pytest.approx(batch / row["decode_step_seconds"])
        assert row["prefill_tokens_per_second"] > 0
    assert len(table) == 3 + len(rows)
    assert torch.__version__.startswith(result["conditions"]["versions"]["torch"])  # the metadata may lack "+cu132"


def test_bytes_are_those_of_files_and_tensors(folders, capsys):
    result, _ = _bench(capsys, folders / "half-bitmask")
    rows = {row["variant"]: row for row in result["rows"]}
    stored = load_file(folders / "half-bitmask" / "pst_bitmask.safetensors")
    assert rows["bitmask"]["file_bytes"] == (folders / "half-bitmask" / "pst_bitmask.safetensors").stat().st_size
    # rotary frequencies stand in the model and in no file
    assert 0 <= rows["bitmask"]["resident_bytes"] - sum(tensor.nbytes for tensor in stored.values()) < 200
    dense = 2 * sum(tensor.numel() for tensor in load_file(folders / "half" / "model.safetensors").values())
    assert 0 <= rows["dense"]["resident_bytes"] - dense < 200
    assert rows["dense"]["file_bytes"] is None


def test_a_model_that_writes_nothing_has_its_forward_pass_measured(folders, capsys):
    result, table = _bench(capsys, folders / "bert")
    assert result["causal"] is False
    assert {row["variant"] for row in result["rows"]} == {"dense"}
    for row in result["rows"]:
        assert "decode_tokens_per_second" not in row
        assert row["prefill_tokens_per_second"] > 0
    assert "decode" not in table[2]


def test_more_tokens_than_positions_are_refused(folders, capsys):
    assert "48 positions" in _refused(capsys, folders / "half", "--prompt-tokens", "40", "--new-tokens", "9")


def test_wrong_numbers_are_refused(folders, capsys):
    for wrong in (("--batch", "0"), ("--threads", "1,x"), ("--repeats", "-1")):
        with pytest.raises(SystemExit) as stopped:
            main(["bench", str(folders / "half"), *wrong])
        assert stopped.value.code == 2


@pytest.mark.thorough
def test_the_number_of_threads_is_put_back(folders, capsys):
    before = torch.get_num_threads()
    _bench(capsys, folders / "half-bitmask", "--threads", f"{before + 1}")
    assert torch.get_num_threads() == before


def test_the_table_shows_what_there_is():
    row = {"variant": "bitmask", "threads": 1, "batch": 1, "decode_tokens_per_second": 12.34, "file_bytes": None}
    row |= {"decode_over_dense": 1.5, "resident_bytes": 2_500_000}
    conditions = {"dtype": "bf16", "repeats": 3, "hardware": "a CPU"}
    conditions |= {"sparse_kernel": "amx", "versions": {"torch": "2"}}
    result = {"model": "m", "prompt_tokens": 1, "new_tokens": 2, "causal": True, "conditions": conditions}
    heading, cells = bench_text({**result, "rows": [row]}).splitlines()[2:]
    assert cells.split() == ["bitmask", "1", "1", "12.3", "1.50", "2.5"]
    assert "file MB" not in heading


def test_variants_are_compared_with_a_reference(folders, tmp_path, capsys):
    """A model is as far from itself as its dtype rounds; the native loop as far as quantised values are."""
    text = tmp_path / "text.txt"
    text.write_text("the film is a sharp and moving story about the people of a small town\n" * 4)
    words = ("--reference", str(folders / "half"), "--text", str(text), "--dtype", "fp32")
    said, table = _bench(capsys, folders / "half-int8", *words)
    kl = {row["variant"]: row["kl_mean"] for row in said["rows"]}
    exact, _ = _bench(capsys, folders / "half", *words)
    assert abs(exact["rows"][0]["kl_mean"]) < 1e-9
    model, other = (open_model_folder(folders / name).load("dense", "fp32") for name in ("half", "half-int8"))
    ids = torch.tensor(open_model_folder(folders / "half").tokenizer()(text.read_text())["input_ids"])
    starts = [number * len(ids) // min(16, len(ids) // 5) for number in range(min(16, len(ids) // 5))]
    with torch.no_grad():
        p, q = (
            torch.cat([Categorical(logits=one(ids[None, at : at + 5]).logits[0].double()).logits for at in starts])
            for one in (model, other)
        )
    wanted = float(kl_divergence(Categorical(logits=p), Categorical(logits=q)).mean())
    assert kl["dense"] == pytest.approx(wanted, rel=1e-3)
    assert kl["native loop"] == pytest.approx(wanted, rel=0.2)
    assert " KL " in next(line for line in table if line.startswith("variant"))


def test_a_reference_needs_a_text_and_tokens(folders, tmp_path, capsys):
    for folder, said in (("half-int8", "--text None cannot be read"), ("bert-int8", "predicts no tokens")):
        assert main(["bench", str(folders / folder), *SHORT, "--reference", str(folders / "half")]) == 2
        assert said in capsys.readouterr().err
