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
    asked = {"--load-as": args.load_as != "auto", "--dtype": args.dtype, "--engine torch": args.engine == "torch"}
    against = [*(name for name, value in asked.items() if value), *([device] if device != "cpu" else [])]
    wanted = "--store" if options.get("users") is not None else "--engine native" if args.engine == "native" else ""
    if wanted and against:
        raise InputError(f"{wanted} is for the native decoder on a CPU. Omit {' and '.join(against)}")
    engine: Engine = "native" if wanted else "torch" if against else "auto"
    return open_decoder(folder, engine, context=context, device=device, **options)
