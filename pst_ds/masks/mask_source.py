"""Base class of mask sources, which choose new masks: by ranking, solving, zeros of the base or removal of experts."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from pst_ds.core.schedule import Schedules
from pst_ds.masks.update import MaskStats


class MaskSource:
    """Chooses the masks of a model, and collects what it needs for that while the model trains.

    :func:`pst_ds.masks.choose_source.choose_source` makes the one of a run. Training calls it in this order, on every
    rank::

        source.before_batch(schedules, step)
        for inputs in micro_batches:
            source.expect(inputs)
            with source.observing():
                ...  # forward
            ...  # backward
        ...  # optimizer step
        source.after_batch()
        source.update(target, progress)  # if the schedule has an update after this step

    A subclass has :meth:`update`, and replaces the other methods where it collects something.
    """

    learns_scores: bool = False
    """True if the factors A, B, R and C have an effect on masks, so that they must train."""
    needs_calibration: bool = False
    """True if it observes the dense model on calibration examples before the first step."""

    @property
    def is_collecting(self) -> bool:
        """True while it holds sums that checkpoints do not have: saving and stopping then wait for the update."""
        return False

    def require_ready(self) -> None:
        """Raise InputError for what the model lacks and ``pst-ds train`` would measure; scripts have to set it."""

    def before_batch(self, schedules: Schedules, step: int) -> None:
        """Start to collect if the update after one of the next steps needs it. ``step``: applied steps so far."""

    def expect(self, inputs: Mapping[str, Tensor]) -> None:
        """Set the micro-batch that runs next. Its optional ``attention_mask`` is 0 for padding.

        The mask has the positions of additions too (:func:`pst_ds.nn.addition.inputs_of_layers`).
        """

    def observing(self) -> AbstractContextManager[object]:
        """Return a context for the forward pass of a micro-batch."""
        return nullcontext()

    def after_batch(self) -> None:
        """Complete what was collected of a batch, after its optimizer step. Collective."""

    def update(self, target: float, progress: float) -> MaskStats:
        """Choose masks and write them. Collective.

        Args:
            target: Sparsity of layers without their own, in [0, 1).
            progress: Share of their final sparsity that layers with their own have, in [0, 1].
        """
        raise NotImplementedError(f"{type(self).__name__} has no update")

    def collected(self) -> dict[str, list[list[int]]]:
        """Return the integer sums that a checkpoint keeps, as JSON values; empty if there are none."""
        return {}

    def restore(self, collected: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """Continue from what :meth:`collected` returned."""

    def close(self) -> None:
        """Stop collecting, and forget what was collected."""


class NoMasks(MaskSource):
    """The source of a run that prunes nothing. Its schedule has no updates."""
