"""Write docs/run-file.md from the dataclasses of a run file and the sentences under their fields."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "run-file.md"
SOURCES = {
    "pst_ds/config/run.py": {
        "RunConfig": "",
        "ModelConfig": "model",
        "ScheduleConfig": "schedule",
        "TrainConfig": "train",
        "DistillationConfig": "distillation",
        "CheckpointConfig": "checkpoint",
        "PicturesConfig": "pictures",
    },
    "pst_ds/config/data.py": {"DataConfig": "data", "EvalConfig": "eval"},
    "pst_ds/config/pst.py": {"PSTConfig": "pst", "Override": "[pst.overrides]"},
}
HEAD = """# The run file

One TOML file describes a run. Paths are relative to the working directory; `--set key=value` on the command line
overrides any setting (`--set train.num_steps=20`). An unknown key is an error that names the nearest known one, and the
resolved file is written to the run folder as `run.toml`. `pst.preset = "paper"` sets the paper's constants (no relative
magnitude, A and U from N(0, 1)), and `data.preset` those of a benchmark ([tasks.md](tasks.md)); settings in the file
win over both.

This page is written by `python -m tools.docs.run_file` from the code.
"""


def page() -> str:
    sections = [HEAD]
    for source, classes in SOURCES.items():
        tree = ast.parse((ROOT / source).read_text(encoding="utf-8"))
        found = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        for name, table in classes.items():
            sections.append(_section(found[name], table))
    return "\n".join(sections)


def _section(node: ast.ClassDef, table: str) -> str:
    title = f"## [{table}]" if table else "## Top level"
    summary = (ast.get_docstring(node) or "").splitlines()[0]
    rows = ["", title, "", summary, "", "| setting | type | default | |", "|---|---|---|---|"]
    for i, statement in enumerate(node.body):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        kind = ast.unparse(statement.annotation)
        if kind.endswith("Config"):
            continue  # a table of its own
        default = "required" if statement.value is None else f"`{ast.unparse(statement.value)}`"
        following = node.body[i + 1] if i + 1 < len(node.body) else None
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = " ".join(str(following.value.value).split())
        rows.append(f"| `{statement.target.id}` | `{kind}` | {default} | {text} |".replace(" | None`", "`"))
    return "\n".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page() + "\n", encoding="utf-8")
    sys.stdout.write(f"{PAGE.relative_to(ROOT)} written\n")
