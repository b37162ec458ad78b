"""``prompt.json`` of a model folder: the vectors of a trained prompt, and where the model inserts them.

    {"text": text it was initialised with, "after": tokens before it, "values": [[m rows of d numbers]]}

``from_pretrained`` of transformers ignores the file; :func:`attach_saved_prompt` adds the prompt to the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pst_ds.errors import InputError
from pst_ds.nn.prompt import PSTPrompt, attach_prompt, body_of

PROMPT_FILE = "prompt.json"


@dataclass(frozen=True, slots=True)
class SavedPrompt:
    """A trained prompt."""

    text: str
    """Text that it was initialised with."""
    after: int
    """Number of input tokens before the prompt, 0 or 1."""
    values: Tensor
    """(m, d) fp32; exact for narrower dtypes."""

    @property
    def facts(self) -> dict[str, object]:
        """Entry of the manifest."""
        return {"text": self.text, "tokens": self.values.shape[0], "after": self.after}

    def write(self, folder: Path) -> None:
        """Write the file into ``folder``."""
        table = {"text": self.text, "after": self.after, "values": self.values.tolist()}
        (folder / PROMPT_FILE).write_text(json.dumps(table, ensure_ascii=False) + "\n", encoding="utf-8")


def read_prompt(folder: Path) -> SavedPrompt | None:
    """Return the prompt of a model folder, or None without one. Raises InputError for a damaged file."""
    path = folder / PROMPT_FILE
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_bytes())
        values = torch.tensor(table["values"], dtype=torch.float32)
        found = SavedPrompt(str(table["text"]), int(table["after"]), values)
        if values.dim() != 2 or not bool(values.isfinite().all()) or found.after not in (0, 1):
            raise ValueError("expected a table of finite numbers, and after = 0 or 1")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}. Export the model again") from None
    return found


def attach_saved_prompt(model: nn.Module, folder: Path) -> None:
    """Add the prompt of ``folder`` to ``model``, which was loaded from it, so that every input has it.

    Does nothing without a prompt. Raises InputError if the prompt is damaged or belongs to another model.
    """
    saved = read_prompt(folder)
    if saved is None:
        return
    table = body_of(model).get_input_embeddings().weight
    if saved.values.shape[1] != table.shape[1]:
        raise InputError(
            f"{folder / PROMPT_FILE} has vectors of size {saved.values.shape[1]}, and the model's embeddings have size "
            f"{table.shape[1]}: it belongs to another model. Export the model again"
        )
    prompt = PSTPrompt(saved.values.to(table), after=saved.after).requires_grad_(False)
    attach_prompt(model, prompt.train(model.training))
