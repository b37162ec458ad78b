"""The choice between the native decoder and transformers, for everything that generates text from a model folder."""

import sys
from typing import Literal, TypeAlias, Unpack, get_args

from pst_ds.errors import InputError
from pst_ds.hf.model_folder import ModelFolder
from pst_ds.inference.decoder import Decoder, DecoderError
from pst_ds.inference.decoder.decoder import Options

Engine: TypeAlias = Literal["auto", "native", "torch"]


def open_decoder(
    folder: ModelFolder,
    engine: Engine = "auto",
    *,
    context: int,
    device: str = "cpu",
    instead: str = "using transformers instead of the native decoder",
    **options: Unpack[Options],
) -> Decoder | None:
    """Return the native decoder of a model folder, or None if transformers is to compute it.

    "auto" chooses the native decoder for quantised values (int8, int4) on a CPU, where it is several times as fast, and
    if it supports the model; otherwise it prints why not after ``instead`` on stderr. Float values are transformers'
    unless ``engine`` is "native": the decoder computes them dense, from an fp32 copy in memory.

    Args:
        context: Positions of a sequence, at most as many as the model has.
        options: See :class:`Decoder`.

    Raises InputError for an unknown ``engine``, and if "native" is not supported.
    """
    if engine not in get_args(Engine):
        raise InputError(f"engine = {engine!r}: not an engine. Choose one of {', '.join(get_args(Engine))}")
    if engine == "auto" and (device != "cpu" or folder.values is None):
        return None
    if engine == "torch":
        return None
    try:
        return Decoder.from_pretrained(folder.path, context, **options)
    except (DecoderError, RuntimeError) as error:  # RuntimeError: no compiler, or native code is switched off
        if engine == "native":
            raise InputError(str(error)) from None
        # on stderr, because stdout has the generated text
        print(f"{instead}: {error}", file=sys.stderr)
        return None
