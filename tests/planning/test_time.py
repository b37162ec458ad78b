"""Times and traffic against sums done by hand."""

from dataclasses import replace

import pytest

from pst_ds.core.bracket import sample_size
from pst_ds.parallel.links import Received
from pst_ds.planning.activations import Trace
from pst_ds.planning.machines import MACHINES
from pst_ds.planning.memory import ZeroSettings, kept_bytes
from pst_ds.planning.model_numbers import MatrixGroup, ModelNumbers, ModuleNumbers, TensorGroup
from pst_ds.planning.time import COUNTS, UNIT_UPDATES, Batch, step_flops, step_traffic, time_plan, update_traffic

MODEL = ModelNumbers(
    tensors=(
        TensorGroup(1_000_000, 2, 4),
        TensorGroup(10_000, 2, 4, trainable=True, kind="factor"),
        TensorGroup(125_000, 1, 4, kind="mask"),
        TensorGroup(500_000, 2),
    ),
    modules=(
        ModuleNumbers(1_135_000, 2_145_000, 2_020_000, 3_000_000, 4, bands=2),
        ModuleNumbers(500_000, 1_000_000, 1_000_000),
    ),
    matrices=(MatrixGroup(1_000_000, 4),),
    score_rank=4,
    update_rank=2,
    dense_weights=500_000,
)
WHOLE = 4 * (2_000_000 + 20_000 + 125_000) + 1_000_000
BATCH = Batch(tokens=10, sequence=10)


def _gathers(zero, batch):
    return step_traffic(MODEL, zero, batch).gathers.total


def test_a_pruned_weight_costs_six_flops_a_token_and_eight_when_recomputed():
    low_rank = 4_000_000 * (2 * 2 * 2 + 4 * 6)
    assert step_flops(MODEL, BATCH) == 4_000_000 * 10 * 6 + low_rank + 500_000 * 10 * 4
    again = step_flops(MODEL, replace(BATCH, recomputed=1.0)) - step_flops(MODEL, BATCH)
    assert again == 4_000_000 * (10 * 2 + 2 * 2)


def test_a_teacher_is_one_more_forward_pass_and_of_the_model_itself_one_more_gather():
    taught = replace(BATCH, teacher_weights=7_000_000)
    assert step_flops(MODEL, taught) - step_flops(MODEL, BATCH) == 7_000_000 * 10 * 2
    zero = ZeroSettings(stage=3, world_size=4)
    assert step_traffic(MODEL, zero, taught) == step_traffic(MODEL, zero, BATCH)  # it is whole on every rank
    assert _gathers(zero, replace(taught, own_teacher=True)) == WHOLE * 3 * 3 / 4


def test_ranks_that_share_sequences_exchange_queries_keys_values_and_results():
    zero, model = ZeroSettings(stage=3, world_size=4), replace(MODEL, attention_width=64)
    shared = replace(BATCH, tokens=10, sequence=20, shared_by=2, recomputed=1.0, micro_batches=3)
    found = step_traffic(model, zero, shared)
    assert found.exchanged == Received(3 * 3 * 4 * 64 * 10 * 2 / 2)
    assert found.received == found.gathers + found.reductions + found.exchanged
    assert step_traffic(model, replace(zero, node_size=1), shared).exchanged == Received(0, 3 * 3 * 4 * 64 * 10 * 2 / 2)
    assert step_traffic(model, zero, replace(shared, shared_by=1)).exchanged.total == 0
    attention = step_flops(model, shared) - step_flops(MODEL, shared)
    assert attention == 64 * 10 * 20 * 2 * 8 / 2


def test_without_a_trace_zero3_receives_all_weights_of_others_in_every_pass():
    zero = ZeroSettings(stage=3, world_size=4, reduce_bucket_size=30_000)
    found = step_traffic(MODEL, zero, BATCH)
    assert found.gathers == Received(WHOLE * 2 * 3 / 4)
    assert found.reductions == Received(40_000 * 2 * 3 / 4)
    assert (found.collectives, found.hops) == (2 * 5 + 2, 3 * (2 * 5 + 2))
    assert _gathers(zero, replace(BATCH, recomputed=1.0)) == WHOLE * 3 * 3 / 4
    twice = step_traffic(MODEL, zero, replace(BATCH, micro_batches=2))
    assert (twice.gathers, twice.reductions) == (found.gathers * 2, found.reductions * 2)


def test_zero3_receives_what_was_traced_less_what_is_kept_and_small_parameters_once_a_step():
    zero = ZeroSettings(stage=3, world_size=4, reduce_bucket_size=40_000)
    traced = replace(BATCH, recomputed=1.0, trace=Trace(gathered=WHOLE * 2 + 500_000, gathers=13))
    found = step_traffic(MODEL, zero, traced)
    assert (found.gathers, found.collectives) == (Received((WHOLE * 2 + 500_000) * 3 / 4), 14)
    kept = kept_bytes(MODEL, zero_kept := replace(zero, max_reuse_distance=1_000_000))
    assert kept == WHOLE * 500_000 // 5_040_000
    assert _gathers(zero_kept, traced) == (WHOLE * 2 + 500_000 - kept) * 3 / 4
    everything = replace(zero, prefetch_bucket_size=1, max_live_parameters=1 << 30)
    assert _gathers(everything, traced) == (WHOLE + 500_000) * 3 / 4
    small = replace(zero, persistence_threshold=10_000)
    twice = replace(traced, micro_batches=2)
    assert _gathers(small, twice) == (2 * (WHOLE * 2 + 500_000) + 4 * 20_000) * 3 / 4


def test_frozen_weights_come_from_the_ranks_that_share_a_copy_and_factors_from_all():
    """Two nodes of 4: of what is gathered over both, a ring brings 3/4 from neighbours in the node."""
    frozen, factors = 4 * 2_125_000 + 1_000_000, 4 * 20_000
    zero = ZeroSettings(stage=3, world_size=8, node_size=4, reduce_bucket_size=1 << 20)
    sharded, in_node, on_rank = (
        step_traffic(MODEL, replace(zero, copy_ranks=ranks), replace(BATCH, micro_batches=2)) for ranks in (0, 4, 1)
    )
    all_of_factors = 4 * factors * 7 / 8
    assert sharded.gathers == Received(4 * WHOLE * 7 / 8 * 3 / 4, 4 * WHOLE * 7 / 8 / 4)
    assert on_rank.gathers == Received(all_of_factors * 3 / 4, all_of_factors / 4)
    assert in_node.gathers == on_rank.gathers + Received(4 * frozen * 3 / 4)
    assert (
        sharded.reductions == in_node.reductions == on_rank.reductions == Received(2 * 70_000 * 3 / 4, 2 * 70_000 / 4)
    )
    assert [t.collectives for t in (sharded, in_node, on_rank)] == [2 * 11, 2 * (4 * 2 + 11), 2 * (4 * 2 + 1)]
    assert [t.hops for t in (sharded, in_node, on_rank)] == [2 * 22, 2 * (9 * 2 + 10 * 3), 2 * 9 * 2]
    update, again = (update_traffic(MODEL, replace(zero, copy_ranks=ranks)) for ranks in (0, 4))
    assert again.received.total - update.received.total == 4 * 125_000 * 7 / 8  # the new masks


def test_one_rank_receives_nothing_and_lower_stages_no_weights():
    assert step_traffic(MODEL, ZeroSettings(stage=3), BATCH).received.total == 0
    assert update_traffic(MODEL, ZeroSettings(stage=3)).received.total == 0
    zero2 = ZeroSettings(stage=2, world_size=4, reduce_bucket_size=1 << 30)
    assert step_traffic(MODEL, zero2, BATCH).received == Received(2 * 40_000 * 2 * 3 / 4)
    accumulated = step_traffic(MODEL, zero2, replace(BATCH, micro_batches=3))
    assert accumulated.received == Received((3 + 1) * 40_000 * 2 * 3 / 4)  # 3 reductions, and the new values
    assert accumulated.collectives == 4
    at_stage_1 = replace(zero2, stage=1)
    assert step_traffic(MODEL, at_stage_1, replace(BATCH, micro_batches=3)) == step_traffic(MODEL, at_stage_1, BATCH)
    assert update_traffic(MODEL, zero2).received.total == 0  # every rank scores all weights, alike


def test_a_mask_update_moves_masters_samples_and_counts_but_no_weight():
    found = update_traffic(MODEL, ZeroSettings(stage=3, world_size=4))
    assert found.gathers == Received(4 * 40_000 * 3 / 4)
    counts = 3 * 4 * (4 + 2048) * 8
    reduced = 4 * 4 * sample_size(1_000_000) + counts + 4 * 4 * 8 + 24
    assert found.reductions == Received(2 * reduced * 3 / 4)
    assert found.collectives == 7


def test_times_add_up_and_overlap_where_the_machine_does():
    cpu = replace(MACHINES["cpu"], host_factor=0.0)
    zero = ZeroSettings(stage=3, world_size=2, reduce_bucket_size=1 << 20)
    batch = replace(BATCH, trace=Trace(moved=7_000_000))
    t = time_plan(MODEL, zero, batch, cpu)
    moved = 4_000_000 * (10 + 40) + 7_000_000 + 40_000 * (14 + 70 / 2)
    assert t.step_compute == pytest.approx(step_flops(MODEL, batch) / cpu.flops + moved / cpu.memory_bytes)
    assert t.step_network == pytest.approx(t.step_received / cpu.node_bytes + 11 * cpu.latency)
    assert (t.step, t.step_launching) == (pytest.approx(t.step_compute + t.step_network), 0.0)
    assert t.update_compute == pytest.approx(2_000_000 * cpu.update_seconds)
    overlapped = time_plan(MODEL, zero, batch, replace(cpu, overlaps=True))
    assert overlapped.step == max(t.step_compute, t.step_network)
    assert t.share_of_masks(10, 2) == pytest.approx(2 * t.update / (10 * t.step + 2 * t.update))
    assert t.share_of_masks(10, 0) == 0.0
    assert t.over_full == pytest.approx((t.step + t.update) / t.full_step)


def test_a_host_that_launches_slower_than_the_device_computes_decides():
    zero = ZeroSettings(stage=3, world_size=2, reduce_bucket_size=1 << 20)
    slow = replace(MACHINES["h100"], launch_seconds=1.0, triton_launch_seconds=10.0)
    assert slow.host_factor == 1.0  # Python takes less
    t = time_plan(MODEL, zero, replace(BATCH, recomputed=1.0, trace=Trace(launches=100), micro_batches=2), slow)
    counts = COUNTS["triton"]
    ops, kernels = (
        4 * (2 * getattr(counts.forward_launches, kind) + getattr(counts.layer_launches, kind))
        + 8 * getattr(counts.band_launches, kind)
        for kind in ("torch", "triton")
    )
    assert (ops, kernels) == (4 * 22 + 8 * 10, 4 * 2 + 8)  # merged twice, and a kernel for the gradients of each band
    each = ops + 10 * kernels + 100 + 3 * 4
    assert t.step == t.step_launching == 2 * each + 2 * (3 * 5 + 1)  # the last are collectives
    assert t.update_compute == (4 * counts.update_launches.total + counts.shared_launches.total) + 9 * 10


def test_the_host_takes_the_python_of_layers_and_operators_and_the_hooks_of_every_turn():
    """Two micro-batches of 4 layers and 100 operators: 13 tensors and 5 modules in two passes."""
    zero = ZeroSettings(stage=3, world_size=2, reduce_bucket_size=1 << 20)
    batch = replace(BATCH, trace=Trace(launches=100), micro_batches=2)
    h100 = MACHINES["h100"]
    python = 4 * (0.25e-3 + 0.98e-3) + 100 * 12.9e-6
    turns = 2 * 5 * (78e-6 + 49e-6) + 2 * 13 * 238e-6
    of_step = 2 * (python + turns + 4 * 257e-6) + 4 * 146e-6
    found = time_plan(MODEL, zero, batch, h100)
    assert found.step_host == pytest.approx(of_step)
    assert (found.step, found.step_bound) == (found.step_host, "host")  # as the host works ahead, not the sum
    slower = time_plan(MODEL, zero, batch, replace(h100, host_factor=2.0))
    assert slower.step_host == pytest.approx(2 * of_step)
    traced = replace(batch, trace=Trace(launches=100, fetches=30, releases=20, parameter_turns=50))
    turns = 30 * 78e-6 + 20 * 49e-6 + 50 * 238e-6
    of_step = 2 * (python + turns + 4 * 257e-6) + 4 * 146e-6
    assert time_plan(MODEL, zero, traced, h100).step_host == pytest.approx(of_step)
    at_stage_2 = time_plan(MODEL, replace(zero, stage=2), traced, h100)
    assert at_stage_2.step_host == pytest.approx(2 * python + 4 * 146e-6)


def test_a_larger_micro_batch_costs_the_host_nothing_and_products_bound_the_step():
    zero = ZeroSettings(stage=3, world_size=2, reduce_bucket_size=1 << 20)
    small, large = (time_plan(MODEL, zero, replace(BATCH, tokens=tokens), MACHINES["h100"]) for tokens in (10, 1 << 20))
    assert small.step_host == large.step_host
    assert (small.step_bound, large.step_bound) == ("host", "products")
    assert large.step == large.step_compute
    slow_links = replace(MACHINES["h100"], node_bytes=1e6)
    assert time_plan(MODEL, zero, BATCH, slow_links).step_bound == "network"


def test_a_rank_on_a_cpu_computes_and_is_its_own_host():
    zero = ZeroSettings(stage=3, world_size=2, reduce_bucket_size=1 << 20)
    found = time_plan(MODEL, zero, BATCH, MACHINES["cpu"])
    assert found.step_host > 4 * (0.25e-3 + 0.98e-3)
    assert found.step == pytest.approx(found.step_compute + found.step_host + found.step_network)


FLAT_MODEL = replace(
    MODEL,
    tensors=(
        TensorGroup(1_000_000, 2, 4),
        TensorGroup(40_000, 2, trainable=True, kind="factor"),
        TensorGroup(125_000, 1, 4, kind="mask"),
        TensorGroup(500_000, 2),
    ),
    flattened_factors=4 * 8,
    flat_parameters=1,
)
"""``MODEL`` with one parameter for the 8 factors of each of 4 layers."""


def test_flat_factors_are_reduced_and_gathered_as_one_tensor():
    zero = ZeroSettings(stage=3, world_size=2, reduce_bucket_size=1 << 20)
    slow = replace(MACHINES["h100"], launch_seconds=1.0, triton_launch_seconds=0.0)
    launching = time_plan(FLAT_MODEL, zero, BATCH, slow).step_launching
    counts = COUNTS["triton"]
    layers = 4 * (counts.forward_launches.torch + counts.layer_launches.torch + 2 * counts.band_launches.torch)
    # autograd adds 32 gradients; 3 launches around the flat parameter, and 3 of its reduction
    assert launching == layers + 32 + 3 + 3 + 11
    per_factor = time_plan(MODEL, zero, BATCH, MACHINES["h100"])
    flat = time_plan(FLAT_MODEL, zero, BATCH, MACHINES["h100"])
    fewer_tensors = 3 * (257e-6 + 146e-6 + 2 * 238e-6)
    assert flat.step_host - per_factor.step_host == pytest.approx(35 * 12.9e-6 - fewer_tensors)
    copied = replace(zero, world_size=8, node_size=4, copy_ranks=1)
    among_all = step_traffic(FLAT_MODEL, copied, replace(BATCH, recomputed=1.0)).collectives
    assert among_all == 3 * 1 + 1


def test_full_fine_tuning_has_no_masks_but_a_tensor_per_weight():
    zero = ZeroSettings(stage=3, world_size=2, reduce_bucket_size=1 << 20)
    batch = replace(BATCH, trace=Trace(launches=100, fetches=30, releases=20, parameter_turns=52))
    found = time_plan(MODEL, zero, batch, MACHINES["h100"]).full_step
    python = (100 + 3 * 4) * 12.9e-6  # operators, and the products of its layers
    turns = 30 * 78e-6 + 20 * 49e-6 + 52 * 5 / 13 * 238e-6  # of 13 tensors, 5 are weights
    assert found == pytest.approx(python + turns + 5 * (257e-6 + 146e-6))


def test_a_mask_update_takes_the_longer_of_its_bytes_and_instructions_or_the_rate_that_was_measured():
    zero, counts = ZeroSettings(stage=3, world_size=2), COUNTS["triton"]
    fast = replace(MACHINES["h100"], launch_seconds=0.0, triton_launch_seconds=0.0)
    instructions = 2_000_000 * counts.update_instructions / fast.instructions
    assert time_plan(MODEL, zero, BATCH, fast).update_compute == pytest.approx(instructions)
    bytes_alone = time_plan(MODEL, zero, BATCH, replace(fast, instructions=0.0)).update_compute
    assert bytes_alone == pytest.approx(2_000_000 * counts.update_bytes / fast.memory_bytes)
    assert time_plan(MODEL, zero, BATCH, replace(fast, update_seconds=1e-3)).update_compute == pytest.approx(2000)
    groups = replace(MODEL, matrices=tuple(replace(m, kind="n:m") for m in MODEL.matrices))
    of_groups = 2_000_000 * UNIT_UPDATES["n:m"][1] / fast.instructions
    assert time_plan(groups, zero, BATCH, fast).update_compute == pytest.approx(of_groups)


def test_full_fine_tuning_trains_every_weight_and_makes_no_mask():
    cpu = replace(MACHINES["cpu"], host_factor=0.0)
    zero = ZeroSettings(stage=3, world_size=2, reduce_bucket_size=1 << 30)
    parameters = 4_000_000 + 500_000
    flops = 4_000_000 * 10 * 6 + 500_000 * 10 * 6
    moved = parameters * (14 + 70 / 2)
    received = (2 * 2 * parameters + 2 * parameters) / 2
    expected = flops / cpu.flops + moved / cpu.memory_bytes + received / cpu.node_bytes
    found = time_plan(MODEL, zero, BATCH, replace(cpu, latency=0.0)).full_step
    assert found == pytest.approx(expected)


def test_without_kernels_a_step_and_an_update_take_longer():
    zero = ZeroSettings(stage=3, world_size=8)
    with_kernels, without = (
        time_plan(MODEL, zero, BATCH, replace(MACHINES["h100"], code=code)) for code in ("triton", "torch")
    )
    assert without.step_compute > with_kernels.step_compute
    assert without.update_compute > 4 * with_kernels.update_compute
    assert without.full_step == with_kernels.full_step


def test_beyond_a_node_the_slower_of_both_links_decides():
    """A ring enters a node of 8 once, so an eighth of the bytes come from the network."""
    h100 = MACHINES["h100"]
    assert h100.transfer_seconds(1e9, 0, 8) == pytest.approx(1e9 / h100.node_bytes)
    assert h100.transfer_seconds(1e9, 3, 16) == pytest.approx(1e9 / 8 / h100.network_bytes + 3 * 2 * h100.latency)
    fast = replace(h100, network_bytes=1e12)
    assert fast.transfer_seconds(1e9, 0, 16) == pytest.approx(1e9 * 7 / 8 / h100.node_bytes)
    assert h100.transfer_seconds(1e9, 3, 1) == 0.0
