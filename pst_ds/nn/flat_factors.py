"""One parameter for the factors of all layers, since engines pay for every tensor and not for its size.

A layer has six or more factors. DeepSpeed gathers, reduces, partitions and updates each of them with Python code,
which takes the host longer than a GPU needs for the products of models below some 13 billion weights
(``python -m tools.bench.host``). :func:`flatten_factors` puts all factors that learn at one rate into one parameter, so
that this time does not depend on the number of layers. Each rank has a whole copy of the values and their gradients.

How a training step goes then::

    input embedding -> FlatFactors -> block 0 -> ... -> loss

:class:`FlatFactors` is a module between the input embedding and the first block. In the forward pass the engine has
gathered its parameters, as for any module; it copies their values to where the layers' factors are views. In the
backward pass the layers add their gradients to another flat tensor, and :class:`FlatFactors`, whose turn is last, since
the outputs of all layers depend on its own, hands that tensor to autograd as the gradient of its parameters.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pst_ds.nn.inject import pst_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.linear import PSTLinear
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import ParamGroup
from pst_ds.parallel.sharding import PlaceInFlat

_MODULE = "pst_flat_factors"
"""Name of the :class:`FlatFactors` in a model."""


def flatten_factors(model: nn.Module, groups: Sequence[ParamGroup]) -> None:
    """Put the factors of each group of ``groups`` into one parameter, which replaces them there. Collective.

    Call it last before the engine is built: ``groups`` are those of AdamW, and the layers of ``model`` have their
    values. Factors of stacks of experts stay parameters: they are few tensors, and too large for a whole copy on each
    rank. A model without input embeddings is unchanged, since its outputs need not depend on :class:`FlatFactors`.
    """
    embeddings = input_embeddings(model)
    if not embeddings:
        return
    flat_factors = FlatFactors()
    owners = owners_of_factors(model)
    for group in groups:
        factors: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for param in group["params"]:
            if param in owners:
                factors.append(param)
            else:
                others.append(param)
        if factors:
            group["params"] = [flat_factors.take(factors, owners), *others]
    if not flat_factors.flats:
        return
    model.add_module(_MODULE, flat_factors)
    for embedding in embeddings:
        embedding.register_forward_hook(flat_factors.follow)


def flat_sizes(model: nn.Module, groups: Sequence[ParamGroup]) -> list[int]:
    """Return the number of values of each parameter that :func:`flatten_factors` would make."""
    if not input_embeddings(model):
        return []
    owners = owners_of_factors(model)
    sizes = []
    for group in groups:
        size = sum(sharding.full_numel(param) for param in group["params"] if param in owners)
        if size:
            sizes.append(size)
    return sizes


def parameters_by_layer(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, Parameter) like ``model.named_parameters()`` of the model before its factors were flattened."""
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, FlatFactors) or prefix.endswith(f"{_MODULE}.flats"):
            continue
        for attribute, param in module._parameters.items():
            if param is None:  # perhaps a flattened factor, which is an attribute alone
                param = vars(module).get(attribute)
            if param is not None and param not in seen:
                seen.add(param)
                yield (f"{prefix}.{attribute}" if prefix else attribute), param


class FlatFactors(nn.Module):
    """The flat parameters of a model, and the views that its layers compute with.

    It passes on its inputs, the outputs of the input embedding, unchanged. Its gradient for them is the one it gets, so
    the layers of the first block compute gradients of their inputs, which they would not need otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flats = nn.ParameterList()
        self._views: list[_Views] = []

    def take(self, factors: Sequence[nn.Parameter], owners: dict[nn.Parameter, tuple[PSTLayer, str]]) -> nn.Parameter:
        """Return a flat parameter with the values of ``factors``, which their ``owners`` replace by views of a copy.

        ``owners``: the layer and the attribute of each factor. Collective if the factors are partitioned.
        """
        with sharding.gathered(factors):
            values = torch.cat([param.detach().flatten() for param in factors])
        flat = nn.Parameter(values.clone())
        # before it is partitioned, after which it has no values here
        sharding.split_as(factors[0], [flat])
        views = _Views(values)
        offset = 0
        for param in factors:
            layer, attribute = owners[param]
            shape = sharding.full_shape(param)
            view = views.add(shape)
            sharding.put_into_flat(view, PlaceInFlat(flat, offset))
            # None keeps the factor's place in the order of the layer's parameters, and hides it from the engine
            layer.register_parameter(attribute, None)
            vars(layer)[attribute] = view
            offset += shape.numel()
        self.flats.append(flat)
        self._views.append(views)
        return flat

    def forward(self, embedded: Tensor) -> Tensor:
        """Return ``embedded``, after the layers' factors got the values of the flat parameters."""
        for flat, views in zip(self.flats, self._views, strict=True):
            views.read(flat)
        return _HandOver.apply(embedded, self._views, *self.flats)

    def follow(self, _embedding: nn.Module, _inputs: object, embedded: Tensor) -> Tensor:
        """Forward hook of an input embedding: call this module on its outputs."""
        result: Tensor = self(embedded)
        return result


class _Views:
    """The views of a copy of one flat parameter, with those of its gradient, into which autograd adds."""

    def __init__(self, values: Tensor):
        self._values = values
        self._gradient = torch.zeros_like(values)
        self._views: list[tuple[nn.Parameter, int]] = []
        """Each view with the offset of its first element."""
        self._end = 0
        """Elements that have a view."""

    def add(self, shape: torch.Size) -> nn.Parameter:
        """Return the view of the values that follow those of the last view."""
        view = nn.Parameter(self._values.new_empty(shape))
        self._views.append((view, self._end))
        self._point(view, self._end)
        self._end += view.numel()
        return view

    @torch.no_grad()
    def read(self, flat: nn.Parameter) -> None:
        """Copy the values of the flat parameter, which is gathered."""
        if self._values.device != flat.device:
            self._move(flat.device)
        self._values.copy_(flat)

    def _move(self, device: torch.device) -> None:
        """Let the views be of tensors on ``device``, to which an engine has moved the flat parameter."""
        self._values = self._values.to(device)
        self._gradient = self._gradient.to(device)
        for view, offset in self._views:
            self._point(view, offset)

    def _point(self, view: nn.Parameter, offset: int) -> None:
        """Let a view and its gradient be the elements of both tensors from ``offset`` on."""
        last = offset + view.numel()
        # torch refuses values on another device than those of the gradient
        view.grad = None
        view.data = self._values[offset:last].view(view.shape)
        view.grad = self._gradient[offset:last].view(view.shape)

    def take_gradient(self) -> Tensor:
        """Return the gradient since the last call, in a separate tensor."""
        gradient = self._gradient.clone()
        self._gradient.zero_()
        return gradient


class _HandOver(torch.autograd.Function):
    """Pass on the inputs; in the backward pass, return the gradients of the flat parameters.

    A model whose encoder and decoder both have an input embedding calls this twice. Each call hands over what has been
    added since the one before, and autograd adds both.
    """

    @staticmethod
    def forward(ctx, embedded, views, *flats):
        ctx.views = views
        return embedded.view_as(embedded)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, *(views.take_gradient() for views in ctx.views)


def owners_of_factors(model: nn.Module) -> dict[nn.Parameter, tuple[PSTLayer, str]]:
    """Return the layer and the attribute of every factor of ``model``, without those of stacks of experts."""
    owners: dict[nn.Parameter, tuple[PSTLayer, str]] = {}
    for layer in pst_layers(model).values():
        if not isinstance(layer, PSTLinear):
            continue
        for name, param in layer.factor_parameters():
            owners[param] = (layer, f"pst_{name}")
    return owners


def input_embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the modules that embed tokens, once each; several for an encoder with a decoder."""
    embeddings: dict[nn.Module, None] = {}
    for module in model.modules():
        getter = getattr(module, "get_input_embeddings", None)
        if getter is None:
            continue
        try:
            embedding = getter()
        except NotImplementedError:  # transformers' answer for parts without one, such as a pooler
            continue
        if embedding is not None:
            embeddings[embedding] = None
    return list(embeddings)
