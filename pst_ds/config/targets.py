"""The table of targets: engines that ``pst-ds init --target`` trains for and ``pst-ds export --for`` writes for."""

from dataclasses import dataclass

from pst_ds.config.one_shot import ENGINES
from pst_ds.core.patterns import parse_pattern


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Properties of an engine that a model is trained and exported for."""

    title: str
    """Name of the engine in messages."""
    skips_pruned: bool = False
    """True if the engine skips pruned weights; others multiply by zeros, so that sparsity saves neither time nor
    memory."""
    patterns: tuple[str, ...] = ()
    """Sparsity patterns that an engine which does not skip single weights can use."""
    only_causal: bool = False
    """True if exports for the engine are causal language models only."""


TARGETS: dict[str, Target] = {
    "cpu": Target(title="the decoder and the operators of pst-ds", skips_pruned=True),
    "onnxruntime": Target(title="ONNX Runtime without the operators of pst-ds"),
    "openvino": Target(title="OpenVINO"),
    "llama.cpp": Target(title="llama.cpp", only_causal=True),
    "vllm": Target(title="vLLM"),
    "transformers": Target(title="transformers without pst-ds"),
    "gpu": Target(title="a GPU", patterns=("2:4",)),
}
# An assertion, because only a change of this package could break it.
assert set(ENGINES) < set(TARGETS), "a speed is predicted for an engine that is not a target"


def pattern_conflict(target: str, pattern: str) -> str:
    """Return why a model that is trained for ``target`` gains nothing by a sparsity ``pattern``; "" if it does.

    Raises ValueError for an unknown pattern.
    """
    facts = TARGETS[target]
    if facts.skips_pruned or not pattern or pattern in facts.patterns:
        return ""
    able: list[str] = []
    for name, other in TARGETS.items():
        if other.skips_pruned or pattern in other.patterns:
            able.append(name)
    return (
        f"{facts.title} computes with dense weights, so the pattern {parse_pattern(pattern)} gains nothing; targets "
        f"that use it: {' and '.join(able)}"
    )
