"""``python -m pst_ds`` and ``deepspeed --module pst_ds``."""

import sys

from pst_ds.cli.main import main

sys.exit(main())
