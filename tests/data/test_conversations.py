"""Conversations through chat templates: exactly the assistant's tokens are learnt, by five templates and by hand."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from pst_ds.config.data import DataConfig, EvalConfig
from pst_ds.config.run import ConfigError
from pst_ds.data.conversations import Conversation, messages_of, prompt_tokens, read_template, render, tools_of
from pst_ds.data.tasks.chat import Chat
from tests.pairs import every_pair

ROLES = "{% for m in messages %}"
CHATML = ROLES + (
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = ROLES + (
    "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}"
    + ROLES
    + (
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    )
)
INST = (
    "{{ bos_token }}"
    + ROLES
    + (
        "{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% elif m.role == 'user' %}"
        "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ raise_exception('unknown role') }}{% endif %}{% endfor %}"
    )
)
GEMMA = (
    "{{ bos_token }}"
    + ROLES
    + (
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim "
        "+ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    )
)
PHI = ROLES + (
    "{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
FORGETFUL = ROLES + (  # as Qwen3 leaves out what was thought before the last answer
    "{% set text = m.content.split('</think>')[-1] if not loop.last else m.content %}"
    "{{ '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>",
]  # fmt: skip
TALK = [
    {"role": "user", "content": "is the film dull"},
    {"role": "assistant", "content": "no é, warm"},
    {"role": "user", "content": "and  the plot"},
    {"role": "assistant", "content": "no"},
]
FIRST, SECOND = TALK[1]["content"], TALK[3]["content"]
SHAREGPT = [{"from": "human", "value": TALK[0]["content"]}, {"from": "gpt", "value": FIRST}]
TEMPLATES = {  # what of the text is learnt, written down by hand
    "chatml": (CHATML, [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"]),
    "marked": (MARKED, [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"]),
    "llama 3": (LLAMA3, [f"{FIRST}<|eot_id|>", f"{SECOND}<|eot_id|>"]),
    "inst": (INST, [f" {FIRST}</s>", f" {SECOND}</s>"]),
    "gemma": (GEMMA, [f"{FIRST}<end_of_turn>", f"{SECOND}<end_of_turn>"]),
    "phi": (PHI, [f"{FIRST}<|end|>", f"{SECOND}<|end|>"]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def tokenizer_with(template):
    """Every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL[2:]
    )
    made.chat_template = template
    return made


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _data(path, **settings):
    return DataConfig(**{"train": str(path), "validation": str(path), "text_columns": ("messages",), **settings})


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_loss_is_that_of_a_mask_made_by_hand(tmp_path, name):
    template, learnt = TEMPLATES[name]
    tokenizer = tokenizer_with(template)
    task = Chat(EvalConfig())
    data = _data(write_rows(tmp_path / "chats.jsonl", [{"messages": TALK}]), max_length=256)
    examples = task.load(data, "train", tokenizer, [])
    batch = task.collate(examples, [0], tokenizer)

    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    pieces, rest = [], text
    for answer in learnt:
        before, _, rest = rest.partition(answer)
        pieces += [(before, False), (answer, True)]
    ids, by_hand = [], []
    for piece, is_answer in [*pieces, (rest, False)]:
        tokens = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += tokens
        by_hand += tokens if is_answer else [-100] * len(tokens)
    assert batch["input_ids"].tolist() == [ids]
    assert batch["labels"].tolist() == [by_hand]

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama", vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=256,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        out = model(**batch)
        losses = -torch.log_softmax(out.logits[0, :-1].double(), -1)[range(len(ids) - 1), ids[1:]]
    expected = losses[torch.tensor([label != -100 for label in by_hand[1:]])]
    assert float(out.loss) == pytest.approx(float(expected.mean()), abs=1e-6)
    ((total, count),) = task.outcomes(out.logits, batch)
    assert (total / count, count) == (pytest.approx(float(expected.mean()), abs=1e-6), len(expected))
    assert task.num_targets(examples, [0]) == len(expected)
    assert task.metrics(task.outcomes(out.logits, batch), examples)["perplexity"] == pytest.approx(
        math.exp(float(expected.mean())), rel=1e-5
    )


def test_a_template_that_forgets_is_refused_unless_it_has_marks():
    thought = [TALK[0], {"role": "assistant", "content": "<think>hm</think>no"}, *TALK[2:]]
    with pytest.raises(ConfigError, match="row 3: the chat template renders the messages before message 1 differently"):
        render(Conversation(thought), tokenizer_with(FORGETFUL), "row 3")
    assert any(
        render(Conversation(TALK[:2]), tokenizer_with(FORGETFUL), "row 3").is_answer
    )  # nothing follows its answer


def test_cutting_takes_tokens_and_mask_alike_and_leaves_out_what_has_no_answer(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    whole = render(Conversation(TALK), tokenizer, "")
    rows = [{"messages": TALK}, {"messages": [{"role": "user", "content": "x" * 99}, TALK[1]]}]
    path = write_rows(tmp_path / "chats.jsonl", rows)
    for length in range(40, len(whole.ids), 7):
        found = Chat(EvalConfig()).load(_data(path, max_length=length), "train", tokenizer, [])
        expected = [t if is_answer else -100 for t, is_answer in zip(whole.ids, whole.is_answer, strict=True)]
        assert found.row(0) == (whole.ids[:length], expected[:length])
        assert len(found) + found.omitted == 2
        said = f"conversations without an answer in their first {length} tokens are left out: 1"
        assert Chat(EvalConfig()).remark(_data(path), found) == (said if found.omitted else "")
    with pytest.raises(ConfigError, match=r"no conversation has an answer within data\.max_length = 8"):
        Chat(EvalConfig()).load(_data(path, max_length=8), "train", tokenizer, [])


def test_the_last_answer_is_what_is_written_and_the_rest_its_prompt(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    found = Chat(EvalConfig()).load(
        _data(write_rows(tmp_path / "c.jsonl", [{"messages": TALK}])), "validation", tokenizer, []
    )
    assert found.references == [[SECOND]]
    assert tokenizer.decode(found.prompts(999)[0]).endswith("and  the plot<|im_end|>\n<|im_start|>assistant\n")
    assert len(found.prompts(5)[0]) == 5
    assert tokenizer.convert_ids_to_tokens(found.answer_ends) == ["<|im_end|>"]


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        (["messages"], {"messages": TALK[:2]}),
        (["conversations"], {"conversations": SHAREGPT}),
        (["prompt", "completion"], {"prompt": TALK[0]["content"], "completion": FIRST}),
        (["prompt", "completion"], {"prompt": TALK[:1], "completion": TALK[1:2]}),
    ],
)
def test_all_shapes_of_a_conversation_are_the_same(tmp_path, columns, row):
    tokenizer = tokenizer_with(CHATML)
    data = _data(write_rows(tmp_path / "c.jsonl", [row]), text_columns=tuple(columns))
    found, expected = (
        Chat(EvalConfig()).load(data, "train", tokenizer, []),
        render(Conversation(TALK[:2]), tokenizer, ""),
    )
    assert found.row(0)[0] == expected.ids
    assert [label != -100 for label in found.row(0)[1]] == expected.is_answer


def test_tools_reach_the_template():
    template = "{% if tools %}{{ 'tools: ' + tools[0].name + '\\n' }}{% endif %}" + CHATML
    tokenizer = tokenizer_with(template)
    for tools in ([{"name": "clock", "kind": None}], '[{"name": "clock"}]'):
        rendered = render(Conversation(TALK[:2], tools_of(tools, "")), tokenizer, "")
        assert tokenizer.decode(rendered.ids).startswith("tools: clock\n<|im_start|>user")
    assert tools_of("", "") is tools_of(None, "") is tools_of([], "") is None
    with pytest.raises(ConfigError, match="row 2: tools are not JSON"):
        tools_of("{", "row 2")


@pytest.mark.parametrize("tools", [{"name": "clock"}, '{"name": "clock"}', "7"])
def test_tools_that_are_not_a_list_are_refused(tools):
    """They would otherwise be omitted without a word."""
    with pytest.raises(ConfigError, match=r"row 2: tools are .*, not a list\. Write a list with an object for each"):
        tools_of(tools, "row 2")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("film", "a conversation is a list of messages"),
        ([{"speaker": "user", "content": "film"}], "message 0 has the fields speaker, content"),
        ([{"role": "assistant", "content": None}], 'needs a "role" and a "content"'),
        (TALK[:1], "has no message of the role 'assistant'"),
    ],
)
def test_what_is_no_conversation_is_refused(value, problem):
    with pytest.raises(ConfigError, match=problem):
        messages_of(value, "row 0")


@every_pair
@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (TALK[:1], ", column 'messages' has no message of the role 'assistant'"),
        ([{"role": "system", "content": "x"}, *TALK], ": the chat template rejects the conversation: unknown role"),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_conversation_of_a_file_is_refused_by_its_line(tmp_path, messages, problem, split):
    rows = [{"messages": TALK}, {"messages": TALK}, {"messages": messages}]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    for where in (str(path), f"{path}[1:]"):
        with pytest.raises(ConfigError, match=re.escape(f"{where}: line 5{problem}")):
            Chat(EvalConfig()).load(_data(where), split, tokenizer_with(INST), [])
    whole = tmp_path / "chats.json"
    whole.write_text(json.dumps(rows, indent=1))
    with pytest.raises(ConfigError, match=re.escape(f"{whole}: row 2{problem}")):
        Chat(EvalConfig()).load(_data(whole), split, tokenizer_with(INST), [])


def test_a_template_that_refuses_a_role_and_a_missing_one_are_said(tmp_path):
    with pytest.raises(ConfigError, match="row 0: the chat template rejects the conversation: unknown role"):
        render(Conversation([{"role": "system", "content": "x"}, *TALK]), tokenizer_with(INST), "row 0")
    path = write_rows(tmp_path / "c.jsonl", [{"messages": TALK}])
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        Chat(EvalConfig()).load(_data(path), "train", tokenizer_with(None), [])


def test_a_content_of_text_parts_is_their_text():
    """As OpenAI writes it. Templates wrote the list as Python prints it: [{'type': 'text', ...}]."""
    parts = [{"type": "text", "text": "is the film", "image_url": None}, {"type": "text", "text": " dull"}]
    messages = messages_of([{"role": "user", "content": parts}, TALK[1]], "row 0")
    assert messages == TALK[:2]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            [{"type": "image_url", "image_url": {"url": "a.png"}}],
            "message 0 has a content part of the type 'image_url'",
        ),
        (["is the film dull"], "message 0 has a content part that is a str"),
        ({"text": "is the film dull"}, "message 0 has a content that is a dict"),
    ],
)
def test_a_content_that_is_not_text_is_refused(content, words):
    with pytest.raises(ConfigError, match=f"row 0: {words}.* Write the content as a text"):
        messages_of([{"role": "user", "content": content}, TALK[1]], "row 0")


CALLS = (
    ROLES + "{{ m.role }}{% for c in m.tool_calls or [] %}{{ CALL }}{% endfor %}{{ m.content or '' }}</s>{% endfor %}"
)


@pytest.mark.parametrize(
    ("call", "written"),
    [
        ("c.function.arguments | tojson", '{"city": "é"}'),
        ("c.function.arguments.city | upper", "É"),
        ("'<' + c.function.arguments + '>'", '<{"city":"é"}>'),
    ],
)
def test_arguments_of_a_tool_call_are_not_encoded_twice(call, written):
    """OpenAI writes them as a JSON text, but most templates expect an object and encode it; some expect the text."""
    call_of_tool = {"type": "function", "function": {"name": "weather", "arguments": '{"city":"é"}'}}
    talk = Conversation([TALK[0], {"role": "assistant", "tool_calls": [call_of_tool]}])
    tokenizer = tokenizer_with(CALLS.replace("CALL", call))
    rendered = render(talk, tokenizer, "row 0")
    assert tokenizer.decode(rendered.ids) == f"user{TALK[0]['content']}</s>assistant{written}</s>"
    assert prompt_tokens(talk, tokenizer, "row 0") == rendered.ids
    assert call_of_tool["function"]["arguments"] == '{"city":"é"}'


def test_a_template_of_windows_has_no_byte_order_mark_in_every_prompt(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(CHATML, encoding="utf-8-sig")
    assert read_template(str(path), "data.chat_template") == CHATML
