"""The training loss: the task's own, or with a teacher a mixture with its predictions."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.core.distillation import distilled_loss
from pst_ds.core.head_loss import Teacher, head_loss
from pst_ds.data.tasks import task_of
from pst_ds.data.tasks.task import IGNORED
from pst_ds.errors import shortened
from pst_ds.nn.addition import load_additions
from pst_ds.nn.base_model import DTYPES, Pretrained
from pst_ds.nn.folder_facts import PRUNING_RECORD
from pst_ds.nn.inject import bypassed
from pst_ds.nn.language_head import LanguageHead
from pst_ds.parallel.engine import Engine
from pst_ds.parallel.sequence import SequenceParallel
from pst_ds.train.resolved import attention_options, set_padding
from pst_ds.train.run_context import RunContext
from pst_ds.train.sequences import keep_documents_apart, part_of_batch
from pst_ds.train.token_heads import following, head_of, predicted, why_all_logits

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Objective:
    """The model's own loss; with a teacher (1 - w) CE + w T^2 KL(teacher || student).

    CE is the cross-entropy of the labels. w and T are weight and temperature of ``[distillation]``. The teacher is a
    separate frozen model, or the trained model with masks and updates bypassed. Where a language model's head
    is known, only the logits of a chunk of tokens are in memory.
    """

    def __init__(self, context: RunContext, teacher: nn.Module | None = None, shared: SequenceParallel | None = None):
        """``shared``: the ranks that train on the same sequences as this one, if any."""
        settings = context.run.distillation
        self._weight = settings.weight
        self._temperature = settings.temperature
        self._task = context.task
        self._teacher = teacher
        self._shared = shared
        self._known_heads: dict[nn.Module, tuple[LanguageHead, LanguageHead] | None] = {}
        """Heads of a model and its teacher, found once: finding one takes a probe of the model's forward pass."""

    def __call__(self, engine: Engine, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of ``batch``, with a gradient. Collective under ZeRO-3; the engine is in training mode."""
        inputs = dict(batch)
        labels = inputs.pop("labels")
        if labels.is_floating_point():  # torch before 2.13 has no gradient of mse_loss for bf16 and fp32
            return F.mse_loss(engine(**inputs).logits.squeeze(-1).float(), labels)
        heads = self._heads(engine.module)
        if heads is not None:
            return self._loss_in_chunks(engine, inputs, labels, head=heads[0], teacher_head=heads[1])
        if not self._weight and labels.dim() == 1:
            return engine(**inputs, labels=labels).loss
        if not self._weight:
            predicts = (labels[:, 1:] != IGNORED).any()  # the mean loss of no tokens would be NaN
            # as a product, because a branch would wait for the device to know the labels
            return predicts * engine(**inputs, labels=labels.masked_fill(~predicts, 0)).loss
        # the teacher first: only its logits remain when the graph of the other pass is built
        teacher_logits = self._teach(engine, inputs).logits
        logits = engine(**inputs).logits
        if labels.dim() == 2:  # one prediction per token
            places, labels = predicted(following(labels))
            # (examples, length, tokens) -> (predictions, tokens)
            teacher_logits = teacher_logits.flatten(0, 1)[places]
            logits = logits.flatten(0, 1)[places]
        return distilled_loss(
            student=logits, teacher=teacher_logits, targets=labels, weight=self._weight, temperature=self._temperature
        )

    def why_all_logits(self, module: nn.Module) -> str:
        """Return why the loss of a language model needs the logits of a whole micro-batch; "" if it does not."""
        reason = why_all_logits(module, self._task)
        if not reason and self._teacher is not None:
            reason = why_all_logits(self._teacher, self._task)
        return reason

    def _heads(self, module: nn.Module) -> tuple[LanguageHead, LanguageHead] | None:
        """Return the language heads of model and teacher, if both are known."""
        if module not in self._known_heads:
            self._known_heads[module] = self._find_heads(module)
        return self._known_heads[module]

    def _find_heads(self, module: nn.Module) -> tuple[LanguageHead, LanguageHead] | None:
        head = head_of(module, self._task)
        if head is None:
            return None
        if self._teacher is None:
            return head, head
        teacher_head = head_of(self._teacher, self._task)
        if teacher_head is None:
            return None
        return head, teacher_head

    def _loss_in_chunks(
        self, engine: Engine, inputs: dict[str, Tensor], labels: Tensor, head: LanguageHead, teacher_head: LanguageHead
    ) -> Tensor:
        """Return the loss, computed by the head in chunks of tokens in place of the model's own product.

        For ranks that share sequences it is scaled so that the mean over all ranks is the loss of the batch.
        """
        shared = self._shared
        sharing: AbstractContextManager[None] = nullcontext()
        count: Tensor | None = None
        if shared is None:
            targets = following(labels)
        else:
            inputs, positions, targets, count = part_of_batch(shared, inputs, labels)
            sharing = shared.sharing(positions)
        places, tokens = predicted(targets)
        teacher_hidden: list[Tensor] = []  # one tensor (examples, length, width), or none without a teacher

        def loss_of(hidden: Tensor) -> Tensor:
            teacher = None
            if teacher_hidden:
                teacher = Teacher(
                    hidden=teacher_hidden[0].flatten(0, 1),
                    readout=teacher_head.readout,
                    weight=self._weight,
                    temperature=self._temperature,
                )
            return head_loss(
                hidden.flatten(0, 1),  # (examples * length, width)
                head.readout,
                targets=tokens,
                rows=places,
                teacher=teacher,
                count=count,
            )

        with sharing:
            if self._weight:
                # keeps the hidden states in front of the head, not the logits, which are larger by vocabulary / width
                with teacher_head.reading(lambda hidden: hidden) as teacher_hidden:
                    self._teach(engine, inputs)
            with head.reading(loss_of) as losses:
                engine(**inputs)
        if shared is None:
            return losses[0]
        # each rank has the sum over its own tokens divided by the count of all, and gradients are averaged over ranks
        return shared.degree * losses[0]

    @torch.no_grad()
    def _teach(self, engine: Engine, inputs: dict[str, Tensor]) -> Any:
        """Return the teacher's output."""
        if self._teacher is not None:
            return self._teacher(**inputs)
        # a teacher has no dropout
        engine.eval()
        try:
            with bypassed(engine.module):
                return engine(**inputs)
        finally:
            engine.train()


def require_teacher(run: RunConfig, shapes: nn.Module) -> None:
    """Raise ConfigError if the run's teacher cannot teach the run's model, given as ``shapes`` on the meta device."""
    if not run.distillation.weight or run.teacher == run.model.path:
        return
    place = teacher_of(run)
    if place is not None:
        if not Path(place.path).is_dir():
            raise ConfigError(
                f"{place} does not exist (looked in {Path(place.path).absolute()}); name a model folder, such as an "
                "exported dense run"
            )
        require_comparable(run, shapes.config, place, place.config(**attention_options(run)))  # type: ignore[arg-type]
        return
    record = Path(run.model.path) / PRUNING_RECORD
    problem = ""
    if run.pst.initial_mask == "zeros":
        problem = 'with pst.initial_mask = "zeros" it is already pruned'
    elif record.is_file():
        problem = f"{record} says that it was pruned"
    if problem:
        raise ConfigError(
            f"distillation.teacher is empty, so model.path = {run.model.path!r} is its own teacher, and {problem}; "
            "name the folder of the dense model in distillation.teacher"
        )
    trained: list[str] = []
    for name, param in shapes.named_parameters():
        # factors are bypassed while the model teaches; everything else that trains would change the teacher
        is_factor = name.rpartition(".")[2].startswith("pst_")
        if param.requires_grad and not is_factor:
            trained.append(name)
    if trained:
        raise ConfigError(
            f"distillation.teacher is empty, so the model is its own teacher; but {shortened(trained, 3)} "
            "would train, and the teacher with it. Name a model folder "
            "(distillation.teacher), such as an exported dense run"
        )


def require_comparable(run: RunConfig, own: "PreTrainedConfig", place: Pretrained, config: "PreTrainedConfig") -> None:
    """Raise ConfigError if the model at ``place``, with ``config``, cannot read the inputs of a model with config
    ``own``, or their predictions cannot be compared."""
    task = task_of(run)
    try:
        task.check_model(run.data, config, None)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    vocabulary = getattr(own.get_text_config(), "vocab_size", None)
    teacher_vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if not vocabulary or not teacher_vocabulary:
        return
    # under a new head only the inputs must be readable; predictions of tokens must have the same ones
    is_comparable = teacher_vocabulary == vocabulary or (task.new_head and teacher_vocabulary > vocabulary)
    if not is_comparable:
        raise ConfigError(
            f"{place} has a vocabulary of {teacher_vocabulary} tokens, and model.path = {run.model.path!r} "
            f"one of {vocabulary} (vocab_size); name a model that reads the tokens of the same tokenizer"
        )


def teacher_of(run: RunConfig) -> Pretrained | None:
    """Return the run's separate teacher; None without one."""
    if not run.distillation.weight or not run.teacher:
        return None
    return Pretrained(run.teacher, "distillation.teacher")


def teacher_shapes(run: RunConfig) -> nn.Module | None:
    """Return the separate teacher on the meta device; None without one. Raises InputError."""
    place = teacher_of(run)
    if place is None:
        return None
    return place.shapes(
        task_of(run).model_class(),
        place.config(**attention_options(run)),
        dtype=DTYPES[run.train.precision],
        fix="Name a model of the same task",
    )


def load_teacher(context: RunContext) -> nn.Module | None:
    """Load the run's separate teacher as :func:`load_frozen` does; None without one."""
    place = teacher_of(context.run)
    if place is None:
        return None
    return load_frozen(place, context)


def load_frozen(place: Pretrained, context: RunContext, quantization_config: object = None, fix: str = "") -> nn.Module:
    """Load a model for the run's task, not partitioned, frozen and in evaluation mode.

    It pads as the run's model does and has no KV cache. Call it before a model is built under ``zero.Init``.
    ``quantization_config``: how to load a packed folder. Raises InputError for other classes, and for missing weights
    or weights of another shape, with advice on the ``fix``.
    """
    run = context.run
    labels = context.labels
    task = context.task
    config = place.config(**attention_options(run))
    classes: list[str] = []
    if labels:
        # in the order of the outputs
        classes = [name for _, name in sorted((config.id2label or {}).items())]
    if classes != labels:
        raise ConfigError(
            f"{place} has the classes {', '.join(classes)}, and the run {', '.join(labels)}, in this order; "
            "name a model that was trained on the same labels"
        )
    set_padding(config, task, context.tokenizer)
    fix = fix or f"Name a whole model that was trained for task {run.task!r}"
    model, missing = place.load(
        task.model_class(),
        fix,
        config=config,
        dtype=DTYPES[run.train.precision],
        quantization_config=quantization_config,
    )
    place.require_whole(model, missing, fix)
    # keys and values of a whole pass would be kept for nothing
    model.config.use_cache = False
    keep_documents_apart(model)
    load_additions(model, place.path)
    whole: nn.Module = model.requires_grad_(False)
    return whole.to(context.device).eval()
