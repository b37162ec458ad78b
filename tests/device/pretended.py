"""A pretended accelerator: tensors that say they are on "gpu:0", are refused beside CPU tensors, and really compute.

Pure Python, on torch's private-use backend. It computes with torch's CPU kernels, so the bits are those of the CPU, and
counts what a card would be asked for: launches, bytes, the host's waits, and the most memory at a time. Streams run at
once, and :class:`Streams` finds what would go wrong if they did not. Collectives are gloo's on the host (accelerator.py
has DeepSpeed's side). Importing this changes what torch says of the machine for the rest of the process (conftest.py).
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "gpu"


class _Module(_DummyBackendModule):
    """``torch.gpu``; the device draws its random numbers from the CPU's generator."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: object = NAME) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: object = NAME) -> None:
        torch.set_rng_state(state)


_setup_privateuseone_for_python_backend(NAME, _Module())  # before any backward pass: autograd counts the devices once
torch.accelerator.max_memory_allocated = lambda device=None: counts.peak_bytes  # what asks an allocator in C++
DEVICE = torch.device(NAME, 0)
VIEWS = frozenset({
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty", "empty_like",
    "empty_strided", "expand", "lift_fresh", "narrow", "new_empty", "new_empty_strided", "permute", "real",
    "resize_", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "sym_size", "t", "transpose",
    "unbind", "unfold", "unsqueeze", "view"
})  # fmt: skip
"""Operators that launch nothing: their results are other looks at the same memory, or are not written yet."""
WAITS = frozenset({
    "_local_scalar_dense", "_unique2", "bincount", "equal", "is_nonzero", "masked_select", "nonzero",
    "repeat_interleave", "unique_dim"
})  # fmt: skip
"""Operators whose result the host must know before it goes on."""
MOVES = frozenset({"_to_copy", "copy_", "set_"})
INDEXED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put", "_unsafe_index"})


class WrongDeviceError(RuntimeError):
    """An operator that has tensors of both devices, as a card would say it."""


@dataclass
class Counts:
    """What the device was asked for."""

    launches: int = 0
    bytes_moved: int = 0
    """Read and written by all launches."""
    waits: Counter[str] = field(default_factory=Counter)
    """How often the host waited for the device, by the line of the package that made it."""
    host_indices: Counter[str] = field(default_factory=Counter)
    """Indices that were copied from the host, by line."""
    operators: Counter[str] = field(default_factory=Counter)
    live_bytes: int = 0
    peak_bytes: int = 0

    @property
    def num_waits(self) -> int:
        return self.waits.total()


counts = Counts()


class Streams:
    """Finds work of one stream that reads what another, which may run late, has yet to write to watched storages."""

    def __init__(self) -> None:
        self.current: object = None
        self.watched: set[int] = set()
        """Addresses."""
        self.races: list[str] = []
        self._late: dict[int, object] = {}

    def wait(self, stream: object) -> None:
        """The work given to a stream is done."""
        self._late = {address: writer for address, writer in self._late.items() if writer is not stream}

    def run(self, name: str, tensors: list[Tensor], *, writes: bool) -> None:
        """Run an operator on the current stream; ``writes``: to its first tensor."""
        if not self.watched:
            return
        addresses = [t.host.untyped_storage().data_ptr() for t in tensors if isinstance(t, PretendedTensor)]
        if any(self._late.get(address, self.current) is not self.current for address in addresses):
            self.races.append(_place(name))
        if writes and addresses and addresses[0] in self.watched:
            self._late[addresses[0]] = self.current


streams = Streams()


class LateCollectives:
    """Collectives whose calls return before they complete, as with NCCL: the host waits at the first operator that
    touches their tensors."""

    def __init__(self) -> None:
        self.are_on = False
        self._works: dict[int, Any] = {}
        """Work that is not complete, by the address of the storage."""

    def wait_for(self, tensors: list[Tensor]) -> None:
        """Let the host wait for collectives on these tensors."""
        for tensor in tensors:
            if isinstance(tensor, PretendedTensor):
                work = self._works.pop(tensor.host.untyped_storage().data_ptr(), None)
                if work is not None:
                    work.wait()

    def returned(self, result: Any, tensors: list[Tensor]) -> Any:
        """Return a collective's result with work that seems complete, and keep the real one."""
        if isinstance(result, torch.ScriptObject):
            work = torch._C._distributed_c10d.Work.unbox(result)
            for tensor in tensors:
                if isinstance(tensor, PretendedTensor):
                    self._works[tensor.host.untyped_storage().data_ptr()] = work
            return torch._C._distributed_c10d.FakeWork().boxed()
        if isinstance(result, (tuple, list)):
            return type(result)([self.returned(one, tensors) for one in result])
        return result


late = LateCollectives()


@contextmanager
def late_collectives() -> Iterator[None]:
    """Let collectives on the device return before they complete."""
    late.are_on = True
    yield
    late.are_on = False


_live: dict[int, int] = {}
"""Tensors of this device that hold each storage, by the storage's address."""


class PretendedTensor(Tensor):
    """A tensor on the pretended device; ``host`` has its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor, requires_grad: bool = False) -> PretendedTensor:
        return Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=DEVICE, requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, host: Tensor, requires_grad: bool = False):
        self._take(host)

    def _take(self, host: Tensor) -> None:
        self.host = host
        self._release = _hold(self, host.untyped_storage())

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        """Other numbers, in another shape perhaps, for the same tensor: those that another holds."""
        if not isinstance(value, PretendedTensor):
            raise WrongDeviceError(f"a tensor on {self.device} was given the data of one on {value.device}")
        Tensor.data.__set__(self, value)
        if value is not self:
            self._release()
            self._take(value.host)

    def untyped_storage(self) -> Any:
        """What tells whether two tensors share memory."""
        return self.host.untyped_storage()

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def record_stream(self, stream: object) -> None:
        """Nothing: memory is given back when no tensor holds it, and every stream has done its work by then."""

    def tolist(self) -> Any:
        counts.waits[_place("tolist")] += 1
        streams.wait(streams.current)
        return self.host.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendedTensor({self.host})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _hold(tensor: PretendedTensor, storage: Any) -> Callable[[], object]:
    """Count the storage as alive until the tensor is gone, or what is returned is called."""
    address, nbytes = storage.data_ptr(), storage.nbytes()
    if address == 0:
        return lambda: None
    if address not in _live:
        counts.live_bytes += nbytes
        counts.peak_bytes = max(counts.peak_bytes, counts.live_bytes)
    _live[address] = _live.get(address, 0) + 1
    return weakref.finalize(tensor, _release, address, nbytes)


def _release(address: int, nbytes: int) -> None:
    _live[address] -= 1
    if not _live[address]:
        del _live[address]
        counts.live_bytes -= nbytes


def to_device(value: Tensor) -> PretendedTensor:
    """A copy of a CPU tensor on the device."""
    return PretendedTensor(value.detach().clone())


def to_host(value: Tensor) -> Tensor:
    """The numbers of a tensor, without counting a wait."""
    return value.host if isinstance(value, PretendedTensor) else value


@contextmanager
def pretended() -> Iterator[Counts]:
    """Have the device; yield what it is asked for inside, counted from nothing."""
    _reset()
    with _BelowTheDispatcher(), _Dispatch():
        yield counts


def _reset() -> None:
    fresh = Counts(live_bytes=counts.live_bytes, peak_bytes=counts.live_bytes)
    for name in Counts.__dataclass_fields__:
        setattr(counts, name, getattr(fresh, name))


def module_to_device(module: nn.Module) -> nn.Module:
    """Move a module's parameters, buffers and tensors held as plain attributes, in place; shared ones stay shared."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, param in part._parameters.items():
            if param is not None:
                new = moved.get(id(param)) or nn.Parameter(to_device(param), requires_grad=param.requires_grad)
                part._parameters[name] = moved[id(param)] = new
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = to_device(buffer)
        for name, value in list(vars(part).items()):
            if type(value) is Tensor:
                setattr(part, name, to_device(value))
    return module


class _Dispatch(TorchDispatchMode):
    """Catches what makes a tensor from none, such as ``torch.zeros(3, device="gpu")``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _BelowTheDispatcher(TorchFunctionMode):
    """``torch.tensor(list, device="gpu")`` is made on the CPU, and copied; ``param.data = param.data.to("gpu")``, by
    which DeepSpeed moves a model that was built on the CPU, moves the parameter."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _is_ours(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func is Tensor.new_tensor and isinstance(args[0], PretendedTensor):
            return torch.tensor(*args[1:], dtype=kwargs.get("dtype", args[0].dtype)).to(DEVICE)
        if func in _MOVING and isinstance(args[1], PretendedTensor) and not isinstance(args[0], PretendedTensor):
            return True if func is torch._has_compatible_shallow_copy_type else _become(*args)
        return func(*args, **kwargs)


_MOVING = (Tensor.data.__set__, torch._has_compatible_shallow_copy_type)  # type: ignore[attr-defined]
"""How a tensor is given the data of another, and how a module asks whether it may be."""


def _become(tensor: Tensor, value: PretendedTensor) -> None:
    """Let a tensor of the CPU be one of the device, with the numbers of ``value``; the same object as before."""
    is_param = isinstance(tensor, nn.Parameter)
    fresh = value.detach().requires_grad_(tensor.requires_grad)
    tensor.__class__ = PretendedTensor
    torch._C._swap_tensor_impl(tensor, fresh)  # torch.utils.swap_tensors, for one that DeepSpeed has weak references to
    moved = cast(PretendedTensor, tensor)
    moved._is_param = is_param
    moved._take(value.host)


def _is_ours(wanted: Any) -> bool:
    return wanted is not None and torch.device(wanted).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the host, and give the result to the device that a card would give it to."""
    name = func._schema.name.split("::")[1]
    tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
    on_device = [t for t in tensors if isinstance(t, PretendedTensor)]
    wanted = kwargs.get("device")
    if name == "_foreach_copy_" and len(on_device) < len(tensors):  # between devices, one by one
        for own, other in zip(*args[:2], strict=True):
            own.copy_(other)
        return None
    if on_device and name not in MOVES:
        _require_one_device(func, name, tensors)
    streams.run(name, tensors, writes=name.endswith("_"))
    is_collective = func._schema.name.startswith("c10d::")
    if late.are_on:
        late.wait_for(tensors)
    result = func(*_mapped(_host_of, args), **{key: _mapped(_host_of, value) for key, value in kwargs.items()})
    if late.are_on and is_collective:
        result = late.returned(result, tensors)
    if name == "copy_":
        is_ours = isinstance(args[0], PretendedTensor)
    else:
        is_ours = _is_ours(wanted) or (bool(on_device) and (wanted is None or _is_ours(wanted)))
    if on_device or is_ours:
        out = {id(leaf) for leaf in _tensors(kwargs.get("out"))}  # written, not read
        read = [t for t in tensors if id(t) not in out]
        asynchronous = is_ours and (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        waits = not asynchronous and name in ("_to_copy", "copy_") and _crosses(name, tensors, is_ours)
        _count(func, name, read, _tensors(result), waits)
    known = {id(_host_of(t)): t for t in tensors}

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return known.get(id(leaf)) if id(leaf) in known else PretendedTensor(leaf) if is_ours else leaf

    return _mapped(placed, result)


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in what an operator takes or gives: values, and sequences of them. torch's own is slower."""
    if isinstance(value, (tuple, list)):
        return [tensor for one in value for tensor in _tensors(one)]
    return [value] if isinstance(value, Tensor) else []


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Call the function on every value in what an operator takes or gives."""
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(function, one) for one in value])
    return function(value)


def _host_of(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu") if leaf.type == NAME else leaf
    return to_host(leaf) if isinstance(leaf, Tensor) else leaf


def _require_one_device(func: Any, name: str, tensors: list[Tensor]) -> None:
    """Allow what a card allows beside its own tensors: numbers of the host, and indices, which are copied."""
    for tensor in tensors:
        if isinstance(tensor, PretendedTensor) or (tensor.dim() == 0 and name not in ("cat", "stack", "mm")):
            continue
        if name in INDEXED and tensor.dtype in (torch.int64, torch.bool, torch.uint8):
            counts.host_indices[_place(name)] += 1
            continue
        devices = ", ".join(str(t.device) for t in tensors)
        raise WrongDeviceError(f"{func} has tensors on {devices}, at {_place(name)}")


def _crosses(name: str, tensors: list[Tensor], is_ours: bool) -> bool:
    """Return whether a copy goes from one device to the other."""
    ours = {isinstance(t, PretendedTensor) for t in tensors}
    return len(ours) > 1 or (name == "_to_copy" and is_ours not in ours)


def _count(func: Any, name: str, tensors: list[Tensor], results: list[Tensor], waits: bool) -> None:
    by_mask = name in INDEXED and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
    if waits or by_mask or name in WAITS:
        counts.waits[_place(name)] += 1
        streams.wait(streams.current)
    if name in VIEWS or name == "_local_scalar_dense":
        return
    is_written_only = name in ("copy_", "zero_", "fill_")
    read = sum(_nbytes(t) for t in tensors[is_written_only:])
    written = sum(map(_nbytes, results)) or (_nbytes(tensors[0]) if tensors else 0)
    counts.launches += 4 if by_mask or name in ("nonzero", "bincount") else 2 if name == "addmm" else 1
    counts.bytes_moved += read + written + (2 * written if name == "addmm" else 0)
    counts.operators[name] += 1


def _nbytes(tensor: Tensor) -> int:
    """Bytes that a look at the tensor reads: what is expanded is read once."""
    once = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    return math.prod(once) * tensor.element_size()


def _place(name: str) -> str:
    """The innermost line of the package that led here, with the operator."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/pst_ds/" in file:
            return f"{file.rpartition('/pst_ds/')[2]}:{frame.f_lineno} {name}"
        frame = frame.f_back
    return f"tests {name}"
