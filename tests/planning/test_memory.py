"""Memory formulas against counts made another way."""

import math

import pytest

from pst_ds.core.bracket import sample_size
from pst_ds.core.layout import WeightLayout
from pst_ds.core.tiles import least_tile_bytes, plan_tiles
from pst_ds.planning.memory import ZeroSettings, layer_work_bytes, mask_update_bytes, memory_plan, optimizer_bytes
from pst_ds.planning.model_numbers import MatrixGroup, ModelNumbers, ModuleNumbers, TensorGroup

WEIGHT, FACTORS, NORM = 1001, 90, 7
"""One pruned matrix, its factors in one tensor, and a norm; sizes that 3 ranks do not divide."""


def _model(world: int, count: int = 2) -> ModelNumbers:
    bits = world * math.ceil(math.ceil(WEIGHT / world) / 8)
    return ModelNumbers(
        tensors=(
            TensorGroup(WEIGHT, 2, count),
            TensorGroup(FACTORS, 2, count, trainable=True, kind="factor"),
            TensorGroup(bits, 1, count, kind="mask"),
            TensorGroup(NORM, 2),
        ),
        modules=(
            ModuleNumbers(
                WEIGHT + FACTORS + bits, 2 * (WEIGHT + FACTORS) + bits, 2 * (WEIGHT + FACTORS), 3 * WEIGHT, 2
            ),
            ModuleNumbers(NORM, 2 * NORM, 2 * NORM),
        ),
        matrices=(MatrixGroup(WEIGHT, count),),
        score_rank=1,
        update_rank=1,
    )


def _plan(zero, **options):
    return memory_plan(_model(zero.shards), zero, activations=1000, device="none", **options)


def test_zero3_shares_are_rounded_up_tensor_by_tensor():
    plan = _plan(ZeroSettings(stage=3, world_size=3, reduce_bucket_size=100))
    assert plan.weights == 2 * (2 * 334 + 2 * 30 + 3)
    assert plan.masks == 2 * 42
    assert plan.optimizer == 12 * 2 * 30
    assert plan.gradients == 2 * 2 * 30
    assert plan.flat_factors == 2 * (2 * 2 * FACTORS), "bf16 values and gradients of two layers, on every rank"
    assert plan.reduce_bucket == 2 * 100
    assert plan.gathers == 2 * (WEIGHT + FACTORS) + 126
    assert plan.communication == int(2 * (WEIGHT + FACTORS) * 4 / 3)
    assert plan.layer_work == 3 * WEIGHT
    assert plan.step_peak == plan.resident + plan.gathers + plan.communication + plan.layer_work + 1000


@pytest.mark.parametrize(
    ("stage", "optimizer", "gradients"), [(None, 2160, 360), (0, 2160, 360), (1, 720, 360), (2, 720, 120)]
)
def test_lower_stages_keep_weights_whole_and_share_the_flat_optimizer_state(stage, optimizer, gradients):
    plan = _plan(ZeroSettings(stage=stage, world_size=1 if stage is None else 3, reduce_bucket_size=1 << 30))
    assert (plan.optimizer, plan.gradients) == (optimizer, gradients)
    assert plan.weights == 2 * (2 * (WEIGHT + FACTORS) + NORM)
    assert plan.gathers == plan.communication == 0
    assert plan.reduce_bucket == (360 if stage else 0)  # no more than there are gradients


def test_fp32_on_one_process_needs_no_master():
    assert optimizer_bytes(_model(1), ZeroSettings(stage=None), element_size=4) == 8 * 2 * FACTORS
    assert optimizer_bytes(_model(1), ZeroSettings(stage=0), element_size=4) == 12 * 2 * FACTORS


@pytest.mark.parametrize(
    ("stage", "device", "element_size", "bytes_a_trainable"),
    [(None, "cpu", 2, 4), (None, "cpu", 4, 0), (None, "cuda", 2, 12), (0, "cpu", 2, 12)],
)
def test_a_fused_step_on_a_cpu_takes_gradients_in_fp32_alone(stage, device, element_size, bytes_a_trainable):
    model = _model(1)
    plan = memory_plan(model, ZeroSettings(stage=stage), activations=0, element_size=element_size, device=device)
    assert plan.optimizer_step == bytes_a_trainable * model.trainables


def test_what_is_kept_or_fetched_ahead_is_gathered_too_but_never_more_than_the_model():
    base = {"stage": 3, "world_size": 2, "backend": "nccl"}
    alone = _plan(ZeroSettings(**base)).gathers
    assert _plan(ZeroSettings(**base, persistence_threshold=7)).gathers == alone + 2 * NORM
    kept = ZeroSettings(**base, max_reuse_distance=1000)  # the way back to what is kept passes 500 elements twice
    elements = sum(t.numel * t.count for t in _model(2).tensors)
    assert _plan(kept).gathers == alone + int(_model(2).whole_bytes * 500 / elements)
    ahead = ZeroSettings(**base, prefetch_bucket_size=1, max_live_parameters=700)  # however little it fetches at a time
    assert _plan(ahead).gathers == alone + int(_model(2).whole_bytes * 700 / elements)
    assert _plan(ZeroSettings(**base, max_live_parameters=700)).gathers == alone
    everything = ZeroSettings(**base, max_reuse_distance=1 << 40)
    assert _plan(everything).gathers == _model(2).whole_bytes


def test_a_rank_alone_uses_its_share_as_it_is():
    plan = _plan(ZeroSettings(stage=3, world_size=1, max_reuse_distance=1 << 40))
    assert plan.gathers == plan.communication == 0
    offloaded = _plan(ZeroSettings(stage=3, world_size=1, offload_param=True))
    assert offloaded.gathers == 2 * (WEIGHT + FACTORS) + 126


@pytest.mark.parametrize(("device", "element_size", "packed"), [("cpu", 2, 2 * WEIGHT), ("cpu", 4, 0), ("cuda", 2, 0)])
def test_a_16_bit_weight_is_laid_out_anew_on_a_cpu_where_staging_was(device, element_size, packed):
    alone, two = ZeroSettings(stage=3), ZeroSettings(stage=3, world_size=2)
    sizes = {"activations": 100_000, "element_size": element_size, "device": device}  # so that the step decides
    for zero in (alone, two):
        plan = memory_plan(_model(zero.shards), zero, **sizes)
        assert plan.packed == packed
        turn = plan.gathers + plan.layer_work + plan.activations + max(plan.communication, packed)
        assert plan.step_peak == plan.resident + turn
    assert plan.communication > packed


def test_a_teacher_of_its_own_is_there_all_the_time():
    zero = ZeroSettings(stage=3, world_size=3)
    without, plan = _plan(zero), _plan(zero, teacher=5000)
    assert plan.resident - without.resident == plan.peak - without.peak == 5000


def test_offload_moves_shares_to_the_host():
    here = _plan(ZeroSettings(stage=3, world_size=2))
    moved = _plan(ZeroSettings(stage=3, world_size=2, offload_optimizer=True, offload_param=True))
    assert moved.weights == moved.masks == moved.optimizer == moved.optimizer_step == 0
    assert moved.host == here.weights + here.masks + here.optimizer


def test_a_mask_update_at_scale_holds_masters_bits_and_brackets():
    numel = 1 << 26
    model = ModelNumbers((TensorGroup(1000, 2, 1, True, kind="factor"),), (), (MatrixGroup(numel, 10),))
    for world, device, each, tile in ((1, "cpu", 5, 2 << 20), (4, "cpu", 5, 2 << 20), (4, "cuda", 8, 256 << 20)):
        found = mask_update_bytes(model, ZeroSettings(stage=3, world_size=world), device)
        inside = each * 10 * numel / world * (2 * 5 * 0.5 / math.sqrt(sample_size(numel)))
        assert found == pytest.approx(4000 + 10 * numel / world / 8 + inside + numel / world + tile, rel=0.01)
    assert mask_update_bytes(ModelNumbers((), (), ()), ZeroSettings(stage=3)) == 0


@pytest.mark.parametrize(("backend", "times"), [("gloo", 3), ("nccl", 2.5)])
def test_a_mask_update_of_many_factors_holds_their_masters_and_what_brings_them(backend, times):
    """Of two ranks half is sent and all arrives, which gloo has twice; or what arrived and the masters cut from it."""
    model = ModelNumbers((TensorGroup(10**8, 2, 1, True, kind="factor"),), (), (MatrixGroup(1 << 20),))
    found = mask_update_bytes(model, ZeroSettings(stage=3, world_size=2, backend=backend))
    assert found == pytest.approx(times * 4e8, rel=0.01)


def test_a_layers_temporaries_are_its_merged_weight_or_a_tile():
    layout = WeightLayout(256, 1024)
    small = layer_work_bytes(layout, 2, least_tile_bytes(layout, 2))
    assert small == 2 * layout.numel + layout.numel * 4  # M . W, and its mask in one band
    large = layer_work_bytes(layout, 2, 1 << 30)
    tiles = plan_tiles(layout, 2, 1 << 30)
    assert large == max(small, 2 * 2 * tiles.max_numel + 8 * tiles.max_band_numel) > small
