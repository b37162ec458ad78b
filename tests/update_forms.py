"""Update forms that tests install as plug-ins of another package."""

import torch

from pst_ds.config.update_forms import UPDATE_FORMS
from pst_ds.core.forms.form import ParamSpec, UpdateForm
from tests.plugins import install

GROUP = "pst_ds.update_forms"


def install_forms(folder, monkeypatch, **values):
    """Install ``values``, a "module:class" for each name, as update forms of another package for this test."""
    monkeypatch.syspath_prepend(install(folder, GROUP, **values))
    forget_forms(monkeypatch)


def forget_forms(monkeypatch):
    """Let the registry look for entry points again, now and after the test."""
    if "_entries" in vars(UPDATE_FORMS):
        monkeypatch.delitem(vars(UPDATE_FORMS), "_entries")
    monkeypatch.setitem(vars(UPDATE_FORMS), "_entries", type(UPDATE_FORMS)._entries.func(UPDATE_FORMS))


class OutputShift(UpdateForm):
    """W = W0 + beta s (1 + t) 1' with s (O,) and a single t, which learns three times as fast."""

    def parameters(self, outputs, inputs, settings):
        return {"shift": ParamSpec((outputs,), std=1e-3), "t": ParamSpec((1,), rate=3.0)}

    def apply(self, weight, parameters, tile, beta):
        return weight + beta * (parameters["shift"][tile.outputs] * (1 + parameters["t"])).unsqueeze(1)


class DoRA(UpdateForm):
    """Weight-decomposed low-rank adaptation (arXiv 2402.09353), with the norm of PEFT, which passes no gradient.

    PEFT trains the magnitudes m (O,), which start as the norms of the rows of W0. Here m is relative to these norms,
    and starts as 1.
    """

    exact_in_slices = False

    def parameters(self, outputs, inputs, settings):
        rank = settings.update_rank
        return {
            "lora_A": ParamSpec((rank, inputs), std=(3.0 * inputs) ** -0.5),
            "lora_B": ParamSpec((outputs, rank)),
            "magnitude": ParamSpec((outputs,), mean=1.0),
        }

    def apply(self, weight, parameters, tile, beta):
        assert tile.is_whole
        adapted = weight + beta * (parameters["lora_B"] @ parameters["lora_A"])
        norms = torch.linalg.vector_norm(adapted, dim=1).detach()
        magnitude = parameters["magnitude"] * torch.linalg.vector_norm(weight, dim=1)
        return (magnitude / norms).unsqueeze(1) * adapted
