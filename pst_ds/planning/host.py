"""What a training step costs the host: Python of layers and operators, and the hooks of DeepSpeed.

The host prepares work ahead of the device, so a step takes as long as the slower of the two. Its time depends on
numbers of calls and tensors, not on their sizes: a small micro-batch on a fast device waits for the host.

How the constants were measured: ``python -m tools.bench.host``, a Llama of 6 blocks whose products take next to no
time, on two ranks with gloo on an AMD EPYC (Zen 4). Milliseconds of a step per block, and calls and tensors of a whole
step (7 pruned layers per block with 6 factors each; stage 3 has 101 parameters, of which two are the flat factors):

    stage 3, a tensor per factor     38.6    165 fetches    153 releases    252 trained tensors
    stage 3, flat factors            21.9    169            159               2
    the same, blocks as leaves       18.9     25             21               2
    stage 2, a tensor per factor     16.4                                   252
    stage 2, flat factors            10.3                                     2

A step is the sum of blocks, fetches, releases, parameters in use, and reduced and optimizer tensors. The five rows
determine these (the sum then matches each row within 0.5 %), with one more assumption: a fetch takes 1.6 times as long
as a release, the ratio of the times inside these calls.

* Rows 4 and 5 differ by 250 optimizer tensors.
* Row 5 without these is 6 blocks.
* Rows 1 and 2 differ by 250 reduced tensors, next to the optimizer's and to 4 fetches and 6 releases.
* Rows 2 and 3 differ by 144 fetches and 138 releases.
* Row 3 without all of these is what ZeRO-3 does for 101 parameters in two passes, regardless of who fetches them.

Gloo's waits are included, so the sum is rather too long than too short for NCCL.
"""

from dataclasses import dataclass

OPTIMIZER_TENSOR = 146e-6
"""Seconds per trained tensor and step, of the optimizer and of stage 2's hooks: (98.4 - 61.8) ms / 250."""
REDUCED_TENSOR = 257e-6
"""Seconds per trained tensor and micro-batch that only stage 3 takes: (231.6 - 131.4 + 0.6) ms / 250 is this and
OPTIMIZER_TENSOR."""
FETCH = 78e-6
"""Seconds per call of ZeRO-3's hooks before a module's turn: (131.4 - 113.4) ms is 144 of these and 138 releases."""
RELEASE = 49e-6
"""Seconds per call of ZeRO-3's hooks after a module's turn."""
PARAMETER_TURN = 238e-6
"""Seconds of ZeRO-3 per parameter and turn of its module: (113.4 - 61.5 - 3.8) ms / (101 parameters x 2 turns)."""

# A block costs (61.8 - 0.3) ms / 6 = 10.25 ms. One process without DeepSpeed tells how the parts share it (thread time,
# the same benchmark): of 9.85 ms, 1.59 are 128 operators of a plain block, and its 7 pruned layers add 1.69 forward and
# 6.57 backward.
OPERATOR = 12.9e-6
"""Seconds of Python and dispatch per operator outside the pruned layers: 10.25 ms x 1.59 / 9.85 / 128."""
LAYER_FORWARD = 0.25e-3
"""Seconds of a pruned layer's forward pass: 10.25 ms x 1.69 / 9.85 / 7."""
LAYER_BACKWARD = 0.98e-3
"""Seconds of its backward pass: 10.25 ms x 6.57 / 9.85 / 7."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """Calls of DeepSpeed's hooks on one rank."""

    fetches: float = 0
    releases: float = 0
    parameter_turns: float = 0
    """Parameters of the modules that have their turn, counted in every turn."""
    reduced_tensors: float = 0
    optimizer_tensors: float = 0

    @property
    def seconds(self) -> float:
        """Seconds on the processor that the constants were measured on."""
        turns = self.fetches * FETCH + self.releases * RELEASE + self.parameter_turns * PARAMETER_TURN
        return turns + self.reduced_tensors * REDUCED_TENSOR + self.optimizer_tensors * OPTIMIZER_TENSOR
