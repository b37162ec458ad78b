"""Score keys of one layer's weights on this rank, in the units of its pattern."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from pst_ds.core.coded_weight import CodedRun, OwnWeights
from pst_ds.core.criteria.criterion import Criterion, WeightSlice
from pst_ds.core.criteria.learned_activation import LearnedActivation
from pst_ds.core.factors import Factors, TileFactors, tile_factors
from pst_ds.core.kernels.triton.launch import serves
from pst_ds.core.kernels.triton.table import OwnKeys, OwnUnits
from pst_ds.core.keys import SingleWeights, order_keys, score_keys, single_weights
from pst_ds.core.layout import Rect, StoredMatrix, positions_before, shard_tiles, view_in_shard
from pst_ds.core.select import Sampled
from pst_ds.core.units import block_keys, loss_keys, unit_tiles
from pst_ds.errors import InputError
from pst_ds.nn.layer import PSTLayer
from pst_ds.parallel import sharding
from pst_ds.parallel.halo import Halo

TILE_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Weights scored per tile, by device: on a CPU the keys of a tile fit a core's cache."""
UNIT_CACHE_BYTES = 256 << 20
"""Most bytes of cached keys of a layer's units of several weights."""
MOST_IN_A_UNIT = 1 << 12
"""Weights of the largest block that kernels sum: a thread has 32 of them."""
EVERY_TERM = LearnedActivation()
"""The criterion that uses all that a layer has: learned scores if it trains them, norms if they were measured."""


class LayerScores:
    """One layer's weights on this rank (:func:`current_base`), their halo, and the fp32 masters of its factors.

    ``criterion`` ranks the weights; None is :data:`EVERY_TERM`. ``gradient``: of the whole layer in storage shape, fp32
    on the weights' device, if the criterion needs it.
    """

    def __init__(
        self,
        name: str,
        layer: PSTLayer,
        factors: Factors,
        own: OwnWeights,
        halo: Halo | None = None,
        criterion: Criterion | None = None,
        gradient: Tensor | None = None,
    ):
        self.name = name
        self.layer = layer
        self.layout = layer.layout
        self.row_length = self.layout.shape[1]
        self.matrices = self.layout.matrices()
        self.rule = layer.rule
        self.pattern = layer.rule.pattern
        self.start = own.start
        self.stop = own.stop
        self.device = own.device
        self._own = own
        self._halo = halo
        self.criterion = EVERY_TERM if criterion is None else criterion
        self._gradient = gradient
        self._shard_numel = layer.split().share
        """Weights of every rank but the last ones, from which all ranks know where each matrix lies."""
        self._tile_size = TILE_ELEMENTS.get(self.device.type, TILE_ELEMENTS["cuda"])
        self.unit = self.pattern.unit(self.layout)
        """Rows and columns of the weights that are kept or pruned together."""
        self.region = self.pattern.aligned(self.layout, self.start, self.stop)
        """Flat range of the units that overlap the shard; what lies outside of the shard is in the halo."""
        self._factors = with_contiguous_columns(factors) if self.layout.transposed else factors
        self._unit_keys: dict[int, list[Tensor]] = {}
        """Keys of units by the number of their matrix: a selection reads them several times."""
        self.is_elsewhere = False
        """True for experts that other ranks own."""

    def lies_whole(self, matrix: StoredMatrix) -> bool:
        """Return whether one rank's shard has all weights of ``matrix``; the same on every rank."""
        rect = matrix.rect
        first = rect.r0 * self.row_length + rect.c0
        last = (rect.r1 - 1) * self.row_length + rect.c1 - 1
        # Shards have one size, so the weights of a matrix are in one if its first and last are.
        return first // self._shard_numel == last // self._shard_numel

    def of_all_ranks(self) -> "list[LayerScores]":
        """Return the parts of a stack whose experts are on different ranks, in their order; another rank's is empty.

        All ranks thus select the same matrices, of which each may hold none.
        """
        group = self.layer.group
        if group is None:
            return [self]
        nothing = OwnWeights(self._own.values[:0], 0, self.row_length)
        elsewhere = LayerScores(self.name, self.layer, self._factors, nothing, criterion=self.criterion)
        elsewhere.is_elsewhere = True
        parts = [elsewhere] * group.degree
        parts[group.position] = self
        return parts

    @property
    def in_order(self) -> bool:
        """True if the matrices are contiguous in the stored weight, one after another."""
        widths = {matrix.rect.c1 - matrix.rect.c0 for matrix in self.matrices}
        return widths == {self.row_length}

    def rects(self, matrix: StoredMatrix) -> Iterator[Rect]:
        """Yield rectangles of whole units that cover this rank's units of ``matrix``, in ascending order."""
        return unit_tiles(matrix.rect, self.unit, self.row_length, *self.region, self._tile_size)

    def own_rects(self, matrix: StoredMatrix) -> Iterator[Rect]:
        """Yield rectangles of exactly this rank's weights of ``matrix``, in ascending order, regardless of units."""
        return shard_tiles(matrix.rect, self.row_length, self.start, self.stop, self._tile_size)

    def keys(self, matrix: StoredMatrix, rect: Rect) -> Tensor:
        """Return the keys of single weights of a rectangle of ``matrix``, (rows, cols) int32."""
        factors = self._visible(matrix, rect)
        if self.criterion.has_kernels:
            scale = self.layer.magnitude_scales[matrix.index]
            return score_keys(self._values(rect), factors, self.layer.constants, scale)
        gradient = None
        if self._gradient is not None:
            gradient = self._gradient[rect.slices]
        outputs, inputs = matrix.ranges(rect, transposed=self.layout.transposed)
        return self._keys_in_torch(
            matrix,
            values=self._values(rect),
            factors=factors,
            outputs=_along(outputs, self.device, is_row=self.layout.transposed),
            inputs=_along(inputs, self.device, is_row=not self.layout.transposed),
            gradient=gradient,
        )

    def _visible(self, matrix: StoredMatrix, rect: Rect) -> TileFactors:
        """Return the factors of a rectangle that the criterion ranks by."""
        return self.criterion.visible(tile_factors(self._factors, self.layout, matrix, rect))

    def _keys_in_torch(
        self,
        matrix: StoredMatrix,
        *,
        values: Tensor,
        factors: TileFactors,
        outputs: Tensor,
        inputs: Tensor,
        gradient: Tensor | None,
    ) -> Tensor:
        """Return the keys of a slice of ``matrix``, int32 in the shape of ``values``. Raises InputError for scores that
        do not fit it.

        ``outputs``, ``inputs``: numbers counted from those of the matrix.
        """
        first = 0
        if self.layer.group is not None:
            # A rank that owns some experts of a stack counts outputs from the first expert of the whole stack.
            first = self.layer.group.position * self.layout.out_features
        part = WeightSlice(
            layer=self.name,
            base=values,
            outputs=outputs + (first + matrix.outputs.start),
            inputs=inputs,
            magnitude_scale=self.layer.magnitude_scales[matrix.index],
            constants=self.layer.constants,
            factors=factors,
            weight_gradient=gradient,
        )
        scores = self.criterion.scores(part)
        if not isinstance(scores, Tensor) or scores.shape != values.shape:
            shape = f"type {type(scores).__name__}"
            if isinstance(scores, Tensor):
                shape = f"shape {tuple(scores.shape)}"
            raise InputError(
                f"{self.name}: the criterion {type(self.criterion).__name__} returned scores of {shape} for weights of "
                f"shape {tuple(values.shape)}. Return a score for each weight"
            )
        # Keys have 32 bits, so scores of other types are rounded before they are compared.
        return order_keys(scores.to(torch.float32))

    def weight_keys(self, matrix: StoredMatrix) -> Iterator[Tensor]:
        """Yield the keys of single weights of the :meth:`rects` of ``matrix``, each (rows, cols) int32."""
        for rect in self.rects(matrix):
            yield self.keys(matrix, rect)

    def unit_keys(self, matrix: StoredMatrix, prune: int) -> Iterator[Tensor]:
        """Yield the keys of units of several weights: blocks, or N:M groups that would lose ``prune`` weights."""
        keys = (self._keys_of_units(matrix, rect, prune) for rect in self.rects(matrix))
        # a key has 4 bytes
        if self.num_units(matrix) * 4 > UNIT_CACHE_BYTES // len(self.matrices):
            yield from keys
            return
        # all of them, even if the caller stops early: the next call must not find a part
        if matrix.index not in self._unit_keys:
            self._unit_keys[matrix.index] = list(keys)
        yield from self._unit_keys[matrix.index]

    def _keys_of_units(self, matrix: StoredMatrix, rect: Rect, prune: int) -> Tensor:
        """Return the keys of the units of a rectangle: blocks, or N:M groups that would lose ``prune`` weights."""
        keys = self.keys(matrix, rect)
        if self.pattern.kind == "block":
            return block_keys(keys, self.unit)
        return loss_keys(keys, self.unit, prune)

    def num_units(self, matrix: StoredMatrix) -> int:
        """Return the number of units in :meth:`rects`, including units that other ranks count."""
        if self.unit == (1, 1):
            first = positions_before(matrix.rect, self.row_length, self.start)
            last = positions_before(matrix.rect, self.row_length, self.stop)
            return last - first
        return sum(rect.numel for rect in self.rects(matrix)) // (self.unit[0] * self.unit[1])

    def own_units(self, matrix: StoredMatrix) -> tuple[int, int]:
        """Return (first, last + 1) of the units of :meth:`rects` that start in this rank's shard."""
        return self._units_before(matrix, self.start), self._units_before(matrix, self.stop)

    def _units_before(self, matrix: StoredMatrix, index: int) -> int:
        """Return the number of units that start before the flat ``index``."""
        rows, cols = self.unit
        length = self.row_length
        count = 0
        for rect in self.rects(matrix):
            across = (rect.c1 - rect.c0) // cols
            # a row of units at a time: they start at first, first + cols, ...
            for first in range(rect.r0 * length + rect.c0, rect.r1 * length + rect.c0, rows * length):
                count += min(max(0, -(-(index - first) // cols)), across)
        return count

    def sample(self, matrix: StoredMatrix, positions: Tensor, on_device: Tensor) -> Sampled:
        """Return what computes the keys of this rank's weights among ``positions`` (int64, in storage order).

        ``on_device``: the same positions on the weights' device.
        """
        rect = matrix.rect
        # full rows are in the order of the shard: look at none but this rank's
        if rect.c1 - rect.c0 == self.row_length:
            offset = rect.r0 * self.row_length
            own = torch.tensor([self.start - offset, self.stop - offset])
            first, last = torch.searchsorted(positions, own).tolist()
            places = slice(first, last)
            return Sampled(places, self._singles(matrix, on_device[places]))
        # The matrix is a band of columns, so this rank's weights are not a run of its positions.
        flat = self._flat(matrix, positions)
        here = ((flat >= self.start) & (flat < self.stop)).nonzero().flatten().to(self.device)
        return Sampled(here, self._singles(matrix, on_device[here]))

    def _flat(self, matrix: StoredMatrix, positions: Tensor) -> Tensor:
        """Return the flat indices in the stored weight of ``positions`` in ``matrix``."""
        rect = matrix.rect
        width = rect.c1 - rect.c0
        offset = rect.r0 * self.row_length + rect.c0
        if width != self.row_length:
            positions = positions // width * self.row_length + positions % width
        if offset == 0:  # no copy of what may be millions of positions
            return positions
        return positions + offset

    def _singles(self, matrix: StoredMatrix, positions: Tensor) -> Tensor | SingleWeights:
        """Return the weights at ``positions`` of ``matrix`` as input of the kernels, or their keys, (positions,)."""
        flat = self._flat(matrix, positions)
        values = self._own.at(flat)
        width = matrix.rect.c1 - matrix.rect.c0
        rows = positions // width
        cols = positions % width
        singles = single_weights(
            values,
            rows,
            cols,
            self._visible(matrix, matrix.rect),
            self.layer.constants,
            self.layer.magnitude_scales[matrix.index],
        )
        if self.criterion.has_kernels:
            return singles
        gradient = None
        if self._gradient is not None:
            gradient = self._gradient.flatten()[flat].unsqueeze(1)
        outputs, inputs = rows, cols
        if self.layout.transposed:
            outputs, inputs = cols, rows
        keys = self._keys_in_torch(
            matrix,
            values=singles.weight,
            factors=singles.tile,
            outputs=outputs.unsqueeze(1),
            inputs=inputs.unsqueeze(1),
            gradient=gradient,
        )
        return keys.squeeze(1)

    def own_keys(self, matrix: StoredMatrix) -> OwnKeys | None:
        """Return this rank's weights of ``matrix`` as input of the kernels; None if the kernels cannot be used."""
        values = self._own.values
        if not self.criterion.has_kernels or not serves(self.device):
            return None
        # kernels read floating-point weights of at most 32 bits
        if isinstance(values, CodedRun) or values.element_size() > 4:
            return None
        keys = OwnKeys(
            values,
            start=self.start,
            row_length=self.row_length,
            rect=matrix.rect,
            tile=self._visible(matrix, matrix.rect),
            constants=self.layer.constants,
            weight_scale=self.layer.magnitude_scales[matrix.index],
        )
        if not keys.fits:
            return None
        return keys

    def unit_weights(self, matrix: StoredMatrix, lost: int = 0, prune: int = 0) -> OwnKeys | None:
        """Return the same with the units of several weights that overlap the shard.

        ``lost``: weights that an N:M group loses; ``prune``: that a row does.
        """
        own = self.own_keys(matrix)
        rows, cols = self.unit
        if self.pattern.kind == "row":
            serves_unit = rows == 1
        else:
            # the lanes of a thread block are a power of two
            are_powers_of_two = rows & (rows - 1) == 0 and cols & (cols - 1) == 0
            serves_unit = are_powers_of_two and rows * cols <= MOST_IN_A_UNIT
        # the bits of a row start at a byte
        if own is None or own.width % 8 or not serves_unit:
            return None
        first = positions_before(matrix.rect, self.row_length, self.region[0]) // (rows * cols)
        end = positions_before(matrix.rect, self.row_length, self.region[1]) // (rows * cols)
        none = own.values[:0]
        halo = self._halo or Halo(none, none)
        return replace(own, units=OwnUnits(self.unit, first, end, halo.before, halo.after, lost, prune))

    def write_own(self, keep: Tensor, rect: Rect, kept: Tensor) -> None:
        """Copy this rank's part of ``kept`` (rows, cols of ``rect``) into ``keep``, the mask of its shard."""
        for own in shard_tiles(rect, self.row_length, self.start, self.stop, 1 << 62):
            view_in_shard(keep, own, self.row_length, self.start).copy_(kept[own.inside(rect)])

    def _values(self, rect: Rect) -> Tensor:
        """Return W0 of a rectangle, (rows, cols): a view of the shard, or a copy of shard and halo."""
        first = rect.r0 * self.row_length + rect.c0
        last = (rect.r1 - 1) * self.row_length + rect.c1
        if self.start <= first and last <= self.stop:
            return self._own.rect(rect)
        if last - first > 2 * rect.numel:  # a few columns of a tall matrix
            return view_in_shard(self._whole_region, rect, self.row_length, self.region[0])
        return view_in_shard(self._region(first, last), rect, self.row_length, first)

    @cached_property
    def _whole_region(self) -> Tensor:
        """All weights of :attr:`region`, made once: a tall rectangle's range is most of them."""
        return self._region(*self.region)

    def _region(self, first: int, last: int) -> Tensor:
        """Return the flat weights [first, last) of :attr:`region`, from the shard and what other ranks sent."""
        assert self._halo is not None, f"{self.name} needs weights of other ranks"
        begin = self.region[0]
        before = self._halo.before[max(0, first - begin) : max(0, last - begin)]
        after = self._halo.after[max(0, first - self.stop) : max(0, last - self.stop)]
        return torch.cat([before, self._own.flat(first, last), after])


def _along(numbers: slice, device: torch.device, *, is_row: bool) -> Tensor:
    """Return ``numbers`` as a row (1, n) or as a column (n, 1), int64."""
    values = torch.arange(numbers.start, numbers.stop, device=device)
    if is_row:
        return values.unsqueeze(0)
    return values.unsqueeze(1)


def whole_factors(layers: Sequence[PSTLayer], *, with_scores: bool = True) -> list[Factors]:
    """Return the factors of each layer for the formulas, from their fp32 masters, on its mask's device.

    Without ``with_scores`` only those of the update.

    A stack that is divided among ranks has the factors of this rank's experts. Collective: under ZeRO-3 one all-gather
    for all layers, or two.
    """
    places: list[tuple[int, str]] = []  # number of the layer, name of the factor
    params: list[nn.Parameter] = []
    for number, layer in enumerate(layers):
        for name, param in layer.factor_parameters():
            if with_scores or name in layer.update_specs:
                places.append((number, name))
                params.append(param)
    homes = [sharding.shard_of(layer.pst_mask).values.device for layer in layers]
    masters: list[Tensor] = []
    if params:
        # of all layers at once, since each call is a collective
        masters = sharding.fp32_masters(params, homes[0])
    values: list[dict[str, Tensor]] = [{} for _ in layers]
    for (number, name), master in zip(places, masters, strict=True):
        values[number][name] = master.to(homes[number])
    factors: list[Factors] = []
    for layer, of_layer, home in zip(layers, values, homes, strict=True):
        factors.append(layer.factors(of_layer).to(home))
    return factors


def current_base(layer: PSTLayer) -> OwnWeights:
    """Return this rank's weights of a layer without its update; fp32 masters if trained.

    Collective if :func:`sharding.master_shard` is.
    """
    if layer.weight is None:
        return layer.own_base()
    shard = sharding.master_shard(layer.weight)
    values = shard.values.to(sharding.shard_of(layer.pst_mask).values.device)
    return OwnWeights(values, shard.start - sharding.first_index(layer.weight), layer.layout.shape[1])


def with_contiguous_columns(factors: Factors) -> Factors:
    """Return the factors with contiguous transposes of A and U, which a Conv1D reads by columns."""

    def columns(by_output: Tensor | None) -> Tensor | None:
        if by_output is None:
            return None
        return by_output.t().contiguous().t()

    return replace(factors, A=columns(factors.A), U=columns(factors.U))
