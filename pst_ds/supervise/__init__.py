"""Unattended runs: restart after failures, and exclude faulty hosts."""
