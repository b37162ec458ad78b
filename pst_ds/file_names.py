"""Names in a run folder and in an export. Imports only the standard library, so that a reader needs no torch."""

import re
from pathlib import Path

RUN_FILE = "run.toml"
"""The settings of the run, every one written out."""
RESULT_FILE = "result.json"
DEEPSPEED_FILE = "deepspeed.json"
RUN_LOCK = "run.lock"
"""Held by the run that writes to the folder, and names its process."""
METRICS_FILE = "metrics.jsonl"
LAYERS_FILE = "layers.jsonl"
MANIFEST_FILE = "pst_manifest.json"
ADDITIONS_FILE = "pst_additions.safetensors"
"""Trained modules of an export next to the plain model, such as a prompt."""
CARD_FILE = "README.md"
"""The model card of an export, which users may edit."""
CHECKPOINTS = "checkpoints"
STALLS = "stalls"
PROFILE = "profile"
"""Folder of the traces of ``train.profile``."""
FINETUNED = "finetuned"
"""Folder of the fine-tuning before a run."""
MODEL = "model"
"""Folder of the fine-tuned model, in FINETUNED."""
START = "start"
"""Folder of the one-shot pruned model that a run starts from."""
SOLVED = "solved"
"""Folder of the base models after each solve."""
EXIT_CODES_VARIABLE = "PST_DS_EXIT_CODES"
"""Names the folder in which every rank leaves its exit code, which some launchers lose."""
SUBMITTED_FILE = "submitted.sbatch"
"""The job script that a scheduler was given."""
SUBMITTED_VARIABLE = "PST_DS_SUBMITTED"
"""The environment variable in which launch/slurm.sbatch hands the job script on."""
LATEST = "latest"
"""Link to a checkpoint, as are the next two."""
BEST = "best"
FINAL = "final"
STEP_FOLDER = re.compile(r"step-(\d{8,})")
"""Names of finished checkpoints; unfinished ones have another ending."""


def trace_name(first: int, last: int, rank: int) -> str:
    """Return the name of a rank's profile of the steps ``first`` to ``last``, in the folder PROFILE."""
    return f"steps-{first}-{last}-rank-{rank:05d}.json.gz"


def step_folders(checkpoints: Path) -> list[Path]:
    """Return the finished checkpoints in the folder ``checkpoints``, newest first."""
    if not checkpoints.is_dir():
        return []
    folder_of_step: dict[int, Path] = {}
    for path in checkpoints.iterdir():
        match = STEP_FOLDER.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            folder_of_step[int(match[1])] = path
    # Sorted as numbers: names have eight digits or more.
    return [folder_of_step[step] for step in sorted(folder_of_step, reverse=True)]


def links_to(checkpoint: Path) -> list[str]:
    """Return which of LATEST, BEST and FINAL point to a checkpoint."""
    links: list[str] = []
    for link in (LATEST, BEST, FINAL):
        # Compared by name, because the folder itself may be reached through a link.
        if (checkpoint.parent / link).resolve().name == checkpoint.name:
            links.append(link)
    return links
