"""Calibration on text that the dense model generates itself, from the file of prompts to the record and to a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pst_ds.cli.main import main
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.errors import InputError
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.parallel.ranks import rank, world_size
from pst_ds.train.model import load_tokenizer
from pst_ds.train.one_shot.own_text import _random_numbers, _Sampled, own_batches, read_prompts
from pst_ds.train.run import prepare, train_prepared

RUN_FILE, TINY = "tests/data/causal_lm.toml", "tests/data/tiny-llama"
TEXTS = ["the film was", "a tired story", "and the end of that film was very", "fine"]


def _rows(run, path, samples, seed=0):
    """The sequences without padding, by their tokens."""
    return [
        ids[:length]
        for batch in own_batches(run, str(path), samples, seed)
        for ids, length in zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True)
    ]


@pytest.fixture
def prompts(tmp_path, alone):
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(TEXTS) + "\n")
    return path


def test_tokens_have_the_models_distribution():
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    with torch.no_grad():
        scores = 20 * model(input_ids=torch.tensor([[1]])).logits[:, -1]  # some tokens are far likelier than others
    expected = scores.softmax(-1)[0]
    numbers = torch.stack([_random_numbers(f"0/{index}", 3) for index in range(4000)])
    for step in range(3):
        chosen = _Sampled(numbers, 2)(torch.ones(4000, 2 + step), scores.expand(4000, -1)).argmax(-1)
        shares = chosen.bincount(minlength=len(expected)) / 4000
        assert (shares - expected).abs().max() < 5 * (expected.max() / 4000).sqrt()
    edges = torch.tensor([[0.0], [1.0 - 2.0**-53]], dtype=torch.float64)  # no token of probability 0 even there
    certain = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    assert _Sampled(edges, 1)(torch.ones(2, 1), certain.expand(2, -1)).argmax(-1).tolist() == [1, 2]


def test_a_continuation_depends_on_its_prompt_and_index_only(prompts):
    run = load_run(RUN_FILE)
    rows = _rows(run, prompts, 10)
    for size in (1, 3):  # other neighbours, and other padding
        other = replace(run, eval=replace(run.eval, batch_size=size))
        assert sorted(_rows(other, prompts, 10)) == sorted(rows)
    assert sorted(_rows(run, prompts, 10, seed=1)) != sorted(rows)
    tokenizer = load_tokenizer(run)
    begun = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert len({tuple(row) for row in rows}) == len(rows) == 10
    assert all(any(row[: len(ids)] == ids for ids in begun) for row in rows)
    end = tokenizer.eos_token_id
    assert all(len(row) == run.data.max_length or (len(row) < run.data.max_length and row[-1] == end) for row in rows)
    assert all(end not in row[len(begun[0]) : -1] for row in rows)
    assert [len(row) for row in rows] == sorted(len(row) for row in rows)


def test_learned_positions_are_not_exceeded(prompts, tmp_path, tiny_gpt2):
    """A short prompt is padded to a long one, whose position is the last that the model has."""
    prompts.write_text("the\n" + "the film " * 8 + "\n")
    run = load_run(RUN_FILE, [f"model.path={json.dumps(tiny_gpt2)}", f"model.tokenizer={TINY}", "data.max_length=24"])
    assert max(map(len, _rows(run, prompts, 4))) <= 24


@pytest.fixture
def tiny_gpt2(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    vocabulary = AutoModelForCausalLM.from_pretrained(TINY).config.vocab_size
    config = GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2, n_positions=24, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


def test_prompts_are_texts_or_messages_without_the_last_answer(tmp_path, alone):
    run = load_run(RUN_FILE, ["data.chat_template=tests/data/chat.jinja"])
    tokenizer, path = load_tokenizer(run), tmp_path / "prompts.jsonl"
    user, answer = {"role": "user", "content": "the film"}, {"role": "assistant", "content": "fine"}

    def read(*rows, as_messages=False):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_prompts(str(path), tokenizer, 8, as_messages=as_messages)

    text = tokenizer("the film")["input_ids"]
    message = [*tokenizer("the film", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert read({"prompt": "the film"}, {"prompt": " "}, {"prompt": "the " * 8}) == [text]
    assert read({"prompt": "the film", "completion": "fine"}, as_messages=True) == [message]
    assert read({"messages": [user]}, {"messages": [user, answer]}) == [message] * 2
    assert read({"prompt": [user]}) == [message]
    with pytest.raises(ConfigError, match=r"row 1 has no \"prompt\" or \"messages\". Columns: question"):
        read({"question": "the film"})
    with pytest.raises(ConfigError, match=r"has no prompt of fewer than data.max_length = 8 tokens"):
        read({"prompt": "the " * 8})
    with pytest.raises(ConfigError, match=r"own_text = .*none.txt' does not exist"):
        read_prompts(str(tmp_path / "none.txt"), tokenizer, 8, as_messages=False)


def _pruned(capsys, out, run_file, *arguments):
    capsys.readouterr()
    status = main(["prune", run_file, "--method", "wanda", "--samples", "6", "--out", str(out), *arguments])
    return status, capsys.readouterr().err


def test_prune_calibrates_on_it_and_says_so(capsys, tmp_path, prompts):
    status, _ = _pruned(capsys, tmp_path / "out", RUN_FILE, "--own-text", str(prompts))
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    rows = _rows(load_run(RUN_FILE), prompts, 6)
    assert (status, record["own_text"], record["data"]) == (0, True, str(prompts))
    assert (record["samples"], record["tokens"]) == (6, sum(map(len, rows)))
    status, said = _pruned(capsys, tmp_path / "bert", "tests/data/world_size.toml", "--own-text", str(prompts))
    assert status == 2
    assert "tests/data/tiny-bert is not a causal language model for task 'classification'" in said
    status, said = _pruned(capsys, tmp_path / "m", RUN_FILE, "--own-text", str(prompts), "--method", "magnitude")
    assert status == 2
    assert "is calibration data, and magnitude needs none" in said


def _train(folder, prompts):
    settings = ["start.method=wanda", "start.samples=6", f"start.own_text={json.dumps(str(prompts))}"]
    settings += ["train.num_steps=2", "eval.interval=0", "schedule.initial_sparsity=0.5"]
    run = load_run(RUN_FILE, [*settings, f"output_dir={json.dumps(str(folder))}"])
    train_prepared(prepare(run, LaunchEnvironment(rank(), world_size(), rank())), quiet=True)


def _refused(folder, prompts):
    with pytest.raises(InputError) as caught:
        _train(folder, prompts)
    return str(caught.value)


@pytest.mark.zero3
def test_a_run_starts_with_it_on_any_number_of_ranks(run_ranks, tmp_path, prompts):
    for ranks in (1, 2):
        run_ranks(_train, ranks, str(tmp_path / str(ranks)), str(prompts))
    one, two = (Path(tmp_path / ranks / "start" / "model.safetensors").read_bytes() for ranks in ("1", "2"))
    assert one == two
    said = run_ranks(_refused, 2, str(tmp_path / "none"), str(tmp_path / "none.txt"))
    assert said == [said[0]] * 2
    assert "none.txt' does not exist" in said[0]


@pytest.mark.zero3
@pytest.mark.thorough
def test_other_prompts_start_a_run_anew(run_ranks, tmp_path, prompts):
    def start():
        run_ranks(_train, 1, str(tmp_path / "run"), str(prompts))
        (tmp_path / "run" / "checkpoints").rename(tmp_path / f"checkpoints-{len(list(tmp_path.glob('checkpoints-*')))}")
        return (tmp_path / "run" / "start" / "pruning.json").stat().st_mtime_ns

    first = start()
    prompts = prompts.rename(tmp_path / "moved.txt")
    assert start() == first
    prompts.write_text("the end\n")
    assert start() != first
