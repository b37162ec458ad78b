"""Base class of pruned layers: frozen weight, mask, score factors and the parameters of the update."""

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.config.pst import MaskRule, PSTConfig
from pst_ds.config.update_forms import update_form
from pst_ds.core import masked_linear
from pst_ds.core.bits import all_ones, relayout, shard_numel
from pst_ds.core.coded_weight import CodedWeight, OwnWeights
from pst_ds.core.factors import SCORE_FACTORS, Constants, Factors
from pst_ds.core.forms.form import ParamSpec
from pst_ds.core.layout import WeightLayout
from pst_ds.core.quantization import UNUSED_SCALE, Grid, Rounding, StoredGrid, bytes_of_scales, scales_of_bytes
from pst_ds.nn.base_codes import BASE_CODES, BASE_SCALES, BaseCodes, own_weights
from pst_ds.parallel import sharding
from pst_ds.parallel.expert_parallel import ExpertGroup
from pst_ds.parallel.sharding import in_backward_pass

CONSTANT_PARTS = ("pst_mask", "pst_scales", BASE_CODES, BASE_SCALES)
"""Parameters of a layer that hold bytes and are not trained."""


class PSTLayer(nn.Module):
    """Base class of pruned layers. It adopts the ``weight`` and ``bias`` Parameters of the layer that it replaces.

    W = W0 + beta U V, or another update form;  S = |W| / scale + alpha1 A B + alpha2 (R 1' + 1 C');  M keeps the
    largest S

    Parameters, besides ``weight`` (frozen unless ``config.train_weights``) and ``bias``:
        pst_A (O, k), pst_B (P*k, I), pst_R (O,), pst_C (P, I): trainable, see :mod:`pst_ds.core.factors` for P; None
            for those that the config omits.
        those of the update form in :attr:`update_specs`, such as pst_U (O, r) and pst_V (P*r, I): trainable.
        pst_mask: uint8, one bit per weight, see :mod:`pst_ds.core.bits`; frozen. One row of bytes for each entry of the
            weight's first dimension, so that FSDP2 splits both alike; (num_shards * bytes,) for ZeRO-3.
        pst_scales: uint8, the bytes of the bf16 scales that quantise M . W, only with a ``grid``; frozen.
        pst_base_codes, pst_base_scales: uint8, W0 as quantised values and scales, only with a ``base``, see
            :class:`pst_ds.core.coded_weight.CodeLayout`; ``weight`` is None then.

    One module holds them all, so ZeRO-3 fetches and releases the layer at once.
    """

    weight: nn.Parameter | None
    pst_scales: nn.Parameter | None
    pst_base_codes: nn.Parameter
    pst_base_scales: nn.Parameter

    def __init__(
        self,
        name: str,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        layout: WeightLayout,
        rule: MaskRule,
        config: PSTConfig,
        num_shards: int | None,
        magnitude_scales: tuple[float, ...],
        grid: Grid | None = None,
        base: BaseCodes | None = None,
        group: ExpertGroup | None = None,
    ):
        assert (weight is None) == (base is not None), "a layer has a weight or its codes"
        super().__init__()
        self.group = group
        """The ranks that own parts of a stack; None if every rank has a share of each expert."""
        self.whole_layout = layout
        """Layout of the layer in the original model, with the experts of all ranks."""
        if group is not None:
            layout = layout.part(group.degree)
        self.layout = layout
        """Layout of the part that this rank and those with the same experts own."""
        self.mask_rows = self.weight_shape[0] if num_shards is None and base is None else 0
        """Rows of the mask; 0 for a flat one, which FSDP2 would not split like the weight."""
        has_padded_rows = self.mask_rows > 0 and layout.numel // self.mask_rows % 8 > 0
        # rows of whole bytes are contiguous bits, like those of a single shard
        self.num_shards = self.mask_rows if has_padded_rows else num_shards or 1
        """Parts of the mask that start at a byte, see :mod:`pst_ds.core.bits`."""
        self.set_magnitude_scales(magnitude_scales)
        self.constants = Constants(
            alpha1=config.alpha1,
            alpha2=config.alpha2,
            beta=config.beta,
            frozen_magnitude=config.frozen_magnitude,
            form=update_form(config.update_form),
        )
        self.update_specs: dict[str, ParamSpec] = {}
        """Parameters of the update by name. Shapes are for one matrix; a layer stacks those of its matrices."""
        self.rule = rule
        self.scores_train = config.has_scores
        """True while the scores have a gradient; False once the masks are fixed."""
        self.stored_grid: StoredGrid | None = None
        if grid is not None:
            self.stored_grid = StoredGrid(layout, grid)
        self.rounds = False
        """True while M . W is quantised with the current scales."""
        self.input_norms: Tensor | None = None
        """(I,) fp32, for ``magnitude = "activation"``; equal on every rank, on the weight's device."""
        self.bypassed = False
        """True while the layer multiplies with W0, like the dense model; see :func:`pst_ds.nn.inject.bypassed`."""
        self.was_called = False
        """True after a call of ``forward``; see :func:`pst_ds.nn.inject.layers_never_called`."""
        self.listen: Callable[[Tensor, Tensor], None] | None = None
        """Called in each backward pass with the inputs (N, I) and the gradient of the outputs (N, O)."""
        self.tile_bytes = config.tile_bytes
        self.register_parameter("weight", weight)
        self.bias = bias
        self.register_parameter(BASE_CODES, None if base is None else base.codes)
        self.register_parameter(BASE_SCALES, None if base is None else base.scales)
        if weight is not None:
            device = weight.device
            dtype = weight.dtype
            bits = all_ones(layout.numel, self.num_shards).to(device)
            if self.mask_rows:
                bits = bits.view(self.mask_rows, -1)
            self.pst_mask = nn.Parameter(bits, requires_grad=False)
        else:
            assert base is not None
            device = base.codes.device
            dtype = base.dtype
            self.pst_mask = base.mask
        self._code_layout = None if base is None else base.layout
        self._loaded_dtype = dtype
        self._add_parameters(name, config, device, dtype)

    def _add_parameters(self, name: str, config: PSTConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Register scales and factors with their initial values, and None for absent ones."""
        scales = None
        if self.stored_grid is not None:
            unused = bytes_of_scales(torch.full(self.stored_grid.shape, UNUSED_SCALE)).to(device)
            scales = nn.Parameter(unused, requires_grad=False)
        self.register_parameter("pst_scales", scales)

        def add(factor: str, shape: tuple[int, ...] | None, std: float = 0.0, mean: float = 0.0) -> None:
            param = None
            if shape is not None:
                if device.type == "meta":  # shapes need no random numbers
                    values = torch.empty(shape, device=device)
                else:
                    # values of all experts are drawn, so that an expert starts alike wherever it is
                    whole = shape
                    if self.group is not None:
                        whole = (shape[0] * self.group.degree, *shape[1:])
                    values = seeded_normal(whole, std, f"{config.seed or 0}/{name}/{factor}")
                    if mean != 0.0:
                        values += mean
                    if self.group is not None:
                        values = self.group.own_part(values).clone()
                param = nn.Parameter(values.to(device=device, dtype=dtype))
            self.register_parameter(f"pst_{factor}", param)

        layout = self.layout
        outputs = layout.out_features
        inputs = layout.in_features
        k = config.score_rank
        add("A", (outputs, k) if k else None, config.score_init_scale)
        add("B", (layout.num_matrices * k, inputs) if k else None)
        add("R", (outputs,) if config.structured_scores else None)
        add("C", (layout.num_matrices, inputs) if config.structured_scores else None)
        per_matrix = outputs // layout.num_matrices
        for update_name, spec in self.constants.form.checked_parameters(per_matrix, inputs, config).items():
            if spec is None:
                add(update_name, None)
                continue
            self.update_specs[update_name] = spec
            stacked = spec.shape[0] * layout.num_matrices, *spec.shape[1:]
            add(update_name, stacked, spec.std, spec.mean)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layer's computation."""
        if self.weight is not None:
            return self.weight.dtype
        # factors follow a cast of the model, quantised values do not
        return next((param.dtype for _, param in self.factor_parameters()), self._loaded_dtype)

    @property
    def base_codes(self) -> BaseCodes | None:
        """W0 as quantised values and scales; None for a layer with a weight."""
        if self._code_layout is None:
            return None
        return BaseCodes(
            layout=self._code_layout,
            codes=self.pst_base_codes,
            scales=self.pst_base_scales,
            mask=self.pst_mask,
            dtype=self._loaded_dtype,
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the parameter ``weight`` when it is gathered."""
        return self.layout.shape

    def set_magnitude_scales(self, scales: tuple[float, ...]) -> None:
        """Set the divisors of |W| in the scores, one for each matrix of :attr:`whole_layout`."""
        num_own = self.layout.num_matrices
        position = 0
        if self.group is not None:
            position = self.group.position
        self.all_magnitude_scales = scales
        self.magnitude_scales = scales[position * num_own : (position + 1) * num_own]

    def base_weight(self) -> Tensor | CodedWeight:
        """Return W0, or the trained weight that replaces it, in storage shape. The parameters must be gathered."""
        if self.weight is not None:
            return self.weight.detach().flatten(0, -2)
        assert self.base_codes is not None
        return self.base_codes.whole(self.dtype)

    def dense_weight(self) -> Tensor:
        """Return :meth:`base_weight`, dequantised."""
        weight = self.base_weight()
        if isinstance(weight, Tensor):
            return weight
        return weight.dense()

    @torch.no_grad()
    def hold(self, weight: Tensor) -> None:
        """Replace the frozen W0, quantised or not, by ``weight``, in storage shape. Not for ZeRO-3."""
        weight = weight.view(self.weight_shape)
        if self.weight is not None:
            self.weight.copy_(weight)
            return
        self.weight = nn.Parameter(weight.to(self.dtype).clone(), requires_grad=False)
        self._code_layout = None
        for name in (BASE_CODES, BASE_SCALES):
            self.register_parameter(name, None)

    def own_base(self) -> OwnWeights:
        """Return this rank's shard of :meth:`base_weight`; the whole weight if it is not partitioned."""
        if self.weight is not None:
            return own_weights(self.weight, self.layout)
        assert self.base_codes is not None
        return self.base_codes.own(self.dtype)

    def split(self) -> sharding.Split:
        """Return how the weights, and their mask bits, are divided over ranks."""
        numel = self.layout.numel
        of_mask = sharding.split_of(self.pst_mask)
        if sharding.splits_rows(self.pst_mask):
            rows = of_mask.share * self.mask_rows // of_mask.numel
            return sharding.Split(numel, rows * (numel // self.mask_rows), of_mask.ranks, of_mask.own)
        assert of_mask.ranks == (1 if self.mask_rows else self.num_shards), "num_shards is not how it is partitioned"
        return sharding.Split(numel, shard_numel(numel, of_mask.ranks), of_mask.ranks, of_mask.own)

    def own_range(self) -> tuple[int, int]:
        """Return the flat range of :attr:`whole_layout` whose mask bits this rank holds; all if not partitioned."""
        split = self.split()
        first = 0
        if self.group is not None:
            first = self.group.position * self.layout.numel
        start, stop = split.range_of(split.own)
        return first + start, first + stop

    @property
    def place(self) -> tuple[int, int, int]:
        """Ranks that hold a part of the layer, the number of this one, and parts of whole experts that ranks own."""
        shard = sharding.shard_index(self.pst_mask)
        shards = self.num_shards
        if self.group is None:
            return shards, shard, 1
        return shards * self.group.degree, shard * self.group.degree + self.group.position, self.group.degree

    def own_bits(self) -> Tensor:
        """Return the mask bits of :meth:`own_range`, from bit 0 on; padding bits are zero."""
        bits = sharding.shard_of(self.pst_mask).values
        rows = self._own_padded_rows()
        if not rows:
            return bits
        return relayout(bits, rows * (self.layout.numel // self.mask_rows), rows, 1)

    def write_own_bits(self, bits: Tensor) -> None:
        """Overwrite the mask bits of :meth:`own_range`. Every rank must do so before the next gather."""
        rows = self._own_padded_rows()
        if rows:
            bits = relayout(bits, rows * (self.layout.numel // self.mask_rows), 1, rows)
        sharding.write_shard(self.pst_mask, bits)

    def own_bits_changed(self, bits: Tensor) -> None:
        """Keep ``bits``, which were written to :meth:`own_bits`. Every rank must do so before the next gather."""
        if self._own_padded_rows():  # of which own_bits was a copy
            self.write_own_bits(bits)
        else:
            sharding.shard_changed(self.pst_mask)

    def _own_padded_rows(self) -> int:
        """Return the rows of the mask on this rank if each is padded to whole bytes; 0 for bits without gaps."""
        if self.num_shards != self.mask_rows:
            return 0
        start, stop = self.own_range()
        return (stop - start) * self.mask_rows // self.layout.numel

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        mask = state_dict.get(prefix + "pst_mask")
        if mask is not None and mask.numel() == self.pst_mask.numel():  # a flat one has the same bytes
            state_dict[prefix + "pst_mask"] = mask.view(self.pst_mask.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def factor_names(self) -> tuple[str, ...]:
        """Names of the factors of the scores, also of those that the layer lacks, and of the update's parameters."""
        return *SCORE_FACTORS, *self.update_specs

    def factor_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name in :attr:`factor_names`, Parameter) of the factors that this layer has."""
        for name in self.factor_names:
            param = getattr(self, f"pst_{name}")
            if param is not None:
                yield name, param

    def update_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the update by name; {} for a layer without an update."""
        return {name: self.get_parameter(f"pst_{name}") for name in self.update_specs}

    def drop_update(self) -> None:
        """Remove the update for good: the layer computes with M . W0."""
        for name in self.update_specs:
            self.register_parameter(f"pst_{name}", None)
        self.update_specs = {}

    def factors(self, values: dict[str, Tensor]) -> Factors:
        """Return the matrices of the formulas, from the ``values`` of :meth:`factor_parameters`."""
        return Factors.of(values, self.constants.form, self.input_norms)

    def state(self) -> masked_linear.LayerState:
        """Return the state that computes the layer's current weight. The parameters must be gathered."""
        remedy = "Call the module that fully_shard was given, not one inside it; or register_fsdp_forward_method"
        sharding.refuse_dtensors(self.named_parameters(recurse=False), remedy)
        weight = self.base_weight()
        mask = self.pst_mask.detach().flatten()
        factors = self.factors({name: param.detach() for name, param in self.factor_parameters()})
        rounding: Rounding | None = None
        if self.rounds:
            rounding = self.rounding()
        return masked_linear.LayerState(
            weight=weight,
            bits=mask,
            num_shards=self.num_shards,
            layout=self.layout,
            factors=factors,
            constants=self.constants,
            magnitude_scales=self.magnitude_scales,
            scores_train=self.scores_train,
            rounding=rounding,
        )

    def rounding(self) -> Rounding:
        """Return the grid and its current scales. Only for layers with a grid, whose parameters must be gathered."""
        assert self.stored_grid is not None
        assert self.pst_scales is not None
        return Rounding(self.stored_grid, scales_of_bytes(self.pst_scales.detach(), self.stored_grid.shape))

    def masked_weight(self) -> Tensor:
        """Return M . W in storage shape, bit-identical to the one in ``forward``. The parameters must be gathered."""
        return self.state().masked_weight()

    def trained(self) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the weight if it is trained, and the factors of :attr:`factor_names`; None for absent ones."""
        weight = self.weight if self.weight is not None and self.weight.requires_grad else None
        return weight, [getattr(self, f"pst_{name}") for name in self.factor_names]

    def keep_if_recomputed(self) -> None:
        """If a backward pass recomputes this forward pass, keep frozen parameters gathered until its turn.

        DeepSpeed gathers the parameters of a checkpointed block to recompute it, then releases them; each would be
        gathered a third time for its gradients.
        """
        if in_backward_pass() and torch.is_grad_enabled():
            sharding.hold(param for param in self.parameters(recurse=False) if not param.requires_grad)

    def gathered_gradients(self, backward: Callable[..., masked_linear.Gradients]) -> masked_linear.Gradients:
        """Call ``backward`` of pst_ds.core with the layer's state. Gathers released parameters."""
        params = list(self.parameters(recurse=False))
        sharding.let_go(params)
        released = list(filter(sharding.is_released, params))
        with sharding.gathered(released):
            return backward(state=self.state(), tile_bytes=self.tile_bytes)

    def of_trained(self, grads: masked_linear.Gradients) -> tuple[Tensor | None, ...]:
        """Return the gradients of the factors in :meth:`trained`, in the layer's dtype."""
        of_factors: list[Tensor | None] = []
        for name in self.factor_names:
            gradient = grads.of_parameter(name)
            if gradient is not None:
                gradient = gradient.to(self.dtype)
            of_factors.append(gradient)
        return tuple(of_factors)


def seeded_normal(shape: tuple[int, ...], std: float, key: str) -> Tensor:
    """Return N(0, std**2) values that depend only on ``key`` and the shape; 0 if std is 0."""
    if std == 0.0:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randn(shape, generator=generator) * std
