"""Text-generation metrics: BLEU, ROUGE and chrF with several references."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import zip_longest

from pst_ds.config.run import ConfigError


def missing_libraries() -> list[str]:
    """Return the missing packages of the metrics."""
    return [name for name in ("sacrebleu", "rouge_score") if find_spec(name) is None]


def require_text_metrics() -> None:
    """Raise ConfigError if a package is not installed."""
    missing = missing_libraries()
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

    streams = [list(stream) for stream in zip_longest(*references)]  # None where a text has fewer references
    scorer = RougeScorer(["rouge1", "rougeL"])
    pairs = zip(texts, references, strict=True)
    rouge = [scorer.score_multi(list(wanted), text) for text, wanted in pairs]
    return {
        "bleu": sacrebleu.corpus_bleu(list(texts), streams).score,
        "rouge_1": 100.0 * sum(found["rouge1"].fmeasure for found in rouge) / len(rouge),
        "rouge_l": 100.0 * sum(found["rougeL"].fmeasure for found in rouge) / len(rouge),
        "chrf": sacrebleu.corpus_chrf(list(texts), streams).score,
    }
