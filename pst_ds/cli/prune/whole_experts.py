"""``pst-ds prune --method reap``: whole experts dropped, and a model folder with the others."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pst_ds.errors import InputError

if TYPE_CHECKING:
    from pst_ds.config.run import RunConfig

REAP = "reap"


def drop(run: RunConfig, args: argparse.Namespace) -> dict[str, object]:
    """Drop experts of the run's model, write it, and return the verb's result. Raises InputError."""
    from pst_ds.export.from_folder import copy_beside
    from pst_ds.nn.base_model import DTYPES
    from pst_ds.prune.folder import FORMAT, write_folder
    from pst_ds.prune.whole_experts import drop_experts
    from pst_ds.train.one_shot.pruning import calibration, facts_of_base, facts_of_text, load_whole, pruning_device

    out = Path(args.out)
    model, base = load_whole(run, out)
    batches = calibration(run, model.config, args.samples, args.seed)
    start = time.perf_counter()
    share = run.schedule.final_sparsity if args.sparsity is None else args.sparsity
    if not 0.0 <= share < 1.0:
        raise InputError(f"--sparsity {share} must be in [0, 1): it is the fraction of experts to drop")
    modules = drop_experts(model, share, batches, device=pruning_device(), dtype=DTYPES[run.train.precision])
    facts = {
        "method": REAP,
        **facts_of_base(run),
        **facts_of_text(run, args.samples, args.seed, batches),
        "sparsity_requested": share,
        "experts": len(modules[0].kept),
        "experts_before": len(modules[0].scores),
    }
    of_modules = {m.name: {"kept": m.kept, "scores": m.scores, "expert_tokens": m.tokens} for m in modules}
    record = {"format": FORMAT, **facts, "layers": [], "modules": of_modules}
    write_folder(
        model,
        record,
        {},
        out,
        shard_bytes=args.shard_bytes,
        unused={},
        copy_beside=lambda to: copy_beside(base.folder, to),
    )
    seconds = time.perf_counter() - start
    print(
        f"wrote {args.out}: reap, {facts['experts']} of {facts['experts_before']} experts in each of {len(modules)} "
        f"modules, on {facts['samples']} examples of {facts['tokens']:,} tokens; in {seconds:.1f} s"
    )
    return {**facts, "out": args.out, "seconds": seconds}


def require_fit(args: argparse.Namespace) -> None:
    """Refuse arguments that are about weights. Raises InputError."""
    for name in ("pattern", "bits", "group", "keep_zeros", "swaps", "budgets", "reconstruct"):
        if getattr(args, name):
            raise InputError(
                f"--{name.replace('_', '-')} is for weights, and --method reap drops whole experts: leave it out, or "
                "prune the folder that it writes once more"
            )
