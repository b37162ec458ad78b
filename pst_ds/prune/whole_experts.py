"""Drop whole experts of a pretrained model: those that contribute least to its outputs on calibration data (REAP)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pst_ds.nn import experts as registered
from pst_ds.nn.cut_config import NUM_EXPERTS, experts_left, number_of_experts
from pst_ds.nn.expert_scores import ExpertScores, highest
from pst_ds.nn.inject import persistent_buffers
from pst_ds.nn.model_structure import ExpertsModule, experts_modules, router_names, text_config
from pst_ds.progress import Progress
from pst_ds.prune.blocks import BlockReplay, BlockSource, Calibration, SourceOf, block_of, find_blocks


@dataclass(frozen=True, slots=True)
class KeptExperts:
    """Outcome for the experts of a module."""

    name: str
    kept: tuple[int, ...]
    """Previous indices of the kept experts, ascending; they are renumbered in this order."""
    scores: tuple[float, ...]
    """Score of every expert, including dropped ones."""
    tokens: tuple[int, ...]

    @property
    def facts(self) -> dict[str, object]:
        """For the pruning record."""
        return {"kept": self.kept, "scores": self.scores, "expert_tokens": self.tokens}


def drop_experts(
    model: nn.Module, share: float, data: Calibration, *, source_of: SourceOf = BlockSource
) -> list[KeptExperts]:
    """Drop floor(``share`` * E) experts of every module of a ``model`` on the CPU, in place, with their router's rows.

    The scores come from one pass of the ``data`` through the dense model, block by block. Among equal scores the first
    experts are dropped. Raises InputError for a model without stacks of experts, if its config does not determine their
    number, and if fewer experts would be left than a token is routed to.
    """
    modules = experts_modules(model)
    key, number = number_of_experts(model, 'method = "reap"')
    left = experts_left(number, share, text_config(model), "sparsity =")
    model.eval()
    measured = _measured(model, modules, data, source_of)
    stack, blocks = find_blocks(model, list(modules))
    source = source_of(stack, blocks)
    routers = router_names(model)
    outcomes: list[KeptExperts] = []
    for name, module in modules.items():
        scores = measured.scores(name)
        kept = highest(scores, left)
        index = block_of(name, stack)
        with source.loaded(index):
            _cut(model, name, module, routers=routers, kept=kept)
            source.finish(index, [])
        _, tokens = measured.sums[name]
        outcome = KeptExperts(
            name, kept=tuple(kept.tolist()), scores=tuple(scores.tolist()), tokens=tuple(tokens.tolist())
        )
        outcomes.append(outcome)
    setattr(text_config(model), key, left)
    return outcomes


@torch.no_grad()
def _measured(model: nn.Module, modules: dict[str, nn.Module], data: Calibration, source_of: SourceOf) -> ExpertScores:
    """Measure the scores of all experts in one pass through the blocks. Collective."""
    scores = ExpertScores(modules)
    stack, blocks = find_blocks(model, list(modules))
    last = max(block_of(name, stack) for name in modules)
    replay = BlockReplay(model, source_of(stack, blocks), data)
    registered.switch_on(modules.values())
    try:
        with scores.listening(), replay.in_place(), Progress("prune", last + 1, "blocks") as shown:
            for index in range(last + 1):
                with replay.resident(index):
                    replay.run(index, keep_output=True, before=scores.expect)
                names = [name for name in modules if block_of(name, stack) == index]
                if names:  # on all ranks or none: the model is the same
                    scores.add_up(data.ranks.sums.all_sum, names)
                shown.add(1, f"{stack}.{index}")
    finally:
        registered.switch_off(modules.values())
    return scores


def _cut(model: nn.Module, name: str, module: ExpertsModule, routers: set[str], kept: Tensor) -> None:
    """Keep these experts of a module, and their entries in its router and the parent module."""
    number = int(module.num_experts)
    parent = name.rpartition(".")[0]
    owners: list[nn.Module] = [module]
    for router in sorted(routers):
        if router.startswith(parent + "."):
            owners.append(model.get_submodule(router))
    owners.append(model.get_submodule(parent))
    persistent = {id(buffer) for buffer in persistent_buffers(model).values()}
    for owner in owners:
        for attribute, param in list(owner._parameters.items()):
            # The first dimension is that of the experts: stacks (E, ...), rows of the router (E, width), biases (E,).
            if param is not None and param.shape[:1] == (number,):
                owner._parameters[attribute] = nn.Parameter(param.data[kept].contiguous(), param.requires_grad)
        for attribute, buffer in list(owner._buffers.items()):
            # For instance DeepSeek's correction bias of the routing; buffers that no file has are made anew.
            if buffer is not None and id(buffer) in persistent and buffer.shape == (number,):
                owner._buffers[attribute] = buffer[kept].contiguous()
        # Modules hold the number of experts as an attribute too, under a name that depends on the family.
        for attribute in (*NUM_EXPERTS, "out_features"):
            if vars(owner).get(attribute) == number:
                setattr(owner, attribute, len(kept))
