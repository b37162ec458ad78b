"""Patterns and shares of zeros, from the run file and the command line, and what does not go together."""

import pytest

from pst_ds.config.pst import Override, PSTConfig
from pst_ds.errors import InputError
from pst_ds.nn.targets import resolve_targets
from pst_ds.prune.rules import layer_rules, requested_sparsity, settings_for, usual_pattern
from tests.pairs import every_pair


@pytest.mark.parametrize(
    ("method", "asked", "of_run", "expected"),
    [("magnitude", "", "matrix", "matrix"), ("wanda", "", "matrix", "row"), ("sparsegpt", "", "matrix", "row"),
     ("alps", "", "matrix", "row"),
     ("wanda", "", "2:4", "2:4"), ("magnitude", "", "16x1", "16x1"), ("sparsegpt", "matrix", "2:4", "matrix"),
     ("wanda", "4:8", "row", "4:8")],
)  # fmt: skip
def test_the_pattern_is_asked_for_or_the_runs_or_the_methods(tiny, method, asked, of_run, expected):
    assert settings_for(tiny("llama"), PSTConfig(pattern=of_run), method, asked).pattern == expected


@every_pair
@pytest.mark.parametrize("method", ["magnitude", "alps"])
@pytest.mark.parametrize(("share", "expected"), [(0.3, "matrix"), (0.6, "matrix"), (0.61, "row"), (0.9, "row")])
def test_rows_are_ranked_together_by_what_the_loss_loses_up_to_a_share(tiny, method, share, expected):
    assert usual_pattern(method, "saliency", share) == expected
    of_run = {one: settings_for(tiny("llama"), PSTConfig(pattern=one), method, budgets="saliency", share=share).pattern
              for one in ("matrix", "4x4")}  # fmt: skip
    assert of_run == {"matrix": expected, "4x4": "4x4"}
    assert (
        settings_for(tiny("llama"), PSTConfig(), method, "matrix", budgets="saliency", share=share).pattern == "matrix"
    )


@pytest.mark.parametrize(
    ("pattern", "asked", "default", "expected"),
    [("row", None, 0.9, 0.9), ("row", 0.3, 0.9, 0.3), ("2:4", None, 0.9, 0.5), ("2:4", 0.5, 0.9, 0.5),
     ("1:4", None, 0.5, 0.75), ("matrix", 0.0, 0.5, 0.0)],
)  # fmt: skip
def test_the_requested_sparsity(pattern, asked, default, expected):
    assert requested_sparsity(PSTConfig(pattern=pattern), asked, default) == expected


@pytest.mark.parametrize(
    ("pattern", "asked", "said"),
    [("2:4", 0.6, "sparsity = 0.6: pattern 2:4 has sparsity 0.5. Set sparsity = 0.5"),
     ("row", 1.0, r"must be in \[0, 1\)"), ("row", -0.1, r"must be in \[0, 1\)"),
     ("row", float("nan"), r"must be in \[0, 1\)")],
)  # fmt: skip
def test_shares_that_cannot_be_are_refused(pattern, asked, said):
    with pytest.raises(InputError, match=said):
        requested_sparsity(PSTConfig(pattern=pattern), asked, 0.5)


def _rules(model, method, pattern):
    settings = settings_for(model, PSTConfig(), method, pattern)
    return layer_rules(resolve_targets(model, settings), method, 0.5)


@pytest.mark.parametrize(
    ("method", "pattern", "said"),
    [("magnitude", "global", r"model\.layers\.0\.self_attn\.q_proj: .* matrix by matrix"),
     ("sparsegpt", "16x1", r"q_proj: SparseGPT prunes by matrix, row or N:M, not in blocks of 16x1"),
     ("wanda", "2:5", r"q_proj: .* in_features divisible by 5, got 32.*pst.exclude_modules"),
     ("wanda", "rows", 'pattern = "rows": .* is not known'),
     ("wanda", "4:4", 'pattern = "4:4": .* needs 0 < N < M')],
)  # fmt: skip
def test_patterns_that_do_not_do_are_refused(tiny, method, pattern, said):
    model = tiny("llama")
    with pytest.raises(InputError, match=said):
        _rules(model, method, pattern)


def test_an_override_that_does_not_go_with_the_pattern_is_refused(tiny):
    config = PSTConfig(overrides=(Override(modules=("q_proj",), final_sparsity=0.7),))
    said = r'pattern = "2:4": overrides\.final_sparsity = 0\.7 with pattern "2:4", which has sparsity 0\.5'
    with pytest.raises(InputError, match=said):
        settings_for(tiny("llama"), config, "wanda", "2:4")


def test_the_head_of_the_task_is_not_looked_for_in_the_base_model(tiny):
    config = PSTConfig(modules_to_save=("classifier", "pooler"))
    settings = settings_for(tiny("bert"), config, "magnitude")
    assert settings.modules_to_save == ("pooler",)
    assert len(resolve_targets(tiny("bert"), settings)) == 18
