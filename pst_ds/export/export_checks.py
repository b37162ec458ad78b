"""Refuse an export early, from its settings, its place, and the configs of run and model.

No check here reads weights, tokenises data or writes anything, so that a wrong option fails in seconds.
"""

from pathlib import Path

from torch import nn

from pst_ds.config.run import RunConfig
from pst_ds.config.update_forms import BESIDE, LOW_RANK
from pst_ds.core.patterns import parse_pattern
from pst_ds.errors import InputError
from pst_ds.storage_format import storage_format


def require_place(out: Path, format_name: str, source: Path | None = None) -> None:
    """Raise InputError unless ``out`` can be written, and is another place than the folder ``source``."""
    # resolved, because "model", "./model" and a link to it are one folder, which the export would replace while reading
    if source is not None and out.resolve() == source.resolve():
        raise InputError(f"out = {str(out)!r} is the folder to read. Name another folder")
    storage_format(format_name).require_free(out)


def require_vocabulary(path: str | None, seen: str) -> None:
    """Raise InputError unless ``path``, the setting ``vocabulary``, is None, ``seen`` or a file."""
    if not path or path == seen:
        return
    # not is_file(), which is False for a pipe, such as a shell's <(...)
    is_readable = Path(path).exists() and not Path(path).is_dir()
    if not is_readable:
        raise InputError(
            f"vocabulary = {path!r} cannot be read: no such file (looked in {Path(path).absolute()}). Name a UTF-8 "
            f'file with one text per line, or vocabulary = "{seen}"'
        )


def require_update_fits(run: RunConfig, format_name: str) -> None:
    """Raise InputError for a run whose update is next to the mask."""
    if run.injected_pst.update_form == BESIDE and run.injected_pst.update_rank > 0:
        raise InputError(
            f'format = "{format_name}" has one weight per layer, and pst.update_form = "{BESIDE}" of the run adds U V '
            f'to every weight, which leaves no zeros. Train with update_form = "{LOW_RANK}" to export'
        )


def require_pruned(run: RunConfig, format_name: str, *, plain: bool) -> None:
    """Raise InputError for a packed format if the run prunes nothing, or keeps more weights than the format holds."""
    storage = storage_format(format_name)
    packing = storage_format(storage.made_from(plain=plain))
    if not packing.omits_pruned:
        return
    if run.mask_method.masks == "none":
        fix = 'Choose format = "dense"'
        if storage.has_plain_variant:
            fix = "Set plain = true"
        raise InputError(
            f'format = "{format_name}" omits pruned weights, and method = "{run.method}" of the run prunes none. {fix}'
        )
    pattern = parse_pattern(run.pst.pattern)
    # with these, sparsity differs between layers, so the run's sparsity does not bound that of each
    varies_by_layer = pattern.pools_matrices or run.pst.overrides or pattern.kind == "experts"
    sparsity = pattern.fixed_sparsity
    if sparsity is None:
        sparsity = run.schedule.final_sparsity
    # with "zeros" the base model's weights decide, and they are not read here
    is_known = not varies_by_layer and run.pst.initial_mask != "zeros"
    if is_known and 1 - sparsity > packing.most_kept:
        raise InputError(
            f'format = "{packing.name}" holds at most {packing.most_kept_text}, and the run, with pattern {pattern} '
            f"and sparsity {sparsity}, keeps more. {packing.fix_for_most_kept}"
        )


def require_representable(model: nn.Module, format_name: str) -> None:
    """Raise InputError for a ``model``, which may be on the meta device, that the format cannot represent."""
    storage_format(format_name).require_model(model)
