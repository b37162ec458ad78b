"""Generate texts with a causal model in one process, by beam search, and score them with BLEU, ROUGE and chrF."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pst_ds.config.data import EvalConfig
from pst_ds.config.run import ConfigError
from pst_ds.parallel.watchdog import heartbeat
from pst_ds.progress import Progress

if TYPE_CHECKING:
    from transformers import GenerationConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer

Rule = Callable[[Tensor, Tensor], Tensor]
"""Returns changed scores of the next token, from the tokens so far and the scores."""


def end_tokens(config: GenerationConfig) -> list[int]:
    """Return the end-of-text tokens of a generation config, which has one, several or none."""
    ends = config.eos_token_id
    if isinstance(ends, int):
        return [ends]
    return list(ends or ())


@torch.inference_mode()
def write_texts(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    settings: EvalConfig,
    batch_size: int,
    device: str,
    ends: Sequence[int] = (),
) -> list[str]:
    """Return the text that ``model`` generates after each prompt, up to the end-of-text token or one of ``ends``.

    The model's generation_config.json is ignored. Up to rounding, texts do not depend on the batching.

    Args:
        model: a transformers model with whole weights, in evaluation mode.
        prompts: token ids of each prompt.
    """
    # Prompts of similar length share a batch, so that little is padded.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    own_config = model.generation_config
    model.generation_config = _generation_config(settings, tokenizer, ends)
    texts = [""] * len(prompts)
    try:
        with Progress("write", len(prompts), "texts") as shown:
            for first in range(0, len(order), batch_size):
                heartbeat("writing texts")
                batch = order[first : first + batch_size]
                prompts_of_batch = [prompts[i] for i in batch]
                rules: list[Rule] = []
                if settings.no_repeat_ngram_size:
                    longest = max(map(len, prompts_of_batch))  # the others are padded to it on the left
                    rules.append(_NoRepeatAfter(longest, settings.no_repeat_ngram_size))
                written = generated(model, prompts_of_batch, rules, device)
                for i, text in zip(batch, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
                    texts[i] = text.strip()
                shown.add(len(batch))
    finally:
        model.generation_config = own_config
    return texts


def generated(model: Any, prompts: Sequence[Sequence[int]], rules: Sequence[Rule], device: str) -> Tensor:
    """Return the tokens that ``model`` generates after each of ``prompts`` by its generation config and the ``rules``:
    (prompts, new tokens) int64. Prompts are padded on the left."""
    from transformers import LogitsProcessorList

    length = max(map(len, prompts))
    padding = model.generation_config.pad_token_id
    padded: list[list[int]] = []
    is_prompt: list[list[int]] = []
    for prompt in prompts:
        num_padding = length - len(prompt)
        padded.append([padding] * num_padding + list(prompt))
        is_prompt.append([0] * num_padding + [1] * len(prompt))
    written: Tensor = model.generate(
        input_ids=torch.tensor(padded, device=device),  # (prompts, length)
        attention_mask=torch.tensor(is_prompt, device=device),
        logits_processor=LogitsProcessorList(rules),
    )
    return written[:, length:]


def _generation_config(settings: EvalConfig, tokenizer: Tokenizer, ends: Sequence[int]) -> GenerationConfig:
    """Return the generation settings; ``use_cache`` is set because training switches it off in the config."""
    from transformers import GenerationConfig

    end = tokenizer.eos_token_id
    padding = tokenizer.pad_token_id
    if padding is None:
        # any token will do: padding is not attended to
        padding = end
    beams = {}
    # transformers warns about a penalty without beams
    if settings.num_beams > 1:
        beams = {"length_penalty": settings.length_penalty}
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted({end, *ends}),
        pad_token_id=padding,
        **beams,
    )


class _NoRepeatAfter:
    """Forbid repeated n-grams of ``size`` tokens after the first ``length`` tokens. The processor of transformers also
    counts the prompt, from which names must be copied."""

    def __init__(self, length: int, size: int):
        from transformers import NoRepeatNGramLogitsProcessor

        self._length = length
        self._processor = NoRepeatNGramLogitsProcessor(size)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._processor(input_ids[:, self._length :], scores)


def require_text_metrics() -> None:
    """Raise ConfigError if a package is not installed."""
    missing = [name for name in ("sacrebleu", "rouge_score") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"written texts are scored with {' and '.join(missing)}, which is not installed: pip install 'pst-ds[nlg]'"
        )


def text_metrics(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the scores of ``texts``, each against all of its ``references``, in [0, 100].

    ``bleu`` and ``chrf`` are corpus scores of sacrebleu with its defaults (arXiv 1804.08771; chrF without word order).
    ``rouge_1`` and ``rouge_l`` are means over texts of the F1 of rouge-score without stemming, for the best reference.
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    # sacrebleu wants the first reference of every text, then the second: None where a text has fewer
    streams = list(map(list, zip_longest(*references)))
    scorer = RougeScorer(["rouge1", "rougeL"])
    rouge_1 = 0.0
    rouge_l = 0.0
    for text, references_of_text in zip(texts, references, strict=True):
        scores = scorer.score_multi(list(references_of_text), text)
        rouge_1 += scores["rouge1"].fmeasure
        rouge_l += scores["rougeL"].fmeasure
    return {
        "bleu": sacrebleu.corpus_bleu(list(texts), streams).score,
        "rouge_1": 100.0 * rouge_1 / len(texts),
        "rouge_l": 100.0 * rouge_l / len(texts),
        "chrf": sacrebleu.corpus_chrf(list(texts), streams).score,
    }
