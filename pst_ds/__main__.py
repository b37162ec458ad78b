"""``python -m pst_ds`` and ``deepspeed --module pst_ds``."""

from pst_ds.cli.main import program

program()
