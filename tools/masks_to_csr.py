"""Convert a pruned model to the packed format csr, for job scripts.

    python tools/masks_to_csr.py SRC OUT [--processes 4] [--json]

SRC is a run folder, a run file or a pruned model folder; OUT is written atomically. The same as ``pst-ds export SRC
--format csr --out OUT``, with its exit codes: 0 done, 1 failed, 2 wrong input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pst_ds.cli.export import convert


def main(argv: Sequence[str] | None = None) -> int:
    return convert("csr", (__doc__ or "").partition("\n")[0], argv)


if __name__ == "__main__":
    sys.exit(main())
