"""prompt.json of a model folder: the vectors of a trained prompt, and how the model reads them.

    {"text": what it began as, "after": tokens of a text before it, "values": [[m rows of d numbers]]}

transformers knows no prompt: ``from_pretrained`` alone gives the model without it, and :func:`attach_saved_prompt` puts
it in.
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
    """A prompt as a folder keeps it."""

    text: str
    after: int
    """Tokens of a text that come before it."""
    values: Tensor
    """(m, d) fp32; numbers of a narrower type are exact in it."""

    @property
    def facts(self) -> dict[str, object]:
        """What a manifest says of it."""
        return {"text": self.text, "tokens": self.values.shape[0], "after": self.after}

    def write(self, folder: Path) -> None:
        """Write the file into ``folder``."""
        table = {"text": self.text, "after": self.after, "values": self.values.tolist()}
        (folder / PROMPT_FILE).write_text(json.dumps(table, ensure_ascii=False) + "\n", encoding="utf-8")


def read_prompt(folder: Path) -> SavedPrompt | None:
    """Read the prompt of a model folder; None without one. Raises InputError for a damaged file."""
    path = folder / PROMPT_FILE
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_bytes())
        values = torch.tensor(table["values"], dtype=torch.float32)
        found = SavedPrompt(str(table["text"]), int(table["after"]), values)
        if values.dim() != 2 or not bool(values.isfinite().all()) or found.after not in (0, 1):
            raise ValueError("no table of finite numbers")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}; export the model again") from None
    return found


def attach_saved_prompt(model: nn.Module, folder: Path) -> None:
    """Let ``model``, loaded from ``folder``, read the folder's prompt with every text; nothing without one.

    Raises InputError for a prompt that is damaged, or of another model.
    """
    saved = read_prompt(folder)
    if saved is None:
        return
    table = body_of(model).get_input_embeddings().weight
    if saved.values.shape[1] != table.shape[1]:
        raise InputError(
            f"{folder / PROMPT_FILE} has vectors of {saved.values.shape[1]} numbers, and the model's embeddings have "
            f"{table.shape[1]}: it is of another model"
        )
    prompt = PSTPrompt(saved.values.to(table), after=saved.after).requires_grad_(False)
    attach_prompt(model, prompt.train(model.training))
