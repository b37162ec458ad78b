"""Write tests/data: a tiny random BERT and Llama with their tokenizers, and a small sentiment data set.

python -m tools.make_test_data
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, BertTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path("tests/data")
GOOD = ["fine", "bright", "warm", "clever", "moving", "lovely", "sharp", "funny"]
BAD = ["dull", "flat", "cold", "clumsy", "boring", "ugly", "vague", "tired"]
OTHER = ["the", "a", "film", "plot", "cast", "scene", "story", "end", "with", "of", "and", "is", "was"]
OTHER += ["very", "quite", "rather"]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 60,
    "max_position_embeddings": 48,
    "initializer_range": 0.2,
}


def main() -> None:
    write_model()
    write_language_model()
    write_texts("train", 240, seed=1)
    write_texts("validation", 61, seed=2)


def write_model() -> None:
    """Write the BERT: 2 layers of width 32."""
    folder = FOLDER / "tiny-bert"
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *OTHER]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), **SIZES)).save_pretrained(folder)


def write_language_model() -> None:
    """Write the Llama: 2 layers of width 32 and an untied head. Every sequence starts with "<s>"."""
    folder = FOLDER / "tiny-llama"
    words = ["<unk>", "<s>", "</s>", *GOOD, *BAD, *OTHER]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)


def write_texts(name: str, count: int, seed: int) -> None:
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        label = draw.choice(("good", "bad"))
        words = draw.choices(OTHER, k=draw.randint(3, 14)) + draw.choices(GOOD if label == "good" else BAD, k=2)
        draw.shuffle(words)
        lines.append(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    (FOLDER / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
