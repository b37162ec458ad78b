"""Remove whole blocks of a pretrained model: each time the one whose absence harms the model least.

The harm is the next-token loss on calibration data; without token logits, the squared change of the last block's
output, relative to its squares.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pst_ds.config.one_shot import PruneConfig
from pst_ds.config.pst import PSTConfig
from pst_ds.errors import InputError
from pst_ds.nn.cut_config import cut_config
from pst_ds.nn.targets import resolve_targets
from pst_ds.progress import Progress
from pst_ds.prune.blocks import BlockReplay, Calibration, Forward, Output, find_blocks, hidden_of
from pst_ds.prune.model_files import ModelFiles
from pst_ds.prune.output_gradients import next_token_loss
from pst_ds.prune.reconstruction import exact_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECES = 16
"""Most pieces of text that each removal is judged by."""


def remove_blocks(
    files: ModelFiles, asked: PruneConfig, excluded: str | tuple[str, ...], data: Calibration
) -> tuple[list[int], int]:
    """Leave ``asked.layers`` blocks of the model in ``files``, and change its config.

    Returns the removed blocks, in their order, and the number of parameters that stay.

    Collective; the result does not depend on the number of ranks. Raises InputError if the config cannot express it.
    """
    names = [target.name for target in resolve_targets(files.model, PSTConfig(exclude_modules=excluded))]
    stack, blocks = find_blocks(files.model, names)
    number = asked.layers or 0
    cut_config(copy.deepcopy(files.model.config), asked)  # checks it before any work

    def choose() -> dict[str, Tensor]:
        replay = BlockReplay(files.model, files.source(stack, blocks), data)
        replay.take(data.own_pieces(PIECES))
        removed: list[int] = []
        with replay.in_place(), Progress("prune", len(blocks) - number, "layers") as shown:
            judge = _Judge(replay)
            for _ in range(len(blocks) - number):
                left = [index for index in range(len(blocks)) if index not in removed]
                harm = judge.harm(left)
                removed.append(left[int(harm.argmin())])
                shown.add(1, f"{stack}.{removed[-1]}")
        return {"removed": torch.tensor(removed)}

    removed = files.remember("layers", choose)["removed"].tolist()
    kept = [index for index in range(len(blocks)) if index not in removed]
    smaller = _with_config(files, asked, stack, kept)
    files.keep_blocks(stack, kept)
    return removed, smaller.num_parameters()


class _Judge:
    """Runs the model without some of its blocks."""

    def __init__(self, replay: BlockReplay):
        self._replay = replay
        with replay.resident(0):
            replay.run(0, keep_output=True, compute=self._input, gradients=True)
        self._start: list[Output] = list(replay.outputs)
        """Input of the first block, in the form of a block's output."""
        self._wanted: list[Tensor] = []
        """Output of the last block of the whole model."""

    def _input(self, forward: Forward) -> Output:
        output, states = forward(), self._replay.leaf.detach()
        return states if isinstance(output, Tensor) else (states, *output[1:])

    def harm(self, left: Sequence[int]) -> Tensor:
        """Return the harm of removing each of the blocks ``left``, (left,). Collective."""
        start, found = self._start, []
        if not self._wanted:
            self._run(left, start)
            self._wanted = [hidden_of(output).float() for output in self._replay.outputs]
        for place, index in enumerate(left):
            self._run(left[place + 1 :], start)
            found.append(self._measured())
            self._run([index], start)
            start = list(self._replay.outputs)
        return torch.stack(found)

    def _run(self, indices: Sequence[int], inputs: Sequence[Output]) -> None:
        self._replay.outputs = list(inputs)
        for index in indices:
            with self._replay.resident(index):
                self._replay.run(index, keep_output=True)

    def _measured(self) -> Tensor:
        """Return the harm of what ran, (). Collective."""
        replay = self._replay
        terms: list[list[Tensor]] = []
        for place, (_, piece) in enumerate(replay.pieces):
            with torch.no_grad():
                _, output = replay.after_blocks(place)
                loss = next_token_loss(output, piece)
            if loss is None:
                made, wanted = hidden_of(replay.outputs[place]).detach().float(), self._wanted[place]
                loss = (made - wanted).square().sum() / wanted.square().sum()
            terms.append([loss.view(1)])
        return exact_sums(terms, [1], replay.data.device, replay.data.ranks)[0].squeeze()


def _with_config(files: ModelFiles, asked: PruneConfig, stack: str, kept: Sequence[int]) -> PreTrainedModel:
    """Change the config; return the smaller model without values. Raises InputError."""
    changed = copy.deepcopy(files.model.config)
    for config in (changed, files.model.config):
        cut_config(config, asked, kept)
    smaller = files.skeleton(changed)
    numbers = {f"{stack}.{old}.": f"{stack}.{new}." for new, old in enumerate(kept)}
    shapes = {name: tuple(param.shape) for name, param in smaller.named_parameters()}
    for name, param in files.model.named_parameters():
        start = next((old for old in numbers if name.startswith(old)), "")
        new = numbers[start] + name.removeprefix(start) if start else name
        if (start or not name.startswith(f"{stack}.")) and shapes.get(new) != tuple(param.shape):
            raise InputError(
                f"layers = {len(kept)}: {name} would become {new}, which has another shape. Cut ffn instead"
            )
    return smaller
