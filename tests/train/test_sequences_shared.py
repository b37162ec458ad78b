"""Ranks that share sequences: gradients, masks and losses of one that has them whole, and what cannot be shared."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.core import documents
from pst_ds.errors import InputError
from pst_ds.masks.update import update_masks
from pst_ds.parallel.launch import launch_environment
from pst_ds.parallel.ranks import rank
from pst_ds.train.objective import Objective
from pst_ds.train.run import build, prepare, train_prepared
from pst_ds.train.sequences import part_of_batch, require_shareable, require_small_masks, shared_sequences

RUN_FILE = "tests/data/causal_lm.toml"


def _run(folder, degree, *more):
    output = f"output_dir={json.dumps(str(folder))}"
    return load_run(RUN_FILE, [output, f"train.sequence_parallel={degree}", *more])


def _one_step(folder, degree, *more):
    """Checksum of masks, loss, and all gradients of one micro-batch."""
    from deepspeed.utils import safe_get_full_grad

    if "long" in more:
        documents.LONG = 2
    prepared = prepare(_run(folder, degree, *(word for word in more if word != "long")), launch_environment())
    engine = build(prepared)
    examples = prepared.load("train")
    objective = Objective(prepared, None, shared_sequences(engine, prepared))
    engine.train()
    masks = update_masks(engine.module, 0.5)
    batch = prepared.task.collate(examples, [0, 1], prepared.tokenizer)
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    loss = objective(engine, batch)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention
    engine.backward(loss)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention
    named = engine.module.named_parameters()
    gradients = {name: safe_get_full_grad(param).clone() for name, param in named if param.requires_grad}
    return masks.checksum, float(loss.detach()), gradients, "position_ids" in batch


CASES = {
    "documents apart": ["model.gradient_checkpointing=true"],
    "long documents": ["long", "model.gradient_checkpointing=true"],
    "documents run on": ["data.document_mask=false"],
    "own teacher": ["distillation.weight=0.5"],
    "trained head": ['pst.modules_to_save=["lm_head"]', "model.gradient_checkpointing=true"],
    "reentrant": ["model.gradient_checkpointing=true", "model.gradient_checkpointing_reentrant=true"],
}


@pytest.mark.zero3
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_that_share_sequences_have_the_masks_and_gradients_of_one(run_ranks, tmp_path, case):
    more = CASES[case]
    ((checksum, expected, gradients, has_positions),) = run_ranks(_one_step, 1, str(tmp_path), 1, *more)
    assert has_positions == (case != "documents run on")
    shared = run_ranks(_one_step, 2, str(tmp_path), 2, *more)
    assert {masks for masks, *_ in shared} == {checksum}
    assert shared[0][1] != shared[1][1]
    assert (shared[0][1] + shared[1][1]) / 2 == pytest.approx(expected, rel=1e-6)
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        apart = float((shared[0][2][name] - gradient).norm())
        assert apart <= 1e-5 * max(float(gradient.norm()), 1e-3 * largest), name


def _afmoe(folder):
    """A model whose attention gets its mask by keyword, with full attention only."""
    torch.manual_seed(2)
    config = AutoConfig.for_model(
        "afmoe", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, moe_intermediate_size=16,
        num_experts=4, num_experts_per_tok=2, num_dense_layers=1, sliding_window=64,
        layer_types=["full_attention", "full_attention"],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained("tests/data/tiny-llama").save_pretrained(folder)
    return [f"model.path={json.dumps(str(folder))}", "model.gradient_checkpointing=true"]


@pytest.mark.zero3
def test_two_ranks_share_sequences_of_a_model_that_passes_masks_by_keyword(run_ranks, tmp_path):
    more = _afmoe(tmp_path / "base")
    ((_, expected, gradients, _),) = run_ranks(_one_step, 1, str(tmp_path), 1, *more)
    shared = run_ranks(_one_step, 2, str(tmp_path), 2, *more)
    assert (shared[0][1] + shared[1][1]) / 2 == pytest.approx(expected, rel=1e-6)
    total, apart = (
        math.hypot(*(float(part.norm()) for part in parts))
        for parts in (gradients.values(), [shared[1][2][name] - gradient for name, gradient in gradients.items()])
    )
    assert apart <= 1e-5 * total


@pytest.mark.zero3
def test_padded_texts_of_any_length_are_shared_too(run_ranks, tmp_path):
    rows = [{"data": f"name[film {i}]", "text": "film plot end good " * (1 + i % 3)} for i in range(24)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "task": "data-to-text", "data.train": str(tmp_path / "texts.jsonl"), "data.validation": "", "data.test": "",
        "data.text_columns": ["data"], "data.label_column": "text", "data.max_length": 40, "eval.max_new_tokens": 4,
        "distillation.weight": 0.25,
    }  # fmt: skip
    more = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    ((checksum, expected, gradients, _),) = run_ranks(_one_step, 1, str(tmp_path), 1, *more)
    shared = run_ranks(_one_step, 2, str(tmp_path), 2, *more)
    assert {masks for masks, *_ in shared} == {checksum}
    assert (shared[0][1] + shared[1][1]) / 2 == pytest.approx(expected, rel=1e-6)
    total, apart = (
        math.hypot(*(float(part.norm()) for part in parts))
        for parts in (gradients.values(), [shared[1][2][name] - gradient for name, gradient in gradients.items()])
    )
    assert apart <= 1e-5 * total


def _saved_bytes(folder, degree, length):
    """Bytes that autograd keeps for the backward pass of one sequence, parameters apart."""
    prepared = prepare(_run(folder, degree), launch_environment())
    engine = build(prepared)
    objective = Objective(prepared, None, shared_sequences(engine, prepared))
    engine.train()
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.arange(length)[None] % 30 + 3
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective(engine, {"input_ids": ids, "labels": ids})
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.zero3
def test_two_ranks_that_share_a_sequence_keep_half_of_its_activations(run_ranks, tmp_path):
    (whole,) = run_ranks(_saved_bytes, 1, str(tmp_path), 1, 512)
    for kept in run_ranks(_saved_bytes, 2, str(tmp_path), 2, 512):
        assert kept <= 0.55 * whole


def _train(folder, degree, *more, resume=False):
    return train_prepared(prepare(_run(folder, degree, *more), launch_environment()), quiet=True, resume=resume)


def _steps(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["event"] == "step"}
    return losses, {line["step"]: line["mask_checksum"] for line in lines if line["event"] == "mask_update"}


@pytest.mark.thorough
@pytest.mark.zero3
def test_a_run_is_the_same_at_any_degree_and_goes_on_at_another(run_ranks, tmp_path):
    """Four ranks in two groups, and a run that changes from one to two and back."""
    short = ["train.num_steps=9", "checkpoint.interval=3"]
    run_ranks(_train, 1, str(tmp_path / "whole"), 1, *short)
    (first, *others) = run_ranks(_train, 4, str(tmp_path / "groups"), 2, *short)
    assert all(result["metrics"] == first["metrics"] for result in others)
    moving = tmp_path / "moving"
    for degree, last in [(1, 3), (2, 6), (1, 9)]:
        _stop_after(run_ranks, moving, degree, last, short)
    whole, checksums = _steps(tmp_path / "whole")
    assert len(whole) == 9
    for folder in ("groups", "moving"):
        losses, found = _steps(tmp_path / folder)
        assert losses == pytest.approx(whole, rel=2e-5)
        assert found == checksums
    kept = [read_checkpoint(max((tmp_path / name / "checkpoints").iterdir())) for name in ("whole", "moving")]
    assert kept[0].state.step == kept[1].state.step == 9


def _stop_after(run_ranks, folder, degree, last, settings):
    results = run_ranks(_train_to, 2 if degree == 2 else 1, str(folder), degree, last, settings)
    assert len(set(results)) == 1


def _train_to(folder, degree, last, settings):
    """Train until the checkpoint of step ``last`` is written, as one that is stopped by a signal."""
    from pst_ds.parallel import stop_signals
    from pst_ds.train import loop
    from pst_ds.train.run import StoppedError

    update = loop.Loop._agree_on_batch

    def agree(own, state, *batch):
        if state.step == last - 1 and last < 9:
            stop_signals._asked_by = 15
        return update(own, state, *batch)

    loop.Loop._agree_on_batch = agree
    try:
        _train(folder, degree, *settings, resume=True)
    except StoppedError:
        return last
    return 9


class _Half:
    """The second of two ranks."""

    degree = 2

    def part(self, whole):
        return whole.chunk(2, 1)[1]


def test_labels_are_shifted_before_they_are_cut():
    ids = torch.arange(10, 15)[None]
    labels = torch.tensor([[-100, 11, 12, 13, 14]])
    own, positions, following, count = part_of_batch(_Half(), {"input_ids": ids}, labels)
    assert own["input_ids"].tolist() == [[13, 14, 0]]
    assert own["position_ids"].tolist() == [[3, 4, 5]]
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert following.tolist() == [[14, -100, -100]]
    assert int(count) == 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.max_length=33"], "must divide data.max_length = 33. Set data.max_length = 32"),
        (["deepspeed_config="], "requires ZeRO-3. Set deepspeed_config"),
        (["distillation.weight=0.5", "distillation.teacher=other"], "does not support distillation.teacher = 'other'"),
    ],
)
def test_run_files_that_share_nothing_evenly_are_refused(tmp_path, settings, said):
    with pytest.raises(ConfigError, match=f"train.sequence_parallel = 2 {said}"):
        _run(tmp_path, 2, *settings)


def test_tasks_and_ranks_that_cannot_share_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="is for language models, not for task = 'classification'"):
        load_run("tests/data/world_size.toml", ["train.sequence_parallel=2"])
    run = _run(tmp_path, 2)
    assert run.micro_batch_size(2) == 12
    assert run.micro_batch_size(4) == 6
    with pytest.raises(ConfigError, match=r"= 2 does not divide 3 ranks\. Start a multiple of 2"):
        run.micro_batch_size(3)
    with pytest.raises(ConfigError, match="is less than an example for each of 13 groups of 2 ranks x 1"):
        run.micro_batch_size(26)


def _config(**more):
    text = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, **more)
    return SimpleNamespace(_attn_implementation=more.pop("attention", "sdpa"), get_text_config=lambda: text)


@pytest.mark.parametrize(
    ("degree", "config", "stage", "said"),
    [
        (2, {}, 2, "is for ZeRO-3; .*not stage 2"),
        (2, {"attention": "eager"}, 3, "cannot cut attention 'eager'"),
        (2, {"attention": "flash_attention_2"}, 3, ".*takes one sequence per micro-batch, not 6"),
        (8, {}, 3, "must divide the 4 attention heads"),
        (2, {"sliding_window": 16}, 3, ".*a sliding window of 16 tokens; .*data.max_length to at most 16"),
        (2, {"layer_types": ["full_attention", "linear_attention"]}, 3, ".*layers of kind linear_attention"),
    ],
)
def test_models_that_cannot_share_are_refused(tmp_path, degree, config, stage, said):
    run = _run(tmp_path, degree)
    with pytest.raises(ConfigError, match=f"train.sequence_parallel = {degree} {said}"):
        require_shareable(run, _config(**config), stage, 6)
    require_shareable(run, _config(), 3, 6) if degree == 2 else None
    require_shareable(_run(tmp_path, 2), _config(sliding_window=16, use_sliding_window=False), 3, 6)


@pytest.mark.parametrize(
    ("length", "config", "is_refused"),
    [
        (32769, {"attention": "eager"}, True),
        (32769, {"attention": "sdpa", "sliding_window": 4096}, True),
        (32768, {"attention": "eager"}, False),
        (131072, {"attention": "sdpa"}, False),
        (131072, {"attention": "flash_attention_2", "sliding_window": 4096}, False),
    ],
)
def test_masks_of_all_pairs_are_refused_in_long_sequences(tmp_path, length, config, is_refused):
    run = _run(tmp_path, 1)
    run = replace(run, data=replace(run.data, max_length=length))
    said = pytest.raises(ConfigError, match=f"data.max_length = {length}: .*needs a mask of {length} x {length} bytes")
    with said if is_refused else nullcontext():
        require_small_masks(run, _config(**config))


def _refusal(folder):
    from deepspeed.runtime.sequence_parallel import ulysses_sp

    prepared = prepare(_run(folder, 2), launch_environment())
    engine = build(prepared)
    mixes = ulysses_sp.UlyssesSPAttentionHF.forward
    ulysses_sp.UlyssesSPAttentionHF.forward = lambda self, *args, **kwargs: tuple(
        part if part is None else part * (1 + 0.1 * rank()) for part in mixes(self, *args, **kwargs)
    )
    with pytest.raises(InputError) as refused:
        shared_sequences(engine, prepared)
    return str(refused.value)


@pytest.mark.zero3
def test_a_model_whose_logits_change_is_refused_on_all_ranks(run_ranks, tmp_path):
    for message in run_ranks(_refusal, 2, str(tmp_path)):
        assert "(llama) gives other logits where ranks share a sequence" in message
