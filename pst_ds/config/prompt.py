"""Settings of a trained prompt: ``[prompt]``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pst_ds.config.data import DataConfig
from pst_ds.config.methods import METHODS
from pst_ds.config.settings import NotNegative, Section, settings
from pst_ds.config.tasks import TASKS

Adapter = Literal["none", "linear", "low-rank"]


@settings
class PromptConfig(Section):
    """A trained prompt that is prepended to every example, initialised from words (docs/how-to/methods.md)."""

    text: str = ""
    """Initial prompt, such as "classify the review as positive or negative:", with one trained vector per token.
    Decoders read it first, encoders after the first token ([CLS]). Empty trains no prompt."""
    source: Literal["embeddings", "hidden", "random"] = "embeddings"
    """Initial vectors. "embeddings" uses the embeddings of the prompt's tokens, as prompt tuning in PEFT does; "hidden"
    the dense model's last hidden states for the prompt (SK-Tuning, arXiv 2410.08598); "random" draws as many vectors
    with the mean norm of these embeddings, as a baseline."""
    adapter: Adapter = "none"
    """What trains: "none" trains the vectors; the other values freeze them and train a linear map initialised with the
    identity, either a full matrix ("linear") or the identity plus a matrix of rank ``rank`` ("low-rank")."""
    rank: NotNegative = 0
    """Rank of the "low-rank" adapter."""

    def problems(self) -> Iterator[str]:
        for name, default in (("source", "embeddings"), ("adapter", "none"), ("rank", 0)):
            if not self.text and getattr(self, name) != default:
                yield f"prompt.{name} = {getattr(self, name)!r} does nothing without prompt.text. Set prompt.text"
        if (self.rank > 0) != (self.adapter == "low-rank"):
            yield (
                f'prompt.rank = {self.rank} with prompt.adapter = "{self.adapter}": only "low-rank" has a rank, of at '
                "least 1. Set both, or neither"
            )

    def conflicts(self, method: str, task: str, data: DataConfig, sequence_parallel: int) -> Iterator[str]:
        """Yield a message where the method lacks a prompt, or where documents or ranks share a sequence."""
        if METHODS[method].prompt_text and not self.text:
            yield (
                f"prompt.text = '' with method = {method!r}, which trains a prompt. Set prompt.text to words such as "
                "those of the task"
            )
        if not self.text:
            return
        if TASKS[task].packs_text and data.keeps_documents_apart:
            yield (
                f"prompt.text with task = {task!r}, which separates the documents of a sequence: only the first would "
                "see the prompt. Set data.document_mask = false"
            )
        if sequence_parallel > 1:
            yield (
                f"prompt.text with train.sequence_parallel = {sequence_parallel}: ranks share sequences, and only one "
                "of them would have the prompt. Set train.sequence_parallel = 1"
            )
