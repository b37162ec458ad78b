"""``pst-ds export SRC --format FORMAT --out DIR``: write a run or any model folder with dense or packed weights."""

from __future__ import annotations

import argparse
import json
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_ds.cli.main import add_quiet_argument, add_shard_argument, count, load_run_or_folder, main
from pst_ds.config.toml import dump_run
from pst_ds.core.packings import (
    COMPRESSED_TENSORS,
    COMPRESSED_TENSORS_W8A8,
    GGUF,
    GROUPS,
    ONNX,
    ONNX_FILE,
    PACKINGS,
    VALUE_BITS,
    WHOLE_ROW,
)
from pst_ds.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from pst_ds.checkpoint.format import Checkpoint
    from pst_ds.config.run import RunConfig
    from pst_ds.export.prompt_file import SavedPrompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="SRC", help="run folder, its run file, or a model folder with zeros in it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of a run")
    parser.add_argument("--out", required=True, help="folder to write")
    text = "dense (default): zeros in a plain model folder; the packed ones load after import pst_ds.hf"
    parser.add_argument(
        "--format", choices=("dense", *PACKINGS, COMPRESSED_TENSORS, GGUF, ONNX), default="dense", help=text
    )
    text = "of onnx: dense fp32 weights and ONNX's own operators, which any runtime reads and none runs faster"
    parser.add_argument("--plain", action="store_true", help=text)
    text = (
        "of onnx with --values: bits that inputs of sparse products are rounded to; 8 is faster (default: as trained); "
        "of compressed-tensors with int8: 8 has its readers round inputs token by token (default: 16, as they are)"
    )
    parser.add_argument("--activation-bits", type=int, choices=(8, 16), metavar="BITS", help=text)
    _add_value_arguments(parser)
    text = 'embed fewer tokens: those "seen" in a run\'s training and validation text, or in a FILE with a text a line'
    parser.add_argument("--vocabulary", metavar="seen|FILE", help=text)
    text = "read a model folder of GPTQ, AWQ, bitsandbytes or MXFP4, whose weights become plain numbers first"
    parser.add_argument("--dequantize", action="store_true", help=text)
    parser.add_argument("--checkpoint", help='of a run: "best" (default), "final", or another in checkpoints/')
    add_writing_arguments(parser)
    add_quiet_argument(parser)


def _add_value_arguments(parser: argparse.ArgumentParser) -> None:
    text = "round linear layers inside the blocks to 8 or 4 bits, with a scale a group; bf16 casts every tensor"
    parser.add_argument("--values", choices=("bf16", *VALUE_BITS), help=text)
    text = "round embeddings and the output layer too (default: as they are)"
    parser.add_argument("--embeddings", choices=tuple(VALUE_BITS), help=text)
    text = "weights of a row that share a scale (default: row for int8, 64 for int4)"
    parser.add_argument("--group", choices=(*map(str, GROUPS), WHOLE_ROW), help=text)


def add_writing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of everything that writes a model folder."""
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="cast every tensor; default: as they are")
    parser.add_argument("--processes", type=count, default=1, metavar="N", help="processes to write with (default: 1)")
    add_shard_argument(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.plain and args.format != ONNX:
        raise InputError(f"--plain is for --format {ONNX}, and this is {args.format}: leave it out")
    to_onnx = args.format == ONNX and not args.plain and args.values in VALUE_BITS
    if args.activation_bits == 8 and not to_onnx and args.format != COMPRESSED_TENSORS:
        raise InputError(
            f"--activation-bits 8 is for --format {ONNX} and codes: add --values {' or '.join(VALUE_BITS)}; or for "
            f"--format {COMPRESSED_TENSORS}"
        )
    if args.format == ONNX:
        return _write_onnx(args)
    written = _written(args)
    if args.format == GGUF:
        changed = f"; fp16 holds {written['inexact_scales']} scales only nearly" if written["inexact_scales"] else ""
        print(
            f"wrote {args.out}: {written['rounded_tensors']} of {written['tensors']} tensors in blocks, "
            f"{written['file_bytes']:,} bytes, {written['bits_per_weight']:.2f} bits a weight{changed}"
        )
        return written
    for name in written["stay_dense"][:4]:
        print(f"{name} stays dense: {args.format} cannot hold it, or would make it larger")
    if len(written["stay_dense"]) > 4:
        print(f"and {len(written['stay_dense']) - 4} more stay dense")
    requested = "unknown" if written["sparsity_requested"] is None else written["sparsity_requested"]
    share = written["file_bytes"] / max(written["dense_bf16_bytes"], 1)
    pruned = f"{written['pruned_tensors']} pruned tensors of " if written["pruned_tensors"] else "tensors: "
    print(
        f"wrote {args.out}: {pruned}{written['tensors']}, sparsity "
        f"{written['sparsity_measured']:.6f} measured, {requested} requested; "
        f"{written['packed_tensors']} packed, {written['file_bytes']:,} bytes, {share:.3f} of dense bf16"
    )
    if "rounded_tensors" in written:
        print(rounding_text(written))
    return written


def _write_onnx(args: argparse.Namespace) -> dict[str, Any]:
    """Write a packed folder that is not kept, and the graph of it."""
    from pst_ds.inference.onnx.folder import require_free, write_onnx

    out = Path(args.out)
    require_free(out)
    with tempfile.TemporaryDirectory(prefix="pst-ds-") as scratch:
        packed = Path(scratch) / out.name
        how = {"format": "dense" if args.plain else "bitmask", "out": str(packed)}
        facts = _written(argparse.Namespace(**{**vars(args), **how}))
        trained = 16 if args.plain or facts.get("values") not in VALUE_BITS else facts.get("activation_bits", 16)
        written = write_onnx(packed, out, facts, plain=args.plain, activation_bits=args.activation_bits or trained)
    weights = "dense weights" if args.plain else f"{written['sparse_nodes']} sparse products"
    difference = written["max_relative_difference"]
    said = "not run: no onnxruntime here" if difference is None else f"outputs within {difference:.1g} of the model's"
    print(f"wrote {out / ONNX_FILE}: {written['nodes']} nodes, {weights}, {written['file_bytes']:,} bytes; {said}")
    return written


def rounding_text(facts: dict[str, Any]) -> str:
    """Return a sentence on what an export rounded; ``facts``: the ``--json`` keys of export or verify."""
    grids = []
    for key, of in (("values", "group"), ("embeddings", "embedding_group")):
        if facts.get(key):
            share = "a scale a row" if facts[of] == WHOLE_ROW else f"a scale for {facts[of]} weights"
            grids.append(f"{key} {facts[key]}, {share}")
    packed = f", {facts['packed_bits_per_weight']:.2f} in packed layers" if "packed_bits_per_weight" in facts else ""
    return (
        f"rounded {facts['rounded_tensors']} tensors ({'; '.join(grids)}): {facts['bits_per_weight']:.2f} bits a weight"
        f"{packed}; none changed by more than {facts['largest_rounding_error']:.2%} of its norm"
    )


def _written(args: argparse.Namespace) -> dict[str, Any]:
    source = Path(args.run)
    how = {key: getattr(args, key) for key in ("dtype", "shard_bytes", "processes")} | _storage(args)
    is_model = source.is_dir() and not (source / "run.toml").is_file() and (source / "config.json").exists()
    if source.is_dir() and not is_model and not (source / "run.toml").is_file():
        raise InputError(
            f"{str(source)!r} is not a run folder: run.toml is missing; nor a model folder: config.json is missing "
            f"(looked in {source.absolute()})"
        )
    if args.dequantize and not is_model:
        raise InputError(f"{source} is a run, and --dequantize is for model folders of other libraries: leave it out")
    if not is_model:
        return _write_run(args, how)
    if args.set or args.checkpoint:
        raise InputError(f"{source} is a model folder, which has no settings and no checkpoints: leave out --set and "
                         "--checkpoint")  # fmt: skip
    from pst_ds.cli.vocabulary import vocabulary_of_folder
    from pst_ds.export.export import export_folder

    if args.vocabulary:
        how |= vocabulary_of_folder(args.vocabulary, source)
    return _with_tokens(export_folder(source, Path(args.out), dequantize=args.dequantize, **how), args)


def _with_tokens(written: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return what was written, with the number of tokens instead of all of them."""
    kept = written.pop("tokens_kept", None)
    if args.vocabulary:
        print(f"embeds {len(kept)} tokens")
    return {**written, "tokens": len(kept)} if kept else written


def _storage(args: argparse.Namespace) -> dict[str, Any]:
    """Return what ``--format``, ``--values``, ``--embeddings`` and ``--group`` are for an export. Raises InputError."""
    rounds_inputs = args.format == COMPRESSED_TENSORS and args.activation_bits == 8
    packing = COMPRESSED_TENSORS_W8A8 if rounds_inputs else args.format
    storage = {"packing": packing, "values": None, "embeddings": None}
    on_a_grid = [name for name in ("values", "embeddings") if getattr(args, name) in VALUE_BITS]
    if args.group and not on_a_grid:
        raise InputError(
            f"--group {args.group} is for values of {' or '.join(VALUE_BITS)}: add --values or --embeddings"
        )
    if args.values == "bf16":
        if args.dtype not in (None, "bf16"):
            raise InputError(f"--values bf16 casts every tensor, and so does --dtype {args.dtype}: leave one out")
        storage["dtype"] = "bf16"
    if on_a_grid:
        from pst_ds.core.quantization import grid_of

        group = args.group or ("32" if args.format == GGUF else None)
        storage |= {name: grid_of(getattr(args, name), group) for name in on_a_grid}
    return storage


def _write_run(args: argparse.Namespace, how: dict[str, Any]) -> dict[str, Any]:
    config = load_run_or_folder(args)
    from pst_ds.export.export import export_run
    from pst_ds.train.model import load_tokenizer, meta_model
    from pst_ds.train.run_folder import open_checkpoint

    checkpoint = open_checkpoint(config, args.checkpoint or "best")
    tokenizer = load_tokenizer(config)
    model = meta_model(config, checkpoint.state.labels, tokenizer, own_dropout=True)
    table = json.loads(json.dumps(tomllib.loads(dump_run(config))))
    if args.vocabulary:
        from pst_ds.cli.vocabulary import vocabulary_of_run

        how["vocabulary"] = vocabulary_of_run(args.vocabulary, config, checkpoint.state.labels, tokenizer, model)
    prompt = saved_prompt(config, checkpoint, model)
    written = export_run(model, checkpoint, tokenizer, Path(args.out), prompt=prompt, run=table, **how)
    if checkpoint.state.rounds and config.quantization.activations:
        written["activation_bits"] = config.quantization.activation_bits
    return {**_with_tokens(written, args), "checkpoint": str(checkpoint.folder)}


def saved_prompt(config: RunConfig, checkpoint: Checkpoint, shapes: nn.Module) -> SavedPrompt | None:
    """Return the prompt of a run's checkpoint; None without one. ``shapes``: the run's model, on the meta device."""
    from pst_ds.export.prompt_file import SavedPrompt
    from pst_ds.nn.base_model import DTYPES
    from pst_ds.nn.prompt import NAME, prompt_of

    prompt = prompt_of(shapes)
    if prompt is None:
        return None
    name = next((name for name in checkpoint.contents.trained if name.endswith(f"{NAME}.pst_P")), None)
    if name is not None:
        values = checkpoint.trained[name].to(DTYPES[checkpoint.state.precision])
    else:  # what an adapter makes of states of the text, which no checkpoint has
        from pst_ds.train.run import masked_model, prepare_single

        whole = prompt_of(masked_model(prepare_single(config, checkpoint), checkpoint))
        assert whole is not None
        values = whole().detach().cpu()
    return SavedPrompt(config.prompt.text, prompt.after, values.float())


def convert(format_name: str, description: str, argv: Sequence[str] | None = None) -> int:
    """Run ``pst-ds export`` to one format, for tools/masks_to_*.py: ``SRC OUT``. Returns the exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("source", metavar="SRC", help="run folder, run file, or model folder with zeros in it")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--processes", default="1", metavar="N", help="processes to write with (default: 1)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line of stdout")
    args = parser.parse_args(argv)
    options = ["--format", format_name, "--out", args.out, "--processes", args.processes]
    return main(["export", args.source, *options, *(["--json"] if args.json else [])])
