"""Measure a norm by its outputs: root-mean-square or layer norm, with its gain, bias and epsilon."""

import torch
from torch import Tensor

from pst_ds.inference.decoder.problems import Problems
from pst_ds.inference.decoder.table import Part
from pst_ds.runtime.native_loop import Norm

_EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")
_SMALL = 1e-3
"""Factor of an input whose variance is then small enough for epsilon to show."""


@torch.no_grad()
def measured_norm(norm: Part, width: int, problems: Problems) -> Norm | None:
    """Return a root-mean-square or layer norm of ``width`` numbers, measured from its outputs.

    Outputs include what its attributes do not tell, such as a gain stored as its difference from 1. Notes a problem and
    returns None for another norm.
    """
    weights = list(norm.parameters(recurse=False))
    if any(tuple(weight.shape) != (width,) for weight in weights):
        problems.note(f"{type(norm).__name__} has weights of another shape than ({width},)")
        return None
    dtype = weights[0].dtype if weights else torch.float32
    ramp = torch.linspace(-1.0, 2.0, width, dtype=dtype)
    ones = torch.ones(width, dtype=dtype)
    bias = norm(torch.zeros_like(ramp)).float()
    output_of_ramp = norm(ramp).float()
    # a layer norm maps a constant to its bias
    is_centred = bool((norm(ones).float() - bias).abs().max() <= 1e-3 * (output_of_ramp - bias).abs().max())
    # alternating signs are unchanged when normalised, and none is 0, so that the gain can be read from them
    signs = ones.clone()
    signs[1::2] = -1.0
    epsilon = _epsilon(norm, signs, bias)
    gain = (norm(signs).float() - bias) / _normalised(signs, epsilon, is_centred=is_centred)
    expected = _normalised(ramp, epsilon, is_centred=is_centred) * gain + bias
    # the loop adds a bias to layer norms only
    has_known_bias = is_centred or not bool(bias.any())
    if not has_known_bias or not torch.allclose(output_of_ramp, expected, rtol=2e-2, atol=1e-3):
        problems.note(f"{type(norm).__name__} is neither a root-mean-square norm nor a layer norm")
        return None
    return Norm(gain, bias if is_centred else None, epsilon)


def _normalised(values: Tensor, epsilon: float, *, is_centred: bool) -> Tensor:
    """Return ``values`` after a norm without gain and bias."""
    values = values.float()
    if is_centred:
        values = values - values.mean()
    return values * (values.square().mean() + epsilon).rsqrt()


def _epsilon(norm: Part, values: Tensor, bias: Tensor) -> float:
    """Return the epsilon of a norm, or measure it where no attribute has it: how much it shrinks small ``values``.

    With variance v, outputs of ``values`` are proportional to (v + e)^-1/2, and those of s times ``values`` to
    s (s^2 v + e)^-1/2. The squared ratio r of the second to the first gives e = s^2 v (1 - r) / (r - s^2).
    """
    for name in _EPSILON_NAMES:
        epsilon = getattr(norm, name, None)
        if isinstance(epsilon, float):
            return epsilon
    variance = float((values.float() - values.float().mean()).square().mean())
    large = float((norm(values).float() - bias).norm())
    small = float((norm(_SMALL * values).float() - bias).norm())
    ratio = (small / large) ** 2
    measured = _SMALL**2 * variance * (1 - ratio) / (ratio - _SMALL**2)
    # two digits, because models have a round number here, and the outputs are rounded
    return float(f"{max(measured, 1e-12):.2g}")
