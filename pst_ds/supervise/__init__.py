"""Runs that go on without people: starts again after failures, and hosts that are left out."""
