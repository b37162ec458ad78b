"""Names in a run folder and in an export. Imports only the standard library, so that a reader needs no torch."""

import re
from pathlib import Path

RUN_FILE, RESULT_FILE, DEEPSPEED_FILE = "run.toml", "result.json", "deepspeed.json"
RUN_LOCK = "run.lock"
"""Held by the run that writes to the folder, and names its process."""
METRICS_FILE, LAYERS_FILE = "metrics.jsonl", "layers.jsonl"
MANIFEST_FILE = "pst_manifest.json"
ADDITIONS_FILE = "pst_additions.safetensors"
"""Trained modules of an export next to the plain model, such as a prompt."""
CARD_FILE = "README.md"
"""The model card of an export, which users may edit."""
CHECKPOINTS, STALLS = "checkpoints", "stalls"
FINETUNED, MODEL, START, SOLVED = "finetuned", "model", "start", "solved"
"""Folders of the fine-tuning before a run, of its model inside that, of the one-shot pruned model that a run starts
from, and of the base models after each solve."""
EXIT_CODES_VARIABLE = "PST_DS_EXIT_CODES"
"""Names the folder in which every rank leaves its exit code, which some launchers lose."""
SUBMITTED_FILE, SUBMITTED_VARIABLE = "submitted.sbatch", "PST_DS_SUBMITTED"
"""The job script that a scheduler was given, which launch/slurm.sbatch hands on in the environment."""
LATEST, BEST, FINAL = "latest", "best", "final"
"""Links among the checkpoints."""
STEP_FOLDER = re.compile(r"step-(\d{8,})")
"""Names of finished checkpoints."""


def step_folders(checkpoints: Path) -> list[Path]:
    """Return the finished checkpoints in the folder ``checkpoints``, newest first."""
    if not checkpoints.is_dir():
        return []
    steps = [(int(match[1]), path) for path in checkpoints.iterdir() if (match := STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(steps, reverse=True) if path.is_dir() and not path.is_symlink()]


def links_to(checkpoint: Path) -> list[str]:
    """Return which of LATEST, BEST and FINAL point to a checkpoint."""
    links = (LATEST, BEST, FINAL)
    return [link for link in links if (checkpoint.parent / link).resolve().name == checkpoint.name]
