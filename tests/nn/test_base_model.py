"""Places of pretrained models that cannot be, and models whose weights are packed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pst_ds.errors import InputError
from pst_ds.nn.base_model import Pretrained

MODEL = Pretrained("a", "model.path")


def test_a_folder_or_a_name_on_the_hub_will_do(tmp_path):
    for place in (str(tmp_path), "bert-base-uncased", "google-bert/bert-base-uncased"):
        Pretrained(place, "model.path").require_place()


@pytest.mark.parametrize("place", ["./a", "/no/model", "~/model", "a/b/c"])
def test_a_path_that_is_not_there_is_refused(place):
    with pytest.raises(
        InputError, match=rf"^model\.path = '{place}' does not exist \(looked in /.*name a model folder"
    ):
        Pretrained(place, "model.path").require_place()


def test_an_empty_place_is_refused():
    with pytest.raises(InputError, match=r"^model\.tokenizer = '' is empty; name a model folder"):
        Pretrained("", "model.tokenizer").require_place()


@pytest.mark.parametrize("quantization", [{"quant_method": "gptq"}, SimpleNamespace(quant_method="gptq")])
def test_quantised_weights_are_refused_by_their_method(quantization):
    with pytest.raises(InputError, match=r"^model\.path = 'a' is quantised \(gptq\).*Name the original"):
        MODEL.require_dense(SimpleNamespace(quantization_config=quantization))


def test_our_own_packed_weights_can_be_made_dense():
    packed = SimpleNamespace(quantization_config={"quant_method": "pst_ds", "format": "bitmask"})
    with pytest.raises(InputError, match="pst-ds export a --format dense --out DIR"):
        MODEL.require_dense(packed)
    MODEL.require_dense(SimpleNamespace())
    MODEL.require_dense(SimpleNamespace(quantization_config=None))
