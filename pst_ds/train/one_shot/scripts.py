"""One-shot pruning in scripts, before the pretrained model is loaded."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from pst_ds.checkpoint.restore import base_fingerprint
from pst_ds.config.one_shot import CHANNELS, PruneConfig
from pst_ds.config.pst import PSTConfig
from pst_ds.core.patterns import parse_pattern
from pst_ds.errors import InputError
from pst_ds.nn.base_model import DTYPES, pruning_record
from pst_ds.parallel.ranks import of_main
from pst_ds.prune.blocks import Batch
from pst_ds.train.one_shot.pruning import PruneJob, digest_of_ranks, prune_to_folder

_LABELS = ("labels", "label", "label_ids")


def prune_pretrained(
    path: str | Path,
    out: str | Path,
    batches: Iterable[Mapping[str, object]],
    config: PruneConfig,
    *,
    pst: PSTConfig | None = None,
    precision: str = "bf16",
) -> Path:
    """Prune a pretrained model in one shot before training; return the folder ``out``, for ``from_pretrained``.

    Collective: all ranks share the work, and the result does not depend on their number. A call that was killed
    continues with the first block that is not finished; one that was finished before returns at once.

    Args:
        path: Model folder, or name of a model on the hub.
        out: Model folder to write.
        batches: Calibration data: arguments of the model's forward pass by name. Labels are ignored, and so are the
            batches of all ranks but 0, and examples after the first ``config.samples``.
        config: Method, sparsity and other settings.
        pst: Settings of ``inject_pst``, for targets, pattern and overrides.
        precision: Dtype of the blocks' computation: "bf16", "fp16" or "fp32".

    Raises, on all ranks, InputError, and FloatingPointError for values that are not finite.
    """
    pst = pst or PSTConfig()
    # a cut of channels has another setting, and a pattern such as 2:4 says the sparsity
    needs_sparsity = config.method != CHANNELS and config.sparsity is None
    if needs_sparsity and parse_pattern(config.pattern or pst.pattern).fixed_sparsity is None:
        raise InputError("prune_pretrained: PruneConfig has no sparsity. Set one, such as sparsity=0.5")
    if precision not in DTYPES:
        raise InputError(f"precision = {precision!r} must be one of {', '.join(DTYPES)}")
    drawn: list[Batch] = []
    if config.needs_data:
        # only rank 0 reads its batches, so that loaders may be empty on the others
        drawn = of_main(lambda: _first_examples(batches, config.samples))
    # The record of a finished folder has these, so a call with other ones does not take it for its own.
    identity = [repr(config), repr(pst), precision, digest_of_ranks(drawn, "batches")]
    identity.append(of_main(lambda: base_fingerprint(str(path))))
    job = PruneJob(
        path=str(path),
        out=Path(out),
        config=config,
        pst=pst,
        sparsity=0.0,  # of a run's schedule; config.sparsity counts here
        precision=precision,
        batches=lambda _: drawn,
        data="batches",
        facts={"job": identity},
    )
    if of_main(lambda: pruning_record(job.out).get("job")) != identity:
        prune_to_folder(job)
    return job.out


def _first_examples(batches: Iterable[Mapping[str, object]], samples: int) -> list[Batch]:
    """Return the tensors of the first ``samples`` examples, on the CPU, without labels. Raises InputError."""
    drawn: list[Batch] = []
    for batch in batches:
        tensors: dict[str, Tensor] = {}
        for name, value in batch.items():
            if isinstance(value, Tensor) and name not in _LABELS:
                tensors[name] = value
        if not tensors:
            raise InputError(f"a calibration batch has no tensors besides labels, but {', '.join(batch) or 'nothing'}")
        # the first dimension of every tensor is the examples
        drawn.append({name: value[:samples].cpu() for name, value in tensors.items()})
        samples -= len(next(iter(tensors.values())))
        if samples <= 0:
            return drawn
    if not drawn:
        raise InputError("batches is empty: there is no calibration data. Give at least one batch")
    return drawn
