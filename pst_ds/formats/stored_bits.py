"""The part "bitmask" in files: row bits, compressed with zlib where that is smaller."""

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from pst_ds.formats.parts import MAX_BYTES, FormatError
from pst_ds.formats.rows import bytes_of_row

# Single weights leave nothing to repeat: Huffman codes of bytes come within 2 % of the entropy at 80 % sparsity, and
# matches would cost 6 % more. Blocks and rows repeat, and matches save most of their bits.
_STRATEGIES = (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY)
_SAMPLE = 1 << 16
"""Bytes with which both strategies are tried."""


def stored_bits(bits: Tensor) -> Tensor:
    """Return row bits as a file has them: compressed, (bytes,) uint8, if that is smaller, else ``bits`` itself."""
    data = bits.contiguous().numpy().reshape(-1)
    strategy = min(_STRATEGIES, key=lambda each: len(_compressed(data[:_SAMPLE].data, each)))
    packed = _compressed(data.data, strategy)
    if len(packed) >= bits.numel():
        return bits
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def _compressed(data: memoryview, strategy: int) -> bytes:
    stream = zlib.compressobj(level=1, memLevel=9, strategy=strategy)
    return stream.compress(data) + stream.flush()


def with_row_bits(name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    """Return the ``parts`` of an (O, I) matrix with its bitmask, if compressed, as (O, ceil(I / 8)) on its device.

    Raises FormatError, starting with ``name``, for damaged bytes.
    """
    rows, columns = shape
    packed = parts.get("bitmask")
    if packed is None or packed.dim() != 1 or packed.dtype != torch.uint8:
        return dict(parts)  # PackedFormat.check judges what is not compressed
    stream = zlib.decompressobj()
    nbytes = min(rows * bytes_of_row(columns), MAX_BYTES)
    try:
        # one byte more than needed shows that a stream is too long; a hostile one is not unpacked further
        data = stream.decompress(packed.cpu().contiguous().numpy().data, nbytes + 1)
    except zlib.error as error:
        raise FormatError(f"{name}: bitmask is damaged: {error}") from None
    if not nbytes or len(data) != nbytes or not stream.eof or stream.unused_data:
        raise FormatError(f"{name}: bitmask is damaged: a {rows} x {columns} matrix needs one stream of {nbytes} bytes")
    bits = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(rows, -1)
    return {**parts, "bitmask": bits.to(packed.device)}
