"""Check that the tensors of a model and of its files are the same."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from pst_ds.errors import shortened
from pst_ds.inference.hf.weight_files import PackedFolderError


class LoadedKeys:
    """Tensors that a model expects from its files; transformers initialises missing ones randomly."""

    def __init__(self, model: PreTrainedModel, *, has_heads: bool, is_part: bool):
        """``has_heads``: the files hold another class of the same base model, whose head is left out; ``is_part``: the
        rest of a model of text and pictures too."""
        self._is_part = is_part
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._base_prefix = f"{model.base_model_prefix}." if has_heads else ""

    def compare(self, model: PreTrainedModel, loading_info: Any) -> None:
        """Raise PackedFolderError, naming a tensor, unless the files and the model fit.

        ``loading_info``: transformers' sets of keys after its own exceptions, as an object, or in 5.0 as the pair
        (missing, unexpected).
        """
        if isinstance(loading_info, tuple):
            missing, unexpected = loading_info
            mismatched: set[tuple[object, ...]] = set()
        else:
            missing, unexpected = loading_info.missing_keys, loading_info.unexpected_keys
            mismatched = loading_info.mismatched_keys
        if missing:
            raise PackedFolderError(_missing(model, sorted(missing)))
        of_model = [] if self._is_part else [name for name in unexpected if name.startswith(self._base_prefix)]
        extra = sorted(of_model)
        if extra:
            raise PackedFolderError(
                f"{shortened(extra, 3)}: in the folder, but {type(model).__name__} has no such tensor. Is "
                "config.json that of another model?"
            )
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        other = sorted({str(key[0]) for key in mismatched} | {n for n in shapes if shapes[n] != self._shapes.get(n)})
        if other:
            wanted, kind = tuple(self._shapes.get(other[0], ())), type(model).__name__
            raise PackedFolderError(f"{shortened(other, 3)}: not of the shape {wanted} that {kind} has")


def _missing(model: PreTrainedModel, missing: list[str]) -> str:
    message = f"{shortened(missing, 3)}: missing in the folder; {type(model).__name__} would have random values there."
    saved = ", ".join(model.config.architectures or ())
    if saved and type(model).__name__ not in saved.split(", "):
        return f"{message} The folder holds {saved}: load it with that class, or export the model that you want."
    return f"{message} Export again."
