"""Settings of the one-shot pruning that a run begins with."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pst_ds.config.checks import ConfigError, NotNegative, Positive, check_fields
from pst_ds.core.patterns import parse_pattern
from pst_ds.file_names import START

if TYPE_CHECKING:
    from pst_ds.config.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class StartConfig:
    """One-shot pruning of the pretrained model on training data, before the first step (docs/how-to/methods.md)."""

    method: Literal["none", "magnitude", "wanda", "sparsegpt", "alps"] = "none"
    """How the zeros are chosen that the run begins with: those of ``schedule.initial_sparsity``, or all of them where
    masks are fixed. The run folder keeps the pruned model, which is the run's base from then on."""
    samples: Positive = 128
    """Examples of ``data.train`` that the pruning looks at; all, where there are fewer."""
    reconstruct: NotNegative = 0
    """Passes of these examples that fit the kept weights of each block to what the dense block gives."""
    budgets: Literal["equal", "owl", "saliency"] = "equal"
    """How zeros are shared out among layers: equally, by how much weights stand out, or by what the loss loses."""

    def __post_init__(self) -> None:
        check_fields(self)
        for field in fields(self):
            if self.method == "none" and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"start.{field.name} = {getattr(self, field.name)!r} does nothing with start.method = "
                    '"none"; set start.method, such as "alps"'
                )

    def sparsity(self, run: RunConfig) -> float:
        """Return the fraction of zeros that ``run`` begins with."""
        return run.schedule.initial_sparsity if run.mask_method.masks == "ramp" else run.schedule.final_sparsity

    def require_fit(self, run: RunConfig) -> None:
        """Refuse a start whose zeros the run would not begin with. Raises ConfigError."""
        if self.method == "none":
            return
        asked, masks, zeros = f'start.method = "{self.method}"', run.mask_method.masks, self.sparsity(run)
        if masks == "none":
            raise ConfigError(f"{asked} prunes, and method = {run.method!r} does not; leave start out, or take another")
        if masks == "fixed" and run.pst.initial_mask != "zeros":
            raise ConfigError(
                f'{asked} chooses the masks, and method = {run.method!r} chose others. Fix: pst.initial_mask = "zeros"'
            )
        if zeros == 0.0:
            raise ConfigError(
                f"{asked} prunes as much as schedule.initial_sparsity says, which is 0; set it above 0, or leave start "
                "out"
            )
        fixed = parse_pattern(run.pst.pattern).fixed_sparsity
        if fixed not in (None, zeros):
            raise ConfigError(
                f'{asked} prunes to schedule.initial_sparsity = {zeros}, but pst.pattern = "{run.pst.pattern}" has '
                f"{fixed} zeros. Fix: schedule.initial_sparsity = {fixed}"
            )
        own = next((rule.modules for rule in run.pst.overrides if rule.final_sparsity is not None), None)
        if masks == "ramp" and own is not None:
            raise ConfigError(
                f"{asked} gives all layers the same share of zeros, and pst.overrides gives {own!r} a final_sparsity "
                "of its own; leave one of them out, or prune with pst-ds prune and train the folder"
            )


def started(run: RunConfig) -> RunConfig:
    """Return ``run`` as it goes on once its pretrained model is pruned, in its folder. A model that was to be its own
    teacher is a teacher of its own then: it is dense."""
    if run.start.method == "none":
        return run
    distillation = run.distillation
    if distillation.weight and not distillation.teacher:
        distillation = replace(distillation, teacher=run.model.path)
    model = replace(run.model, path=str(Path(run.output_dir) / START))
    return replace(run, model=model, distillation=distillation, start=StartConfig())
