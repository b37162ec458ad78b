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
    found = _measured(model, modules, data, source_of)
    stack, blocks = find_blocks(model, list(modules))
    source, routers, kept = source_of(stack, blocks), router_names(model), []
    for name, module in modules.items():
        scores = found.scores(name)
        chosen = highest(scores, left)
        index = block_of(name, stack)
        with source.loaded(index):
            _cut(model, name, module, routers, chosen)
            source.finish(index, [])
        tokens = tuple(found.sums[name][1].tolist())
        kept.append(KeptExperts(name, tuple(chosen.tolist()), tuple(scores.tolist()), tokens))
    setattr(text_config(model), key, left)
    return kept


@torch.no_grad()
def _measured(model: nn.Module, modules: dict[str, nn.Module], data: Calibration, source_of: SourceOf) -> ExpertScores:
    """Measure the scores of all experts in one pass through the blocks. Collective."""
    found = ExpertScores(modules)
    stack, blocks = find_blocks(model, list(modules))
    last = max(block_of(name, stack) for name in modules)
    replay = BlockReplay(model, source_of(stack, blocks), data)
    registered.switch_on(modules.values())
    try:
        with found.listening(), replay.in_place(), Progress("prune", last + 1, "blocks") as shown:
            for index in range(last + 1):
                with replay.resident(index):
                    replay.run(index, keep_output=True, before=found.expect)
                if own := [name for name in modules if block_of(name, stack) == index]:
                    found.add_up(data.ranks.sums.all_sum, own)
                shown.add(1, f"{stack}.{index}")
    finally:
        registered.switch_off(modules.values())
    return found


def _cut(model: nn.Module, name: str, module: ExpertsModule, routers: set[str], kept: Tensor) -> None:
    """Keep these experts of a module, and their entries in its router and the parent module."""
    number, parent = int(module.num_experts), name.rpartition(".")[0]
    beside = [model.get_submodule(router) for router in sorted(routers) if router.startswith(parent + ".")]
    persistent = {id(buffer) for buffer in persistent_buffers(model).values()}
    for owner in (module, *beside, model.get_submodule(parent)):
        for attribute, param in list(owner._parameters.items()):
            if param is not None and param.shape[:1] == (number,):
                owner._parameters[attribute] = nn.Parameter(param.data[kept].contiguous(), param.requires_grad)
        for attribute, buffer in list(owner._buffers.items()):
            if buffer is not None and id(buffer) in persistent and buffer.shape == (number,):
                owner._buffers[attribute] = buffer[kept].contiguous()
        for attribute in (*NUM_EXPERTS, "out_features"):
            if vars(owner).get(attribute) == number:
                setattr(owner, attribute, len(kept))
