"""A pretrained model that is pruned block by block, from its files into new ones.

Memory holds what is outside the blocks, and one block at a time. A pruned block is written, with a JSON file of its
outcome, before the next is read, so a killed run continues with the first block that lacks one.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from itertools import islice
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pst_ds.atomic_files import LOCK, atomic_folder, only_writer, sync, write_pieces, write_text_atomic
from pst_ds.core.layout import runs_of
from pst_ds.errors import InputError, first_line
from pst_ds.formats.base_weights import BaseWeights, saved_tensors, tensors_lacking
from pst_ds.formats.safetensors_file import TensorFile, header_and_slots, tensor_bytes
from pst_ds.nn.base_model import Pretrained, architecture
from pst_ds.nn.folder_facts import PRUNING_RECORD
from pst_ds.nn.model_structure import outermost_list
from pst_ds.parallel.ranks import all_gather_objects, barrier, is_main, of_main, raise_on_all_ranks, rank, world_size
from pst_ds.parallel.stop_signals import StoppedError
from pst_ds.prune.blocks import BlockSource
from pst_ds.prune.folder import SCALES_FILE, scales_name
from pst_ds.prune.outcome import Outcome, OutcomeT, PrunedLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

OUTSIDE = "outside"
"""Name of the part of a model that is outside of all blocks."""
_PLAN = "plan.json"
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_FIX = 'Set "architectures" in its config.json to the class that it was saved from'


class ModelFiles:
    """The model in a folder, and the folder that gets its pruned parts: blocks, and what is outside of them."""

    def __init__(
        self,
        path: str,
        out: Path | None,
        shard_bytes: int = 0,
        *,
        attn_implementation: str | None = None,
        reads_values: bool = True,
    ):
        """Build the model without values, except for buffers that no file has. Raises InputError.

        Args:
            path: model folder, or name of a model on the hub.
            out: folder to write; None to read the model, without parts that a killed run has finished.
            shard_bytes: size limit of a weight file.
            attn_implementation: the model's attention; None for its default.
            reads_values: False to look at the model only: its weights are then not downloaded.
        """
        place = Pretrained(path, "model.path")
        config = place.config()
        place.require_dense(config)
        kind = architecture(config)
        self.base = BaseWeights(path, getattr(kind, "base_model_prefix", ""), reads_values=reads_values)
        self._place = place
        self._attention = attn_implementation
        self.model = self._whole(config)
        self._mapping: list[Any] = self.model._weight_conversions  # type: ignore[assignment]
        self._out = out or Path(os.devnull)
        self._work = self._out.with_name(f".{self._out.name}.unfinished")
        self._shard_bytes = shard_bytes
        self._plan = ""
        self._names: dict[str, str] = {}
        """Name in the model of each tensor in the files."""
        self._part_of = self._parts(place)
        self._present: set[str] = set()
        """Parts whose values are in the model."""
        self.check: Callable[[], None] = lambda: None
        """Called on every rank after each block; may raise StoppedError."""

    def _whole(self, config: PretrainedConfig) -> PreTrainedModel:
        """Return the :meth:`skeleton` whose tensors are all in the files. Raises InputError.

        Sentence encoders are saved without the head of the masked language model that many of their configs name: for
        these it is the model without a head.
        """
        model = self.skeleton(config)
        in_files = set(self.base.names)
        lacking = tensors_lacking(model, in_files)
        if lacking and type(model).__name__.endswith("ForMaskedLM"):
            config.architectures = None
            model = self.skeleton(config)
            config.architectures = [type(model).__name__]
            lacking = tensors_lacking(model, in_files)
        self._place.require_whole(model, lacking, _FIX)
        return model

    def skeleton(self, config: PretrainedConfig) -> PreTrainedModel:
        """Return a model of this ``config`` without values, except for buffers. Raises InputError."""
        return _skeleton(self._place, config, self.base, self._attention)

    def unpruned(self) -> ModelFiles:
        """Return the model as it was, also where a killed run has finished parts."""
        return ModelFiles(self._place.path, None, attn_implementation=self._attention)

    def part_of(self, module: str) -> str:
        """Return the part of a module: its block, such as "model.layers.3", or :data:`OUTSIDE`."""
        stack = outermost_list(module + ".weight", self.model)
        if not stack:
            return OUTSIDE
        index, _, _ = module.removeprefix(stack + ".").partition(".")
        return f"{stack}.{index}"

    def source(self, stack: str, blocks: nn.ModuleList) -> BlockSource:
        """Return the blocks of the list ``stack``, and load all that is outside of it."""
        parts_of_stack = {f"{stack}.{index}" for index in range(len(blocks))}
        self._load(part for part in self._part_of.values() if part not in parts_of_stack)
        return _Blocks(self, stack, blocks)

    @contextmanager
    def loaded(self, part: str) -> Iterator[None]:
        """Have the values of a part inside the context."""
        if part in self._present:
            yield
            return
        self._load([part])
        try:
            yield
        finally:
            self._present.discard(part)
            if part != OUTSIDE:
                _forget_values(self.model.get_submodule(part))

    @contextmanager
    def working(self, plan: Mapping[str, object]) -> Iterator[None]:
        """Write the result inside the context, as the only process. Collective.

        Blocks that a run with another ``plan`` has finished are removed; those of the same plan are kept.
        """
        self._plan = json.dumps(plan, indent=1, sort_keys=True)

        def clean() -> None:
            plan_file = self._work / _PLAN
            is_of_plan = plan_file.is_file() and plan_file.read_text(encoding="utf-8") == self._plan
            if self._work.is_dir() and not is_of_plan:
                shutil.rmtree(self._work)

        # Only rank 0 takes the lock: the other ranks of this run write into the same folder.
        lock: AbstractContextManager[object] = nullcontext()
        if is_main():
            lock = only_writer(self._out.with_name(f".{self._out.name}{LOCK}"), f"write {self._out}")
        with lock:
            of_main(clean)
            # Ranks skip finished blocks, and must skip the same ones: each then meets the collectives of the others.
            finished = sorted(path.name for path in self._work.glob("*.json"))
            if any(seen != finished for seen in all_gather_objects(finished)):
                raise InputError(f"{self._out} is not the same folder on every host. Name one on a shared file system")
            yield
            barrier()  # no rank writes any more when the lock is released

    def outcome(self, part: str, kind: type[OutcomeT]) -> list[OutcomeT] | None:
        """Return the outcome of a finished part; None for others."""
        path = self._work / f"{part}.json"
        if not path.is_file():
            return None
        scales: dict[str, Tensor] = {}
        scales_file = path.with_suffix(".scales")
        if scales_file.is_file():
            scales = load_file(scales_file)
        outcomes: list[OutcomeT] = []
        for entry in json.loads(path.read_text(encoding="utf-8")):
            facts: dict[str, Any] = {}
            for key, value in entry.items():
                facts[key] = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
            if entry["name"] in scales:
                facts["scales"] = scales[entry["name"]]
            outcomes.append(kind(**facts))
        return outcomes

    def finish(self, part: str, layers: Sequence[Outcome]) -> None:
        """Write a part with the values it has, and the outcome of its ``layers``. Collective.

        Raises OSError or StoppedError on all ranks if one does.
        """
        number = 0
        if part != OUTSIDE:
            number = int(part.rpartition(".")[2])

        def write() -> None:
            # Blocks are dealt to the ranks, so that every host writes its share.
            if number % world_size() == rank():
                self._write(part, layers)
            self.check()

        of_main(self._make_folder)
        raise_on_all_ranks(write, (InputError, OSError, StoppedError))

    def remember(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors that ``make`` returns, or returned before the run was killed. Collective."""
        path = self._work / f"{name}.tensors"
        if of_main(path.is_file):
            return load_file(path)
        made = make()
        of_main(self._make_folder)
        of_main(lambda: _save(made, path))
        return made

    def publish(self, copy_small_files: Callable[[Path], None], record: Mapping[str, object]) -> None:
        """Write the folder, with its pruning ``record`` and small files, atomically. Collective."""

        def write() -> None:
            with atomic_folder(self._out) as folder:
                self._write_weights(folder)
                self._write_rest(folder, copy_small_files, record)
            shutil.rmtree(self._work, ignore_errors=True)

        barrier()  # a rank may still read a finished part
        of_main(write)

    def _write_weights(self, folder: Path) -> None:
        """Write one file if it is not too large; else one or more for each pruned part, and others for the rest."""
        pruned: list[Path] = []
        for part in dict.fromkeys(self._part_of.values()):
            pruned += self._files(part)
        # Tensors of parts that were not pruned are copied from the base model.
        copied: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        copied_bytes: dict[str, int] = {}
        for key, part in self._part_of.items():
            if self._is_done(part):
                continue
            dtype, shape = self.base.size(key)
            copied[key] = dtype, shape
            copied_bytes[key] = dtype.itemsize * prod(shape)
        total = sum(file.stat().st_size for file in pruned) + sum(copied_bytes.values())
        if total <= self._shard_bytes:
            self._write_one_file(folder / _WHOLE, pruned, copied)
            return
        file_of: dict[str, str] = {}
        for file in pruned:
            _link(file, folder / file.name)
            file_of |= dict.fromkeys(TensorFile(file).slots, file.name)
        for number, run in enumerate(runs_of(list(copied_bytes.values()), self._shard_bytes)):
            keys = list(copied_bytes)[run.start : run.stop]
            file = folder / f"model-rest-{number}.safetensors"
            _save({key: self.base.read(key) for key in keys}, file)
            file_of |= dict.fromkeys(keys, file.name)
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        write_text_atomic(folder / _INDEX, json.dumps(index, indent=1, sort_keys=True) + "\n")

    def _write_one_file(
        self, path: Path, pruned: Iterable[Path], copied: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        """Write the tensors in the files ``pruned`` and those ``copied`` from the base model, by dtype and shape."""
        file_of: dict[str, TensorFile] = {}
        sizes = dict(copied)
        for file in map(TensorFile, pruned):
            for name, slot in file.slots.items():
                file_of[name] = file
                sizes[name] = slot.dtype, slot.shape
        header, slots, _ = header_and_slots(sizes)

        def pieces() -> Iterator[bytes | memoryview]:
            yield header
            # tensor by tensor: memory need not hold the model
            for name in slots:
                source = file_of.get(name, self.base)
                tensor = source.read(name)
                yield tensor_bytes(tensor.contiguous())

        write_pieces(path, pieces())

    def _write_rest(self, folder: Path, copy_small_files: Callable[[Path], None], record: Mapping[str, object]) -> None:
        """Write all files of the pruned model but its weights."""
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)
        copy_small_files(folder)
        # over the copied config, since the model may be smaller
        self.model.config.save_pretrained(folder)
        scales: dict[str, Tensor] = {}
        for file in sorted(self._work.glob("*.scales")):
            for name, scales_of_layer in load_file(file).items():
                scales[scales_name(name)] = scales_of_layer
        if scales:
            _save(scales, folder / SCALES_FILE)
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        write_text_atomic(folder / PRUNING_RECORD, text)

    def _make_folder(self) -> None:
        """Create the folder of finished parts, with the plan that tells whether a later run may use them."""
        if not self._work.is_dir():
            self._work.mkdir(parents=True)
            write_text_atomic(self._work / _PLAN, self._plan)

    def _files(self, part: str) -> list[Path]:
        """Return the weight files of a part, none if it is not finished: a killed run may have left some of them."""
        if not self._is_done(part):
            return []
        return sorted(self._work.glob(f"model-{part}-[0-9]*.safetensors"))

    def _is_done(self, part: str) -> bool:
        """Return whether a part has an outcome, which is written after its weights."""
        return (self._work / f"{part}.json").is_file()

    def _write(self, part: str, layers: Sequence[Outcome]) -> None:
        """Write the weights of a part, its scales, and then the outcome, which makes it finished."""
        tensors = self._tensors_of(part)
        saved: dict[str, Tensor] = {}
        for name, tensor in saved_tensors(self.model, tensors).items():
            # as the base model's files spell it
            saved[self.base.find(name) or name] = tensor.contiguous()
        for number, run in enumerate(runs_of([tensor.nbytes for tensor in saved.values()], self._shard_bytes)):
            tensors_of_file = dict(islice(saved.items(), run.start, run.stop))
            _save(tensors_of_file, self._work / f"model-{part}-{number}.safetensors")
        scales: dict[str, Tensor] = {}
        facts: list[dict[str, object]] = []
        for layer in layers:
            if isinstance(layer, PrunedLayer) and layer.scales is not None:
                scales[layer.name] = layer.scales
            facts.append(_facts_of(layer))
        if scales:
            _save(scales, self._work / f"{part}.scales")
        write_text_atomic(self._work / f"{part}.json", json.dumps(facts))

    def _tensors_of(self, part: str) -> dict[str, Tensor]:
        """Return the model's tensors of a part, by name."""
        names_outside: set[str] = set()
        for key, part_of_key in self._part_of.items():
            if part_of_key == OUTSIDE:
                names_outside.add(self._names[key])
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.model.state_dict().items():
            is_in_part = name.startswith(f"{part}.")
            # what lies outside of the blocks has no common prefix
            if part == OUTSIDE:
                is_in_part = name in names_outside
            if is_in_part:
                tensors[name] = tensor
        return tensors

    def _parts(self, place: Pretrained) -> dict[str, str]:
        """Return the part of each tensor in the files. Raises InputError for tensors of another shape."""
        from transformers.core_model_loading import rename_source_key

        renamings, converters = _renamings_and_converters(self._mapping)
        state = self.model.state_dict()
        prefix = self.model.base_model_prefix
        parts: dict[str, str] = {}
        differing: list[str] = []
        for key in self.base.names:
            name, converted_from = rename_source_key(
                key, renamings, converters, base_model_prefix=prefix, meta_state_dict=state
            )
            self._names[key] = name
            if name not in state:  # the model does not use it
                parts[key] = OUTSIDE
                continue
            shape = self.base.size(key)[1]
            # A tensor that is split or merged has another shape in the files.
            if converted_from is None and tuple(state[name].shape) != shape:
                differing.append(f"{name} of shape {shape}")
            module, _, _ = name.rpartition(".")
            parts[key] = self.part_of(module)
        if differing:
            raise InputError(f"{place} has {', '.join(differing[:3])}; its config.json gives another shape. {_FIX}")
        return parts

    def _load(self, parts: Iterable[str]) -> None:
        """Load parts that are not there yet, as they were written if they are finished."""
        wanted = set(parts) - self._present
        tensors: dict[str, Tensor] = {}
        for key, part in self._part_of.items():
            if part in wanted and not self._is_done(part):
                tensors[key] = self.base.read(key)
        for part in wanted:
            for file in self._files(part):
                tensors |= load_file(file)
        _set(self.model, tensors, self._mapping)
        self._present |= wanted
        if OUTSIDE in wanted:  # files have a tied tensor once
            self.model.tie_weights()


class _Blocks(BlockSource):
    def __init__(self, files: ModelFiles, stack: str, blocks: nn.ModuleList):
        super().__init__(stack, blocks)
        self._files = files

    @contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        with self._files.loaded(f"{self.stack}.{index}"):
            yield

    def outcome(self, index: int, kind: type[OutcomeT]) -> list[OutcomeT] | None:
        return self._files.outcome(f"{self.stack}.{index}", kind)

    def finish(self, index: int, layers: Sequence[Outcome]) -> None:
        self._files.finish(f"{self.stack}.{index}", layers)


def _skeleton(
    place: Pretrained, config: PretrainedConfig, base: BaseWeights, attn_implementation: str | None
) -> PreTrainedModel:
    """Return a model with parameters on the meta device and buffers on the CPU, in the dtype of its config or files."""
    import transformers
    from accelerate import init_empty_weights

    kind: Any = architecture(config) or transformers.AutoModel._model_mapping[type(config)]
    dtype = getattr(config, "dtype", None) or _first_floating_dtype(base)
    config._attn_implementation = attn_implementation
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with init_empty_weights(include_buffers=False):
            model = kind(config)
    except Exception as error:  # strange values make transformers raise anything
        raise InputError(f"{place} cannot be built: {first_line(error)}. {_FIX}") from error
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()  # parameters on the meta device are new ones
    model._weight_conversions = _used_conversions(model, base.names)
    return model.requires_grad_(False).eval()


def _first_floating_dtype(base: BaseWeights) -> torch.dtype:
    """Return the dtype of the first floating-point tensor in the files, as transformers does; fp32 if there is none."""
    for name in base.names:
        dtype, _ = base.size(name)
        if dtype.is_floating_point:
            return dtype
    return torch.float32


def _forget_values(module: nn.Module) -> None:
    """Move all parameters in a module to the meta device, which frees their memory."""
    for part in module.modules():
        for name, param in part._parameters.items():
            if param is not None:
                part._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)


def _used_conversions(model: PreTrainedModel, names: Iterable[str]) -> list[Any]:
    """Return those of transformers' conversions for this model that apply to tensors with ``names`` in its files.

    ``from_pretrained`` keeps the same ones. The others are for older or original checkpoints of the family: reverting
    them would look for names that these files do not have.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    mapping: list[Any] = get_model_conversion_mapping(model)
    # Matching changes the state of a conversion, so it is tried on a copy.
    tried = copy.deepcopy(mapping)
    renamings, converters = _renamings_and_converters(tried)
    state = model.state_dict()
    for name in names:
        rename_source_key(name, renamings, converters, base_model_prefix=model.base_model_prefix, meta_state_dict=state)
    return [conversion for conversion, copied in zip(mapping, tried, strict=True) if copied.was_used()]


def _renamings_and_converters(mapping: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """Divide transformers' conversions into those that rename a tensor, and those that split or merge tensors."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    renamings: list[Any] = []
    converters: list[Any] = []
    for conversion in mapping:
        if isinstance(conversion, WeightRenaming):
            renamings.append(conversion)
        if isinstance(conversion, WeightConverter):
            converters.append(conversion)
    return renamings, converters


def _set(model: PreTrainedModel, tensors: Mapping[str, Tensor], mapping: Any) -> None:
    """Give a model the ``tensors`` of its files, as transformers converts them."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        convert_and_load_state_dict_in_model(model, dict(tensors), LoadStateDictConfig(weight_mapping=mapping))
    finally:
        if shown:
            logging.enable_progress_bar()
    model.requires_grad_(False)


def _facts_of(layer: Outcome) -> dict[str, object]:
    """Return the fields of an outcome as JSON, without the scales, which are tensors."""
    facts: dict[str, object] = {}
    for field in fields(layer):
        if field.name != "scales":
            facts[field.name] = getattr(layer, field.name)
    return facts


def _link(file: Path, other: Path) -> None:
    """Give a file another name, or copy it where a file system has no links."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copyfile(file, other)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file that is complete or absent."""
    partial = path.with_suffix(".partial")
    save_file(dict(tensors), partial, metadata={"format": "pt"})
    sync(partial)
    partial.replace(path)
