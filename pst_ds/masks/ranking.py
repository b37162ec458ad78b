"""Masks by the scores of a criterion, whose gradients are collected while the model trains."""

from torch import Tensor, nn

from pst_ds.config.criteria import as_criterion, criterion_called
from pst_ds.core.criteria.criterion import GRADIENTS, INPUT_NORMS, LEARNED_SCORES, Criterion
from pst_ds.core.schedule import Schedules
from pst_ds.errors import InputError
from pst_ds.masks.mask_source import MaskSource
from pst_ds.masks.update import MaskStats, update_masks
from pst_ds.nn.inject import injected_config, pst_layers
from pst_ds.nn.weight_gradients import WeightGradients
from pst_ds.parallel import sharding


class Ranking(MaskSource):
    """Ranks the weights of ``model`` by a criterion.

    Args:
        model: a model with PST layers.
        criterion: what ranks the weights: a Criterion, or a function of a slice; None for that of the model's config.

    Raises InputError for what is not a criterion, and for one whose needs the model cannot meet.
    """

    def __init__(self, model: nn.Module, criterion: object = None):
        config = injected_config(model)
        self.criterion: Criterion
        if criterion is None:
            self.criterion = criterion_called(config.criterion_name)
        else:
            self.criterion = as_criterion(criterion, "criterion")
        self._is_implied = criterion is None and not config.criterion
        self._model = model
        self._gradients: WeightGradients | None = None
        self.learns_scores = LEARNED_SCORES in self.criterion.needs

    def require_ready(self) -> None:
        """Raise InputError if the criterion needs norms of inputs that a layer lacks."""
        if INPUT_NORMS not in self.criterion.needs:
            return
        for name, layer in pst_layers(self._model).items():
            if layer.input_norms is None:
                if self._is_implied:
                    lead = 'magnitude = "activation"'
                    remedy = 'use PSTConfig(magnitude="weight")'
                else:
                    lead = f"the criterion {type(self.criterion).__name__} needs norms of inputs"
                    remedy = "use another criterion"
                raise InputError(
                    f"{lead}, but {name} has no norms of its inputs. Set them with "
                    f"pst_ds.train.calibration.set_norms, or {remedy}"
                )

    def before_batch(self, schedules: Schedules, step: int) -> None:
        """Collect gradients of the next batch, if the criterion needs them and a mask update follows it."""
        if GRADIENTS not in self.criterion.needs:
            return
        # those of an earlier batch, after which the run was resumed or its schedule changed
        self.close()
        if schedules.masks is not None and schedules.masks.updates_masks_at(step + 1):
            self._gradients = WeightGradients(self._model)

    def close(self) -> None:
        if self._gradients is not None:
            self._gradients.close()
        self._gradients = None

    def update(self, target: float, progress: float) -> MaskStats:
        """Select masks, as :func:`pst_ds.masks.update.update_masks`. Collective.

        Raises InputError if the criterion needs gradients, weights are to be pruned, and no batch was collected.
        """
        gradients: dict[str, Tensor] | None = None
        if GRADIENTS in self.criterion.needs:
            layers = list(pst_layers(self._model).values())
            device = sharding.shard_of(layers[0].pst_mask).values.device
            if self._gradients is not None:
                gradients = self._gradients.of_all_ranks(device)
            elif target == 0.0:
                # nothing is pruned, so the order of the weights has no effect
                gradients = WeightGradients(self._model).of_all_ranks(device)
            else:
                raise InputError(
                    f"the criterion {type(self.criterion).__name__} needs gradients, and the schedule prunes to "
                    f"{target:.3g} before the first step. Set initial_sparsity = 0, on a schedule with a ramp"
                )
            self.close()
        return update_masks(self._model, target, progress=progress, criterion=self.criterion, gradients=gradients)
