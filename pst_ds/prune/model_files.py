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
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from itertools import chain, islice
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
_PLAN, _INDEX, _WHOLE = "plan.json", "model.safetensors.index.json", "model.safetensors"
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
        self._place, self._attention = place, attn_implementation
        self.model = self._whole(config)
        self._mapping: list[Any] = self.model._weight_conversions  # type: ignore[assignment]
        self._out = out or Path(os.devnull)
        self._work = self._out.with_name(f".{self._out.name}.unfinished")
        self._shard_bytes, self._plan = shard_bytes, ""
        self._part_of = self._parts(place)
        self._present = set[str]()
        self.check: Callable[[], None] = lambda: None
        """Called on every rank after each block; may raise StoppedError."""

    def _whole(self, config: PretrainedConfig) -> PreTrainedModel:
        """Return the :meth:`skeleton` whose tensors are all in the files. Raises InputError.

        Sentence encoders are saved without the head of the masked language model that many of their configs name: for
        these it is the model without a head.
        """
        model, in_files = self.skeleton(config), set(self.base.names)
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
        return f"{stack}.{module.removeprefix(stack + '.').partition('.')[0]}" if stack else OUTSIDE

    def source(self, stack: str, blocks: nn.ModuleList) -> BlockSource:
        """Return the blocks of the list ``stack``, and load all that is outside of it."""
        own = {f"{stack}.{index}" for index in range(len(blocks))}
        self._load(part for part in dict.fromkeys(self._part_of.values()) if part not in own)
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
            for module in self.model.get_submodule(part).modules() if part != OUTSIDE else ():
                for name, param in module._parameters.items():
                    if param is not None:
                        module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=False)

    @contextmanager
    def working(self, plan: Mapping[str, object]) -> Iterator[None]:
        """Write the result inside the context, as the only process. Collective.

        Blocks that a run with another ``plan`` has finished are removed; those of the same plan are kept.
        """
        self._plan = json.dumps(plan, indent=1, sort_keys=True)

        def clean() -> None:
            plan = self._work / _PLAN
            if self._work.is_dir() and (not plan.is_file() or plan.read_text(encoding="utf-8") != self._plan):
                shutil.rmtree(self._work)

        lock = self._out.with_name(f".{self._out.name}{LOCK}")
        with only_writer(lock, f"write {self._out}") if is_main() else nullcontext():
            of_main(clean)
            finished = sorted(path.name for path in self._work.glob("*.json"))
            if any(finished != others for others in all_gather_objects(finished)):
                raise InputError(f"{self._out} is not the same folder on every host. Name one on a shared file system")
            yield
            barrier()

    def outcome(self, part: str, kind: type[OutcomeT]) -> list[OutcomeT] | None:
        """Return the outcome of a finished part; None for others."""
        path = self._work / f"{part}.json"
        if not path.is_file():
            return None
        held = path.with_suffix(".scales")
        scales = load_file(held) if held.is_file() else {}
        found = []
        for entry in json.loads(path.read_text(encoding="utf-8")):
            facts: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()}
            facts |= {"scales": scales[entry["name"]]} if entry["name"] in scales else {}
            found.append(kind(**facts))
        return found

    def finish(self, part: str, layers: Sequence[Outcome]) -> None:
        """Write a part with the values it has, and the outcome of its ``layers``. Collective.

        Raises OSError or StoppedError on all ranks if one does.
        """
        number = int(part.rpartition(".")[2]) if part != OUTSIDE else 0

        def write() -> None:
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
        parts = dict.fromkeys(self._part_of.values())
        pruned = [file for part in parts for file in self._files(part)]
        missing = {key: self.base.size(key) for key, part in self._part_of.items() if not self._is_done(part)}
        rest = {key: dtype.itemsize * prod(shape) for key, (dtype, shape) in missing.items()}
        total = sum(file.stat().st_size for file in pruned) + sum(rest.values())
        if total <= self._shard_bytes:  # tensor by tensor: memory need not hold the model
            opened = {name: file for file in map(TensorFile, pruned) for name in file.slots}
            sizes = {name: (file.slots[name].dtype, file.slots[name].shape) for name, file in opened.items()}
            header, order, _ = header_and_slots(sizes | missing)
            read = (opened[name].read(name) if name in opened else self.base.read(name) for name in order)
            write_pieces(folder / _WHOLE, chain([header], (tensor_bytes(tensor.contiguous()) for tensor in read)))
            return
        file_of: dict[str, str] = {}
        for file in pruned:
            _link(file, folder / file.name)
            file_of |= dict.fromkeys(TensorFile(file).slots, file.name)
        for number, run in enumerate(runs_of(list(rest.values()), self._shard_bytes)):
            keys = list(rest)[run.start : run.stop]
            file = folder / f"model-rest-{number}.safetensors"
            _save({key: self.base.read(key) for key in keys}, file)
            file_of |= dict.fromkeys(keys, file.name)
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        write_text_atomic(folder / _INDEX, json.dumps(index, indent=1, sort_keys=True) + "\n")

    def _write_rest(self, folder: Path, copy_small_files: Callable[[Path], None], record: Mapping[str, object]) -> None:
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)
        copy_small_files(folder)
        self.model.config.save_pretrained(folder)  # which may say that the model is smaller
        scales = {name: t for file in sorted(self._work.glob("*.scales")) for name, t in load_file(file).items()}
        if scales:
            _save({scales_name(name): tensor for name, tensor in scales.items()}, folder / SCALES_FILE)
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        write_text_atomic(folder / PRUNING_RECORD, text)

    def _make_folder(self) -> None:
        if not self._work.is_dir():
            self._work.mkdir(parents=True)
            write_text_atomic(self._work / _PLAN, self._plan)

    def _files(self, part: str) -> list[Path]:
        return sorted(self._work.glob(f"model-{part}-[0-9]*.safetensors")) if self._is_done(part) else []

    def _is_done(self, part: str) -> bool:
        return (self._work / f"{part}.json").is_file()

    def _write(self, part: str, layers: Sequence[Outcome]) -> None:
        own = {self._names[key] for key, other in self._part_of.items() if other == part}
        prefix = "" if part == OUTSIDE else part + "."
        state = self.model.state_dict()
        tensors = {n: t for n, t in state.items() if (n in own if part == OUTSIDE else n.startswith(prefix))}
        saved = {self.base.find(n) or n: t.contiguous() for n, t in saved_tensors(self.model, tensors).items()}
        for number, run in enumerate(runs_of([tensor.nbytes for tensor in saved.values()], self._shard_bytes)):
            some = dict(islice(saved.items(), run.start, run.stop))
            _save(some, self._work / f"model-{part}-{number}.safetensors")
        scales = {one.name: one.scales for one in layers if isinstance(one, PrunedLayer) and one.scales is not None}
        if scales:
            _save(scales, self._work / f"{part}.scales")
        facts = [{f.name: getattr(layer, f.name) for f in fields(layer) if f.name != "scales"} for layer in layers]
        write_text_atomic(self._work / f"{part}.json", json.dumps(facts))

    def _parts(self, place: Pretrained) -> dict[str, str]:
        """Return the part of each tensor in the files. Raises InputError for tensors of another shape."""
        from transformers.core_model_loading import rename_source_key

        renamings, converters = _renamings_and_converters(self._mapping)
        own, prefix = self.model.state_dict(), self.model.base_model_prefix
        parts, self._names = {}, dict[str, str]()
        differing = []
        for key in self.base.names:
            name, source = rename_source_key(key, renamings, converters, base_model_prefix=prefix, meta_state_dict=own)
            self._names[key] = name
            shape = self.base.size(key)[1]
            if name in own and source is None and tuple(own[name].shape) != shape:
                differing.append(f"{name} of shape {shape}")
            parts[key] = self.part_of(name.rpartition(".")[0]) if name in own else OUTSIDE
        if differing:
            raise InputError(f"{place} has {', '.join(differing[:3])}; its config.json gives another shape. {_FIX}")
        return parts

    def _load(self, parts: Iterable[str]) -> None:
        """Load parts that are not there yet, as they were written if they are finished."""
        wanted = set(parts) - self._present
        keys = [key for key, part in self._part_of.items() if part in wanted and not self._is_done(part)]
        tensors = {key: self.base.read(key) for key in keys}
        for part in wanted:
            for file in self._files(part):
                tensors |= load_file(file)
        _set(self.model, tensors, self._mapping)
        self._present |= wanted
        if OUTSIDE in wanted:
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
    floating = (base.size(name)[0] for name in base.names)
    dtype = getattr(config, "dtype", None) or next((d for d in floating if d.is_floating_point), torch.float32)
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

    renamings = [conversion for conversion in mapping if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in mapping if isinstance(conversion, WeightConverter)]
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
