"""``pst-ds prepare SRC ... --tokenizer DIR --out DIR``: tokenise a corpus once, into a token store."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pst_ds.cli.main import add_quiet_argument, count
from pst_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = "text, JSONL, CSV or Parquet, also compressed: files, folders, patterns, URLs, datasets on the hub"
    parser.add_argument("sources", nargs="+", metavar="SRC", help=sources)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder or hub name of a model or tokenizer")
    parser.add_argument("--out", required=True, metavar="DIR", help="store to write, or to resume")
    workers = "processes (default: the cores of this machine, at most 64); the store's bytes do not depend on it"
    parser.add_argument("--workers", type=count, metavar="N", help=workers)
    kind = "content of a row: text, or a conversation, of which the assistant's turns are learnt (default: text)"
    parser.add_argument("--kind", choices=("text", "chat"), default="text", help=kind)
    column = 'column that has the text, or a list of messages (default: "text", for conversations "messages")'
    parser.add_argument("--text-column", metavar="C", help=column)
    template = "Jinja file that formats conversations (default: the tokenizer's template)"
    parser.add_argument("--chat-template", metavar="FILE", help=template)
    sample_by = (
        "document in a plain text file: line, paragraph (up to an empty line), or the whole document (default: line)"
    )
    parser.add_argument("--sample-by", choices=("line", "paragraph", "document"), default="line", help=sample_by)
    parser.add_argument("--split", default="train", metavar="S", help="split of a dataset on the hub (default: train)")
    parser.add_argument("--subset", default="", metavar="S", help="configuration of a dataset on the hub")
    parser.add_argument("--revision", default="", metavar="R", help="branch, tag or commit of a dataset on the hub")
    bytes_help = "count the bytes of text behind each token, for perplexity per byte of a validation set"
    parser.add_argument("--count-bytes", action="store_true", help=bytes_help)
    shard = "input bytes per shard, if the file can be split (default: 64 MiB)"
    parser.add_argument("--shard-bytes", type=count, default=64 << 20, metavar="B", help=shard)
    force = "replace an existing or incomplete store"
    parser.add_argument("--force", action="store_true", help=force)
    add_quiet_argument(parser)


def run(args: argparse.Namespace) -> dict[str, object]:
    from pst_ds.data.conversations import read_template
    from pst_ds.data.plain_text import is_wrapped
    from pst_ds.data.preparation.pieces import Reading
    from pst_ds.data.preparation.prepare import plan_store, prepare_store

    start = time.perf_counter()
    is_chat = args.kind == "chat"
    if is_chat and args.count_bytes:
        raise InputError("--count-bytes is for text: in conversations only a part is learnt. Omit it")
    tokenizer = _tokenizer(args.tokenizer)
    if args.chat_template:
        tokenizer.chat_template = read_template(args.chat_template, "--chat-template")
    column = args.text_column or ("messages" if is_chat else "text")
    reading = Reading(
        column=column,
        kind=args.kind,
        sample_by=args.sample_by,
        split=args.split,
        subset=args.subset,
        revision=args.revision,
    )
    plan = plan_store(args.sources, tokenizer, reading, count_bytes=args.count_bytes, piece_bytes=args.shard_bytes)
    if args.sample_by == "line" and (path := next(filter(is_wrapped, plan.plain_files), None)):
        fix = "--sample-by document keeps them together"
        print(f"note: {path}: its lines are parts of longer texts, and each becomes a document; {fix}", file=sys.stderr)
    workers = args.workers or min(64, len(os.sched_getaffinity(0)))
    manifest = prepare_store(plan, tokenizer, Path(args.out), num_workers=workers, force=args.force)
    seconds, counts = time.perf_counter() - start, manifest.counts
    print(
        f"wrote {args.out}: {counts['tokens']:,} tokens of {counts['documents']:,} documents, "
        f"{counts['text_bytes']:,} bytes of text, in {len(manifest.shards)} shards; {seconds:.1f} s"
    )
    facts = {"shards": len(manifest.shards), "dtype": manifest.tokenizer.dtype.name, "digest": manifest.digest}
    return {"out": args.out, **counts, **facts, "seconds": seconds}


def _tokenizer(where: str) -> PreTrainedTokenizerBase:
    from pst_ds.data.tokens.tokenize import open_tokenizer

    return open_tokenizer(where, f"--tokenizer {where}", "Name the language model's folder")
