"""A trained prompt: PEFT's losses and gradients, positions of encoders and decoders, runs, exports."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from pst_ds.additions.prompt import PromptSettings, PromptVectors
from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.cli.main import main
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.errors import InputError
from pst_ds.file_names import ADDITIONS_FILE
from pst_ds.hf import load_additions
from pst_ds.hf.model_folder import open_model_folder
from pst_ds.nn.addition import added_modules, attach_additions
from pst_ds.nn.inject import bypassed
from pst_ds.planning.plan import PlanOptions, plan
from tests.train.stopping import train_here

LLAMA = "tests/data/tiny-llama"
BERT = "tests/data/tiny-bert"
TEXT = "a good plot"
ALONE = ("method=masked-lora", "pst.update_rank=0", "pst.update_embeddings=[]")
"""Settings with which only the prompt and the head train."""


def _llama(kind=AutoModelForCausalLM):
    torch.manual_seed(0)
    return kind.from_pretrained(LLAMA, dtype=torch.float64).eval()


def _prompted(model, folder=LLAMA, **settings):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.requires_grad_(False)
    attach_additions(model, {"prompt": PromptSettings(text=TEXT, **settings)}, tokenizer, seed=0)
    (prompt,) = added_modules(model).values()
    return prompt


def _batch(*, left=False):
    """Two sequences, the first with two tokens of padding."""
    ids = torch.randint(4, 30, (2, 6), generator=torch.Generator().manual_seed(1))
    padding = slice(0, 2) if left else slice(4, 6)
    mask = torch.ones_like(ids)
    ids[0, padding] = 0
    mask[0, padding] = 0
    labels = ids.masked_fill(mask == 0, -100)
    # PEFT's model predicts the first token from the prompt; without the prompt's logits nothing does
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("length", [0, 2, 7])
def test_loss_and_gradients_equal_those_of_peft(length):
    peft = pytest.importorskip("peft")
    ours = _llama()
    prompt = _prompted(ours, length=length)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=TEXT,
        num_virtual_tokens=prompt.extra_tokens,
        tokenizer_name_or_path=LLAMA,
    )
    theirs = peft.get_peft_model(_llama(), config)
    (table,) = (param for param in theirs.parameters() if param.requires_grad)
    torch.testing.assert_close(prompt.vectors, table.double(), rtol=1e-6, atol=1e-8)
    table.data = table.data.double()
    loss = ours(**_batch()).loss
    expected = theirs(**_batch()).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(prompt.vectors.grad, table.grad, rtol=1e-6, atol=1e-10)
    assert prompt.vectors.grad.norm() > 1e-4


def test_an_encoder_has_the_prompt_after_its_first_token():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    plain = BertForSequenceClassification(config).double().eval()
    model = copy.deepcopy(plain)
    prompt = _prompted(model, BERT)
    assert prompt.after == 1
    batch = _batch()
    mask = batch["attention_mask"]
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    words = plain.bert.get_input_embeddings()(batch["input_ids"])
    repeated = prompt.vectors.detach().expand(2, -1, -1)
    ones = mask.new_ones(2, prompt.extra_tokens)
    by_hand = {
        "inputs_embeds": torch.cat([words[:, :1], repeated, words[:, 1:]], 1),
        "attention_mask": torch.cat([mask[:, :1], ones, mask[:, 1:]], 1),
        "token_type_ids": torch.cat([segments[:, :1], 0 * ones, segments[:, 1:]], 1),
    }
    expected = plain(**by_hand).logits
    logits = model(batch["input_ids"], mask, segments).logits
    torch.testing.assert_close(logits, expected)
    dense = plain(batch["input_ids"], mask, segments).logits
    assert not torch.allclose(dense, expected)
    with bypassed(model):
        torch.testing.assert_close(model(batch["input_ids"], mask, segments).logits, dense)
    states = model.bert(batch["input_ids"], mask, output_hidden_states=True)
    assert {state.shape[1] for state in (states.last_hidden_state, *states.hidden_states)} == {6}


def test_the_head_of_a_decoder_reads_the_last_token_of_the_text():
    model = _llama(AutoModelForSequenceClassification)
    model.config.pad_token_id = 0
    _prompted(model)
    batch = _batch()
    logits = model(batch["input_ids"], batch["attention_mask"]).logits
    without_padding = model(batch["input_ids"][:1, :4]).logits
    torch.testing.assert_close(logits[:1], without_padding)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_equals_that_from_embeddings_put_together_by_hand(use_cache):
    model = _llama()
    plain = _llama()
    prompt = _prompted(model)
    batch = _batch(left=True)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    written = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=use_cache, **how
    )
    for row, width in ((0, 4), (1, 6)):  # without padding
        words = plain.get_input_embeddings()(batch["input_ids"][row : row + 1, -width:])
        embeddings = torch.cat([prompt.vectors.detach().unsqueeze(0), words], 1)
        expected = plain.generate(inputs_embeds=embeddings, **how)
        assert written[row, 6:].tolist() == expected[0].tolist()


def test_random_vectors_have_the_size_of_the_words_and_depend_on_the_seed():
    words = _prompted(_llama())
    first = _prompted(_llama(), source="random")
    again = _prompted(_llama(), source="random")
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors, words.vectors)
    sizes = [float(prompt.vectors.detach().square().mean().sqrt()) for prompt in (first, words)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.25)


def test_a_model_without_embeddings_as_inputs_is_refused():
    model = torch.nn.Linear(2, 2)
    model.config = BertConfig()
    with pytest.raises(InputError, match="reads no embeddings"):
        attach_additions(model, {"prompt": PromptSettings(text=TEXT)}, AutoTokenizer.from_pretrained(BERT), seed=0)


def _train(folder, *more, resume=False, stop_at=0, ranks=False, run_file="tests/data/world_size.toml"):
    settings = [
        f"output_dir={json.dumps(str(folder))}",
        f"additions.prompt.text={json.dumps(TEXT)}",
        "additions.prompt.learning_rate=0.01",
        "schedule.final_sparsity=0.5",
        "train.num_steps=4",
        "checkpoint.interval=2",
        "eval.interval=0",
        *more,
    ]
    return train_here(run_file, settings, resume=resume, stop_at=stop_at, ranks=ranks)


def _trained(folder):
    return dict(read_checkpoint((Path(folder) / "checkpoints" / "final").resolve()).trained)


def test_alone_the_prompt_and_the_head_train_at_the_rate_of_the_run_file(tmp_path):
    result = _train(tmp_path, *ALONE)
    trained = _trained(tmp_path)
    name = "bert.pst_prompt.vectors"
    assert {other for other in trained if not other.startswith(("classifier", "bert.pooler"))} == {name}
    assert result["trained_parameters"] == sum(values.numel() for values in trained.values())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr/additions.prompt"] for line in lines if line["event"] == "step"]
    assert max(rates) == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("method", [(), ALONE], ids=["with PST", "alone"])
def test_a_resumed_run_and_its_export_are_exact(method, tmp_path, verb):
    _train(tmp_path / "whole", *method)
    _train(tmp_path / "stopped", *method, stop_at=3)
    _train(tmp_path / "stopped", *method, resume=True)
    stopped = _trained(tmp_path / "stopped")
    for name, values in _trained(tmp_path / "whole").items():
        assert torch.equal(values, stopped[name]), name
    verb("export", str(tmp_path / "whole"), "--out", str(tmp_path / "out"))
    assert main(["verify", str(tmp_path / "out"), "--against", str(tmp_path / "whole")]) == 0


@pytest.mark.zero3
def test_two_ranks_train_as_one_does(run_ranks, tmp_path):
    run_ranks(partial(_train, str(tmp_path / "2"), *ALONE, ranks=True), 2)
    _train(tmp_path / "1", *ALONE)
    whole = _trained(tmp_path / "1")
    shared = _trained(tmp_path / "2")
    assert whole.keys() == shared.keys()
    for name, values in whole.items():
        torch.testing.assert_close(shared[name], values, atol=1e-4, rtol=1e-3)


def test_exports_have_the_prompt_in_every_format_that_our_verbs_load(tmp_path, verb, capsys):
    _train(tmp_path / "run", *ALONE, "data.document_mask=false", run_file="tests/data/causal_lm.toml")
    out = tmp_path / "out"
    packed = tmp_path / "packed"
    verb("export", str(tmp_path / "run"), "--out", str(out))
    verb("export", str(out), "--format", "bitmask", "--out", str(packed))
    assert main(["verify", str(packed), "--against", str(tmp_path / "run")]) == 0
    ids = torch.tensor([[2, 5, 6, 3]])
    plain = AutoModelForCausalLM.from_pretrained(out)
    without = plain(ids).logits
    load_additions(plain, out)
    logits = plain(ids).logits
    assert not torch.allclose(logits, without)
    torch.testing.assert_close(open_model_folder(packed).load("dense")(ids).logits, logits)
    assert not any(param.requires_grad for param in added_modules(plain)["model.pst_prompt"].parameters())
    capsys.readouterr()
    assert main(["generate", str(out), "--prompt", "a film", "--max-new-tokens", "3", "--engine", "native"]) == 2
    assert "has prompt, which the native decoder does not compute" in capsys.readouterr().err
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["additions"]["prompt"]["text"] == TEXT
    for source in (out, tmp_path / "run"):
        assert main(["export", str(source), "--format", "gguf", "--out", str(tmp_path / "out.gguf")]) == 2
        assert "has additions (prompt), which programs that read gguf would ignore" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"which would be lost\. Name a model without them"):
        _train(
            tmp_path / "next",
            f"model.path={json.dumps(str(out))}",
            "data.document_mask=false",
            run_file="tests/data/causal_lm.toml",
        )
    (out / ADDITIONS_FILE).write_bytes(b"{")
    with pytest.raises(InputError, match="is damaged"):
        load_additions(plain, out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["task=causal-lm", "data.text_columns=['text']"], "Set data.document_mask = false"),
        (
            ["task=causal-lm", "data.document_mask=false", "train.sequence_parallel=2"],
            "Set train.sequence_parallel = 1",
        ),
        (["additions.prompt.text=' '"], "has no words"),
        (["additions.prompt.txt=a"], "unknown key 'additions.prompt.txt'. Did you mean 'text'?"),
        (["additions.promt.text=a"], "Did you mean 'prompt'?"),
    ],
)
def test_a_prompt_that_does_not_fit_the_run_is_refused(settings, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        _train(tmp_path, *settings)
    assert message in str(caught.value)


def test_a_plan_counts_the_tokens_of_the_prompt():
    def planned(max_length, *more):
        settings = ["deepspeed_config=", f"data.max_length={max_length}", *more]
        return plan(load_run("tests/data/world_size.toml", settings), PlanOptions(machine="cpu"))

    prompted = planned(24, f"additions.prompt.text={json.dumps(TEXT)}", "additions.prompt.length=24")
    shorter = planned(24)
    longer = planned(48)
    assert prompted.trace.activations > 1.5 * shorter.trace.activations
    assert prompted.trace.activations == pytest.approx(longer.trace.activations, rel=0.1)
    assert prompted.memory.activations == prompted.trace.activations
    assert prompted.time.step_compute > 1.2 * shorter.time.step_compute
    assert prompted.time.step_compute == pytest.approx(longer.time.step_compute, rel=0.1)
    assert prompted.time.full_step == pytest.approx(longer.time.full_step, rel=0.1)
    assert prompted.trained_parameters == shorter.trained_parameters + 24 * 32


def test_a_prompt_that_exceeds_the_positions_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"Set it to at most 45"):
        _train(tmp_path, "data.max_length=46")


def test_zero3_may_release_the_vectors_after_the_module_has_run():
    prompt = PromptVectors(torch.ones(2, 3), after=1)
    longer = prompt(torch.zeros(1, 4, 3))
    prompt.vectors.data = torch.empty(0)
    assert longer[0, :, 0].tolist() == [0, 1, 1, 0, 0, 0]
