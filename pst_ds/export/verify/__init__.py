"""Verify an export: its files against the manifest, and its model against the run that it came from."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pst_ds.checkpoint.format import Checkpoint
from pst_ds.config.run import RunConfig
from pst_ds.config.toml import load_run_or_folder
from pst_ds.export.verify.against_run import Comparison, compare_with_run
from pst_ds.storage_format import format_recognising
from pst_ds.train.resolved import ResolvedRun
from pst_ds.train.run_folder import open_trained
from pst_ds.writing.check import check_export, check_model

if TYPE_CHECKING:
    from pst_ds.export.verify.onnx import OnnxComparison


class VerificationError(RuntimeError):
    """A valid export that is not the trained model."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Result of :func:`verify`."""

    export_dir: str
    file: Mapping[str, object]
    """Counts, sizes and sparsity of the files."""
    comparison: "Comparison | OnnxComparison | None" = None
    """Comparison with the run, if one was given."""
    run: str = ""
    """Folder of the run, and its checkpoint."""

    @property
    def problem(self) -> str:
        """Why the export is not the trained model; "" if it is, or without a run."""
        if self.comparison is None or not self.comparison.problem:
            return ""
        return f"{self.export_dir} is not the model in {self.run}: {self.comparison.problem}"

    def require_equal(self) -> None:
        """Raise VerificationError if the export is not the trained model."""
        if self.problem:
            raise VerificationError(self.problem)

    def to_json(self) -> dict[str, object]:
        """Return the JSON object of ``pst-ds verify --json``."""
        if self.comparison is None:
            return {**self.file, "export_dir": self.export_dir}
        # a key that is missing means "not measured", such as "kl" of an export without quantisation
        compared = {key: value for key, value in asdict(self.comparison).items() if value is not None}
        return {**self.file, **compared, "reloaded_equal": not self.problem, "export_dir": self.export_dir}


def verify(
    export: str | Path,
    against: RunConfig | str | Path | ResolvedRun | None = None,
    *,
    checkpoint: str | Checkpoint = "best",
    split: str = "test",
    limit: int | None = None,
    reference: str | Path | None = None,
) -> VerifyReport:
    """Verify an export.

    Without ``against`` the files are compared with the manifest (:func:`pst_ds.writing.check.check_export`), an ONNX
    file is opened, and a GGUF file is compared with the SHA-256 inside it. With it the masked model of the run and the
    export are loaded, and their weights, logits and predictions are compared on the same batches; check ``problem`` of
    the report, or call ``require_equal``.

    Args:
        export: the exported folder, or GGUF file.
        against: the run that it came from, as its config, its folder, its run file, or resolved with the classes of
            the checkpoint.
        checkpoint: name of the checkpoint that was exported, or the opened checkpoint.
        split: "train", "validation" or "test": the data to compare on.
        limit: number of examples to compare on; None uses all.
        reference: folder of a model from which the export's divergence is measured on the same data, with ``against``.

    Raises InputError for a damaged export, and for the export of another model.
    """
    folder = Path(export)
    storage = format_recognising(folder)
    compare: Callable[..., Comparison | OnnxComparison] = compare_with_run
    if storage is not None and against is not None:
        # before the run is loaded, because some formats cannot be compared with one
        compare = storage.comparison(folder, _name_of_run(against))
    run = against
    if isinstance(run, str | Path):
        run = load_run_or_folder(run)
    file: Mapping[str, object]
    if storage is not None:
        file = storage.check(folder)
    else:
        file = check_export(folder)
        # the manifest cannot tell that transformers would initialise a tensor of the model that no file has
        check_model(folder)
    if run is None:
        return VerifyReport(str(export), file)
    resolved, opened = open_trained(run, checkpoint)
    compared = compare(folder, resolved, opened, split, limit, reference)
    # a name stays as the caller wrote it: "best" says more than the folder that it is a link to
    name = opened.folder.name if isinstance(checkpoint, Checkpoint) else checkpoint
    return VerifyReport(
        export_dir=str(export), file=file, comparison=compared, run=f"{resolved.run.output_dir}, checkpoint {name}"
    )


def _name_of_run(run: RunConfig | str | Path | ResolvedRun) -> str:
    """Return the place of a run, for messages."""
    if isinstance(run, ResolvedRun):
        return run.run.output_dir
    if isinstance(run, RunConfig):
        return run.output_dir
    return str(run)
