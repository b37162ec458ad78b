"""Run files: TOML and --set into frozen dataclasses and back, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.config.data import DataConfig, EvalConfig
from pst_ds.config.model import ModelConfig
from pst_ds.config.pst import PAPER, PSTConfig
from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.config.settings import OnResume, resume_rules
from pst_ds.config.toml import dump_run, load_run, load_run_folder, run_from_table
from pst_ds.config.train import TrainConfig
from pst_ds.core.schedule import CubicSchedule, OneShotSchedule, ScheduleConfig

MINIMAL = """
output_dir = "runs/a"
[model]
path = "some/model"
[data]
train = "train.jsonl"
[train]
num_steps = 10
"""


def _load(tmp_path, text=MINIMAL, *overrides):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return load_run(path, overrides)


def _refusal(tmp_path, *overrides, text=MINIMAL):
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, text, *overrides)
    return str(caught.value)


def test_what_is_not_set_has_its_default(tmp_path):
    run = _load(tmp_path)
    assert run == RunConfig(
        output_dir="runs/a",
        model=ModelConfig(path="some/model"),
        data=DataConfig(train="train.jsonl"),
        train=TrainConfig(num_steps=10),
    )
    assert (run.method, run.seed, run.deepspeed_config) == ("pst", 0, "")
    assert run.schedule == ScheduleConfig(final_sparsity=0.9, warmup_fraction=0.1, cooldown_fraction=0.3)
    assert run.pst == PSTConfig()


def test_set_lays_over_the_file(tmp_path):
    run = _load(
        tmp_path,
        MINIMAL,
        "train.num_steps=20",
        "train.score_learning_rate = 1e-5",
        "schedule.final_sparsity=0",  # a whole number where a fraction is wanted
        "train.precision=fp32",  # a string without quotes
        'data.text_columns=["a", "b"]',
        "model.gradient_checkpointing=true",
        "output_dir=runs/a=b",
        "eval.interval=3",  # in a table the file does not have
        "train.num_steps=30",  # the last one wins
    )
    assert run.train.num_steps == 30
    assert run.train.score_learning_rate == 1e-5
    assert run.schedule.final_sparsity == 0.0
    assert isinstance(run.schedule.final_sparsity, float)
    assert run.train.precision == "fp32"
    assert run.data.text_columns == ("a", "b")
    assert run.model.gradient_checkpointing is True
    assert run.output_dir == "runs/a=b"
    assert run.eval.interval == 3


@pytest.mark.parametrize(
    ("override", "unknown", "meant"),
    [
        ("methd=pst", "methd", "method"),
        ("deepspeed_confg=a", "deepspeed_confg", "deepspeed_config"),
        ("schedule.final_sparsty=0.5", "schedule.final_sparsty", "final_sparsity"),
        ("train.num_step=3", "train.num_step", "num_steps"),
        ("pst.score_rnk=4", "pst.score_rnk", "score_rank"),
        ("pst.presett=paper", "pst.presett", "preset"),
    ],
)
def test_an_unknown_key_names_the_near_miss(tmp_path, override, unknown, meant):
    assert _refusal(tmp_path, override) == f"unknown key '{unknown}'. Did you mean {meant!r}?"


def test_an_unknown_key_with_no_near_miss_lists_the_known(tmp_path):
    message = _refusal(tmp_path, "eval.zzz=1")
    assert message.startswith("unknown key 'eval.zzz'. Known keys: interval, batch_size, metric")


@pytest.mark.parametrize(
    ("override", "place", "wanted"),
    [
        ("train.num_steps=1.5", "train.num_steps = 1.5", "a whole number"),
        ("train.num_steps=true", "train.num_steps = True", "a whole number"),
        ("train.num_epochs=false", "train.num_epochs = False", "a number"),
        ('schedule.final_sparsity="0.5"', "schedule.final_sparsity = '0.5'", "a number"),
        ("model.dropout=none", "model.dropout = 'none'", "a number"),
        (
            "model.gradient_checkpointing_reentrant=true",
            "model.gradient_checkpointing_reentrant = true",
            "Set model.gradient_checkpointing = true",
        ),
        ("model.gradient_checkpointing=1", "model.gradient_checkpointing = 1", "true or false"),
        ("output_dir=3", "output_dir = 3", "a string"),
        ("data.text_columns=text", "data.text_columns = 'text'", "a list of strings"),
        ("data.text_columns=[1, 2]", "data.text_columns = [1, 2]", "a list of strings"),
        ("pst.target_modules=3", "pst.target_modules = 3", "a string or a list of strings"),
        ("pst.target_modules=[3]", "pst.target_modules = [3]", "a string or a list of strings"),
        ("method=sparse", "method = 'sparse'", "one of 'pst', 'dense', 'lora', 'magnitude'"),
        ("train.precision=fp16", "train.precision = 'fp16'", "one of 'bf16', 'fp32'"),
        ("eval.metric=f2", "eval.metric = 'f2'", "'macro_f1'"),
        ("schedule=0.5", "schedule", "a table"),
        ("pst=[]", "pst", "a table"),
        ("pst.preset=papr", "pst.preset = 'papr'", "one of default, paper"),
        ("pst.preset=[1]", "pst.preset = [1]", "one of default, paper"),
    ],
)
def test_a_wrong_type_names_key_value_and_what_is_wanted(tmp_path, override, place, wanted):
    message = _refusal(tmp_path, override)
    assert message.startswith(place)
    assert wanted in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.final_sparsity=1.2", "schedule.final_sparsity = 1.2 must be in [0, 1)"),
        ("schedule.final_sparsity=1", "schedule.final_sparsity = 1.0 must be in [0, 1)"),
        ("schedule.final_sparsity=nan", "schedule.final_sparsity = nan must be in [0, 1)"),
        ("schedule.initial_sparsity=0.95", "schedule.initial_sparsity = 0.95 must be in [0, final_sparsity = 0.9]"),
        ("schedule.warmup_fraction=0.7", "must be below 1"),
        ("schedule.update_interval=0", "schedule.update_interval = 0 must be at least 1"),
        ("train.batch_size=0", "train.batch_size = 0 must be at least 1"),
        ("train.gradient_accumulation_steps=0", "train.gradient_accumulation_steps = 0"),
        ("train.score_learning_rate=-1", "train.score_learning_rate = -1 must be a finite number"),
        ("train.head_learning_rate=inf", "train.head_learning_rate = inf"),
        ("train.embedding_learning_rate=-1", "train.embedding_learning_rate = -1 must be a finite number"),
        ("train.adam_beta2=1", "train.adam_beta2 = 1 must be in [0, 1)"),
        ("train.adam_beta1=-0.1", "train.adam_beta1 = -0.1 must be in [0, 1)"),
        ("train.update_learning_rate=nan", "train.update_learning_rate = nan"),
        ("train.learning_rate_warmup_fraction=1", "train.learning_rate_warmup_fraction = 1 must be in [0, 1)"),
        ("train.num_epochs=1", "set one of them to a number above 0"),
        ("train.num_steps=0", "set one of them to a number above 0"),
        ("train.num_steps=-3", "train.num_steps = -3"),
        ("model.dropout=1.5", "model.dropout = 1.5 must be in [0, 1)"),
        ("data.text_columns=[]", "data.text_columns = [] must name one column or two"),
        ('data.text_columns=["a", "b", "c"]', "must name one column or two"),
        ("data.max_length=0", "data.max_length = 0 must be at least 1"),
        ("eval.interval=-2", "eval.interval = -2 must be at least -1"),
        ("pst.score_rank=-1", "pst.score_rank = -1 must not be negative"),
        ("pst.alpha1=nan", "pst.alpha1 = nan must be a finite number"),
        ("output_dir=", "output_dir = '' is empty"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(tmp_path, override, message):
    assert message in _refusal(tmp_path, override)


def test_negative_steps_are_not_hidden_by_epochs(tmp_path):
    assert "train.num_steps = -3" in _refusal(tmp_path, "train.num_steps=-3", "train.num_epochs=2")


def test_a_schedule_is_what_the_method_makes_of_it_and_checked_for_all(tmp_path):
    assert _load(tmp_path, MINIMAL, "method=dense").make_schedules(10).masks is None
    magnitude = _load(tmp_path, MINIMAL, "method=magnitude", "schedule.final_sparsity=0.5")
    assert magnitude.make_schedules(10).masks == OneShotSchedule(0.5)
    for method in ("dense", "magnitude", "pst"):
        assert "schedule.final_sparsity = 1.2" in _refusal(tmp_path, f"method={method}", "schedule.final_sparsity=1.2")


def test_the_schedule_takes_its_numbers_from_the_file(tmp_path):
    overrides = [f"schedule.{k}" for k in ("final_sparsity=0.5", "initial_sparsity=0.25", "update_interval=3")]
    run = _load(tmp_path, MINIMAL, *overrides, "schedule.warmup_fraction=0.3", "schedule.cooldown_fraction=0.2")
    assert run.make_schedules(40).masks == CubicSchedule(
        num_steps=40, final_sparsity=0.5, initial_sparsity=0.25, warmup_fraction=0.3, cooldown_fraction=0.2,
        update_interval=3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ('output_dir = "runs/a"', "'output_dir' is missing"),
        ('path = "some/model"', "'model.path' is missing"),
        ('train = "train.jsonl"', "data.train is missing"),
        ("num_steps = 10", "train.num_steps = 0"),
        ('[model]\npath = "some/model"', "'model.path' is missing"),
    ],
)
def test_a_missing_key_is_named(tmp_path, line, missing):
    assert line in MINIMAL
    assert missing in _refusal(tmp_path, text=MINIMAL.replace(line, ""))


def test_a_file_that_is_no_run_file(tmp_path):
    assert "run.toml is not TOML: " in _refusal(tmp_path, text="[model\n")
    assert "line 2" in _refusal(tmp_path, text="seed = 1\nmask_structure = 2:4\n")  # YAML would read 124
    with pytest.raises(ConfigError, match=r"run file '.*nothere\.toml' does not exist \(looked in /"):
        load_run(tmp_path / "nothere.toml")
    with pytest.raises(ConfigError, match="is a folder, not a run file"):
        load_run(tmp_path)
    (tmp_path / "run.toml").write_bytes(b'output_dir = "\xff"')
    with pytest.raises(ConfigError, match="is not TOML"):
        load_run(tmp_path / "run.toml")


def test_a_run_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_run(tmp_path / "run.toml") == run_from_table(tomllib.loads(MINIMAL))


@pytest.mark.parametrize("name", ["plain", "\U0001f600 \u00e9", 'a "b" = \\u0041', "42", "true"])
def test_a_run_folder_is_its_own_place_whatever_it_is_called(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "run.toml").write_text(MINIMAL, encoding="utf-8")
    run = load_run_folder(folder, ["train.num_steps=20"])
    assert (run.output_dir, run.train.num_steps) == (str(folder), 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert load_run_folder(Path(name)).output_dir == name


@pytest.mark.parametrize("override", ["output_dir=runs/b", " output_dir = 'runs/b'"])
def test_a_run_folder_cannot_be_given_another_place(tmp_path, override):
    (tmp_path / "run.toml").write_text(MINIMAL, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_run_folder(tmp_path, ["train.num_steps=20", override])
    assert str(caught.value) == (
        f"--set {override!r}: {str(tmp_path)!r} is a run folder, which is its own output_dir. Leave it out, or name "
        f"the run file {str(tmp_path / 'run.toml')!r} to train elsewhere"
    )


@pytest.mark.parametrize("override", ["output_dir=runs/\udcff", "data.text_columns=['a', '\udcff']"])
def test_bytes_that_are_no_text_are_refused(tmp_path, override):
    """A run file could not hold them. Python gives such bytes of a command line as halves of surrogate pairs."""
    key = override.partition("=")[0]
    message = _refusal(tmp_path, override)
    assert message.startswith(f"{key} = ")
    assert "'" in message
    assert "\\udcff" in message
    assert "not UTF-8" in message


@pytest.mark.parametrize("override", ["train.num_steps", "=3", " = 3"])
def test_a_set_without_key_or_value_is_refused(tmp_path, override):
    assert "must have the form key=value" in _refusal(tmp_path, override)


def test_a_set_inside_a_value_is_refused(tmp_path):
    assert "output_dir is a value, not a table" in _refusal(tmp_path, "output_dir.a=3")


def test_the_paper_preset_and_what_stands_beside_it(tmp_path):
    run = _load(tmp_path, MINIMAL + "[pst]\npreset = 'paper'\n")
    assert run.pst == PSTConfig.paper() != PSTConfig()
    assert (run.pst.score_rank, run.pst.update_rank) == (8, 8)
    assert (run.pst.alpha1, run.pst.alpha2, run.pst.beta) == (1.0, 1.0, 1.0)
    assert run.pst.relative_magnitude is False
    assert (run.pst.score_init_scale, run.pst.update_init_scale) == (1.0, 1.0)
    mixed = _load(tmp_path, MINIMAL + "[pst]\nupdate_init_scale = 0.5\npreset = 'paper'\nscore_rank = 4\n")
    assert mixed.pst == PSTConfig.paper(update_init_scale=0.5, score_rank=4)
    assert _load(tmp_path, MINIMAL, "pst.preset=paper").pst == PSTConfig.paper()
    assert _load(tmp_path, MINIMAL, "pst.preset=default").pst == PSTConfig()
    assert all(getattr(PSTConfig(), k) != v for k, v in PAPER.items() if not k.endswith("_init"))


def test_a_run_file_of_the_last_release_with_removed_settings_loads_with_hints(capsys):
    defaults = ["pst.nm_ramp=share", "pst.score_init=normal", "pst.bias=none", "train.score_penalty=0.0"]
    run = load_run("tests/data/world_size.toml", ["pictures.interval=5", "pictures.layers=10", *defaults])
    assert run == load_run("tests/data/world_size.toml")
    said = capsys.readouterr().err.splitlines()  # defaults, which every run folder has, need no hint
    assert said == [
        "pictures.interval = 5 has no effect any more: set layer_statistics.interval. Remove it",
        "pictures.layers = 10 has no effect any more: every layer has statistics, none a histogram. Remove it",
    ]


def test_run_from_table_leaves_the_table_alone():
    table = {**tomllib.loads(MINIMAL), "pst": {"preset": "paper"}}
    run_from_table(table)
    assert table["pst"] == {"preset": "paper"}


# any text TOML can hold: no lone surrogates
_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
_rate = st.floats(0.0, 1e300)
_names = st.one_of(st.just("all-linear"), st.lists(_text, max_size=3).map(tuple))


@st.composite
def _runs(draw):
    steps = draw(st.one_of(st.integers(1, 10**12), st.floats(0.001, 1e6)))
    final = draw(st.floats(0.0, 0.999))
    return RunConfig(
        output_dir=draw(_text),
        method=draw(st.sampled_from(["pst", "magnitude", "dense"])),
        seed=draw(st.integers(-(2**40), 2**40)),
        deepspeed_config=draw(st.one_of(st.just(""), _text)),
        model=ModelConfig(path=draw(_text), dropout=draw(st.floats(0.0, 0.99))),
        data=DataConfig(
            train=draw(_text), text_columns=draw(st.lists(_text, min_size=1, max_size=2).map(tuple)),
            group_by_length=draw(st.booleans()),
        ),
        train=TrainConfig(
            **{"num_steps" if isinstance(steps, int) else "num_epochs": steps},
            score_learning_rate=draw(st.one_of(st.none(), _rate)), precision=draw(st.sampled_from(["bf16", "fp32"])),
        ),
        pst=PSTConfig(
            target_modules=draw(_names), exclude_modules=draw(st.lists(_text, max_size=2).map(tuple)),
            modules_to_save=draw(st.one_of(st.none(), st.lists(_text, max_size=2).map(tuple))),
            alpha1=draw(st.floats(-1e9, 1e9)),
        ),
        schedule=ScheduleConfig(final_sparsity=final, initial_sparsity=draw(st.floats(0.0, final))),
        eval=EvalConfig(interval=draw(st.integers(0, 10**6))),
    )  # fmt: skip


@given(_runs())
def test_a_dumped_run_reads_back_equal(run):
    assert run_from_table(tomllib.loads(dump_run(run))) == run


def test_every_setting_is_written_out(tmp_path):
    set_here = ("model.dropout=0.25", "model.base_bits=4", "model.base_group=32", "data.document_mask=true")
    set_here += ("model.gradient_checkpointing=true", "model.recomputed_blocks=2")
    run = _load(tmp_path, MINIMAL, *set_here, "pst.preset=paper", "pst.modules_to_save=[]", "pst.seed=3")
    run = run.with_rates(width=384, num_steps=600, num_examples=10**6, num_labels=2)
    (tmp_path / "dumped.toml").write_text(dump_run(run), encoding="utf-8")
    assert load_run(tmp_path / "dumped.toml") == run
    table = tomllib.loads(dump_run(run))
    for section in ("model", "data", "train", "pst", "schedule", "eval"):
        fields = {f.name for f in dataclasses.fields(getattr(run, section))}
        assert table[section].keys() == fields, section


def test_steps_of_epochs_count_whole_batches(tmp_path):
    run = _load(tmp_path, MINIMAL, "train.num_steps=0", "train.num_epochs=1.5", "train.batch_size=8")
    assert run.num_steps(43) == round(1.5 * 5)
    assert run.num_steps(8) == 2
    with pytest.raises(ConfigError, match=r"data\.train has 7 examples, .* train\.batch_size = 8; lower it"):
        run.num_steps(7)
    tiny = _load(tmp_path, MINIMAL, "train.num_steps=0", "train.num_epochs=0.01", "train.batch_size=8")
    assert tiny.num_steps(8) == 1
    assert _load(tmp_path).num_steps(43) == 10
    with pytest.raises(ConfigError, match=r"31 examples, fewer than one batch of train\.batch_size = 32"):
        _load(tmp_path).num_steps(31)


def test_a_batch_has_an_example_for_every_rank_or_is_refused(tmp_path):
    run = _load(tmp_path, MINIMAL, "train.batch_size=24", "train.gradient_accumulation_steps=2")
    assert [run.micro_batch_size(world) for world in (1, 2, 3, 4, 5, 12)] == [12, 6, 4, 3, 3, 1]
    with pytest.raises(ConfigError) as caught:
        run.micro_batch_size(13)
    message = str(caught.value)
    assert "train.batch_size = 24 is less than an example for each of 13 ranks x 2 accumulation steps" in message
    assert "make it 26 or more" in message


@pytest.mark.parametrize("path", ["tests/data/world_size.toml", "tests/data/causal_lm.toml", "tools/demo/run.toml"])
def test_shipped_run_files_parse_and_name_files_of_ours(path):
    run = load_run(path)
    assert Path(run.deepspeed_config).is_file()
    assert run.make_schedules(run.train.num_steps).masks.sparsity_at(run.train.num_steps) == run.schedule.final_sparsity
    for world_size in (1, 2, 4):
        run.micro_batch_size(world_size)


def test_the_world_size_run_is_twenty_steps_on_files_in_the_repository():
    run = load_run("tests/data/world_size.toml")
    assert run.train.num_steps == 20
    assert run.model.dropout == 0.0
    assert run.micro_batch_size(3) * 3 == run.train.batch_size
    for name in (run.model.path, run.data.train, run.data.validation, run.data.test):
        assert os.path.exists(name), name


def test_all_wrong_settings_are_reported_at_once(tmp_path):
    message = _refusal(tmp_path, "train.batch_size=0", "pst.score_rnk=1", "model.dropout='x'", "eval.interval=-2")
    assert message == "\n  ".join(
        [
            "4 settings cannot be used:",
            "model.dropout = 'x' must be a number",
            "train.batch_size = 0 must be at least 1",
            "unknown key 'pst.score_rnk'. Did you mean 'score_rank'?",
            "eval.interval = -2 must be at least -1",
        ]
    )
    two_of_pst = "pst.target_modules='('", "pst.update_rank=0", "pst.update_embeddings=['wte']"
    message = _refusal(tmp_path, *two_of_pst, "quantization.interval=5", "data.test_rows=['a']")
    assert message.count("\n") == 4
    for name in (
        "pst.target_modules = '(' is not",
        "pst.update_embeddings = ['wte'] with",
        "quantization.interval",
        "data.test_rows",
    ):
        assert name in message


def test_settings_declare_what_a_resumed_run_may_change():
    rules = resume_rules(RunConfig)
    assert rules["train.head_learning_rate"] is OnResume.IS_REPORTED
    assert {"output_dir", "data.sources", "model.path", "tracking.to"} <= rules.keys()
    assert not {"seed", "train.batch_size", "pst.score_rank", "schedule.final_sparsity"} & rules.keys()


def test_the_injected_config_is_computed_once(tmp_path):
    run = _load(tmp_path, MINIMAL, "method=gmp", "seed=4")
    assert run.injected_pst is run.injected_pst
    assert (run.injected_pst.seed, run.injected_pst.train_weights) == (4, True)
