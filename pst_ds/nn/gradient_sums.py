"""Sums over the inputs of pruned layers and the gradients of their outputs, collected in the backward pass.

They do not depend on the order of the tokens or on their distribution over ranks: values are rounded to integers, whose
products and sums are exact. A layer has I inputs and O outputs.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pst_ds.core.layout import WeightLayout
from pst_ds.nn.inject import pst_layers
from pst_ds.parallel.ranks import sum_over_ranks, world_size

LEAST_WEIGHT = 0.1
"""Weight of a token without gradient; the mean weight of the others is that much above 1."""
_LARGEST_INPUT = 255
"""Largest integer of an input."""
_TOKENS = 256
"""Tokens per product: _TOKENS * _LARGEST_INPUT**2 < 2**24, so fp32 products are exact."""
_RANGE = 24.0
"""Root mean squares that the largest integer of an input represents at least."""
_BITS_OF_GRADIENTS = 10
"""Bits of a gradient of average size; squares of larger ones are exact too, in fp64."""
_PANEL = 512
"""Columns of a product. Those above the diagonal are not computed."""


@dataclass(slots=True)
class _Scales:
    """Units of a layer's integers, and the size of its gradients."""

    inputs: Tensor
    """(I,) fp32: powers of two."""
    gradients: float
    """A power of two."""
    mean_square: float
    """Mean squared norm of a token's gradient."""


class LayerSums:
    """Sums of one layer over this rank's tokens: in the first batch to find the scales, later of integers."""

    def __init__(self, layout: WeightLayout, device: torch.device, *, by_token: bool):
        self._by_token = by_token
        self._scales: _Scales | None = None
        self.first = torch.zeros(2 + 2 * layout.in_features, dtype=torch.float64, device=device)
        """Sums over tokens of 1, g, x_j^2 and g x_j^2, where g is the token's squared gradient."""
        self.gram = torch.zeros(layout.in_features, layout.in_features, dtype=torch.float64, device=device)
        """(I, I): lower triangle of sum of w x x', in the units of the inputs."""
        self.rows = torch.zeros(layout.out_features, dtype=torch.float64, device=device)
        """(O,): sum of each output's squared gradient, in units."""

    @torch.no_grad()
    def add(self, x: Tensor, gradient: Tensor, real: Tensor | None) -> None:
        """Add tokens with inputs ``x`` (N, I) and the ``gradient`` of their outputs, (N, O). ``real``: (N,) bool."""
        x = x.float()
        # A value that is not finite in one token must not make the sums NaN.
        gradient = gradient.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) / world_size()
        if real is not None and len(real) == len(x):  # ranks that share sequences have parts of them
            x = x[real]
            gradient = gradient[real]
        token_squares = gradient.square().sum(1)  # (N,)
        scales = self._scales
        if scales is None:
            self._add_first(x.double().square_(), token_squares.double())
            return
        if self._by_token:
            # The square root of a token's weight goes into both factors of x x'.
            x = x * (token_squares / scales.mean_square + LEAST_WEIGHT).sqrt().unsqueeze(1)
        integers = (x / scales.inputs).nan_to_num(0.0).round_().clamp_(-_LARGEST_INPUT, _LARGEST_INPUT)
        for part in integers.split(_TOKENS):  # (<= _TOKENS, I): longer products would not be exact in fp32
            for start in range(0, part.shape[1], _PANEL):
                self.gram[start:, start : start + _PANEL] += part[:, start:].t() @ part[:, start : start + _PANEL]
        self.rows += (gradient.double() / scales.gradients).round_().square_().sum(0)

    def _add_first(self, squares: Tensor, token_squares: Tensor) -> None:
        """Add to :attr:`first`. ``squares``: (N, I), of the inputs; ``token_squares``: (N,), g of each token."""
        tokens = token_squares.new_tensor([len(squares)])
        self.first += torch.cat([tokens, token_squares.sum()[None], squares.sum(0), token_squares @ squares])

    def settle(self, first: Tensor) -> None:
        """Set the scales by ``first`` of all ranks."""
        tokens = max(float(first[0]), 1.0)
        mean_square = _few_bits(float(first[1] / first[0].clamp(min=1.0))) or 1.0
        squares, weighted = first[2:].view(2, -1)  # (I,) each
        if self._by_token:
            squares = weighted / mean_square + LEAST_WEIGHT * squares
        # Powers of two absorb that the last bits of these fp64 sums depend on the order of the tokens.
        units = _power_of_two((squares / tokens).sqrt() * (_RANGE / _LARGEST_INPUT))
        mean_size = torch.tensor(mean_square / len(self.rows), dtype=torch.float64).sqrt()
        self._scales = _Scales(
            inputs=units.float(),
            gradients=float(_power_of_two(mean_size)) * 2.0**-_BITS_OF_GRADIENTS,
            mean_square=mean_square,
        )

    def products(self, gram: Tensor) -> Tensor:
        """Return sum of w x x', (I, I) fp64, from ``gram`` of all ranks."""
        assert self._scales is not None
        units = self._scales.inputs.double()
        symmetric = gram.tril() + gram.tril(-1).t()  # panels have entries above the diagonal too, which tril drops
        return symmetric * units * units.unsqueeze(1)


def _power_of_two(values: Tensor) -> Tensor:
    """Return the smallest powers of two above ``values``, fp64; 1 for 0."""
    return torch.where(values > 0, torch.exp2(values.clamp(min=1e-30).log2().ceil()), 1.0)


def _few_bits(value: float) -> float:
    """Return ``value`` with 8 significant bits, which the order of a sum does not change."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 256), exponent - 8)


class GradientSums:
    """Listen to the pruned layers of a model, until :meth:`close`.

    Call :meth:`expect` before each micro-batch and :meth:`settle` after each batch.

    Args:
        device: device of the computation, which offloaded parameters are not on.
        by_token: weight each token by its squared gradient plus :data:`LEAST_WEIGHT`, for models that read few tokens;
            otherwise all weigh the same.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, by_token: bool):
        self.device = device
        self._layers = pst_layers(model)
        self._real: Tensor | None = None
        self._is_settled = False
        self._sums = {}
        for name, layer in self._layers.items():
            self._sums[name] = LayerSums(layer.layout, device, by_token=by_token)
            layer.listen = partial(self._add, name)

    def expect(self, batch: Mapping[str, Tensor]) -> None:
        """Set the micro-batch that runs next. Its optional ``attention_mask`` is 0 for padding."""
        mask = batch.get("attention_mask")
        self._real = None if mask is None else mask.flatten().bool()

    def _add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        self._sums[name].add(x, gradient, self._real)

    def settle(self) -> None:
        """Set the scales of all layers after the first batch. Collective."""
        if self._is_settled:
            return
        self._is_settled = True
        sums = list(self._sums.values())
        lengths = [len(layer_sums.first) for layer_sums in sums]
        # one collective for all layers
        totals = sum_over_ranks(torch.cat([layer_sums.first for layer_sums in sums]))
        for layer_sums, first in zip(sums, totals.split(lengths), strict=True):
            layer_sums.settle(first)

    def statistics(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (sum of w x x' (I, I), squared gradients (O,)) of each layer, fp64. Collective."""
        for layer_sums in self._sums.values():
            yield layer_sums.products(sum_over_ranks(layer_sums.gram)), sum_over_ranks(layer_sums.rows)

    def close(self) -> None:
        """Stop listening."""
        for layer in self._layers.values():
            layer.listen = None
