"""Names in a run folder and in an export. Imports nothing, so that a reader needs no torch."""

RUN_FILE, RESULT_FILE = "run.toml", "result.json"
METRICS_FILE, LAYERS_FILE = "metrics.jsonl", "layers.jsonl"
MANIFEST_FILE = "pst_manifest.json"
CHECKPOINTS, STALLS = "checkpoints", "stalls"
LATEST, BEST, FINAL = "latest", "best", "final"
"""Links among the checkpoints."""
