"""``pst-ds bench DIR``: measure the speed and size of a model, dense and sparse."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_ds.cli.flags import flags_of_fields
from pst_ds.cli.main import add_quiet_argument, count
from pst_ds.errors import InputError
from pst_ds.text_table import aligned

if TYPE_CHECKING:
    from pst_ds.hf.model_folder import ModelFolder
    from pst_ds.inference.bench import NativeLoop, Variant

COLUMNS = (
    ("variant", "variant", "{}"),
    ("threads", "threads", "{}"),
    ("batch", "batch", "{}"),
    ("prefill_tokens_per_second", "prefill tok/s", "{:.1f}"),
    ("decode_tokens_per_second", "decode tok/s", "{:.1f}"),
    ("decode_over_dense", "/dense", "{:.2f}"),
    ("prefill_over_dense", "prefill /dense", "{:.2f}"),
    ("kl_mean", "KL", "{:.3g}"),
    ("kl_p99", "KL 99 %", "{:.3g}"),
    ("same_top", "same token", "{:.2%}"),
    ("resident_bytes", "resident MB", "{}"),
    ("file_bytes", "file MB", "{}"),
)
"""Key in a row, heading and format of each column."""
Row = dict[str, str | float | None]
"""Results of a variant at a number of threads and a batch size, by the keys of :data:`COLUMNS` and others."""
FLAGS = flags_of_fields(["reference", "text", "prompt_tokens"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pst-ds bench``."""
    add = parser.add_argument
    add("model", metavar="DIR", help="folder packed by pst-ds export")
    add("--batch", type=_counts, default=[1], metavar="N,...", help="sequences per batch (default: 1)")
    add("--prompt-tokens", type=count, default=128, metavar="N", help="(default: 128)")
    add("--new-tokens", type=count, default=32, metavar="N", help="(default: 32)")
    add("--threads", type=_counts, metavar="N,...", help="torch threads (default: OMP_NUM_THREADS)")
    add("--repeats", type=count, default=3, metavar="N", help="interleaved repeats (default: 3)")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="of every model (default: bf16)")
    add("--reference", metavar="DIR", help="also measure the KL divergence from this language model")
    add("--text", metavar="FILE", help="UTF-8 text for --reference")
    add_quiet_argument(parser)


def run(args: argparse.Namespace) -> dict[str, object]:
    """Measure every variant of a model, print a table and return its rows. Raises InputError."""
    # imported here, because transformers takes seconds to import, and --help must not wait for it
    from pst_ds.hf.model_folder import open_model_folder
    from pst_ds.inference.bench import NativeLoop, conditions, divergences, variants

    folder = open_model_folder(args.model)
    # other models have a forward pass only
    new_tokens = args.new_tokens if folder.is_causal else 0
    _require_positions(folder, args, new_tokens)
    by_name: dict[str, Variant | NativeLoop] = {**variants(folder, args.dtype)}
    loop = NativeLoop.of(folder, positions=args.prompt_tokens + new_tokens, sequences=max(args.batch))
    if loop is not None:
        by_name["native loop"] = loop
    # before the speeds, so that a wrong --reference or --text is reported at once
    kl: dict[str, dict[str, float]] = {}
    if args.reference:
        kl = divergences(by_name, folder, _text(args, folder.is_causal), args)
    rows = _measured(by_name, folder, args)
    for row in rows:
        row.update(kl.get(str(row["variant"]), {}))
    measured = {"dtype": args.dtype, "repeats": args.repeats, "clock": "wall, medians, in turn"}
    result = {
        "model": args.model,
        "causal": folder.is_causal,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": new_tokens,
        "conditions": conditions() | measured,
        "rows": rows,
    }
    print(bench_text(result))
    return result


def _require_positions(folder: "ModelFolder", args: argparse.Namespace, new_tokens: int) -> None:
    """Raise InputError if the prompt and ``new_tokens`` need more positions than the model has."""
    positions = getattr(folder.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int):
        # models with relative positions have no limit
        return
    # a trained prompt, which the model puts before other tokens
    positions -= folder.extra_tokens
    needed = args.prompt_tokens + new_tokens
    if needed > positions:
        raise InputError(
            f"{args.model} has {positions} positions, and --prompt-tokens and --new-tokens come to {needed}. Lower them"
        )


def _measured(
    by_name: "Mapping[str, Variant | NativeLoop]", folder: "ModelFolder", args: argparse.Namespace
) -> list[Row]:
    """Measure every variant with every number of threads and batch size. Leaves torch's number of threads unchanged."""
    import torch

    from pst_ds.inference.bench import measure

    threads_before = torch.get_num_threads()
    rows: list[Row] = []
    try:
        for threads in args.threads or [threads_before]:
            torch.set_num_threads(threads)
            for batch in args.batch:
                rates = measure(by_name, folder, batch, args)
                rows += _rows(rates, by_name, {"threads": threads, "batch": batch})
    finally:
        # tests and callers in Python share the process
        torch.set_num_threads(threads_before)
    return rows


def _text(args: argparse.Namespace, is_causal: bool) -> str:
    """Return the text on which predictions are compared. Raises InputError if there is none, or nothing to compare."""
    if not is_causal:
        raise InputError(f"--reference {args.reference}: {args.model} predicts no tokens. Use eval or verify")
    try:
        # without --text this is the current folder, which cannot be read either
        return Path(args.text or "").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {args.text} cannot be read: {error}. --reference needs a UTF-8 file") from None


def _rows(
    rates: Mapping[str, Mapping[str, float]], by_name: "Mapping[str, Variant | NativeLoop]", settings: Mapping[str, int]
) -> list[Row]:
    """Return one row per variant, with its rates relative to the dense one.

    ``rates``: of each variant, as :func:`pst_ds.inference.bench.measure` returns them; ``settings``: threads and batch.
    """
    dense = rates["dense"]
    rows: list[Row] = []
    for name, variant in by_name.items():
        row: Row = {"variant": name, **settings, **rates[name], **variant.facts()}
        for stage in ("prefill", "decode"):
            key = f"{stage}_tokens_per_second"
            # only a causal model decodes
            if key in rates[name]:
                row[f"{stage}_over_dense"] = rates[name][key] / dense[key]
        rows.append(row)
    return rows


def bench_text(result: Mapping[str, Any]) -> str:
    """Format the conditions, and one line for each row, in the columns that any row has a value for."""
    conditions = result["conditions"]
    tokens = f"{result['prompt_tokens']} tokens in"
    if result["causal"]:
        tokens += f", {result['new_tokens']} out"
    lines = [
        f"{result['model']}: {tokens}, {conditions['dtype']}, medians of {conditions['repeats']} in turn",
        f"{conditions['hardware']}; sparse kernel: {conditions['sparse_kernel']}; "
        f"torch {conditions['versions']['torch']}",
    ]
    return "\n".join([*lines, *_table(result["rows"])])


def _table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the table, without the columns in which no row has a value."""
    headings: list[str] = []
    table: list[list[str]] = [[] for _ in rows]
    for key, heading, form in COLUMNS:
        values = [row.get(key) for row in rows]
        if all(value is None for value in values):
            continue
        headings.append(heading)
        for cells, value in zip(table, values, strict=True):
            cells.append(_cell(value, key, form))
    return aligned([headings, *table])


def _cell(value: str | float | None, key: str, form: str) -> str:
    """Format a value of the column ``key``; "-" if the row lacks it."""
    if value is None:
        return "-"
    # the headings of sizes say MB
    if key.endswith("_bytes"):
        return f"{float(value) / 1e6:.1f}"
    return form.format(value)


def _counts(text: str) -> list[int]:
    """Parse "1,8" for argparse."""
    return [count(part) for part in text.split(",")]
