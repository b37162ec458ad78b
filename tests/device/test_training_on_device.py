"""Steps of training on the pretended device: losses and masks of the CPU, and what the host waits for."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from pst_ds.config.pst import PSTConfig
from pst_ds.core.head_loss import head_loss
from pst_ds.core.schedule import CubicSchedule
from pst_ds.masks.schedule_driver import MaskUpdater
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst
from pst_ds.nn.language_head import language_head
from pst_ds.parallel.engine import LocalEngine

from .pretended import module_to_device, pretended, to_device, to_host
from .tiny import tiny_llama

pytestmark = [pytest.mark.device]


def _model(**config):
    return inject_pst(tiny_llama(2), PSTConfig(**config))


def _trained(model, place, steps=4):
    """Losses, masks, trainable values after some steps."""
    params = [p for p in model.parameters() if p.requires_grad]
    engine = LocalEngine(model, [{"params": params, "lr": 1e-2}], gradient_clipping=1.0)
    masks = MaskUpdater(model, CubicSchedule(num_steps=steps, final_sparsity=0.5, cooldown_fraction=0.25))
    tokens = place(torch.arange(24).view(2, 12) % 40)
    found = []
    for _ in range(steps):
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        masks.after_step(engine)
        found.append((float(to_host(loss.detach())), masks.masks.checksum))
    return found, [to_host(p.detach()).clone() for p in params]


@pytest.mark.few(1)
@pytest.mark.parametrize("pattern", ["matrix", "2:4"])
def test_a_run_is_that_of_the_cpu(pattern):
    expected, values = _trained(_model(pattern=pattern), lambda tensor: tensor)
    with pretended():
        model = module_to_device(_model(pattern=pattern))
        found, on_device = _trained(model, to_device)
        assert all(p.device.type == "gpu" for p in model.parameters())
    assert [masks for _, masks in found] == [masks for _, masks in expected]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    for own, other in zip(on_device, values, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_and_an_update_have_the_host_wait_few_times(dtype):
    with pretended() as counts:
        model = module_to_device(_model().to(dtype))
        params = [p for p in model.parameters() if p.requires_grad]
        engine = LocalEngine(model, [{"params": params, "lr": 1e-2}], gradient_clipping=1.0)
        tokens = to_device(torch.arange(24).view(2, 12))
        for _ in range(2):
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            before = counts.num_waits
            engine.step()
        assert engine.global_steps == 2
        assert counts.num_waits - before <= 2  # for the gradients' norm, and for changed parameters apart from masters
        before = counts.num_waits
        update_masks(model, 0.5)
        assert counts.num_waits - before <= 8  # one of them to see that no parameter was given other values


def test_a_loss_in_chunks_is_that_of_the_cpu_and_has_the_host_wait_for_nothing():
    def trained(model, place):
        head, tokens = language_head(model), place(torch.arange(24).view(2, 12) % 40)
        with head.reading(lambda hidden: head_loss(hidden.flatten(0, 1), head.readout, tokens.flatten())) as losses:
            model(input_ids=tokens)
        losses[0].backward()
        return [losses[0].detach(), *(param.grad for param in model.parameters() if param.grad is not None)]

    expected = trained(_model(), lambda tensor: tensor)
    with pretended() as counts:
        model = module_to_device(_model())
        found = trained(model, to_device)
        assert not [line for line in counts.waits if not line.startswith("tests")]
        for own, other in zip(map(to_host, found), expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


def test_inputs_of_blocks_wait_on_the_host():
    """A device then holds those of no block but the one at work."""

    def saved(blocks, place):
        with pretended() as counts:
            model = module_to_device(inject_pst(tiny_llama(blocks), PSTConfig()))
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            model.enable_input_require_grads()
            tokens = to_device(torch.arange(96).view(2, 48) % 40)
            before = counts.live_bytes
            with place():
                loss = model.train()(input_ids=tokens, labels=tokens).loss
            assert loss.requires_grad
            return counts.live_bytes - before

    of_block = (saved(6, nullcontext) - saved(2, nullcontext)) / 4
    assert of_block >= 96 * 24 * 4  # an input in fp32
    assert saved(6, torch.autograd.graph.save_on_cpu) == saved(2, torch.autograd.graph.save_on_cpu)
