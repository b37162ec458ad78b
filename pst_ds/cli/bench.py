"""``pst-ds bench DIR``: measure the speed and size of a model, dense and sparse."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_ds.cli.flags import flags_of_fields
from pst_ds.cli.main import add_quiet_argument, count
from pst_ds.errors import InputError
from pst_ds.text_table import aligned

if TYPE_CHECKING:
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
    import torch

    from pst_ds.hf.model_folder import open_model_folder
    from pst_ds.inference.bench import NativeLoop, conditions, divergences, measure, variants

    folder = open_model_folder(args.model)
    positions = getattr(folder.config.get_text_config(), "max_position_embeddings", None)
    new_tokens = args.new_tokens if folder.is_causal else 0
    if isinstance(positions, int):
        positions -= folder.extra_tokens
    if isinstance(positions, int) and args.prompt_tokens + new_tokens > positions:
        what = f"--prompt-tokens and --new-tokens come to {args.prompt_tokens + new_tokens}"
        raise InputError(f"{args.model} has {positions} positions, and {what}. Lower them")
    by_name: dict[str, Variant | NativeLoop] = {**variants(folder, args.dtype)}
    if loop := NativeLoop.of(folder, args.prompt_tokens + new_tokens, max(args.batch)):
        by_name["native loop"] = loop
    kl = divergences(by_name, folder, _text(args, folder.is_causal), args) if args.reference else {}
    threads_before, rows = torch.get_num_threads(), []
    try:
        for threads in args.threads or [threads_before]:
            torch.set_num_threads(threads)
            for batch in args.batch:
                rows += _rows(measure(by_name, folder, batch, args), by_name, {"threads": threads, "batch": batch})
        for row in rows:
            row.update(kl.get(str(row["variant"]), {}))
    finally:
        torch.set_num_threads(threads_before)
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


def _text(args: argparse.Namespace, is_causal: bool) -> str:
    if not is_causal:
        raise InputError(f"--reference {args.reference}: {args.model} predicts no tokens. Use eval or verify")
    try:
        return Path(args.text or "").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {args.text} cannot be read: {error}. --reference needs a UTF-8 file") from None


def _rows(
    measured: dict[str, dict[str, float]], by_name: "Mapping[str, Variant | NativeLoop]", at: dict[str, int]
) -> list[Row]:
    """Return one row per variant, with its rates relative to the dense one."""
    rows: list[Row] = []
    for name, variant in by_name.items():
        row: Row = {"variant": name, **at, **measured[name], **variant.facts()}
        for stage in ("prefill", "decode"):
            rate = f"{stage}_tokens_per_second"
            if rate in measured[name]:
                row[f"{stage}_over_dense"] = measured[name][rate] / measured["dense"][rate]
        rows.append(row)
    return rows


def bench_text(result: dict[str, Any]) -> str:
    """Format the conditions, and one line for each row, in the columns that any row has a value for."""
    conditions, rows = result["conditions"], result["rows"]
    what = f"{result['prompt_tokens']} tokens in" + (f", {result['new_tokens']} out" if result["causal"] else "")
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    cells = [[_cell(row.get(key), key, form) for key, _, form in columns] for row in rows]
    lines = [
        f"{result['model']}: {what}, {conditions['dtype']}, medians of {conditions['repeats']} in turn",
        f"{conditions['hardware']}; sparse kernel: {conditions['sparse_kernel']}; "
        f"torch {conditions['versions']['torch']}",
    ]
    return "\n".join([*lines, *aligned([[heading for _, heading, _ in columns], *cells])])


def _cell(value: str | float | None, key: str, form: str) -> str:
    if value is None:
        return "-"
    return f"{float(value) / 1e6:.1f}" if key.endswith("_bytes") else form.format(value)


def _counts(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]
