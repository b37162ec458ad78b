"""``pst.pattern`` and ``pst.overrides`` in run files."""

from __future__ import annotations

import pytest

from pst_ds.config.pst import Override
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import dump_run, load_run


def test_overrides_are_tables_and_survive_the_resolved_file(tmp_path):
    settings = ['pst.overrides=[{modules = ["q", "k"], pattern = "2:4"}, {modules = ".*fc", final_sparsity = 0.25}]']
    run = load_run("tests/data/world_size.toml", settings)
    assert run.pst.overrides == (
        Override(modules=("q", "k"), pattern="2:4"),
        Override(modules=".*fc", final_sparsity=0.25),
    )
    (tmp_path / "run.toml").write_text(dump_run(run), encoding="utf-8")
    assert load_run(tmp_path / "run.toml") == run


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (['pst.pattern="2:5:1"'], 'pattern \'2:5:1\' is not known; there are "matrix"'),
        (['pst.pattern="2:4"', "schedule.final_sparsity=0.9"], "Fix: schedule.final_sparsity = 0.5"),
        (['pst.pattern="global"', "pst.min_kept_share=0.2", "schedule.final_sparsity=0.9"], "min_kept_share below 0.1"),
        (['pst.pattern="global"', "pst.relative_magnitude=false"], "Set relative_magnitude = true"),
        (["pst.min_kept_share=1.0"], "min_kept_share = 1.0 must be in [0, 1)"),
        (['pst.overrides=[{modules = ["q"]}]'], "set neither pattern nor final_sparsity"),
        (['pst.overrides=[{modules = ["q"], patern = "row"}]'], "Did you mean 'pattern'?"),
        (['pst.overrides=[{modules = [], pattern = "row"}]'], "overrides.modules = () is empty"),
        (['pst.overrides=[{modules = ["q"], pattern = "2:4", final_sparsity = 0.9}]'], "which has sparsity 0.5"),
        (['pst.overrides=[{modules = ["q"], final_sparsity = 1.5}]'], "final_sparsity = 1.5 must be in [0, 1)"),
        (['pst.overrides=["q"]'], "pst.overrides = 'q' must be a table"),
        (["pst.overrides=3"], "pst.overrides = 3 must be a list of tables"),
    ],
)  # fmt: skip
def test_patterns_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ConfigError) as caught:
        load_run("tests/data/world_size.toml", settings)
    assert said in str(caught.value)
