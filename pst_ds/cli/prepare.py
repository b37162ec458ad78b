"""``pst-ds prepare SRC ... --tokenizer DIR --out DIR``: tokenise texts once, into a store that runs map into memory."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pst_ds.cli.main import add_quiet_argument, count
from pst_ds.data.tokens.identity import open_tokenizer
from pst_ds.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = "text, JSONL, CSV or Parquet, also compressed: files, folders, patterns, URLs, data sets of the hub"
    parser.add_argument("sources", nargs="+", metavar="SRC", help=sources)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="folder or hub name of a model or tokenizer")
    parser.add_argument("--out", required=True, metavar="DIR", help="store to write; a killed call goes on there")
    workers = "processes (default: the cores of this machine, at most 64); the store's bytes do not depend on it"
    parser.add_argument("--workers", type=count, metavar="N", help=workers)
    kind = "what rows are: texts, or conversations, of which the assistant's part is learnt (default: text)"
    parser.add_argument("--kind", choices=("text", "chat"), default="text", help=kind)
    column = 'column that has the text, or a list of messages (default: "text", for conversations "messages")'
    parser.add_argument("--text-column", metavar="C", help=column)
    template = "Jinja file by which conversations are written (default: the tokenizer's template)"
    parser.add_argument("--chat-template", metavar="FILE", help=template)
    sample_by = "a document of a plain text: line, paragraph (up to an empty line) or document, all (default: line)"
    parser.add_argument("--sample-by", choices=("line", "paragraph", "document"), default="line", help=sample_by)
    parser.add_argument("--split", default="train", metavar="S", help="split of a data set of the hub (default: train)")
    parser.add_argument("--subset", default="", metavar="S", help="configuration of a data set of the hub")
    parser.add_argument("--revision", default="", metavar="R", help="branch, tag or commit of a data set of the hub")
    bytes_help = "count the bytes of text behind each token, for perplexity per byte of a validation set"
    parser.add_argument("--count-bytes", action="store_true", help=bytes_help)
    shard = "bytes of input for a shard, where a file can be cut (default: 64 MiB)"
    parser.add_argument("--shard-bytes", type=count, default=64 << 20, metavar="B", help=shard)
    force = "replace a store that is there, or what is left of another"
    parser.add_argument("--force", action="store_true", help=force)
    add_quiet_argument(parser)


def run(args: argparse.Namespace) -> dict[str, object]:
    from pst_ds.data.conversations import read_template
    from pst_ds.data.plain_text import is_wrapped
    from pst_ds.data.preparation.pieces import Reading
    from pst_ds.data.preparation.prepare import as_result, plan_store, prepare_store

    start = time.perf_counter()
    is_chat = args.kind == "chat"
    if is_chat and args.count_bytes:
        raise InputError("--count-bytes is for texts: of a conversation a part is learnt; leave it out")
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
        print(f"note: {path}: its lines continue one another, and each becomes a document; {fix}", file=sys.stderr)
    workers = args.workers or min(64, len(os.sched_getaffinity(0)))
    manifest = prepare_store(plan, tokenizer, Path(args.out), num_workers=workers, force=args.force)
    seconds = time.perf_counter() - start
    print(
        f"wrote {args.out}: {manifest.tokens:,} tokens of {manifest.documents:,} documents, {manifest.text_bytes:,} "
        f"bytes of text, in {len(manifest.shards)} shards; {seconds:.1f} s"
    )
    return {"out": args.out, **as_result(manifest), "seconds": seconds}


def _tokenizer(where: str) -> PreTrainedTokenizerBase:
    return open_tokenizer(where, f"--tokenizer {where}", "Name the language model's folder")
