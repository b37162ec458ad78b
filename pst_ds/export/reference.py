"""Load a model folder as a run loads its model, and measure how far the run's predictions are from the folder's."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from pst_ds.data.tasks import ExampleSet
from pst_ds.errors import InputError
from pst_ds.hf.config import LoadAs, PackedWeightsConfig
from pst_ds.hf.model_folder import open_model_folder
from pst_ds.nn.base_model import Pretrained
from pst_ds.train.evaluate import kl_divergence
from pst_ds.train.objective import load_frozen, require_comparable
from pst_ds.train.run_context import RunContext


def load_folder(folder: str | Path, context: RunContext, load_as: LoadAs = "dense", fix: str = "") -> nn.Module:
    """Load a folder, dense or packed, in the precision of a run and for its task; see :func:`load_frozen`."""
    packed: PackedWeightsConfig | None = None
    if not open_model_folder(folder).is_plain:
        packed = PackedWeightsConfig(load_as=load_as)
    return load_frozen(Pretrained(str(folder)), context, packed, fix)


def kl_from_folder(
    folder: str | Path, model: Callable[..., object], context: RunContext, examples: ExampleSet
) -> dict[str, float]:
    """Return how far the predictions of ``model`` are from those of the folder; see :func:`kl_divergence`.

    Raises InputError.
    """
    run = context.run
    place = Pretrained(str(folder), "reference")
    if why := run.task_facts.no_teacher:
        raise InputError(f"{place}: task {run.task!r} {why}, not a distribution. Compare metrics, without a reference")
    open_model_folder(folder)  # refuses a folder that is not a model, before its config is read
    require_comparable(run, Pretrained(run.model.path).config(), place, place.config())
    return kl_divergence(load_folder(folder, context), model, context, examples)
