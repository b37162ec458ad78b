"""Models of the Hugging Face hub by name: find them in the hub's cache, download what is missing, read only headers."""

import glob
import json
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from pst_ds.errors import InputError, first_line
from pst_ds.formats.safetensors_file import DTYPE_OF_CODE
from pst_ds.progress import Progress

CONFIG_FILE = "config.json"
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Weight files and indexes of several, in the order in which transformers looks for them."""
_SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Endings of the other files that a model needs: its config, tokenizer and generation settings."""
_POLL_SECONDS = 0.2
"""Time between two looks at how many bytes have arrived."""

TensorSize = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""


class NotDownloadedError(InputError):
    """Files of a model on the hub that are neither in the cache nor can be downloaded now."""


def is_hub_name(path: str | Path) -> bool:
    """Return whether ``path`` is not a folder, and is spelled like the name of a model on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(str(path))
    except HFValidationError:
        return False
    return not Path(path).exists()


def downloaded(path: str | Path) -> Path:
    """Return a folder with the model's config, weights and small files: ``path``, or its snapshot in the hub's cache.

    Files of a model on the hub that are not in the cache are downloaded, in one of the weight formats only. Processes
    of a host that need the same file wait for the one that downloads it. Raises NotDownloadedError if weights are
    missing and the hub cannot be reached, and InputError if the hub does not have the model.
    """
    if Path(path).is_dir():
        return Path(path)
    name = str(path)
    if not is_hub_name(path):
        raise InputError(f"{name} does not exist (looked in {Path(path).absolute()}). Name a model folder")
    folder = cached_snapshot(name)
    missing = [CONFIG_FILE] if folder is None else missing_weights(folder)
    # "*token*" is any file of a tokenizer: tokenizer.json, tokenizer.model, special_tokens_map.json
    if folder is not None and not missing and any(folder.glob("*token*")):
        return folder
    try:
        return _download(name)
    except InputError:
        raise
    except Exception as error:  # of several HTTP clients
        needed = "its tokenizer"
        if missing:
            needed = missing[0]
        problem = _error(name, needed, error)
        # some models have no tokenizer file, and a complete one in the cache must load offline
        if folder is not None and not missing and isinstance(problem, NotDownloadedError):
            return folder
        raise problem from error


def cached_snapshot(name: str) -> Path | None:
    """Return the folder of a model's newest revision in the hub's cache, whose files may be incomplete; None without
    its config."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, CONFIG_FILE)
    if not isinstance(config, str):  # None, or a mark that the hub is known not to have the file
        return None
    return Path(config).parent


def missing_weights(folder: Path) -> list[str]:
    """Return the weight files that a model folder lacks; empty if it is complete. Raises InputError for an index that
    is damaged."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            if not name.endswith(".json"):
                return []
            # a download that was interrupted leaves the index and some of its files
            shards = sorted(set(weight_map(folder / name).values()))
            return [shard for shard in shards if not (folder / shard).is_file()]
    return [WEIGHT_FILES[0]]


def weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor, as an index of several weight files has it. Raises InputError."""
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(table.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} is damaged: {error!r}. Copy it again") from None
    strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if strange:
        raise InputError(f"{index} refers to {strange[0]!r}, outside the folder. Use a copy from a trusted source")
    return table


@dataclass(frozen=True, slots=True)
class RemoteHeaders:
    """Names, dtypes and shapes of the tensors of a model on the hub."""

    folder: Path
    """Folder of its config in the hub's cache."""
    file_of: dict[str, str]
    """File of each tensor."""
    sizes: dict[str, TensorSize]
    """Dtype and shape of each tensor."""


def remote_headers(path: str | Path) -> RemoteHeaders | None:
    """Read the headers of a model's safetensors files on the hub; a few kB of each file.

    Returns None for a folder, for weights in the hub's cache, and for weights in another format than safetensors.
    Raises as :func:`downloaded`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    name = str(path)
    if not is_hub_name(path):
        return None
    folder = cached_snapshot(name)
    missing = [CONFIG_FILE] if folder is None else missing_weights(folder)
    if not missing:
        return None
    try:
        folder = _fetch(name, CONFIG_FILE).parent
        headers = HfApi().get_safetensors_metadata(name, revision=folder.name)
    except NotASafetensorsRepoError:
        return None
    except Exception as error:  # of several HTTP clients
        raise _error(name, missing[0], error) from error
    sizes: dict[str, TensorSize] = {}
    for file in headers.files_metadata.values():
        for tensor, info in file.tensors.items():
            if info.dtype not in DTYPE_OF_CODE:
                raise InputError(f"{name} on the hub: {tensor} is {info.dtype}; known are {', '.join(DTYPE_OF_CODE)}")
            sizes[tensor] = DTYPE_OF_CODE[info.dtype], tuple(info.shape)
    return RemoteHeaders(folder, dict(headers.weight_map), sizes)


def require_file(name: str, file: str) -> None:
    """Raise InputError if a model's ``file`` is neither in the hub's cache nor can be downloaded.

    NotDownloadedError tells that it may be on the hub.
    """
    try:
        _fetch(name, file)
    except Exception as error:  # of several HTTP clients
        raise _error(name, file, error) from error


def _fetch(name: str, file: str) -> Path:
    """Return the path of a model's ``file`` in the hub's cache, after a download if it is outdated or missing."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, file))


def _download(name: str) -> Path:
    """Download the files of a model that the cache lacks; return their folder. Raises what the hub's client does."""
    from huggingface_hub import HfApi, snapshot_download

    folder = _fetch(name, CONFIG_FILE).parent
    info = HfApi().model_info(name, revision=folder.name, files_metadata=True)
    # "or", because the client types both as optional
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = _needed_files(name, folder, sizes)
    lacking = [file for file in wanted if not (folder / file).is_file()]
    if not lacking:
        return folder
    # the client takes patterns: a name with brackets would match another file
    patterns = [glob.escape(file) for file in wanted]
    download = _Background(lambda: snapshot_download(name, revision=folder.name, allow_patterns=patterns))
    total = sum(sizes[file] for file in lacking)
    # the cache has a snapshots/REVISION folder of links into blobs/, where parts of files grow
    blobs = folder.parents[1] / "blobs"
    before = _bytes_in(blobs)
    with Progress(f"download {name}", total, "bytes") as progress:
        progress.say(f"downloading {name}: {len(lacking)} files, {total / 1e6:,.1f} MB")
        while not download.has_ended(_POLL_SECONDS):
            progress.at(min(total, max(0, _bytes_in(blobs) - before)))
    download.raise_error()
    return folder


def _needed_files(name: str, folder: Path, sizes: Collection[str]) -> list[str]:
    """Return the files of a repository that transformers would read: one format of the weights, and small files.

    Raises InputError for a repository without weights.
    """
    in_repository = [file for file in WEIGHT_FILES if file in sizes]
    if not in_repository:
        raise InputError(f"{name} has no {WEIGHT_FILES[0]} or {WEIGHT_FILES[2]} on the hub. Name a model with weights")
    first = in_repository[0]
    small: list[str] = []
    for file in sizes:
        # subfolders hold settings of sentence encoders, such as 1_Pooling, but also exports to other formats
        is_in_place = "/" not in file or file.endswith("_Pooling/config.json")
        if is_in_place and file.endswith(_SMALL_FILES) and not file.endswith(".index.json"):
            small.append(file)
    if not first.endswith(".index.json"):
        return [*small, first]
    from huggingface_hub import hf_hub_download

    index = Path(hf_hub_download(name, first, revision=folder.name))
    return [*small, first, *sorted(set(weight_map(index).values()))]


class _Background:
    """A call on a thread that does not keep the process alive, so that the caller can report progress meanwhile."""

    def __init__(self, call: Callable[[], object]):
        self._error: BaseException | None = None

        def run() -> None:
            try:
                call()
            except BaseException as error:  # raised again on the caller's thread
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def has_ended(self, patience: float) -> bool:
        """Wait for the end of the call for at most ``patience`` seconds; return whether it has ended."""
        self._thread.join(patience)
        return not self._thread.is_alive()

    def raise_error(self) -> None:
        """Raise what the call raised."""
        if self._error is not None:
            raise self._error


def _bytes_in(folder: Path) -> int:
    """Return the size of the files in a folder while others write to it."""
    total = 0
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):  # renamed when it was complete
            total += path.stat().st_size
    return total


def _error(name: str, file: str, error: Exception) -> InputError | OSError:
    """Return the error to raise for one of the hub's client, when ``file`` of a model is needed."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if constants.HF_HUB_OFFLINE:
        return _not_downloaded(name, file, "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set")
    if isinstance(error, GatedRepoError):
        return InputError(f"{name} is gated. Accept its terms on the hub, and log in with hf auth login")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(f"{name} is not on the hub, or is private. Check the name, or log in with hf auth login")
    if isinstance(error, LocalEntryNotFoundError):
        return _not_downloaded(name, file, f"the hub cannot be reached ({first_line(error.__cause__ or error)})")
    if isinstance(error, EntryNotFoundError):
        return InputError(f"{name} on the hub lacks a file: {first_line(error)}. Name another model")
    if isinstance(error, OSError) and error.errno and not isinstance(error, HfHubHTTPError | ConnectionError):
        return error  # such as a full disk
    told = f"{type(error).__name__}: {first_line(error)}"
    # an answer with an error status comes from a hub that was reached
    verb = "does not send it" if isinstance(error, HfHubHTTPError) else "cannot be reached"
    return _not_downloaded(name, file, f"the hub {verb} ({told})")


def _not_downloaded(name: str, file: str, reason: str) -> NotDownloadedError:
    return NotDownloadedError(
        f"{file} of {name} is not in the hub's cache, and {reason}. Run hf download {name} where the hub can be "
        "reached, into an HF_HOME that this machine reads"
    )
