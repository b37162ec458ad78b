"""Read and check a run before its model is built, so that mistakes are reported within seconds."""

from dataclasses import replace
from importlib.util import find_spec

from torch import nn

from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.errors import InputError, shortened
from pst_ds.json_text import JsonObject
from pst_ds.nn.cut_config import experts_left
from pst_ds.nn.experts import leaf_class
from pst_ds.nn.model_structure import text_config
from pst_ds.nn.router import pst_routers
from pst_ds.parallel.ds_config import (
    RunNumbers,
    load_deepspeed_config,
    place_frozen,
    resolve_deepspeed_config,
    zero_stage,
)
from pst_ds.parallel.launch import LaunchEnvironment, device_of, init_distributed, memory_of_rank
from pst_ds.parallel.ranks import all_gather_objects, raise_together
from pst_ds.parallel.watchdog import longest_wait
from pst_ds.train.model import frozen_bytes
from pst_ds.train.objective import require_teacher
from pst_ds.train.resolved import ResolvedRun, num_trainable, resolve
from pst_ds.train.run_context import RunContext
from pst_ds.train.sequences import require_shareable, require_small_masks

_AFTER_STALL_SECONDS = 60.0
"""By how much collectives outlast the watchdog's verdict."""


def prepare(
    run: RunConfig | ResolvedRun,
    launch: LaunchEnvironment,
    *,
    run_file: str = "the run file",
    labels: list[str] | None = None,
) -> RunContext:
    """Read and check everything that takes little time, and join the process group. Collective.

    Args:
        run: The run. A config is resolved here, where an error on one rank reaches the others.
        run_file: Name of the run file, for messages.
        labels: Names of the classes of a trained run, for a config; None to read them from the data.

    Raises InputError, on every rank.
    """
    config = run
    if isinstance(config, ResolvedRun):
        config = config.run
    config.micro_batch_size(launch.world_size)
    require_engine(config, launch.world_size)
    problem: InputError | None = None
    try:
        resolved = run if isinstance(run, ResolvedRun) else resolve(run, labels=labels)
        context = _checked(resolved, launch, run_file)
    except InputError as error:
        if launch.world_size == 1 or find_spec("deepspeed") is None:
            raise
        problem = error  # possibly on this rank only: the process group has to exist to tell the others
    if config.deepspeed_config:
        timeout = config.train.stall_timeout_seconds
        collective_timeout = 0.0  # torch's own
        if timeout:
            # after the watchdog's verdict, which names the rank that the others wait for; a collective only fails
            collective_timeout = timeout + longest_wait(timeout) + _AFTER_STALL_SECONDS
        init_distributed(launch, timeout_seconds=collective_timeout)
    raise_together(problem)
    return _placed(context, run_file)


def require_engine(run: RunConfig, ranks: int) -> None:
    """Raise ConfigError for several ``ranks`` without DeepSpeed."""
    if not run.deepspeed_config and ranks > 1:
        raise ConfigError(
            f"{ranks} ranks, but deepspeed_config is not set. Set deepspeed_config = "
            '"ds_configs/zero3_cpu.json" (or zero3.json on GPUs), or start one process.'
        )


def _placed(context: RunContext, run_file: str) -> RunContext:
    """Return ``context`` with the place of frozen weights, the same on every rank. Collective. Raises InputError."""
    run = context.run
    launch = context.launch
    config = context.ds_config
    if config is None or zero_stage(config) != 3:
        return context
    node_sizes, memory = zip(*all_gather_objects((launch.node_size, memory_of_rank(launch))), strict=True)
    ranks = launch.world_size
    wanted = run.model.base_placement
    is_uneven = len(set(node_sizes)) > 1 or ranks % min(node_sizes[0], ranks) > 0
    # DeepSpeed's secondary partitions are groups of equally many ranks, which would cross nodes of unequal sizes
    node_size = ranks if is_uneven else node_sizes[0]
    chosen = place_frozen(
        config,
        wanted,
        frozen=frozen_bytes(context.resolved.shapes.model, run, ranks),
        ranks=ranks,
        node_size=node_size,
        memory=min(memory),  # of the rank with the least, so that all ranks choose the same
        names=(run.deepspeed_config, run_file),
    )
    if not is_uneven or wanted not in ("auto", "node"):
        return replace(context, copy_ranks=chosen)
    remark = (
        f'model.base_placement = "{wanted}": nodes have different numbers of ranks, so all ranks share the frozen '
        "weights. Start equally many ranks on every node to keep gathers in the node"
    )
    return replace(context, copy_ranks=chosen, remark=remark)


def _checked(resolved: ResolvedRun, launch: LaunchEnvironment, run_file: str) -> RunContext:
    run = resolved.run
    run.tracking.require_installed()
    raw = None
    if run.deepspeed_config:
        raw = load_deepspeed_config(run.deepspeed_config)
    ranks = launch.world_size
    resolved = resolved.with_shards(ranks)
    device = device_of(launch)
    require_trainable(resolved, ranks=ranks, stage=zero_stage(raw))
    ds_config = resolved_deepspeed_config(run, raw, resolved.shapes.model, ranks=ranks, run_file=run_file)
    return RunContext(resolved, launch, ds_config, device)


def require_trainable(resolved: ResolvedRun, *, ranks: int, stage: int, reads_teacher: bool = True) -> None:
    """Build the run's model on the meta device and check that it can be trained. Raises InputError.

    Args:
        stage: ZeRO stage; 0 without DeepSpeed.
        reads_teacher: whether to check a teacher, whose folder must then exist.
    """
    run = resolved.run
    shapes = resolved.shapes
    if problem := resolved.only_fp32:
        raise ConfigError(f'train.precision = {run.train.precision!r}: {problem}. Set train.precision = "fp32"')
    model = shapes.model
    if reads_teacher:
        require_teacher(run, model)
    require_small_masks(run, model.config)  # type: ignore[arg-type]
    require_shareable(run, model.config, stage, run.micro_batch_size(ranks))  # type: ignore[arg-type]
    for router in pst_routers(model).values():
        experts_left(
            router.num_embeddings, run.schedule.final_sparsity, text_config(model), "schedule.final_sparsity ="
        )
    stacks = [target.name for target in shapes.targets if target.layout.num_experts > 1]
    if run.schedule.solves and stacks:
        raise ConfigError(
            f"schedule.solves = {run.schedule.solves}: {shortened(stacks)} holds experts, which it does not support. "
            "Set schedule.solves = 0"
        )


def resolved_deepspeed_config(
    run: RunConfig, raw: JsonObject | None, shapes: nn.Module, *, ranks: int, run_file: str = "the run file"
) -> JsonObject | None:
    """Fill in the DeepSpeed settings ``raw`` for the run and the ``shapes`` of its model; None stays None.

    Raises InputError for settings that contradict the run file.
    """
    if raw is None:
        return None
    micro_batch = run.micro_batch_size(ranks)
    accumulation = run.train.gradient_accumulation_steps
    numbers = RunNumbers(
        # DeepSpeed knows neither parts of unequal size nor shared sequences
        train_batch_size=micro_batch * accumulation * ranks,
        train_micro_batch_size_per_gpu=micro_batch,
        gradient_accumulation_steps=accumulation,
        gradient_clipping=run.train.gradient_clipping,
        bf16=run.train.precision == "bf16",
        num_trainable=num_trainable(shapes),
        expert_parallel=run.train.experts_divided_by(ranks),
        leaf_class=leaf_class(shapes),
    )
    return resolve_deepspeed_config(raw, numbers, source=run.deepspeed_config, run_file=run_file)


def prepare_single(resolved: ResolvedRun) -> RunContext:
    """Prepare a run on one process without DeepSpeed, regardless of what it trained on: to read its checkpoints."""
    launch = LaunchEnvironment(0, 1, 0)
    return RunContext(resolved, launch, None, device_of(launch))
