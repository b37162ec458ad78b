"""Packed folders in transformers: ``import pst_ds.hf``, then ``AutoModelForCausalLM.from_pretrained(DIR)`` as ever.

Every Auto class loads bitmask, 2:4 and csr. ``quantization_config=PackedWeightsConfig(load_as="dense")`` (or "sparse")
chooses between an ordinary model and one whose weights stay packed. Without this import transformers finds no weight
file in such a folder and raises.

``PSTCallback`` and ``trainer_optimizer`` train with HF Trainer (docs/how-to/your-script.md).
"""

from typing import TYPE_CHECKING

from pst_ds.hf.config import PackedWeightsConfig
from pst_ds.hf.quantizer import PackedWeightsQuantizer, register
from pst_ds.hf.weight_files import PackedFolderError

__all__ = [
    "PSTCallback",
    "PackedFolderError",
    "PackedWeightsConfig",
    "PackedWeightsQuantizer",
    "load_additions",
    "trainer_optimizer",
]

register()

if TYPE_CHECKING:
    from pst_ds.hf.trainer_callback import PSTCallback, trainer_optimizer
    from pst_ds.nn.addition import load_additions as load_additions
else:

    def __getattr__(name: str) -> object:
        """Import what needs more than loading a model on first use: the Trainer's part, and additions."""
        if name == "load_additions":
            from pst_ds.nn.addition import load_additions

            return load_additions
        if name not in ("PSTCallback", "trainer_optimizer"):
            raise AttributeError(f"module 'pst_ds.hf' has no attribute {name!r}")
        from pst_ds.hf import trainer_callback

        return getattr(trainer_callback, name)
