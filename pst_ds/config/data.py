"""Data and evaluation in the run file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from pst_ds.config.checks import ConfigError, Finite, NotNegative, Positive, Rate, check_fields

PARQUET_BRANCH = "refs/convert/parquet"
"""Where the hub keeps its own conversion of a dataset; each subset is a folder there."""


_SUM_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """A part of the text to train on, for task "causal-lm"."""

    path: str
    """A store of ``pst-ds prepare``, a file or folder of tokens of OLMo-core, datatrove or Megatron, or text: a file, a
    folder or a pattern."""
    weight: Rate = 0.0
    """Share of the sequences that are trained on; those of all sources add up to 1. 0 for all takes each as it is."""
    epochs: Rate = 0.0
    """Most passes over this source, after which the others take its turns. 0 is no limit."""
    kind: Literal["auto", "text", "chat", "tokens"] = "auto"
    """What ``path`` holds: "auto" sees tokens, and takes all else for text. Of conversations ("chat", a column
    "messages", or "prompt" and "completion") the assistant's part is learnt."""
    stream: bool = False
    """Tokenise the text as it comes, without a store, for text that is too much to prepare: files, a URL, or a data set
    of the hub. It begins anew at its end, and needs ``train.num_steps``."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("data.sources.path = '' is empty: name a store, or files of text")
        check_fields(self)
        if self.stream and self.kind == "tokens":
            raise ConfigError(
                f'data.sources: {self.path!r} has kind = "tokens" and stream = true, and tokens on disk are mapped; '
                "leave stream out"
            )
        if self.stream and self.epochs:
            raise ConfigError(
                f"data.sources: {self.path!r} has stream = true and epochs = {self.epochs}, and the length of a stream "
                "is not known; leave epochs out, or make a store of it (pst-ds prepare)"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Training and evaluation data, and the length of the model's inputs (docs/how-to/data.md)."""

    train: str = ""
    """Local JSONL, CSV, Parquet or text file to train on, or a slice of its rows such as "reviews.csv[:80%]", as for
    the next two. For task "causal-lm" also a store of tokens, and many files of text (docs/how-to/data.md)."""
    sources: tuple[DataSource, ...] = ()
    """Texts to train on in a mixture, instead of ``train``, for task "causal-lm": tables [[data.sources]]."""
    validation: str = ""
    """Local file for periodic evaluation and the choice of the best checkpoint."""
    test: str = ""
    """Local file that only ``pst-ds eval`` and ``verify`` read."""
    dataset: str = ""
    """Name of a dataset on the hub, or a folder in its shape, instead of local files; the three settings above then
    name its splits, or pieces of them such as "train[:90%]"."""
    subset: str = ""
    """Configuration of the hub dataset, such as "sst2" of "nyu-mll/glue"."""
    revision: str = ""
    """Branch, tag or commit of the hub dataset. On "refs/convert/parquet", the hub's conversion of datasets that are
    scripts, the subset names a folder."""
    test_rows: tuple[str, ...] = ()
    """A column and a value: of the test split, only rows that have this value there. Empty takes all."""
    text_columns: tuple[str, ...] = ("text",)
    """One column, or two for sentence pairs; tasks "causal-lm" and "data-to-text" take one. For "data-to-text" it may
    be a path into nested values, such as "lex.text". For "chat" one with lists of messages, or two with prompts and
    completions; a column "tools" is read too."""
    label_column: str = "label"
    """The class or the number of a row; for task "data-to-text" the text to write, or a list of such texts. Tasks
    "causal-lm" and "chat" have none."""
    label_names: tuple[str, ...] = ()
    """The classes in the order of their ids, where those of the training data are just these: "f1" is that of the
    second of two. Empty is the order of the dataset's own class names, or else of the alphabet."""
    separator: str = ""
    """For task "data-to-text", what stands between the data and the text; empty is the end-of-text token."""
    chat_template: str = ""
    """For task "chat", a Jinja file by which conversations are written; exports take it along. Empty is the tokenizer's
    own template."""
    sample_by: Literal["line", "paragraph", "document"] = "line"
    """A row of a .txt file, as in ``datasets``: a line, the text between empty lines, or the whole file, of which a
    slice is then some lines. Its column is "text"."""
    max_length: Positive = 128
    """Tokens a text is cut to. For task "causal-lm" the length of every training sequence: the documents, with the
    end-of-text token between them, are one stream that is cut into such sequences; what is left at the end, less than a
    sequence, is not trained on. An evaluation predicts every token but the first once: there a sequence begins with the
    last token of the one before, and the last is shorter.
    For task "data-to-text" data and text together; the data is cut first. For task "chat" a whole conversation."""
    document_mask: bool | None = None
    """For task "causal-lm": restart positions and attention at each document of a sequence, whose first token is not
    predicted. True rejects a model that cannot do so, such as one with recurrent layers; unset warns of it. False joins
    documents as if they were one text."""
    group_by_length: bool = False
    """Make batches of texts of similar length; less padding, the same examples in another order."""

    def __post_init__(self) -> None:
        if not self.train and not self.sources:
            raise ConfigError("data.train is missing: name a local file, or a split of data.dataset")
        self._require_mixture()
        if len(self.text_columns) not in (1, 2):
            raise ConfigError(f"data.text_columns = {list(self.text_columns)} must name one column or two")
        if len(set(self.label_names)) != len(self.label_names):
            raise ConfigError(f"data.label_names = {list(self.label_names)} must be different names, or empty")
        if len(self.test_rows) not in (0, 2):
            raise ConfigError(f"data.test_rows = {list(self.test_rows)} must be a column and a value, or empty")
        check_fields(self)

    @property
    def keeps_documents_apart(self) -> bool:
        """True unless documents of a sequence are to run on."""
        return self.document_mask is not False

    def _require_mixture(self) -> None:
        if not self.sources:
            return
        for name in ("train", "dataset"):
            if getattr(self, name):
                raise ConfigError(
                    f"data.{name} = {getattr(self, name)!r} besides data.sources: a run trains on one or the "
                    "other; leave one of them out"
                )
        weights = [source.weight for source in self.sources]
        if not any(weights):
            limited = next((source for source in self.sources if source.epochs), None)
            if limited is not None:
                raise ConfigError(
                    f"data.sources: {limited.path!r} has epochs = {limited.epochs} and no weight, and sources without "
                    "weights are read once each in an epoch; give all of them a weight, or leave epochs out"
                )
            if self.streams and len(self.sources) > 1:
                raise ConfigError(
                    f"data.sources: {self.streams[0].path!r} has stream = true and no weight, and a stream has no last "
                    "sequence; give all sources a weight"
                )
        elif abs(sum(weights) - 1.0) > _SUM_TOLERANCE or 0.0 in weights:
            raise ConfigError(
                f"data.sources have the weights {weights}, whose sum is {sum(weights):.7g}: shares above 0 that add up "
                "to 1 are wanted, or none at all"
            )

    @property
    def streams(self) -> tuple[DataSource, ...]:
        """The sources that are read as they come."""
        return tuple(source for source in self.sources if source.stream)

    @property
    def trained_on(self) -> str:
        """The setting that names the text to train on, with its value."""
        paths = ", ".join(source.path for source in self.sources)
        return f"data.sources ({paths})" if self.sources else f"data.train = {self.train!r}"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Evaluation on the validation file, and how texts are written for tasks "data-to-text" and "chat"."""

    interval: Annotated[int, Ge(-1)] = 0
    """Optimizer steps between evaluations. 0 evaluates at the end, and where the data is read more than once up to four
    times before it, which shows whether the run overfits; they take at most a twentieth of the run, and choose no
    checkpoint. -1 evaluates at the end only."""
    batch_size: NotNegative = 0
    """Examples a rank evaluates at a time. 0 is 64, and 8 for tasks that predict tokens."""
    metric: str = ""
    """Chooses the best checkpoint, among those at the final sparsity. Empty is "accuracy", for task "regression"
    "pearson", and for the others the lowest "perplexity". "f1" is that of the second of two classes."""
    num_beams: Positive = 10
    """Beams of the search that writes texts."""
    length_penalty: Finite = 0.9
    """A beam's log-probability is divided by its length to this power; above 0 it favours longer texts."""
    no_repeat_ngram_size: NotNegative = 4
    """Tokens in a row that may not occur twice in a text; the data's own may be repeated. 0 switches it off."""
    max_new_tokens: Positive = 64
    """Most tokens of a written text."""

    def __post_init__(self) -> None:
        check_fields(self)
