"""What a sharding is: how the values of a parameter are divided over ranks, and how they are read and written there."""

# ruff: noqa: B027 - many methods do nothing unless a sharding defines them

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's part of a parameter: flat values from index ``start``, without padding."""

    values: Tensor
    start: int


@dataclass(frozen=True, slots=True)
class Split:
    """How ``numel`` flat values are divided over ``ranks``: ``share`` for each, fewer or none for the last ones."""

    numel: int
    share: int
    ranks: int
    own: int
    """Index of this rank."""

    def range_of(self, rank: int) -> tuple[int, int]:
        """Return the flat range [first, last) of a rank."""
        return min(rank * self.share, self.numel), min((rank + 1) * self.share, self.numel)


@dataclass(frozen=True, slots=True)
class Fragment:
    """Flat values [start, stop) of a trained parameter in this rank's optimizer.

    They are stored from index ``offset`` of ``owner``, and the moments from the same index of what the optimizer keeps
    for ``owner``.
    """

    name: str
    """Name of the parameter."""
    start: int
    stop: int
    owner: Tensor
    """fp32 tensor in the parameter groups of torch's optimizer."""
    offset: int

    def cut(self, start: int, stop: int) -> "Fragment":
        """Return the part within [start, stop), which may be empty."""
        start = max(start, self.start)
        stop = max(start, min(stop, self.stop))
        offset = self.offset + start - self.start
        return Fragment(name=self.name, start=start, stop=stop, owner=self.owner, offset=offset)


class Sharding(ABC):
    """One way to divide parameters over ranks. It has no state: a parameter carries what it needs.

    A subclass must define :meth:`owns`, :meth:`ranks`, :meth:`rank`, :meth:`local` and :meth:`gather`. With the
    defaults of the other methods, rank i of n holds the flat values [i * p, (i + 1) * p) with p = ceil(numel / n), the
    ranks are those of the default process group, and what :meth:`local` returns is where a parameter is stored. If
    the optimizer trains another tensor than the parameter, :meth:`optimized` must return it.

    A package adds a sharding by an entry point in the group "pst_ds.shardings", see :mod:`pst_ds.plugins`. Its
    :meth:`owns` is asked before those of pst-ds.
    """

    is_partitioned = True
    """False if every rank holds all values."""
    splits_rows = False
    """True if ranks hold whole rows of the first dimension, also of a mask, which has a row for each of the weight."""
    divides_experts = False
    """True if other ranks may hold other experts of a stack, see :class:`pst_ds.parallel.sharding.ExpertShare`."""
    reshards_state_dicts = False
    """True if any number of ranks can load what a module's state dict has of a parameter, as with DTensors."""

    @abstractmethod
    def owns(self, param: Tensor) -> bool:
        """Return whether ``param`` is divided in this way at the moment. Called often, so it must be cheap."""

    @abstractmethod
    def ranks(self, param: nn.Parameter) -> int:
        """Return the number of ranks that ``param`` is divided over."""

    @abstractmethod
    def rank(self, param: nn.Parameter) -> int:
        """Return the index of this rank among :meth:`ranks`."""

    @abstractmethod
    def local(self, param: nn.Parameter) -> Tensor:
        """Return this rank's flat values, without padding: a detached view that can be written to."""

    @abstractmethod
    def gather(self, param: nn.Parameter) -> Tensor:
        """Return all values of ``param`` in its shape; of experts on ranks those of this rank. Collective."""

    # Where the values are

    def shape(self, param: nn.Parameter) -> torch.Size:
        """Return the shape of :meth:`gather`."""
        return param.shape

    def share(self, param: nn.Parameter, numel: int) -> int:
        """Return how many of ``numel`` flat values, divided like ``param``, every rank but the last ones holds."""
        return -(-numel // self.ranks(param))

    def split(self, param: nn.Parameter) -> Split:
        """Return how the values of :meth:`gather` are divided."""
        numel = self.shape(param).numel()
        return Split(numel=numel, share=self.share(param, numel), ranks=self.ranks(param), own=self.rank(param))

    def first_index(self, param: nn.Parameter) -> int:
        """Return the flat index in the full parameter at which the values of :meth:`gather` start."""
        return 0

    def own_part(self, like: nn.Parameter, whole: Tensor) -> Tensor:
        """Return this rank's part of the flat values ``whole``, (n,), when they are divided like ``like``: a view."""
        share = self.share(like, whole.numel())
        first = self.rank(like) * share
        return whole[first : first + share]

    def group(self, param: nn.Parameter) -> dist.ProcessGroup | None:
        """Return the ranks that ``param`` is divided over; None for the default group."""
        return None

    # Written values

    def write(self, param: nn.Parameter, values: Tensor) -> None:
        """Overwrite this rank's values of a frozen ``param``. Every rank must do so before the next gather."""
        self.local(param).copy_(values)
        self.changed(param)
        self.finish_writes()

    def changed(self, param: nn.Parameter) -> None:
        """Let the next gather of a frozen ``param`` send what was written to :meth:`local`."""

    def finish_writes(self) -> None:
        """Wait until what was written to :meth:`local` of any parameter can be gathered."""

    # Gathered and released parameters

    def is_released(self, param: nn.Parameter) -> bool:
        """Return whether ``param`` does not hold all its values at the moment."""
        return self.is_partitioned

    def gathered(
        self, params: Sequence[nn.Parameter], writer_rank: int | None
    ) -> AbstractContextManager[object, bool | None]:
        """Gather ``params`` inside the context. Collective. With ``writer_rank`` all keep the values it leaves."""
        return nullcontext()

    def hold(self, param: nn.Parameter) -> None:
        """Keep ``param``, if it is gathered, gathered until :meth:`let_go`, even after its module has run."""

    def let_go(self, param: nn.Parameter) -> None:
        """End :meth:`hold`."""

    def release(self, model: nn.Module) -> None:
        """Release parameters of ``model`` that stayed gathered after a pass. Not collective."""

    # What is refused

    def require_weights_everywhere(self) -> None:
        """Raise InputError if weights are on one rank only until they are divided: masks depend on them."""

    def require_supported(self, name: str, param: nn.Parameter) -> None:
        """Raise InputError if ``param`` is divided in a way that pruned layers do not support."""

    def require_whole(self, name: str, param: nn.Parameter, remedy: str) -> None:
        """Raise InputError, with the ``remedy``, if code that reads all values of ``param`` would see a part."""

    def require_alike(self, params: Sequence[tuple[str, nn.Parameter]], others: Sequence[str]) -> None:
        """Raise InputError if pruned layers cannot share masks over these ranks.

        ``params``: the named parameters of all pruned layers that are divided in this way. ``others``: the names of
        those that are not.
        """

    # New parameters

    def split_as(self, like: nn.Parameter, params: Sequence[nn.Parameter]) -> None:
        """Divide the whole ``params``, with the values of rank 0, like ``like``. Collective."""

    def bytes_split_as(self, like: nn.Parameter, numel: int, own: Tensor) -> nn.Parameter:
        """Return a frozen parameter of ``numel`` bytes, divided like ``like``; this rank has ``own``. Collective."""
        return nn.Parameter(own, requires_grad=False)

    def drop(self, param: nn.Parameter) -> None:
        """Free the memory of a parameter that no module uses any more."""

    def is_unfilled(self, param: nn.Parameter) -> bool:
        """Return whether ``param`` has no memory for its values yet."""
        return False

    # fp32 masters, and the optimizer's moments

    def rows(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of a ``tensor`` that is divided in this way, in its shape; detached."""
        return tensor.detach()

    def optimized(self, param: nn.Parameter) -> Tensor:
        """Return the fp32 tensor that torch's optimizer trains for ``param`` on this rank: a master, or itself."""
        return getattr(param, "fp32_master", param)

    def own_master(self, param: nn.Parameter) -> Tensor:
        """Return this rank's flat values of the fp32 master of a trained ``param``, or its values without one."""
        master = self.optimized(param)
        if master is param:
            return self.local(param)
        return master.detach().view(-1)

    def masters(self, params: Sequence[nn.Parameter], device: torch.device | None) -> list[Tensor]:
        """Return the full fp32 masters of trained ``params`` in their shapes, on ``device`` (None: unchanged).

        A parameter without a master is returned as an fp32 copy. Collective: one all-gather.
        """
        own = [self.padded(param, self.own_master(param).float()) for param in params]
        return self.all_gathered(params, own, device)

    def fragment(self, name: str, param: nn.Parameter, optimizer: Optimizer) -> Fragment | None:
        """Return where torch's ``optimizer`` holds this rank's values of ``param``; None if it holds no value."""
        split = self.split(param)
        start, stop = split.range_of(split.own)
        first = self.first_index(param)
        return Fragment(name=name, start=first + start, stop=first + stop, owner=self.optimized(param), offset=0)

    def replicates_optimizer(self, param: nn.Parameter) -> bool:
        """Return whether every rank holds the full optimizer state of ``param``."""
        return not self.is_partitioned

    def cuts_optimizer_evenly(self, param: nn.Parameter) -> bool:
        """Return whether rank r of n holds the state of the flat values [r * p, (r + 1) * p), p = ceil(numel / n)."""
        split = self.split(param)
        return split.share == -(-split.numel // split.ranks)

    def padded(self, param: nn.Parameter, own: Tensor) -> Tensor:
        """Return this rank's flat values ``own`` of ``param`` with zeros after them, as many as the first ranks have.

        :meth:`all_gathered` needs as many values of every rank.
        """
        return functional.pad(own, (0, self.split(param).share - own.numel()))

    def all_gathered(
        self, params: Sequence[nn.Parameter], own: Sequence[Tensor], device: torch.device | None
    ) -> list[Tensor]:
        """Return values for ``params``, in their shapes, from this rank's flat ones, padded to the share of a rank.

        All have the same ranks. Collective: one all-gather, and one copy to ``device`` (None: none).
        """
        world = self.ranks(params[0])
        group = self.group(params[0])
        # Shards of one size lie in a row, so that one copy puts those of all ranks together.
        order = sorted(range(len(params)), key=lambda i: own[i].numel())
        local = [own[i] for i in order]
        flat = torch.cat(local)
        if dist.get_backend(group) == "nccl":
            flat = flat.cuda(non_blocking=True)
        everyone = torch.empty(world * flat.numel(), dtype=flat.dtype, device=flat.device)
        dist.all_gather_into_tensor(everyone, flat, group=group)
        everyone = everyone.to(device or everyone.device)
        sizes = Counter(piece.numel() for piece in local)  # in their order
        parts = everyone.view(world, -1).split([size * count for size, count in sizes.items()], dim=1)
        # (world, count * size) becomes (count, world * size): each row has the values of one parameter, padded.
        padded: list[Tensor] = []
        for part, count in zip(parts, sizes.values(), strict=True):
            padded.extend(part.unflatten(1, (count, -1)).transpose(0, 1).flatten(1))
        values: dict[int, Tensor] = {}
        for i, row in zip(order, padded, strict=True):
            shape = self.shape(params[i])
            values[i] = row[: shape.numel()].view(shape)
        return [values[i] for i in range(len(params))]
