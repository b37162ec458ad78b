"""``pst-ds plan`` for clusters and models that are not there, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import safetensors.numpy

from pst_ds.cli.main import main
from pst_ds.cli.plan import layer_groups
from pst_ds.planning.machines import MACHINES
from pst_ds.planning.plan import PlannedLayer
from pst_ds.planning.time import COUNTS
from pst_ds.text_table import bytes_text

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
PARAMETERS_70B = 70_553_706_496
"""Llama 3 70B, as its model card counts it."""
FACTORS_70B = 17 * 80 * (2 * (8192 + 8192) + 2 * (1024 + 8192) + 3 * (28672 + 8192))


@pytest.fixture
def llama_70b(tmp_path):
    return _arguments(tmp_path, LLAMA_70B)


@pytest.fixture
def llama_of_4_layers(tmp_path):
    return _arguments(tmp_path, {**LLAMA_70B, "num_hidden_layers": 4})


def _arguments(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return [
        "plan", "tests/data/causal_lm.toml", "--json", "--no-data", "--set", f"model.path={json.dumps(str(folder))}",
        "--set", "train.batch_size=512", "--set", 'train.precision="bf16"', "--set", "data.max_length=4096",
        "--set", "model.gradient_checkpointing=true", "--set", 'deepspeed_config="ds_configs/zero3.json"',
    ]  # fmt: skip


def _plan(capsys, arguments, code=None):
    """What plan prints, and its JSON. Its exit code is that of the JSON, and ``code`` if one is given."""
    ended_with = main(arguments)
    text = capsys.readouterr().out
    plan = json.loads(text.splitlines()[-1])
    assert plan["exit_code"] == ended_with == (3 if "does NOT fit" in text else 0)
    assert code in (None, ended_with)
    return text, plan


@pytest.mark.thorough
def test_a_70b_model_plans_from_its_config_alone(capsys, llama_70b):
    text, plan = _plan(capsys, [*llama_70b, "--world-size", "512"])
    assert plan["parameters"] == PARAMETERS_70B + FACTORS_70B
    assert plan["trained_parameters"] == FACTORS_70B
    assert plan["pruned_parameters"] == 80 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 8192 * 28672)
    assert (plan["ranks"], plan["micro_batch_size"], plan["machine"]) == (512, 1, "h100")
    assert plan["num_examples"] is None
    memory = plan["memory_bytes_per_rank"]
    assert memory["weights"] == pytest.approx(2 * plan["parameters"] / 512, rel=0.001)
    assert memory["masks"] == pytest.approx(plan["pruned_parameters"] / 8 / 512, rel=0.01)
    assert memory["optimizer"] == pytest.approx(12 * FACTORS_70B / 512, rel=0.01)
    assert memory["activations"] > 80 * 4096 * 8192 * 2  # the inputs of 80 layers
    assert len(plan["layers"]) == 560
    assert "model.layers.*.self_attn.q_proj  80 times 8192 x 8192, 278,528 factor parameters each" in text
    assert len(text.splitlines()) < 40


@pytest.mark.thorough
def test_rounded_weights_have_scales(capsys, llama_of_4_layers):
    arguments = [*llama_of_4_layers, "--world-size", "8", "--set", "train.num_steps=1000"]
    _, plain = _plan(capsys, arguments)
    text, plan = _plan(capsys, [*arguments, "--set", "quantization.values=int4", "--set", "quantization.group=128"])
    assert (plain["scale_bytes"], plain["rounding"]) == (0, None)
    assert plan["scale_bytes"] == 2 * plan["pruned_parameters"] // 128
    rounding = {"grid": "int4, a scale for 128 inputs", "start": 800, "searches": 10}
    assert plan["rounding"] == rounding
    assert "weights rounded to int4, a scale for 128 inputs, from step 800 on: 10 searches" in text
    before, after = (p["memory_bytes_per_rank"] for p in (plain, plan))
    assert (before["scales"], after["scales"]) == (0, plan["scale_bytes"] // 8)
    assert after["weights"] == before["weights"]
    assert plan["checkpoint_bytes"] == plain["checkpoint_bytes"] + plan["scale_bytes"]
    assert plan["time"]["step_received"] > plain["time"]["step_received"]


def test_a_larger_world_holds_less_and_takes_the_same_weights_in(capsys, llama_of_4_layers):
    sharded = [*llama_of_4_layers, "--set", "model.base_placement=sharded"]
    _, few = _plan(capsys, [*sharded, "--world-size", "8"])
    _, many = _plan(capsys, [*sharded, "--ranks", "64"])
    memory = [plan["memory_bytes_per_rank"] for plan in (few, many)]
    assert memory[0]["weights"] == pytest.approx(8 * memory[1]["weights"], rel=0.001)
    times = [plan["time"] for plan in (few, many)]
    assert times[1]["step_received"] / times[0]["step_received"] == pytest.approx((63 / 64) / (7 / 8), rel=0.001)
    launches = COUNTS["triton"].shared_launches.seconds(MACHINES["h100"])
    assert times[0]["update_compute"] > times[1]["update_compute"] == pytest.approx(launches)
    assert 0 < many["time"]["share_of_masks"] < 0.05


@pytest.mark.thorough
def test_rates_are_chosen_by_name(capsys, llama_of_4_layers):
    _, slow = _plan(capsys, [*llama_of_4_layers, "--world-size", "8", "--machine", "cpu"])
    _, fast = _plan(capsys, [*llama_of_4_layers, "--world-size", "8", "--machine", "a100"])
    assert slow["time"]["step"] > 100 * fast["time"]["step"]
    assert slow["memory_bytes_per_rank"]["communication"] > fast["memory_bytes_per_rank"]["communication"] == 0


def test_a_plan_says_whether_it_fits_and_how_long_it_takes(capsys, llama_of_4_layers):
    asked = [*llama_of_4_layers, "--world-size", "512", "--machine", "h100"]
    text, plan = _plan(capsys, asked)
    judged, peak = plan["verdict"], plan["memory_bytes_per_rank"]["peak"]
    assert judged["fits"]
    assert "to spare" in text
    time = plan["time"]
    assert time["step_bound"] == "products"
    assert time["step"] == time["step_compute"] > time["step_host"] > time["step_launching"]
    assert "at the same time: the products bound the step" in text
    least = peak / 1e9 * 0.99
    text, plan = _plan(capsys, [*asked, "--memory", f"{least:.6f}"], code=3)
    assert not plan["verdict"]["fits"]
    assert f"does NOT fit, by {bytes_text(-plan['verdict']['margin_bytes'])}" in text
    assert ", costs " not in text


@pytest.mark.thorough
def test_on_a_cpu_the_process_and_a_save_are_needed_too_and_what_is_close_is_not_judged(capsys, llama_of_4_layers):
    asked = [*llama_of_4_layers, "--world-size", "8", "--machine", "cpu"]
    text, plan = _plan(capsys, asked)
    judged = plan["verdict"]
    enough, least = judged["needed_bytes"], judged["least_bytes"]
    assert plan["memory_bytes_per_rank"]["peak"] + 300e6 < enough
    assert f"memory: {bytes_text(enough)}, with the process and its saves, of a rank is enough; less than" in text
    between, below = f"{(enough + least) / 2e9:.6f}", f"{0.99 * least / 1e9:.6f}"
    text, plan = _plan(capsys, [*asked, "--memory", between])
    assert not plan["verdict"]["fits"]
    assert f"too close to tell, and {bytes_text(least)} is the least" in text
    text, _ = _plan(capsys, [*asked, "--memory", below], code=3)
    assert "does NOT fit, by" in text
    text, _ = _plan(capsys, [*asked, "--memory", f"{2 * enough / 1e9:.6f}"])
    assert "fits, 50% to spare" in text


def test_the_start_is_planned_and_counts_in_the_verdict(capsys, llama_of_4_layers):
    asked = [*llama_of_4_layers, "--world-size", "64", "--machine", "h100", "--set", "data.max_length=2048"]
    _, without = _plan(capsys, asked)
    start = ["start.method=alps", "start.budgets=saliency", "start.reconstruct=2", "schedule.initial_sparsity=0.5"]
    text, plan = _plan(capsys, [*asked, *(word for one in start for word in ("--set", one))])
    cost = plan["start_cost"]
    assert without["start_cost"] is None
    assert cost["memory"]["block"] == 2 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 8192 * 28672 + 2 * 8192)
    hours = plan["verdict"]["hours"] - without["verdict"]["hours"]
    assert hours * 3600 == pytest.approx(cost["time"]["all"], rel=0.01)
    assert f"outside of blocks {bytes_text(cost['memory']['outside_of_blocks'])}, block 1.71 GB" in text
    assert f"peak {bytes_text(cost['memory']['peak'])}" in text


def test_bytes_are_whole_where_they_are_computed_from_rates(capsys):
    start = ("--set", "start.method=wanda", "--set", "schedule.initial_sparsity=0.3")
    text, _ = _plan(capsys, ["plan", "tests/data/causal_lm.toml", "--json", "--no-data", *start])
    assert "; read 80,256 bytes, written 80,256 bytes" in text


def test_rates_may_be_a_file(capsys, llama_of_4_layers, tmp_path):
    rates = {"name": "mine", "flops": 1e9, "memory_bytes": 1e12, "node_size": 8, "node_bytes": 1e12,
             "network_bytes": 1e12, "latency": 0}  # fmt: skip
    path = tmp_path / "mine.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in rates.items()))
    text, plan = _plan(capsys, [*llama_of_4_layers, "--world-size", "8", "--machine", str(path)])
    assert plan["machine"] == str(path)
    assert plan["time"]["step"] > 1e4
    assert f"expected on {path}:" in text
    assert "full fine-tuning of the same model there:" in text


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--machine", "h101"], ("--machine h101", "h100, h200, b200, a100, mi300x, cpu", "name a TOML file")),
        (["--world-size", "513"], ("train.batch_size = 512", "513 ranks x 1 accumulation steps", "513 or more")),
        (
            ["--set", "train.num_steps=0", "--set", "train.num_epochs=1.0"],
            ("--no-data", "train.num_steps = 0", "Set train.num_steps = 1000 and train.num_epochs = 0"),
        ),
        (["--world-size", "2", "--set", "deepspeed_config="], ("2 ranks, but deepspeed_config is not set",)),
        (["--set", 'model.path="/no/such/model"'], ("model.path = '/no/such/model' does not exist",)),
    ],
)
def test_what_cannot_be_planned_is_2_and_names_the_number(capsys, llama_of_4_layers, more, words):
    assert main([*llama_of_4_layers, *more]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    for word in words:
        assert word in told


@pytest.mark.parametrize("more", [["--memory", "0"], ["--memory", "cheap"], ["--memory", "inf"]])
def test_memory_is_a_number_above_0(capsys, llama_of_4_layers, more):
    with pytest.raises(SystemExit) as caught:
        main([*llama_of_4_layers, *more])
    assert caught.value.code == 2
    assert f"argument {more[0]}: {more[1]!r} is not a number above 0" in capsys.readouterr().err


@pytest.mark.thorough
def test_ranks_that_share_sequences_hold_a_part_of_them(capsys, llama_of_4_layers):
    def planned(degree, *settings):
        arguments = [*llama_of_4_layers, "--ranks", "8", "--set", f"train.sequence_parallel={degree}", *settings]
        text, plan = _plan(capsys, [*arguments, "--set", f"train.batch_size={8 // degree}"])
        return text, plan["micro_batch_size"], plan["memory_bytes_per_rank"]["activations"], plan["time"]

    run_on = ("--set", "data.document_mask=false")
    _, one, whole, alone = planned(1, *run_on)
    text, another, part, shared = planned(8, *run_on)
    assert one == another == 1
    assert part < 0.3 * whole  # a chunk of logits is the same
    assert "micro-batches of 1 x 4096 tokens, shared by 8 ranks, checkpointed" in text
    assert shared["step_received"] > alone["step_received"]
    assert planned(8)[2] == part + 4096**2  # the mask of a whole sequence
    assert main([*llama_of_4_layers, "--ranks", "6", "--set", "train.sequence_parallel=4"]) == 2
    assert "train.sequence_parallel = 4 does not divide 6 ranks" in capsys.readouterr().err


def test_a_sequence_classifier_plans_without_its_data(capsys):
    arguments = ["plan", "tests/data/world_size.toml", "--json", "--no-data", "--set", 'data.train="no.jsonl"']
    _, plan = _plan(capsys, [*arguments, "--ranks", "2"])
    assert plan["trained_in_full"] == ["bert.pooler", "classifier"]
    assert plan["memory_bytes_per_rank"]["activations"] > 0


@pytest.mark.thorough
def test_a_teacher_costs_its_weights_on_every_rank_or_of_the_model_itself_one_more_gather(capsys, llama_of_4_layers):
    def planned(*settings):
        _, plan = _plan(capsys, [*llama_of_4_layers, "--ranks", "8", *settings])
        return plan["memory_bytes_per_rank"], plan["time"]

    weight = ("--set", "distillation.weight=0.5")
    (none, alone), (own, taught) = planned(), planned(*weight)
    (folder, led) = planned(*weight, "--set", "distillation.teacher=not/looked/for")
    assert none["teacher"] == own["teacher"] == 0
    assert folder["teacher"] == 2 * (PARAMETERS_70B - 76 * (PARAMETERS_70B - 2 * 128256 * 8192 - 8192) // 80)
    hidden = 8 * 8 * 4096 * 8192 * 2  # the teacher's, in place of logits
    assert 0 <= own["activations"] - none["activations"] < hidden + (1 << 30) < 8 * 8 * 4096 * 128256 * 2
    assert taught["step_received"] > 1.3 * alone["step_received"] > led["step_received"]
    assert taught["step_compute"] == led["step_compute"] > 1.2 * alone["step_compute"]


def test_a_teacher_in_a_folder_is_counted_from_its_config(capsys):
    teacher = "tests/data/tiny-bert"
    arguments = ["plan", "tests/data/world_size.toml", "--json", "--set", "distillation.weight=0.5"]
    text, plan = _plan(capsys, [*arguments, "--set", f"distillation.teacher={teacher}"])
    weights = safetensors.numpy.load_file(f"{teacher}/model.safetensors")
    head = 2 * 32 + 2  # two classes, drawn anew
    assert plan["memory_bytes_per_rank"]["teacher"] == 4 * (sum(w.size for w in weights.values()) + head)
    assert "the teacher, whole:" in text


def test_layers_that_differ_in_a_number_are_one_line():
    layer = PlannedLayer("", out_features=4, in_features=4, matrices=1, experts=1, factor_parameters=8)
    names = ["a.0.q", "a.1.q", "a.1.k", "b.0", "b.1.c2.0", "b.1.c2.1"]
    groups = layer_groups([replace(layer, name=name) for name in names])
    assert [(name, len(group)) for name, group in groups] == [
        ("a.*.q", 2), ("a.1.k", 1), ("b.0", 1), ("b.*.c2.*", 2),
    ]  # fmt: skip
    assert len(layer_groups([replace(layer, name="a.0.q"), replace(layer, name="a.1.q", out_features=5)])) == 2
