"""Sizes of a model, from which the memory and the time of a run are computed."""

from dataclasses import dataclass, replace
from typing import Literal, Self, TypeAlias

from pst_ds.core.bracket import sample_size

Kind: TypeAlias = Literal["weight", "factor", "mask", "scales"]


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """``count`` equal parameter tensors."""

    numel: int
    element_size: int
    count: int = 1
    trainable: bool = False
    kind: Kind = "weight"
    """A "factor" belongs to a pruned matrix: every rank gathers its fp32 master for a mask update. "scales" quantise a
    layer's weights during training. Everything else is a "weight"."""
    stands_for: int | None = None
    """Weights that these bytes represent: the number of quantised values, 0 for their scales; None for ``numel``."""
    in_stack: bool = False
    """Whether they belong to a pruned stack of experts."""
    divided_by: int = 1
    """Neighbouring ranks that divide the stack of experts: all numbers are one rank's, and fewer ranks share them."""

    @property
    def nbytes(self) -> int:
        return self.numel * self.element_size * self.count

    @property
    def parameters(self) -> int:
        weights = self.numel if self.stands_for is None else self.stands_for
        return weights * self.count

    def divided(self, degree: int) -> Self:
        """Return one rank's tensors if ``degree`` ranks divide the stack of experts; others are unchanged."""
        if not self.in_stack:
            return self
        stands_for = self.stands_for
        if stands_for is not None:  # None follows numel
            stands_for //= degree
        return replace(self, numel=self.numel // degree, stands_for=stands_for, divided_by=degree)


@dataclass(frozen=True, slots=True)
class ModuleNumbers:
    """Parameters that a module holds directly, which ZeRO-3 gathers for its turn."""

    numel: int
    gathered_bytes: int
    """Bytes of all its parameters, gathered."""
    largest_gather_bytes: int
    """Bytes of its largest collective: parameters of one dtype are gathered together."""
    work_bytes: int = 0
    """Temporaries of a pruned layer, see :func:`pst_ds.planning.memory.layer_work_bytes`; 0 for another."""
    count: int = 1
    bands: int = 0
    """Bands of rows in a pruned layer's backward pass; 0 for another."""
    experts: int = 1
    """Experts of a pruned stack, each of which is multiplied by itself unless there are ``groups``."""
    groups: int = 0
    """Groups of experts whose gradients kernels compute together, in a stack that is multiplied as a whole."""
    by_kernels: bool = True
    """Whether Triton kernels can compute a pruned layer; without, torch's operators do."""

    def divided(self, degree: int) -> Self:
        """Return one rank's module if ``degree`` ranks divide its experts; a module without experts is unchanged."""
        if self.experts == 1:
            return self
        work_bytes = self.work_bytes
        if self.groups:
            # at least those of one expert: its merged weight and two temporaries of that size
            work_bytes = max(work_bytes // degree, 3 * self.gathered_bytes // self.experts)
        return replace(
            self,
            numel=self.numel // degree,
            gathered_bytes=self.gathered_bytes // degree,
            largest_gather_bytes=self.largest_gather_bytes // degree,
            work_bytes=work_bytes,
            bands=self.bands // degree,
            experts=self.experts // degree,
            # rounded up: a part of a group is computed like a group
            groups=-(-self.groups // degree),
        )


@dataclass(frozen=True, slots=True)
class MatrixGroup:
    """``count`` pruned matrices of ``numel`` weights."""

    numel: int
    count: int = 1
    share: float = 1.0
    """Tokens that each is multiplied with, relative to a rank's micro-batch: k / E for experts."""
    per_layer: int = 1
    """Matrices in the stack of experts that each belongs to."""
    by_kernels: bool = True
    """Whether Triton kernels can compute its layer and score its weights."""
    divided_by: int = 1
    """See :attr:`TensorGroup.divided_by`."""
    kind: str = "matrix"
    """Kind of its pattern."""

    def num_cut(self, shards: int) -> int:
        """Count the matrices that shard borders cut, which ranks select together: all except most experts."""
        if self.per_layer == 1:
            return self.count
        # a stack has one border fewer than shards, and each border cuts at most one expert
        borders = shards // self.divided_by - 1
        stacks = self.count // self.per_layer
        return stacks * min(self.per_layer, borders)

    def divided(self, degree: int) -> Self:
        """Return one rank's matrices if ``degree`` ranks divide the experts; other matrices are unchanged."""
        if self.per_layer == 1:
            return self
        return replace(
            self,
            count=self.count // degree,
            share=self.share * degree,  # the tokens of all these ranks are sent to its experts
            per_layer=self.per_layer // degree,
            divided_by=degree,
        )


@dataclass(frozen=True, slots=True)
class ModelNumbers:
    """Sizes of a model for the cost formulas."""

    tensors: tuple[TensorGroup, ...]
    modules: tuple[ModuleNumbers, ...]
    matrices: tuple[MatrixGroup, ...]
    score_rank: int = 0
    update_rank: int = 0
    updated_weights: int = 0
    """Weights with an update form without kernels, of which a mask update makes an fp32 copy."""
    dense_weights: int = 0
    """Weights of linear layers that are not pruned, such as a causal model's head."""
    sliced_weights: int = 0
    """The part of ``dense_weights`` in quantised output layers, which are dequantised slice by slice."""
    attention_width: int = 0
    """Width of all attention heads of a layer, summed over layers."""
    products: int = 0
    """Products of two inputs of a pruned layer, summed over layers: what ``schedule.solves`` sums in fp64."""
    flattened_factors: int = 0
    """Factors of linear layers that are views of few flat parameters, which take their place in ``tensors`` and
    ``modules``, see :mod:`pst_ds.nn.flat_factors`; 0 if each factor is a parameter."""
    flat_parameters: int = 0
    """These flat parameters."""
    dispatch_width: int = 0
    """Values that a token sends to its experts in a forward pass, summed over layers: experts per token x width."""
    divided_by: int = 1
    """See :attr:`TensorGroup.divided_by`."""

    def divided(self, degree: int) -> Self:
        """Return the numbers of one of ``degree`` neighbouring ranks that divide the experts of every stack."""
        return replace(
            self,
            tensors=tuple(tensor.divided(degree) for tensor in self.tensors),
            modules=tuple(module.divided(degree) for module in self.modules),
            matrices=tuple(matrix.divided(degree) for matrix in self.matrices),
            divided_by=degree,
        )

    @property
    def pruned_weights(self) -> int:
        return sum(m.numel * m.count for m in self.matrices)

    @property
    def multiplied_weights(self) -> float:
        """Pruned weights that a token is multiplied with: k of E experts."""
        return sum(m.numel * m.count * m.share for m in self.matrices)

    @property
    def num_matrices(self) -> int:
        """Matrices of all ranks."""
        return sum(m.count * m.divided_by for m in self.matrices)

    @property
    def num_layers(self) -> int:
        """Pruned layers."""
        return sum(m.count for m in self.modules if m.bands)

    @property
    def num_trainables(self) -> int:
        """Trainable tensors."""
        return sum(t.count for t in self.tensors if t.trainable)

    def weights_here(self, shards: int) -> float:
        """Return the pruned weights of a rank's shards."""
        # the count of a divided stack is one rank's
        return sum(m.numel * m.count * m.divided_by for m in self.matrices) / shards

    def num_cut(self, shards: int) -> int:
        """Count the matrices that ranks select together in a mask update; the others are on one rank each."""
        return sum(m.num_cut(shards) for m in self.matrices)

    def sampled_keys(self, shards: int) -> int:
        """Count the keys of these matrices that a mask update sends to every rank of those that select them."""
        return sum(sample_size(m.numel) * m.num_cut(shards) for m in self.matrices)

    @property
    def parameters(self) -> int:
        # masks and scales are not parameters to a user
        return sum(t.parameters for t in self.tensors if t.kind in ("weight", "factor"))

    @property
    def coded_weights(self) -> int:
        """Frozen weights that are stored quantised."""
        return sum((t.stands_for or 0) * t.count for t in self.tensors)

    @property
    def trainables(self) -> int:
        """Trainable values."""
        return sum(t.numel * t.count for t in self.tensors if t.trainable)

    @property
    def factor_parameters(self) -> int:
        return sum(t.numel * t.count for t in self.tensors if t.kind == "factor")

    @property
    def whole_bytes(self) -> int:
        """Bytes of all unsharded parameters and masks, which a pass of gathers brings to a rank."""
        return sum(t.nbytes for t in self.tensors)

    def copied_bytes(self, ranks: int, kind: str = "") -> int:
        """Return the bytes of frozen weights and masks, or of one kind, of which so many neighbours share a copy.

        Neighbours have other experts, so that only a whole copy has those of a rank.
        """
        total = 0
        for tensor in self.tensors:
            is_copied = not tensor.trainable and (tensor.divided_by == 1 or ranks == 1)
            if is_copied and kind in ("", tensor.kind):
                total += tensor.nbytes
        return total

    def divided_bytes(self, *, trained: bool) -> int:
        """Return the bytes of stacks of experts on ranks that a rank gathers, or only those that train."""
        divided = [t for t in self.tensors if t.divided_by > 1]
        return sum(t.nbytes for t in divided if t.trainable or not trained)

    def bytes_of(self, kind: str) -> int:
        """Return the bytes of the tensors of one :attr:`TensorGroup.kind`, unsharded."""
        return sum(t.nbytes for t in self.tensors if t.kind == kind)
