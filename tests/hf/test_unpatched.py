"""transformers is as before once no config and no callback of pst-ds exists."""

from __future__ import annotations

import copy
import gc

from transformers import trainer
from transformers.quantizers.auto import AutoHfQuantizer

from pst_ds.hf import PackedWeightsConfig, PSTCallback


def test_configs_are_merged_as_before_once_the_user_s_is_gone():
    gc.collect()
    before = vars(AutoHfQuantizer)["merge_quantization_configs"]
    config = PackedWeightsConfig(load_as="dense")
    copied = copy.deepcopy(config)
    assert vars(AutoHfQuantizer)["merge_quantization_configs"] is not before
    del config
    assert vars(AutoHfQuantizer)["merge_quantization_configs"] is not before
    del copied
    gc.collect()
    assert vars(AutoHfQuantizer)["merge_quantization_configs"] is before
    of_folder = PackedWeightsConfig(format="bitmask")
    assert vars(AutoHfQuantizer)["merge_quantization_configs"] is before
    assert of_folder.load_as == "auto"


def test_trainers_have_the_usual_callbacks_once_no_callback_of_ours_exists():
    gc.collect()
    before = list(trainer.DEFAULT_CALLBACKS)
    one = PSTCallback(final_sparsity=0.5)
    other = PSTCallback(final_sparsity=0.7)
    assert len(trainer.DEFAULT_CALLBACKS) == len(before) + 1
    del one
    assert len(trainer.DEFAULT_CALLBACKS) == len(before) + 1
    del other
    gc.collect()
    assert before == trainer.DEFAULT_CALLBACKS
