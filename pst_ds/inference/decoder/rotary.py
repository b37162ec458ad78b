"""Rotary angles of a model: which parameters are known, the tables of its layers, and the columns that angles turn."""

import sys
from typing import Any

import torch

from pst_ds.inference.decoder.problems import Problems
from pst_ds.inference.decoder.table import DecoderError, Part, RotaryTable

_PARAMETERS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor", "short_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Rotary parameters by rope_type. Each only affects the angles, which the model's module computes for the table."""
_PARAMETERS_OF_ALL = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "max_position_embeddings",
    "original_max_position_embeddings",
    # mrope is for images: the three positions of a text token are equal
    "mrope_section",
    "mrope_interleaved",
}
_CHANGES_BEYOND_ORIGINAL = {
    "long_factor": "longrope uses other angles",
    "llama_4_scaling_beta": "attention scales queries by position",
}
"""Rotary parameters without effect up to original_max_position_embeddings, and their effect in longer sequences."""
NO_ANGLES = -1
"""Index of the table of a layer whose attention has no rotary angles."""


class RotaryTables:
    """Tables of cosines and sines, which the model's own module computes. Layers of one kind share a table."""

    def __init__(self, rotary: Part | None, context: int, problems: Problems):
        """``rotary``: the model's module of rotary angles. ``context``: positions of a table."""
        self.tables: list[RotaryTable] = []
        self.turns_neighbours = False
        """:attr:`DecoderTable.turns_neighbours`: one value, since all layers share the model's code."""
        self._rotary = rotary
        self._context = context
        self._problems = problems
        self._index_of_type: dict[str | None, int] = {}

    def index_for(self, attention: Part, layer_type: str | None) -> int:
        """Return the index of a layer's table; NO_ANGLES without angles, or if a problem was noted."""
        if self._rotary is None or not _uses_angles(attention):
            return NO_ANGLES
        # modules without this attribute compute the same angles for all types of layers
        kind = layer_type if hasattr(self._rotary, "layer_types") else None
        if kind not in self._index_of_type:
            table = self._table(kind)
            if table is None:
                self._problems.note(f"{type(self._rotary).__name__} gives no pair of columns the same angle")
                return NO_ANGLES
            self.turns_neighbours = _turns_neighbours(attention)
            self.tables.append(table)
            self._index_of_type[kind] = len(self.tables) - 1
        return self._index_of_type[kind]

    @torch.no_grad()
    def _table(self, kind: str | None) -> RotaryTable | None:
        """Compute the angles of one kind of layers; None if its columns do not come in pairs."""
        assert self._rotary is not None
        # the module reads only the dtype and the device of the hidden states
        arguments: list[Any] = [torch.zeros(1, 1, 1), torch.arange(self._context)[None]]
        if kind:
            arguments.append(kind)
        cosines, sines = self._rotary(*arguments)
        cosines = cosines[0].float()  # (context, rotated columns)
        sines = sines[0].float()
        half = cosines.shape[-1] // 2
        # both columns of a pair have the same angle; the table has one of the two
        if torch.equal(cosines[:, :half], cosines[:, half:]):
            one_of_pair = slice(0, half)
        elif torch.equal(cosines[:, ::2], cosines[:, 1::2]):
            one_of_pair = slice(0, None, 2)
        else:
            return None
        return RotaryTable(cosines[:, one_of_pair].contiguous(), sines[:, one_of_pair].contiguous())


def note_unknown_parameters(config: Part, problems: Problems) -> None:
    """Note the rotary parameters that may affect more than the angles."""
    for parameters in _settings(config):
        kind = parameters.get("rope_type", "default")
        known = {*_PARAMETERS_OF_ALL, *_CHANGES_BEYOND_ORIGINAL, *_PARAMETERS.get(kind, ())}
        if kind not in _PARAMETERS:
            known.discard("rope_type")  # so that the message names it
        for key, value in {"rope_type": kind, **parameters}.items():
            if value is not None and key not in known:
                problems.note(f"{key} = {value!r} in rope_parameters is not known")


def require_original_positions(config: Part, context: int) -> None:
    """Raise DecoderError if rotary parameters affect more than the angles beyond the original positions."""
    for parameters in _settings(config):
        original = parameters.get("original_max_position_embeddings") or 0
        for key, change in _CHANGES_BEYOND_ORIGINAL.items():
            if parameters.get(key) is not None and context > original:
                raise DecoderError(
                    f"context = {context}: {change} in sequences beyond the original {original} positions ({key}), and "
                    f"the native decoder does not. Lower context to {original}, or use transformers' own generate()"
                )


def _settings(config: Part) -> list[dict[str, Any]]:
    """Return the rotary parameters of a config, which may differ by kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    return by_layer_type or [parameters]


def _uses_angles(attention: Part) -> bool:
    if getattr(attention, "sliding_window", None) and not getattr(attention, "is_sliding", True):
        return False  # full attention between layers with windows has no angles (EXAONE 4)
    return bool(int(getattr(attention, "use_rope", 1)))  # SmolLM3 has it as a number


def _turns_neighbours(attention: Part) -> bool:
    """Return whether rotary angles turn neighbouring columns, measured with the function of the model's own code."""
    rotate_half = getattr(sys.modules.get(type(attention).__module__), "rotate_half", None)
    if rotate_half is None:
        return False
    # pairs of halves would become (-3, -4, 1, 2)
    return bool(rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [-2.0, 1.0, -4.0, 3.0])
