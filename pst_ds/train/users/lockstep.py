"""Train a user on every rank at a time, in lockstep over one base that ZeRO-3 has split.

The updates beside the layers are each rank's own: DeepSpeed knows nothing of them, and nothing of theirs is summed over
ranks. What ranks do together is gather the weights of the base, so all take as many steps as the user with most; who is
through repeats its last batch and forgets the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from pst_ds.config.run import RunConfig
from pst_ds.data.by_user import RowsByUser
from pst_ds.data.tasks import ExampleSet
from pst_ds.parallel.ranks import all_gather_objects, raise_on_all_ranks, rank, world_size
from pst_ds.parallel.watchdog import heartbeat
from pst_ds.train.loop import learning_rate_factor, seed_random_numbers
from pst_ds.train.objective import Objective
from pst_ds.train.run import Prepared
from pst_ds.train.users.personal import PersonalModel
from pst_ds.train.users.trained import Trained, with_batches_for


@dataclass(frozen=True, slots=True)
class _Own:
    """What this rank trains in a round."""

    run: RunConfig
    examples: ExampleSet
    num_steps: int


def rounds(names: Sequence[str], rows: RowsByUser) -> list[list[str]]:
    """Return who is trained at a time, as many as there are ranks: users with about as many rows."""
    ordered = sorted(names, key=lambda name: (-rows.count(name), name))
    return [ordered[i : i + world_size()] for i in range(0, len(ordered), world_size())]


def train_round(model: PersonalModel, prepared: Prepared, rows: RowsByUser, names: Sequence[str]) -> dict[str, Trained]:
    """Train the users ``names``, one a rank, and return what came of each; on every rank. A rank without one helps.

    A user has the values that it has alone on one process, up to the rounding of products. One whose loss is not finite
    is left out. Collective. Raises ConfigError.
    """
    own = raise_on_all_ranks(partial(_own, prepared, rows, names[min(rank(), len(names) - 1)]))
    model.activate(None)
    most = max(all_gather_objects(own.num_steps))
    loss, trains = math.nan, rank() < len(names)
    batches = _batches(prepared, own)
    batch = next(batches)
    for step in range(most):
        heartbeat(f"step {step + 1} of a round of users")
        is_own = trains and step < own.num_steps
        for group in model.engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_factor(
                min(step, own.num_steps), own.num_steps, own.run.train.learning_rate_warmup_fraction
            )
        seed_random_numbers(own.run.seed, step, of_rank=0)
        found = Objective(own.run)(model.engine, batch)
        model.engine.backward(found)
        if not is_own:
            model.engine.optimizer.zero_grad()
            continue
        loss = float(found.detach())
        model.engine.step()
        batch = next(batches)
    done = Trained(model.state(), len(own.examples), own.num_steps, loss, 0) if trains else None
    found_by = zip(names, all_gather_objects(done), strict=False)
    return {name: one for name, one in found_by if one is not None and math.isfinite(one.loss)}


def _own(prepared: Prepared, rows: RowsByUser, name: str) -> _Own:
    examples = rows.load(prepared.task, name, prepared.tokenizer, prepared.labels)
    run = with_batches_for(prepared.run, len(examples), name, ranks=1)
    return _Own(run, examples, run.num_steps(len(examples)))


def _batches(prepared: Prepared, own: _Own) -> Iterator[dict[str, Tensor]]:
    """Yield the inputs of each step of one user, as one process has them."""
    task, data = prepared.task, own.run.data
    order = task.batches(own.examples, own.run.train.batch_size, own.run.seed, group_by_length=data.group_by_length)
    for indices in order.after(0):
        inputs = task.collate(own.examples, indices, prepared.tokenizer)
        yield {name: values.to(prepared.device) for name, values in inputs.items()}
