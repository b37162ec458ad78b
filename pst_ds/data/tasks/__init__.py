"""Tasks: one file each, with its class as TASK, and an entry in pst_ds/config/tasks.py."""

from dataclasses import replace
from importlib import import_module
from typing import Any

from pst_ds.config.run import RunConfig
from pst_ds.data.tasks.task import ExampleSet, Task

__all__ = ["ExampleSet", "Task", "task_of"]


def task_of(run: RunConfig) -> Task[Any]:
    """Return the task of a run."""
    # imported by name: a task's file imports what only this task needs
    module = import_module(f"pst_ds.data.tasks.{run.task.replace('-', '_')}")
    return module.TASK(replace(run.eval, metric=run.metric))
