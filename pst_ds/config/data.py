"""Settings of data and evaluation: ``[data]``, ``[[data.sources]]`` and ``[eval]``."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Strict

from pst_ds.config.settings import Finite, Interval, MayDiffer, NotNegative, Positive, Rate, Section, Strings, settings

PARQUET_BRANCH = "refs/convert/parquet"
"""Branch with the hub's own Parquet conversion of a dataset; each subset is a folder there."""
_SUM_TOLERANCE = 1e-6
"""Allows weights that are written with seven digits, such as 0.3333333."""


@settings
class DataSource(Section):
    """One part of a mixture of training data, for task "causal-lm"."""

    path: str
    """A token store of ``pst-ds prepare``, its address such as "s3://bucket/store", token files of Megatron-LM or
    datatrove, or text: a file, a folder or a pattern."""
    weight: Rate = 0.0
    """Fraction of the training sequences that come from this source; the weights add up to 1. With 0 everywhere, each
    source is read once per epoch."""
    kind: Literal["text", "chat"] = "text"
    """Contents of ``path``, if it is not a store. "chat" reads conversations (a column "messages", or "prompt" and
    "completion") and trains on the assistant's messages."""

    def problems(self) -> Iterator[str]:
        if not self.path:
            yield "data.sources.path = '' is empty. Name a store, or files of text"


@settings
class DataConfig(Section):
    """Training and evaluation data, and the length of the model's inputs (docs/how-to/data.md)."""

    train: MayDiffer[str] = ""
    """Training data: a local JSONL, CSV, Parquet or text file, or a slice of its rows such as "reviews.csv[:80%]" (also
    in the next two settings). Task "causal-lm" also reads a token store, here or at an address, token files of other
    programs, and many text files (docs/how-to/data.md)."""
    sources: MayDiffer[Annotated[tuple[DataSource, ...], Strict(False)]] = ()
    """A mixture to train on instead of ``train``, for task "causal-lm": tables [[data.sources]]."""
    validation: MayDiffer[str] = ""
    """Local file for periodic evaluation and for choosing the best checkpoint."""
    test: MayDiffer[str] = ""
    """Local file that only ``pst-ds eval`` and ``verify`` read."""
    dataset: str = ""
    """Name of a dataset on the hub, or a local folder with the same layout, instead of local files. The three settings
    above then name splits, or slices such as "train[:90%]"."""
    subset: str = ""
    """Configuration of the hub dataset, such as "sst2" of "nyu-mll/glue"."""
    revision: str = ""
    """Branch, tag or commit of the hub dataset. On "refs/convert/parquet", the hub's conversion of script datasets,
    ``subset`` names a folder."""
    test_rows: Strings = ()
    """A column and a value: evaluate the test split only on rows with this value. Empty keeps all rows."""
    text_columns: Strings = ("text",)
    """One column, or two for sentence pairs; exactly one for tasks "causal-lm" and "data-to-text". For "data-to-text"
    it may be a path into nested values, such as "lex.text". For "chat": one column with lists of messages, or two with
    prompts and completions; a column "tools" is also read."""
    label_column: str = "label"
    """Class or number of a row. For task "data-to-text": the target text, or a list of target texts. Unused in tasks
    "causal-lm" and "chat"."""
    label_names: MayDiffer[Strings] = ()
    """Class names in the order of their ids, if the training data has exactly these; metric "f1" scores the second of
    two. Empty uses the dataset's class names, or else alphabetical order."""
    separator: str = ""
    """Text between the data and the target of task "data-to-text"; empty is the end-of-text token."""
    chat_template: MayDiffer[str] = ""
    """Jinja file with the chat template for task "chat", which exports include. Empty is the tokenizer's template."""
    sample_by: Literal["line", "paragraph", "document"] = "line"
    """Row of a .txt file: a line, the lines between empty ones, or the whole file (slices of it are lines). Its column
    is "text"."""
    max_length: Positive = 128
    """Maximum tokens per example; longer ones are truncated. For task "causal-lm", the length of every training
    sequence: documents are joined with the end-of-text token and cut into sequences, and an incomplete last sequence is
    dropped. Evaluation predicts every token except the first once: each sequence starts with the last token of the one
    before, and the last may be shorter. For task "data-to-text", data and target together, of which the data is
    truncated first. For task "chat", a whole conversation."""
    document_mask: MayDiffer[bool | None] = None
    """For task "causal-lm": restart positions and attention at each document of a sequence, and do not predict its
    first token. True rejects models that cannot, such as recurrent ones; unset warns instead. False treats the joined
    documents as one text."""
    cache: MayDiffer[str] = ""
    """Folder for tokenised text and for fetched token stores. Empty is $PST_DS_CACHE, or else "pst-ds" in $HF_HOME."""
    group_by_length: bool = False
    """Build batches from examples of similar length: less padding, the same examples in another order."""

    def problems(self) -> Iterator[str]:
        if not self.train and not self.sources:
            yield "data.train is missing. Name a local file, or a split of data.dataset"
        if self.sources:
            yield from self._mixture_problems()
        # How many columns fit depends on the task: see pst_ds/config/tasks.py.
        if len(self.text_columns) not in (1, 2):
            yield f"data.text_columns = {list(self.text_columns)} must name one column or two"
        # A name stands for a class id; two ids with one name could not be told apart in the data.
        if len(set(self.label_names)) != len(self.label_names):
            yield f"data.label_names = {list(self.label_names)} must be different names, or empty"
        if len(self.test_rows) not in (0, 2):
            yield f"data.test_rows = {list(self.test_rows)} must be a column and a value, or empty"

    def _mixture_problems(self) -> Iterator[str]:
        for name in ("train", "dataset"):
            if getattr(self, name):
                yield (
                    f"data.{name} = {getattr(self, name)!r} with data.sources: a run trains on one of them. Remove the "
                    "other"
                )
        # Zero weights in all sources mean: read each once. A single zero is rather a source that was forgotten.
        weights = [source.weight for source in self.sources]
        if any(weights) and (abs(sum(weights) - 1.0) > _SUM_TOLERANCE or 0.0 in weights):
            yield (
                f"data.sources have the weights {weights}, whose sum is {sum(weights):.7g}. Set weights above 0 that "
                "add up to 1, or none"
            )

    @property
    def keeps_documents_apart(self) -> bool:
        """True unless the documents of a sequence are treated as one text."""
        return self.document_mask is not False  # unset, None, keeps them apart where the model can

    @property
    def trained_on(self) -> str:
        """The setting that names the training data, with its value."""
        if not self.sources:
            return f"data.train = {self.train!r}"
        paths = ", ".join(source.path for source in self.sources)
        return f"data.sources ({paths})"


@settings
class EvalConfig(Section):
    """Evaluation on the validation file, and generation for tasks "data-to-text" and "chat"."""

    interval: MayDiffer[Interval] = 0
    """Optimizer steps between evaluations. 0 and -1 evaluate at the end only."""
    batch_size: MayDiffer[NotNegative] = 0
    """Examples per rank and evaluation batch. 0 is 64, or 8 for tasks that predict tokens."""
    metric: str = ""
    """Metric that chooses the best checkpoint among those at the final sparsity. Empty is "accuracy", "pearson" for
    task "regression", and the lowest "perplexity" for the others. "f1" scores the second of two classes."""
    num_beams: Positive = 10
    """Beams of the beam search."""
    length_penalty: Finite = 0.9
    """Power of the length by which a beam's log-probability is divided; values above 0 favour longer outputs."""
    no_repeat_ngram_size: NotNegative = 4
    """Length of the token n-grams that may not repeat in an output; those of the input may. 0 switches it off."""
    max_new_tokens: Positive = 64
    """Maximum generated tokens per output."""


PRESET_PLACES = ("dataset", "subset", "revision", "train", "validation", "test", "test_rows")
"""Settings of a preset that say where the data is; the others say how to read it."""
DATA_PRESETS: dict[str, dict[str, object]] = tomllib.loads(
    Path(__file__).with_name("presets.toml").read_text(encoding="utf-8")
)
"""Settings that each value of ``data.preset`` stands for."""
