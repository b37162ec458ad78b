"""``pst-ds prepare SRC ... --tokenizer DIR --out DIR``: tokenise a corpus once, into a token store."""

import argparse
import os
import sys
import time
from pathlib import Path

from pst_ds.cli.flags import flags_of_fields
from pst_ds.cli.main import add_quiet_argument, count
from pst_ds.errors import InputError

FLAGS = {"Reading.column": "--text-column", **flags_of_fields(["out", "force"])}
"""Flags for the settings that messages of this verb name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("sources", nargs="+", metavar="SRC", help="text, JSONL, CSV, Parquet: files, folders, URLs, hub datasets")
    add("--tokenizer", required=True, metavar="DIR", help="folder or hub name of a model or tokenizer")
    add("--out", required=True, metavar="DIR", help="store to write, or to resume")
    add("--workers", type=count, metavar="N", help="processes (default: the cores of this machine, at most 64)")
    add("--kind", choices=("text", "chat"), default="text", help="content of a row (default: text)")
    add("--text-column", metavar="C", help='column of the text or messages (default: "text" or "messages")')
    add("--chat-template", metavar="FILE", help="Jinja file that formats conversations (default: the tokenizer's)")
    units = ("line", "paragraph", "document")
    add("--sample-by", choices=units, default="line", help="document in a plain text file (default: line)")
    add("--split", default="train", metavar="S", help="split of a dataset on the hub (default: train)")
    add("--subset", default="", metavar="S", help="configuration of a dataset on the hub")
    add("--revision", default="", metavar="R", help="branch, tag or commit of a dataset on the hub")
    add("--count-bytes", action="store_true", help="count the bytes of text of each token, for perplexity per byte")
    add("--shard-bytes", type=count, default=64 << 20, metavar="B", help="input bytes per shard (default: 64 MiB)")
    add("--force", action="store_true", help="replace an existing or incomplete store")
    add_quiet_argument(parser)


def run(args: argparse.Namespace) -> dict[str, object]:
    from pst_ds.data.conversations import read_template
    from pst_ds.data.plain_text import is_wrapped
    from pst_ds.data.preparation.pieces import Reading
    from pst_ds.data.preparation.prepare import plan_store, prepare_store
    from pst_ds.data.tokens.tokenize import open_tokenizer

    start = time.perf_counter()
    is_chat = args.kind == "chat"
    # perplexity per byte is for whole texts: of a conversation the loss counts some tokens only
    if is_chat and args.count_bytes:
        raise InputError("--count-bytes is for text: in conversations only a part is learnt. Omit it")
    tokenizer = open_tokenizer(args.tokenizer, f"--tokenizer {args.tokenizer}", "Name the language model's folder")
    if args.chat_template:
        tokenizer.chat_template = read_template(args.chat_template, "--chat-template")
    usual_column = "messages" if is_chat else "text"
    reading = Reading(
        column=args.text_column or usual_column,
        kind=args.kind,
        sample_by=args.sample_by,
        split=args.split,
        subset=args.subset,
        revision=args.revision,
    )
    # all sources are found before any is tokenised, so that a misspelt one is refused first
    plan = plan_store(args.sources, tokenizer, reading, count_bytes=args.count_bytes, piece_bytes=args.shard_bytes)
    if args.sample_by == "line":
        # one note is enough for a folder of books
        wrapped = next(filter(is_wrapped, plan.plain_files), None)
        if wrapped is not None:
            print(
                f"note: {wrapped}: its lines are parts of longer texts, and each becomes a document; --sample-by "
                "document keeps them together",
                file=sys.stderr,
            )
    # the cores that this process may use: a container or a Slurm job may have fewer than the machine
    workers = args.workers or min(64, len(os.sched_getaffinity(0)))
    manifest = prepare_store(plan, tokenizer, Path(args.out), num_workers=workers, force=args.force)
    seconds = time.perf_counter() - start
    counts = manifest.counts
    print(
        f"wrote {args.out}: {counts['tokens']:,} tokens of {counts['documents']:,} documents, "
        f"{counts['text_bytes']:,} bytes of text, in {len(manifest.shards)} shards; {seconds:.1f} s"
    )
    facts = {"shards": len(manifest.shards), "dtype": manifest.tokenizer.dtype.name, "digest": manifest.digest}
    return {"out": args.out, **counts, **facts, "seconds": seconds}
