"""``pst-ds users ACTION``: personal adapters over one sparse base: train, evaluate, list, export and remove them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pst_ds.cli.flags import flags_of_fields, in_flags
from pst_ds.cli.main import add_quiet_argument, add_run_arguments, count, load_run_or_folder
from pst_ds.errors import InputError
from pst_ds.parallel import stop_signals
from pst_ds.progress import is_first_rank
from pst_ds.storage_format import folder_formats
from pst_ds.text_table import aligned, bytes_text

if TYPE_CHECKING:
    from pst_ds.checkpoint.format import Checkpoint
    from pst_ds.checkpoint.user_store import UserStore
    from pst_ds.config.run import RunConfig
    from pst_ds.train.run import RunContext
    from pst_ds.train.users.evaluate import UserScores
    from pst_ds.train.users.personal import PersonalPart
    from pst_ds.writing.manifest import Facts

FLAGS = {
    "names": "--users",
    **flags_of_fields(["min_rows", "again", "form", "layers", "rank", "checkpoint", "out", "format"]),
}
"""Flags of the fields of :class:`Choice`, :class:`PersonalPart`, :func:`train_users` and :func:`export_run`."""
_SHOWN = 20
"""Users that a table has; --json has all."""
_NAME_WIDTH = 40
"""Characters of a user's name that a table has."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    subs: dict[str, argparse.ArgumentParser] = {}
    json_help = "end with one JSON object on the last line of stdout"
    for name, action in ACTIONS.items():
        sub = actions.add_parser(name, help=action.summary, description=action.summary)
        # every verb has the option itself; a default here would overwrite it if it is given before the action
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=json_help)
        subs[name] = sub
    for sub in (subs["train"], subs["eval"], subs["export"]):
        add_run_arguments(sub, "folder of a finished run, or its run file")
        sub.add_argument("--checkpoint", default="best", help='"best" (default), "final", or another in checkpoints/')
        sub.add_argument("--store", required=True, metavar="DIR", help="folder of the users' adapters")
    # these need no run, so the store is all that they are about
    for sub in (subs["list"], subs["remove"]):
        sub.add_argument("store", metavar="DIR", help="the store")
    for sub in (subs["train"], subs["eval"]):
        sub.add_argument("--by", required=True, metavar="COLUMN", help="the column that names the user of each row")
        sub.add_argument("--users", nargs="+", default=[], metavar="NAME", help="only these users (default: all)")
        sub.add_argument("--data", metavar="FILE", help="rows of the users (default: the run's data)")
        add_quiet_argument(sub)
    _add_training_arguments(subs["train"])
    add = subs["eval"].add_argument
    add("--split", choices=("train", "validation", "test"), default="test", help="(default: test)")
    add("--others", type=count, default=1, metavar="N", help="mean over the adapters of N other users (default: 1)")
    add = subs["export"].add_argument
    add("--user", required=True, metavar="NAME", help="user whose model is written")
    add("--out", required=True, help="folder to write")
    add("--format", choices=folder_formats(), default="dense", help="(default: dense)")
    add("--dtype", choices=("bf16", "fp32"), help="cast every tensor (default: unchanged)")
    subs["remove"].add_argument("--user", required=True, nargs="+", metavar="NAME", help="users to remove")


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--min-rows", type=count, default=1, metavar="N", help="of a user that is trained (default: 1)")
    add("--limit", type=count, metavar="N", help="train the N users with most rows")
    add("--again", action="store_true", help="train users again that the store has already")
    form = 'U and V in the layers ("masked", default), or next to them, so that users share a batch ("beside")'
    add("--form", choices=("masked", "beside"), default="masked", help=form)
    add("--layers", nargs="+", default=[], metavar="NAME", help="layers, or endings (default: all)")
    add("--rank", type=count, metavar="R", help="of updates beside layers (default: the run's)")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the adapters (default: bf16)")
    add("--epochs", type=float, default=8.0, metavar="E", help="epochs over a user's rows (default: 8)")
    add("--batch-size", type=count, default=8, metavar="B", help="most rows of a step (default: 8)")
    rate = "of U and V (default: 0.4 of the run's, with a head 0.2)"
    add("--learning-rate", type=float, metavar="LR", help=rate)
    add("--head-learning-rate", type=float, metavar="LR", help="of the head (default: the run's)")


def run(args: argparse.Namespace) -> Facts:
    return ACTIONS[args.action].run(args)


def _train(args: argparse.Namespace) -> Facts:
    # before the slow imports and the model: a scheduler may send its signal at any time
    stop_signals.install()
    config = load_run_or_folder(args)
    from pst_ds.train.users.personal import PersonalPart
    from pst_ds.train.users.train import Choice, UserTraining, run_of_users, train_users

    # NaN is neither, and infinite epochs would never end
    if not 0 < args.epochs < math.inf:
        raise InputError(f"--epochs {args.epochs} is not a number above 0")
    how = UserTraining(
        epochs=args.epochs,
        batch_size=args.batch_size,
        update_learning_rate=args.learning_rate,
        head_learning_rate=args.head_learning_rate,
    )
    part = PersonalPart(form=args.form, layers=tuple(args.layers), rank=args.rank or 0, dtype=args.dtype)
    data = {"train": args.data} if args.data else {}
    context, checkpoint = _opened(run_of_users(config, how, **data), args)
    choice = Choice(names=tuple(args.users), min_rows=args.min_rows, limit=args.limit or 0)
    outcome = train_users(
        context,
        checkpoint,
        folder=Path(args.store),
        column=args.by,
        part=part,
        choice=choice,
        how=how,
        again=args.again,
        say=lambda text: _say(in_flags(text, FLAGS)),
    )
    facts: Facts = dict(outcome)
    diverged = facts["diverged"]
    if diverged:
        # the others are stored and usable, but a script should notice
        facts["exit_code"] = 1
    _say(_sentence_on_training(facts, args.store))
    return facts


def _sentence_on_training(facts: Facts, store: str) -> str:
    """Return the outcome of :func:`train_users` in one sentence."""
    text = f"trained {facts['trained']} of {facts['users']} users into {store}"
    text += f", {bytes_text(facts['state_bytes'])} each"
    if facts["with_few_rows"]:
        text += f", {facts['with_few_rows']} left out with fewer rows than --min-rows"
    diverged = facts["diverged"]
    if diverged:
        text += f", {len(diverged)} diverged: {', '.join(diverged[:4])}"
    return text


def _eval(args: argparse.Namespace) -> Facts:
    config = load_run_or_folder(args)
    from pst_ds.checkpoint.user_store import UserStore
    from pst_ds.data.by_user import read_by_user
    from pst_ds.parallel.ranks import raise_on_all_ranks
    from pst_ds.train.users.evaluate import evaluate_users, metric_of, summary
    from pst_ds.train.users.personal import PersonalModel
    from pst_ds.train.users.train import UserTraining, run_of_users

    data = {args.split: args.data} if args.data else {}
    # the settings of a training change nothing here: only its run is needed, in which rows have users
    context, checkpoint = _opened(run_of_users(config, UserTraining(), **data), args)
    # if one rank cannot read what all read, all stop, instead of waiting for it in their next collective
    store = raise_on_all_ranks(lambda: UserStore(Path(args.store)))
    rows = raise_on_all_ranks(lambda: read_by_user(context.run.data, args.split, args.by))
    users = raise_on_all_ranks(lambda: _users_to_score(args, store, set(rows.places)))
    model = PersonalModel(context, checkpoint, part_of(store))
    raise_on_all_ranks(lambda: store.require_common(model.common))
    scores = evaluate_users(model, store, rows, users, others=args.others)
    facts = {"metric": metric_of(context), **summary(scores, lower_is_better=context.task.lower_is_better)}
    lines = _table_of_scores(scores)
    lines.append(_sentence_on_scores(facts))
    _say("\n".join(lines))
    return {**facts, "scores": [score.as_table() for score in scores]}


def _table_of_scores(scores: Sequence[UserScores]) -> list[str]:
    """Return the first scores as lines of a table."""
    table = [["user", "rows", "shared", "own", "another's"]]
    for score in scores[:_SHOWN]:
        values = [f"{value:.4f}" for value in (score.shared, score.own, score.other)]
        table.append([score.user[:_NAME_WIDTH], str(score.rows), *values])
    lines = aligned(table)
    if len(scores) > _SHOWN:
        lines.append(f"and {len(scores) - _SHOWN} more")
    return lines


def _sentence_on_scores(facts: Facts) -> str:
    """Return the means over users, and what they gain by their own adapters, in one sentence."""
    parts = [f"{facts['metric']} of {facts['users']} users: shared {facts['shared']:.4f}, own {facts['own']:.4f}"]
    for name, word in (("shared", "the shared"), ("other", "another's")):
        gain = facts[f"gain_over_{name}"]
        # a store with one user has no other adapter to compare with
        if math.isnan(gain):
            continue
        error = facts[f"gain_over_{name}_standard_error"]
        share = facts[f"share_better_than_{name}"]
        parts.append(f"own better than {word} by {gain:+.4f} (s.e. {error:.4f}), for {share:.0%} of users")
    return "; ".join(parts)


def _list(args: argparse.Namespace) -> Facts:
    from pst_ds.checkpoint.user_store import UserStore

    store = UserStore(Path(args.store))
    table = [["user", "rows", "steps", "loss", "state"]]
    users: Facts = {}
    total = 0
    for name in store.names:
        entry = store.entry(name)
        users[name] = {"rows": entry.rows, "steps": entry.steps, "loss": entry.loss, "bytes": entry.bytes}
        numbers = [str(entry.rows), str(entry.steps), f"{entry.loss:.4f}"]
        table.append([name[:_NAME_WIDTH], *numbers, bytes_text(entry.bytes)])
        total += entry.bytes
    # a store may have thousands of users, and JSON has all of them anyway
    if not args.json:
        print("\n".join(aligned(table)))
    common = store.common
    print(f"{len(store)} users, {bytes_text(total)}, {common.form} over {common.base_path}")
    return {"store": args.store, "form": common.form, "base": common.base_path, "bytes": total, "users": users}


def _export(args: argparse.Namespace) -> Facts:
    config = load_run_or_folder(args)
    from pst_ds.checkpoint.user_store import UserStore
    from pst_ds.export.export_run import ExportSettings, export_run, require_run_fits
    from pst_ds.train.run_folder import open_checkpoint
    from pst_ds.train.users.personal import user_checkpoint

    settings = ExportSettings(format=args.format, dtype=args.dtype)
    # before the checkpoint and the store are read, which takes longer
    require_run_fits(config, args.out, settings)
    checkpoint = open_checkpoint(config, args.checkpoint)
    checkpoint_of_user = user_checkpoint(checkpoint, config, UserStore(Path(args.store)), args.user)
    written = export_run(config, args.out, settings, checkpoint=checkpoint_of_user)
    print(
        f"wrote {args.out} of {args.user}: sparsity {written['sparsity_measured']:.6f} measured, as the base; "
        f"{bytes_text(written['file_bytes'])}"
    )
    return {**written, "user": args.user, "out": args.out}


def _remove(args: argparse.Namespace) -> Facts:
    from pst_ds.checkpoint.user_store import UserStore

    store = UserStore(Path(args.store))
    names = list(dict.fromkeys(args.user))
    # a misspelt name is refused before any adapter is deleted
    for name in names:
        store.entry(name)
    for name in names:
        store.remove(name)
    print(f"removed {', '.join(names)}; {len(store)} users stay in {args.store}")
    return {"store": args.store, "removed": names, "users": len(store)}


def _opened(config: RunConfig, args: argparse.Namespace) -> tuple[RunContext, Checkpoint]:
    """Prepare the run and open its checkpoint. Collective: joins the ranks of a launcher. Raises InputError."""
    from pst_ds.parallel.launch import launch_environment
    from pst_ds.train.run import prepare
    from pst_ds.train.run_folder import open_checkpoint

    checkpoint = open_checkpoint(config, args.checkpoint)
    # the classes of the checkpoint, since the rows of --data may have some of them only
    context = prepare(config, launch_environment(), run_file=args.run, labels=checkpoint.state.labels)
    return context, checkpoint


def part_of(store: UserStore) -> PersonalPart:
    """Return the personal part of a model, from the index of a store, so that eval needs no options for it."""
    from pst_ds.nn.personal_updates import LEFT
    from pst_ds.train.users.personal import UPDATES, PersonalPart

    common = store.common
    layers: list[str] = []
    ranks: list[int] = []
    for name, shape in common.shapes.items():
        layer, _, parameter = name.rpartition(".")
        # others belong to a head
        if parameter not in UPDATES:
            continue
        if layer not in layers:
            layers.append(layer)
        if parameter == LEFT:
            ranks.append(shape[1])  # (outputs, rank)
    # 0: in the layers, U and V have the run's rank. Next to them, all layers have one rank
    rank = ranks[0] if ranks else 0
    return PersonalPart(form=common.form, layers=tuple(layers), rank=rank, dtype=common.dtype)


def _users_to_score(args: argparse.Namespace, store: UserStore, with_rows: set[str]) -> list[str]:
    """Return the users of the store that have rows, or those of ``--users``. Raises InputError."""
    for name in args.users:
        store.entry(name)
        if name not in with_rows:
            raise InputError(f"--users {name!r}: no row of the {args.split} split is of that user")
    # a name given twice would count twice in the means
    users = list(dict.fromkeys(args.users))
    if not users:
        users = [name for name in store.names if name in with_rows]
    if not users:
        raise InputError(f"no row of the {args.split} split has a user of {args.store} in column {args.by!r}")
    return users


def _say(text: str) -> None:
    """Print from one of the ranks, which all have the same result."""
    if is_first_rank():
        print(text)


class Action(NamedTuple):
    """What follows ``pst-ds users``."""

    summary: str
    """Line of the help."""
    run: Callable[[argparse.Namespace], Facts]


ACTIONS = {
    "train": Action("train an adapter for each user of a column, over a finished run", _train),
    "eval": Action("compare each user's adapter with the shared model, and with others' adapters", _eval),
    "list": Action("list the users of a store", _list),
    "export": Action("write a user's own model, as sparse as the base: dense or packed", _export),
    "remove": Action("delete the adapters of users", _remove),
}
