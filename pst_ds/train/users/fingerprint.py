"""What the states over a run's checkpoint have in common, as a store's index keeps it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from pst_ds.checkpoint.format import Checkpoint
from pst_ds.config.run import RunConfig
from pst_ds.nn.layer import SCORE_FACTORS
from pst_ds.train.users.store import Common, Form


def common_of(
    checkpoint: Checkpoint, run: RunConfig, shapes: Mapping[str, list[int]], *, form: Form, dtype: str
) -> Common:
    """Return what states with personal values of ``shapes``, by name, have in common over ``checkpoint``."""
    masks = {name: hashlib.sha256(bits.numpy().data).hexdigest() for name, bits in checkpoint.masks.items()}
    others = hashlib.sha256()
    for name in sorted(checkpoint.contents.trained):
        if name not in shapes and name.rpartition(".")[2].removeprefix("pst_") not in SCORE_FACTORS:
            others.update(name.encode())
            others.update(checkpoint.trained[name].contiguous().numpy().data)
    return Common(
        form=form,
        task=run.task,
        labels=checkpoint.state.labels,
        base_path=checkpoint.state.base_path,
        base_fingerprint=checkpoint.state.base_fingerprint,
        masks_sha256=masks,
        shared_sha256=others.hexdigest(),
        beta=run.pst.beta,
        dtype="bf16" if dtype == "bf16" else "fp32",
        shapes=dict(shapes),
    )
