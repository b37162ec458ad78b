"""No tensor of a weight's size outlives the product it is made for: not for autograd, not in a checkpointed block."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pst_ds.config.pst import PSTConfig
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.nn.targets import InjectionError

WIDTH, NUM_LAYERS, NUM_TOKENS = 512, 4, 8
WEIGHT_BYTES = 4 * WIDTH * WIDTH
TILE_BYTES = 1 << 19
ACTIVATION_BYTES = 4 * NUM_TOKENS * WIDTH
RUNS = {
    "plain": lambda block, x: block(x),
    "non-reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
}
each_run = pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))


def block_of_layers(tile_bytes: int = TILE_BYTES) -> nn.Sequential:
    block = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS)))
    config = PSTConfig(target_modules=r"\d", modules_to_save=(), score_rank=1, update_rank=1, tile_bytes=tile_bytes)
    return inject_pst(block, config)


@each_run
def test_the_forward_pass_leaves_activations_alone(run, torch_bytes):
    block, x = block_of_layers(), torch.randn(NUM_TOKENS, WIDTH, requires_grad=True)
    _, left = torch_bytes(lambda: run(block, x))
    assert left <= (NUM_LAYERS + 2) * ACTIVATION_BYTES < WEIGHT_BYTES


@each_run
def test_the_backward_pass_holds_one_tile_and_one_merged_weight(run, torch_bytes):
    """Recomputing a block merges its weights again, one at a time, and keeps none."""
    block, x = block_of_layers(), torch.randn(NUM_TOKENS, WIDTH, requires_grad=True)
    run(block, x).sum().backward()
    block.zero_grad(set_to_none=True)
    y = run(block, x).sum()
    peak, _ = torch_bytes(y.backward)
    of_factors = 4 * sum(p.numel() for layer in pst_layers(block).values() for _, p in layer.factor_parameters())
    merging = WEIGHT_BYTES + 6 * WIDTH * WIDTH if run is not RUNS["plain"] else 0  # the mask of a small layer: one band
    assert peak <= max(TILE_BYTES, merging) + 4 * of_factors + 4 * NUM_LAYERS * ACTIVATION_BYTES
    assert peak < (NUM_LAYERS - 1) * WEIGHT_BYTES


@each_run
def test_autograd_is_given_nothing_of_a_weights_size(run):
    block, x = block_of_layers(), torch.randn(NUM_TOKENS, WIDTH, requires_grad=True)
    saved: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    # within the block: checkpointing has hooks of its own around it
    def hooked(v: torch.Tensor) -> torch.Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return block(v)

    run(hooked, x).sum().backward()
    assert saved
    assert set(saved) == {(NUM_TOKENS, WIDTH)}


def test_a_budget_too_small_names_the_layer_that_needs_most():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 128))
    config = PSTConfig(target_modules=r"\d", modules_to_save=(), tile_bytes=1000)
    with pytest.raises(
        InjectionError, match=r"^2: a tile of 1000 bytes .* set pst.tile_bytes to at least (\d+)"
    ) as error:
        inject_pst(model, config)
    needed = int(str(error.value).split("at least ")[1].split(",")[0])
    assert type(model[0]) is nn.Linear  # nothing was changed
    assert (
        len(pst_layers(inject_pst(model, PSTConfig(target_modules=r"\d", modules_to_save=(), tile_bytes=needed)))) == 3
    )
