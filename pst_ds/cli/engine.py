"""The options of ``generate`` and ``serve`` that choose between the native decoder and transformers."""

import argparse
from typing import Unpack

from pst_ds.errors import InputError
from pst_ds.hf.model_folder import ModelFolder
from pst_ds.inference.decoder import Decoder
from pst_ds.inference.decoder.decoder import Options
from pst_ds.inference.engine import Engine, open_decoder


def native_decoder(
    args: argparse.Namespace, folder: ModelFolder, device: str, context: int, **options: Unpack[Options]
) -> Decoder | None:
    """Return the native decoder if ``args`` or :func:`open_decoder` choose it, and for users. Raises InputError.

    Options of transformers (``--load-as``, ``--dtype``) choose transformers.
    """
    for_transformers = _choices_of_transformers(args, device)
    for_decoder = ""
    if options.get("users") is not None:
        # transformers has no adapters of users
        for_decoder = "--store"
    elif args.engine == "native":
        for_decoder = "--engine native"
    if for_decoder and for_transformers:
        # rather than ignore one of two options, of which either may be the mistake
        raise InputError(f"{for_decoder} is for the native decoder on a CPU. Omit {' and '.join(for_transformers)}")
    engine: Engine = "auto"
    if for_decoder:
        engine = "native"
    elif for_transformers:
        engine = "torch"
    return open_decoder(folder, engine, context=context, device=device, **options)


def _choices_of_transformers(args: argparse.Namespace, device: str) -> list[str]:
    """Return the options, and the device, that only transformers supports."""
    choices: list[str] = []
    if args.load_as != "auto":
        choices.append("--load-as")
    if args.dtype:
        choices.append("--dtype")
    if args.engine == "torch":
        choices.append("--engine torch")
    if device != "cpu":
        choices.append(device)
    return choices
