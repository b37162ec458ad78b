"""Settings of a trained prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pst_ds.config.checks import ConfigError, NotNegative, check_fields

if TYPE_CHECKING:
    from pst_ds.config.run import RunConfig


Adapter = Literal["none", "linear", "low-rank"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptConfig:
    """A prompt that the model reads with every text, begun from words (docs/how-to/methods.md)."""

    text: str = ""
    """What it begins as, such as "classify the review as positive or negative:"; it has a vector for each token.
    Decoders read it before the text, encoders after the first token, [CLS]. Empty is no prompt."""
    source: Literal["embeddings", "hidden", "random"] = "embeddings"
    """Where the vectors begin: at the embeddings of the text's tokens, as PEFT's prompt tuning from text does; at the
    last hidden states with which the dense model has read it (SK-Tuning, arXiv 2410.08598); or, to compare with, as
    many vectors of random numbers, as large as the embeddings of the text are on average."""
    adapter: Adapter = "none"
    """What trains: with "none" the vectors themselves; else they stay, and a linear map that begins as the identity is
    trained, of the model's whole width or, "low-rank", its difference from the identity of rank ``rank``."""
    rank: NotNegative = 0
    """Of the adapter "low-rank"."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, default in (("source", "embeddings"), ("adapter", "none"), ("rank", 0)):
            if not self.text and getattr(self, name) != default:
                raise ValueError(f"{name} = {getattr(self, name)!r} does nothing without text; set text")
        if (self.rank > 0) != (self.adapter == "low-rank"):
            raise ValueError(
                f'rank = {self.rank} with adapter = "{self.adapter}": adapter "low-rank" needs a rank of at least 1, '
                "and no other has one"
            )

    def require_fit(self, run: RunConfig) -> None:
        """Refuse a prompt where texts share a sequence, or ranks do. Raises ConfigError."""
        if run.mask_method.prompt_text and not self.text:
            raise ConfigError(
                f"method = {run.method!r} trains a prompt, and prompt.text = '' begins none; set prompt.text to words "
                "such as those of the task"
            )
        if not self.text:
            return
        if run.task_facts.packs_text and run.data.keeps_documents_apart:
            raise ConfigError(
                f"prompt.text with task {run.task!r}, which keeps the documents of a sequence apart: the first alone "
                "would see the prompt; set data.document_mask = false"
            )
        if run.train.sequence_parallel > 1:
            raise ConfigError(
                f"prompt.text with train.sequence_parallel = {run.train.sequence_parallel}: the ranks share sequences, "
                "and which of them has the prompt is not known; set train.sequence_parallel = 1"
            )
