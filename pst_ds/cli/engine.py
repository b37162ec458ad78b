"""The choice between the native decoder and transformers, for the verbs that write text."""

import argparse
import sys
from typing import Unpack

from pst_ds.errors import InputError
from pst_ds.inference.decoder import Decoder, DecoderError
from pst_ds.inference.decoder.decoder import Options
from pst_ds.inference.hf.model_folder import ModelFolder


def native_decoder(
    args: argparse.Namespace, folder: ModelFolder, device: str, context: int, **options: Unpack[Options]
) -> Decoder | None:
    """Return the native decoder if ``args`` ask for it, if it is certainly faster, or for users. Raises InputError."""
    asked = {"--load-as": args.load_as != "auto", "--dtype": args.dtype, "--engine torch": args.engine == "torch"}
    against = [*(name for name, value in asked.items() if value), *([device] if device != "cpu" else [])]
    wanted = "--store" if options.get("users") is not None else "--engine native" if args.engine == "native" else ""
    if wanted and against:
        raise InputError(f"{wanted} is for the native decoder on a CPU. Omit {' and '.join(against)}")
    if against or not (wanted or folder.values):
        return None
    try:
        return Decoder.from_pretrained(folder.path, context, **options)
    except (DecoderError, RuntimeError) as error:
        if wanted:
            raise InputError(str(error)) from None
        print(f"using transformers instead of the native loop: {error}", file=sys.stderr)
        return None
