"""The adapter state in a folder: what it holds, where it goes, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
)

from pst_ds.checkpoint.adapter import PretrainedError, _fingerprint, adapter_state, load_pretrained, save_pretrained
from pst_ds.config.pst import Override, PSTConfig
from pst_ds.config.settings import BeforeLoading, Finite, settings
from pst_ds.errors import InputError
from pst_ds.masks.update import mask_stats, update_masks
from pst_ds.nn.adapter_checkpoints import adapter_checkpoints
from pst_ds.nn.inject import freeze_scores, inject_pst, pst_layers
from pst_ds.nn.merge import merge_and_unload
from pst_ds.nn.optimizer import pst_parameter_groups
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import LocalEngine

BASE = "tests/data/tiny-bert"
CONFIG = PSTConfig(
    score_rank=3, update_embeddings=("word_embeddings",), exclude_modules=("key",), modules_to_save=("classifier",),
    overrides=(Override(modules=("intermediate.dense",), pattern="row"),),
)  # fmt: skip


def _base(dtype=torch.float32, path=BASE):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype)


def _trained(dtype=torch.float32):
    """A model after two steps, so that bf16 parameters have masters beside them."""
    model = inject_pst(_base(dtype), CONFIG).eval()
    engine = LocalEngine(model, pst_parameter_groups(model))
    for _ in range(2):
        ids = torch.arange(5, 21).view(2, 8)
        engine.backward(engine(input_ids=ids, labels=torch.tensor([0, 1])).loss)
        engine.step()
    update_masks(model, 0.6)
    return model


def _logits(model):
    return model.eval()(input_ids=torch.arange(5, 25).view(2, 10)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back_on_its_base(tmp_path, dtype):
    model = _trained(dtype)
    freeze_scores(model)
    save_pretrained(model, tmp_path, step=2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "pst_config.json", "pst_model.safetensors", "model.safetensors.index.json",
    }  # fmt: skip
    table = json.loads((tmp_path / "pst_config.json").read_text())
    assert (table["step"], table["masks_frozen"], table["base_model_name_or_path"]) == (2, True, BASE)
    assert table["sparsity"] == pytest.approx(mask_stats(model).sparsity)
    assert len(table["base_fingerprint"]) == 64
    tensors = load_file(tmp_path / "pst_model.safetensors")
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    for (name, param), master in zip(named.items(), sharding.fp32_masters(list(named.values())), strict=True):
        assert torch.equal(tensors[name], master), name
        assert torch.equal(tensors[name].to(dtype), param)

    loaded = load_pretrained(_base(dtype), tmp_path)
    assert loaded.pst_config == CONFIG
    assert torch.equal(_logits(loaded), _logits(model))
    assert mask_stats(loaded).checksum == mask_stats(model).checksum
    assert {n: layer.magnitude_scales for n, layer in pst_layers(loaded).items()} == {
        n: layer.magnitude_scales for n, layer in pst_layers(model).items()
    }
    assert not any(layer.scores_train for layer in pst_layers(loaded).values())
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == set(named)


def test_the_paper_s_config_and_a_model_that_is_no_transformer_s(tmp_path):
    def base():
        torch.manual_seed(0)
        model = nn.Module()
        model.blocks = nn.ModuleList([nn.Linear(5, 7)])
        return model

    model = inject_pst(base(), PSTConfig.paper(seed=4))
    update_masks(model, 0.5)
    save_pretrained(model, tmp_path / "new" / "folder")
    again = load_pretrained(base(), tmp_path / "new" / "folder")
    assert again.pst_config == PSTConfig.paper(seed=4)
    assert mask_stats(again).checksum == mask_stats(model).checksum
    assert all(layer.scores_train for layer in pst_layers(again).values())


def test_a_tied_head_that_is_trained_is_saved_once_and_stays_tied(tmp_path):
    config = GPT2Config(vocab_size=60, n_embd=24, n_layer=1, n_head=2, n_positions=48, initializer_range=0.2)

    def base():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()

    def logits(model):
        return model(input_ids=torch.arange(5, 15).view(1, -1)).logits

    model = inject_pst(base(), PSTConfig(modules_to_save=("lm_head",)))
    with torch.no_grad():
        model.lm_head.weight.add_(0.5)
    update_masks(model, 0.5)
    save_pretrained(model, tmp_path)
    names = set(load_file(tmp_path / "pst_model.safetensors"))
    assert len(names & {"lm_head.weight", "transformer.wte.weight"}) == 1
    again, other = load_pretrained(base(), tmp_path), inject_pst(base(), PSTConfig(modules_to_save=("lm_head",)))
    adapter_checkpoints(model)
    adapter_checkpoints(other)
    other.load_state_dict(model.state_dict())
    assert len(set(model.state_dict()) & {"lm_head.weight", "transformer.wte.weight"}) == 1
    for loaded in (again, other, merge_and_unload(again)):
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert torch.equal(logits(loaded), logits(model))


def test_values_of_a_gathered_state_dict_are_taken():
    model = _trained(torch.bfloat16)
    tensors = adapter_state(model, model.state_dict())
    assert tensors.keys() == adapter_state(model).keys()
    assert torch.equal(tensors["classifier.weight"], model.classifier.weight.float())
    assert not torch.equal(tensors["classifier.weight"], adapter_state(model)["classifier.weight"])


def test_a_model_that_was_frozen_is_saved_whole(tmp_path):
    """For inference, say: what is saved follows the config, not the gradients of the moment."""
    model = _trained()
    adapter_checkpoints(model)
    expected, state = adapter_state(model), model.state_dict()
    model.requires_grad_(False)
    assert adapter_state(model).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_state(model).items())
    assert model.state_dict().keys() == state.keys()
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "pst_config.json").read_text())["also_trained"] == []
    assert torch.equal(_logits(load_pretrained(_base(), tmp_path)), _logits(model))
    frozen = inject_pst(_base(), CONFIG).requires_grad_(False)
    assert torch.equal(_logits(load_pretrained(frozen, tmp_path)), _logits(model))


def test_pruned_weights_of_the_config_are_saved_when_frozen_too(tmp_path):
    config = PSTConfig(train_weights=True, score_rank=0, structured_scores=False, update_rank=0)
    model = inject_pst(_base(), config)
    with torch.no_grad():
        for layer in pst_layers(model).values():
            layer.weight.mul_(1.5)
    save_pretrained(model.requires_grad_(False), tmp_path)
    assert torch.equal(_logits(load_pretrained(_base(), tmp_path)), _logits(model))


def test_what_was_trained_by_hand_comes_back_trainable(tmp_path):
    model = _trained()
    by_hand = [name for name, _ in model.named_parameters() if "LayerNorm" in name]
    with torch.no_grad():
        for name in by_hand:
            model.get_parameter(name).requires_grad_(True).mul_(1.25)
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "pst_config.json").read_text())["also_trained"] == by_hand
    loaded = load_pretrained(_base(), tmp_path)
    assert torch.equal(_logits(loaded), _logits(model))
    assert all(loaded.get_parameter(name).requires_grad for name in by_hand)


def test_settings_that_are_gone_load_unless_they_change_results(tmp_path, capsys):
    save_pretrained(_trained(), tmp_path)
    path = tmp_path / "pst_config.json"
    table = json.loads(path.read_text())
    former = {"nm_ramp": "share", "score_init": "normal", "bias": "none"}
    former |= {"detach_magnitude": False, "full_scores": False, "multiplicative_update": False}
    path.write_text(json.dumps({**table, "pst_config": {**table["pst_config"], **former}}))
    load_pretrained(_base(), tmp_path)
    assert "no effect" not in capsys.readouterr().err
    path.write_text(json.dumps({**table, "pst_config": {**table["pst_config"], "bias": "all"}}))
    with pytest.raises(PretrainedError, match=r"pst\.bias = 'all' is no longer supported"):
        load_pretrained(_base(), tmp_path)


def test_a_folder_from_before_there_was_a_list_of_the_others_loads(tmp_path):
    save_pretrained(_trained(), tmp_path)
    _damage(tmp_path, "pst_config.json", _without("also_trained"))
    load_pretrained(_base(), tmp_path)


@pytest.mark.parametrize(
    "setting", [{"beta": 3.0}, {"alpha1": 0.5}, {"magnitude": "activation"}, {"frozen_magnitude": True}], ids=str
)
def test_a_model_injected_with_another_formula_is_refused_by_the_setting(tmp_path, setting):
    save_pretrained(_trained(), tmp_path)
    (name,) = setting
    other = inject_pst(_base(), dataclasses.replace(CONFIG, **setting))
    with pytest.raises(PretrainedError, match=rf"pst_config\.json has {name} = .*was injected with {name} = "):
        load_pretrained(other, tmp_path)
    same = inject_pst(_base(), dataclasses.replace(CONFIG, seed=3, score_init_scale=0.1, tile_bytes=1 << 20))
    load_pretrained(same, tmp_path)


def test_a_new_setting_is_part_of_the_formula_unless_it_is_marked():
    """Forgetting to think of saved adapters when adding a setting must refuse them, not change what they compute."""

    @settings
    class Extended(PSTConfig):
        gamma: Finite = 1.0
        warm_start: BeforeLoading[bool] = False

    assert set(Extended.formula()) == {*PSTConfig.formula(), "gamma"}
    assert {"alpha1", "alpha2", "beta", "magnitude", "frozen_magnitude", "relative_magnitude", "update_form"} == set(
        PSTConfig.formula()
    )


def test_a_model_that_was_injected_in_part_is_refused_with_the_way_out(tmp_path):
    save_pretrained(_trained(), tmp_path)
    part = _base()
    inject_pst(part.bert, PSTConfig())
    for action in (save_pretrained, load_pretrained, lambda model, _: merge_and_unload(model)):
        with pytest.raises(InputError, match=r"inject_pst was called on a part.*Inject the whole model, and name the"):
            action(part, tmp_path)
    with pytest.raises(InputError, match=r"has no PST layers; call inject_pst\(model"):
        save_pretrained(_base(), tmp_path)


def _unwritable(folder):
    model = inject_pst(_base(), CONFIG)
    model.name_or_path = {1, 2}  # JSON has no sets
    with pytest.raises(TypeError) as caught:
        save_pretrained(model, folder)
    torch.distributed.barrier()  # none leaves before all have heard
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.zero3
def test_ranks_do_not_wait_for_one_that_cannot_write(run_ranks, tmp_path):
    first, second = run_ranks(_unwritable, 2, tmp_path)
    assert first.startswith("TypeError: ")
    assert second == first


def _commit(hub, revision, *, seed):
    """A revision of who/model in the cache of the hub, as the newest."""
    snapshot = hub / "models--who--model" / "snapshots" / revision
    (hub / "models--who--model" / "refs").mkdir(parents=True, exist_ok=True)
    (hub / "models--who--model" / "refs" / "main").write_text(revision)
    torch.manual_seed(seed)
    BertForSequenceClassification(BertConfig.from_pretrained(BASE)).save_pretrained(snapshot)
    _fingerprint.cache_clear()


def test_weights_are_told_apart_at_other_revisions_of_the_hub(tmp_path, monkeypatch):
    """Any commit to a model on the hub is another revision, and from_pretrained tells nobody which it took."""
    hub, first, same, other = tmp_path / "hub", "a" * 40, "b" * 40, "c" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))

    def base(**options):
        return AutoModelForSequenceClassification.from_pretrained(
            "who/model", cache_dir=hub, local_files_only=True, **options
        )

    _commit(hub, first, seed=0)
    save_pretrained(inject_pst(base(), PSTConfig()), tmp_path / "small")
    save_pretrained(inject_pst(base(), PSTConfig(relative_magnitude=False)), tmp_path / "no scales")
    _commit(hub, same, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_pretrained(base(), tmp_path / "small")
    for folder, options in (("no scales", {}), ("small", {"dtype": torch.bfloat16})):
        message = rf"trained on 'who/model' when its revision was hub:{first}, and now it is hub:{same}"
        with pytest.warns(UserWarning, match=message):
            load_pretrained(base(**options), tmp_path / folder)
    _commit(hub, other, seed=1)
    with pytest.raises(
        PretrainedError, match=r"other weights; load the base .* by from_pretrained\(\.\.\., revision=\)"
    ):
        load_pretrained(base(), tmp_path / "small")
    load_pretrained(base(revision=first), tmp_path / "small")


def _damage(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


def _set(key, value):
    return lambda data: json.dumps({**json.loads(data), key: value}).encode()


def _without(key):
    return lambda data: json.dumps({k: v for k, v in json.loads(data).items() if k != key}).encode()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pst_model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is damaged: its SHA-256 is not"),
        ("pst_model.safetensors", lambda data: data[:50], "is damaged: its SHA-256 is not"),
        ("pst_config.json", lambda data: data[:40], "pst_config.json is damaged"),
        ("pst_config.json", lambda data: b"[]", "has format None; this version reads 1"),
        ("pst_config.json", _set("format", 2), "has format 2; this version reads 1"),
        ("pst_config.json", _without("weight_scales"), "is damaged: 'weight_scales' is missing"),
        ("pst_config.json", _set("weight_scales", {}), "weight_scales belong to other layers"),
        ("pst_config.json", _set("pst_config", {"score_rnk": 1}), "is damaged: pst_config.score_rnk = "),
        ("pst_config.json", _set("pst_config", {"pattern": "2:0"}), "is damaged: pst_config = .*2:0"),
        ("pst_config.json", _set("pst_config", []), "is damaged: pst_config = "),
        ("pst_config.json", _set("base_fingerprint", "0" * 64), "has other weights; load the base that it was trained"),
    ],
)
def test_damaged_folders_are_refused_before_a_value_changes(tmp_path, name, change, message):
    save_pretrained(_trained(), tmp_path)
    _damage(tmp_path, name, change)
    base = inject_pst(_base(), CONFIG) if "weight_scales" in message or "SHA" in message else _base()
    before = {n: p.clone() for n, p in base.named_parameters()}
    with pytest.raises(PretrainedError, match=message):
        load_pretrained(base, tmp_path)
    assert all(torch.equal(param, before[n]) for n, param in base.named_parameters() if n in before)


def test_a_folder_that_is_no_adapter_state_is_named(tmp_path):
    with pytest.raises(PretrainedError, match=r"pst_config\.json does not exist; name a folder that save_pretrained"):
        load_pretrained(_base(), tmp_path)


def test_another_model_is_refused_by_the_tensor_that_differs(tmp_path):
    save_pretrained(_trained(), tmp_path)
    other = inject_pst(_base(), PSTConfig(score_rank=2, modules_to_save=("classifier",)))
    with pytest.raises(PretrainedError, match=r"does not fit the model: bert\.\S+ has shape \(37, 8\) there, and None"):
        load_pretrained(other, tmp_path)


def test_a_disk_that_is_full_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not be written"):
        save_pretrained(_trained(), tmp_path / "file" / "folder")


def test_plain_transformers_refuses_the_folder(tmp_path):
    save_pretrained(_trained(), tmp_path)
    with pytest.raises(ValueError, match=r"model_type"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    config = BertConfig.from_pretrained(BASE)
    with pytest.raises(TypeError, match="str"):  # a named class has a config of its own, or is given one
        BertForSequenceClassification.from_pretrained(tmp_path, config=config)


def _partitioned(folder, out):
    """Save a partitioned model with an engine around it, and load it into another one."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 16, "reduce_bucket_size": 1 << 14},
    }  # fmt: skip
    from transformers.integrations import HfDeepSpeedConfig

    keep = HfDeepSpeedConfig(config)
    model = load_pretrained(_base(torch.bfloat16, folder / "base"), folder / "small")
    groups = pst_parameter_groups(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups), config=config)
    before = mask_stats(model)
    ids = torch.arange(5, 21).view(2, 8)
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=torch.tensor([0, 1])).loss)
        engine.step()
    save_pretrained(engine, out)
    del keep
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    masters = sharding.fp32_masters(list(params.values()))
    return before, {name: master.clone() for name, master in zip(params, masters, strict=True)}


@pytest.mark.zero3
def test_a_partitioned_model_takes_and_gives_the_same_folder(run_ranks, tmp_path):
    base = _base()
    base.save_pretrained(tmp_path / "base")
    model = inject_pst(_base(torch.bfloat16, tmp_path / "base"), CONFIG)
    update_masks(model, 0.6)
    save_pretrained(model, tmp_path / "small")
    (masks, values), (other, _) = run_ranks(_partitioned, 2, tmp_path, tmp_path / "out")
    assert masks == other
    assert masks.checksum == mask_stats(model).checksum
    tensors = load_file(tmp_path / "out" / "pst_model.safetensors")
    for name, value in values.items():
        assert torch.equal(tensors[name], value), name
    again = load_pretrained(_base(torch.bfloat16, tmp_path / "base"), tmp_path / "out")
    assert mask_stats(again).checksum == masks.checksum
    assert not torch.equal(again.classifier.weight, model.classifier.weight)


def test_tensors_of_another_shape_are_refused(tmp_path):
    save_pretrained(_trained(), tmp_path)
    tensors = load_file(tmp_path / "pst_model.safetensors")
    tensors["classifier.bias"] = torch.zeros(3)
    save_file(tensors, tmp_path / "pst_model.safetensors")
    import hashlib

    digest = hashlib.sha256((tmp_path / "pst_model.safetensors").read_bytes()).hexdigest()
    _damage(tmp_path, "pst_config.json", _set("sha256", digest))
    with pytest.raises(PretrainedError, match=r"classifier\.bias has shape \(3,\) there, and \(2,\) in the model"):
        load_pretrained(_base(), tmp_path)


def test_an_adapter_has_the_parameters_of_its_update_form(tmp_path):
    config = PSTConfig(update_form="spp", modules_to_save=("classifier",))
    model = inject_pst(_base(), config)
    for layer in pst_layers(model).values():
        torch.nn.init.normal_(layer.pst_U)
    update_masks(model, 0.5)
    save_pretrained(model, tmp_path)
    assert torch.equal(_logits(load_pretrained(_base(), tmp_path)), _logits(model))
    with pytest.raises(PretrainedError, match="update_form"):
        load_pretrained(inject_pst(_base(), PSTConfig(modules_to_save=("classifier",))), tmp_path)
