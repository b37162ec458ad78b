"""Models and tokenizers that a run cannot train."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer

from .workshop import BERT, LLAMA, Workshop, Wrong, causal_setting, setting


def _bert(change=None, *settings: str, **config):
    """The arguments of a run on a BERT whose config or weights were changed."""
    return lambda shop: shop.train(f"model.path={_changed(shop, BERT, change, config)}", *settings)


def _llama(change=None, *settings: str, **config):
    return lambda shop: shop.causal(f"model.path={_changed(shop, LLAMA, change, config)}", *settings)


def _changed(shop: Workshop, base: str, change, config) -> Path:
    return shop.model(base, **config) if change is None else shop.model_with(change, base, **config)


def _without(*names: str):
    def arguments(shop: Workshop) -> list[str]:
        folder = shop.model()
        for name in names:
            (folder / name).unlink()
        return shop.train(f"model.path={folder}")

    return arguments


def _cut_weights(shop: Workshop) -> list[str]:
    path = shop.model() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return shop.train(f"model.path={path.parent}")


def _config_of(text: str):
    def arguments(shop: Workshop) -> list[str]:
        folder = shop.model()
        (folder / "config.json").write_text(text)
        return shop.train(f"model.path={folder}")

    return arguments


def _tokenizer_of_llama(shop: Workshop) -> list[str]:
    folder = shop.model(LLAMA, vocab_size=20)
    return shop.causal(f"model.path={folder}")


def _nan(weights: dict[str, torch.Tensor]) -> None:
    weights["encoder.layer.0.output.dense.weight"][3, 4] = torch.nan


def _zeros(weights: dict[str, torch.Tensor]) -> None:
    weights["encoder.layer.0.output.dense.weight"].zero_()


def _padding_that_the_model_lacks(shop: Workshop) -> list[str]:
    folder = shop.model(LLAMA)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    tokenizer.save_pretrained(folder)
    return shop.train(f"model.path={folder}")


def _roberta(shop: Workshop) -> list[str]:
    """The arguments of a run on the config of a RoBERTa, which is all that is read before it is refused."""
    folder = shop.model(
        BERT, model_type="roberta", architectures=["RobertaModel"], max_position_embeddings=32, type_vocab_size=1
    )
    return shop.train(f"model.path={folder}")


def _taught_by(**config):
    """The arguments of a language model's run whose teacher is one with other values in its config."""

    def arguments(shop: Workshop) -> list[str]:
        teacher = f"distillation.teacher={shop.model(LLAMA, **config)}"
        return shop.causal("distillation.weight=0.5", teacher)

    return arguments


def _taught_by_a_headless_model(shop: Workshop) -> list[str]:
    return shop.causal("distillation.weight=0.5", f"distillation.teacher={shop.model_with(_no_head, LLAMA)}")


def _taught_by_its_pruned_self(shop: Workshop) -> list[str]:
    folder = shop.model(LLAMA)
    (folder / "pruning.json").write_text("{}")
    return shop.causal("distillation.weight=0.5", f"model.path={folder}")


def _head_of_three(weights: dict[str, torch.Tensor]) -> None:
    weights["classifier.weight"], weights["classifier.bias"] = torch.zeros(3, 32), torch.zeros(3)


def _no_head(weights: dict[str, torch.Tensor]) -> None:
    del weights["lm_head.weight"]


_BLOCK = "bert.encoder.layer.0."
MODELS = {
    "a model folder that is not there": Wrong(
        setting("model.path=./no/model"), "model.path", "'./no/model'", "name a model folder"
    ),
    "a model that is neither here nor on the hub": Wrong(
        setting("model.path=no-such-model"), "model.path", "'no-such-model'", "looked in {here}/no-such-model"
    ),
    "a model folder that is empty": Wrong(
        setting("model.path={made}/plain", "model.tokenizer=tests/data/tiny-bert"),
        "model.path",
        "{made}/plain",
        "config.json",
    ),
    "a config that is not JSON": Wrong(
        _config_of("{"), "model.path", "{tmp}/model/config.json", "Name a folder with a config.json"
    ),
    "a model of an unknown kind": Wrong(
        _config_of('{"model_type": "bret"}'), "model.path", "bret", "Name a folder with a config.json"
    ),
    "no weights": Wrong(
        _without("model.safetensors"), "model.path", "model.safetensors", "Name a folder with whole weights"
    ),
    "weights that were cut off": Wrong(_cut_weights, "model.path", "{tmp}/model", "Name a folder with whole weights"),
    "no tokenizer": Wrong(
        _without("tokenizer.json", "tokenizer_config.json", "vocab.txt"),
        "{tmp}/model",
        "no tokenizer",
        "model.tokenizer",
    ),
    "a tokenizer that is not there": Wrong(
        setting("model.tokenizer=/no/tokenizer"), "model.tokenizer", "'/no/tokenizer'", "name a model folder"
    ),
    "a tokenizer of another model": Wrong(
        _tokenizer_of_llama, "tokenizer", "35 tokens", "Name the model's own tokenizer with model.tokenizer"
    ),
    "a tokenizer of another classifier": Wrong(
        _bert(None, vocab_size=20), "tokenizer", "20", "Name the model's own tokenizer with model.tokenizer"
    ),
    "a head of another size": Wrong(
        _bert(_head_of_three), "{tmp}/model", "classifier.weight of shape (3, 32)", "the model without that head"
    ),
    "a vocabulary of another size": Wrong(
        _llama(None, vocab_size=64), "{tmp}/model", "of shape (35, 32)", "Name one that the config belongs to"
    ),
    "a model without the head of its task": Wrong(
        _llama(_no_head), "model.path", "lm_head.weight", "language modelling head"
    ),
    "texts longer than the model's": Wrong(
        setting("data.max_length=512"), "data.max_length", "512", "Set it to at most"
    ),
    "sequences longer than the model's": Wrong(
        causal_setting("data.max_length=64"), "data.max_length", "64", "Set it to at most 48"
    ),
    "a padding token that the model lacks": Wrong(
        _padding_that_the_model_lacks, "padding token '[NEW]'", "35", "model.tokenizer"
    ),
    "texts longer than a RoBERTa's": Wrong(_roberta, "data.max_length", "32", "Set it to at most 31"),
    "nothing to train": Wrong(
        causal_setting("method=lora", "pst.update_rank=0"), "pst.update_rank", "0", "pst.update_rank of at least 1"
    ),
    "an encoder as a language model": Wrong(
        causal_setting("model.path=tests/data/tiny-bert"), "model", "bert", "Name a causal language model"
    ),
    "an attention that is none": Wrong(
        setting("model.attn_implementation=egar"), "model.attn_implementation", "'egar'", "eager"
    ),
    "an attention that needs a GPU": Wrong(
        setting("model.attn_implementation=flash_attention_2"),
        "model.attn_implementation",
        "'flash_attention_2'",
        "Choose another",
    ),
    "a GPU that is not there": Wrong(
        setting(), "DS_ACCELERATOR", "'cuda'", "unset it", environment={"DS_ACCELERATOR": "cuda"}, without_gpu=True
    ),
    "an accelerator that is none": Wrong(
        setting(), "DS_ACCELERATOR", "'gpu'", "unset it", environment={"DS_ACCELERATOR": "gpu"}, without_gpu=True
    ),
    "a quantised base": Wrong(
        _bert(None, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "model.path",
        "bitsandbytes",
        "Name the original",
    ),
    "a packed export as a base": Wrong(
        causal_setting("model.path={made}/bitmask"), "model.path", "{made}/bitmask", "pst-ds export"
    ),
    "a NaN in the weights": Wrong(_bert(_nan), f"{_BLOCK}output.dense.weight", "NaN", "the base model is damaged"),
    "weights that are all zero": Wrong(_bert(_zeros), f"{_BLOCK}output.dense.weight", "all zeros", "exclude_modules"),
    "a target that matches nothing": Wrong(
        setting("pst.target_modules=['q_porj']"), "target_modules", "'q_porj'", "Names seen: query, key, value, dense"
    ),
    "a target that is no linear layer": Wrong(
        setting("pst.target_modules=['LayerNorm']"), "target_modules matches", "LayerNorm", "Name the linear layers"
    ),
    "a target that is tied": Wrong(
        _llama(None, "pst.target_modules=['lm_head']", tie_word_embeddings=True),
        "lm_head.weight is tied to model.embed_tokens",
        "lm_head",
        'exclude_modules = ["lm_head"]',
    ),
    "a module to train that is not there": Wrong(
        setting("pst.modules_to_save=['clasifier']"), "modules_to_save", "'clasifier'", "Did you mean 'classifier'?"
    ),
    "an embedding that is not there": Wrong(
        setting("pst.update_embeddings=['word_embedings']"),
        "update_embeddings",
        "'word_embedings'",
        "Did you mean 'word_embeddings'?",
    ),
    "an embedding that is tied": Wrong(
        _llama(None, "pst.update_embeddings=['embed_tokens']", tie_word_embeddings=True),
        "model.embed_tokens.weight",
        "tied to lm_head",
        "Take model.embed_tokens out of update_embeddings",
    ),
    "a pattern that does not divide": Wrong(
        setting("pst.pattern='7x1'"), f"{_BLOCK}attention.self.query", "divisible by 7, got 32", "exclude_modules"
    ),
    "overrides that match nothing": Wrong(
        setting('pst.overrides=[{modules=["querry"], pattern="row"}]'), "overrides", "'querry'", "Did you mean 'query'?"
    ),
    "a teacher that is not there": Wrong(
        setting("distillation.weight=0.5", "distillation.teacher=no/teacher"),
        "distillation.teacher",
        "'no/teacher'",
        "name a model folder",
    ),
    "a teacher that is no model": Wrong(
        setting("distillation.weight=0.5", "distillation.teacher={made}/plain"),
        "distillation.teacher",
        "{made}/plain",
        "config.json",
    ),
    "a teacher of other classes": Wrong(
        setting("distillation.weight=0.5", "distillation.teacher=tests/data/tiny-bert"),
        "distillation.teacher",
        "LABEL_0, LABEL_1",
        "the same labels",
    ),
    "a teacher of another vocabulary": Wrong(
        _taught_by(vocab_size=64), "distillation.teacher", "vocabulary of 64 tokens", "the same tokenizer"
    ),
    "a teacher of fewer positions": Wrong(
        _taught_by(max_position_embeddings=24), "distillation.teacher", "24 positions", "Set it to at most 24"
    ),
    "a teacher that sees both ways": Wrong(
        causal_setting("distillation.weight=0.5", f"distillation.teacher={BERT}"),
        "distillation.teacher",
        "is_decoder = false",
        "Name a causal language model",
    ),
    "a teacher without its head": Wrong(
        _taught_by_a_headless_model, "distillation.teacher", "lacks lm_head.weight", "Name a whole model"
    ),
    "a teacher that was pruned": Wrong(
        _taught_by_its_pruned_self,
        "distillation.teacher is empty",
        "{tmp}/model/pruning.json",
        "name the folder of the dense model in distillation.teacher",
    ),
    "a teacher with the zeros that are kept": Wrong(
        causal_setting("distillation.weight=0.5", "method=masked-lora", "pst.initial_mask=zeros"),
        "distillation.teacher is empty",
        'pst.initial_mask = "zeros"',
        "name the folder of the dense model in distillation.teacher",
    ),
    "a teacher that would train": Wrong(
        setting("distillation.weight=0.5"), "distillation.teacher", "classifier.weight", "Name a model folder"
    ),
}
