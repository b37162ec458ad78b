"""Which experts of a stack a tensor of the files is, in every family whose experts can be pruned."""

import json
import os
from itertools import pairwise

import pytest
import torch

from pst_ds.core.layout import WeightLayout
from pst_ds.formats.base_weights import saved_tensors
from pst_ds.formats.safetensors_file import TensorFile
from pst_ds.nn.model_structure import is_experts, stack_layouts
from pst_ds.writing.expert_stacks import StackRun, all_experts, parts_in_files
from tests.nn.expert_families import FAMILIES, tiny_model


def _stacks(model):
    for owner, module in model.named_modules():
        if is_experts(module):
            for attribute, layout in stack_layouts(module).items():
                yield f"{owner}.{attribute}", module.get_parameter(attribute), layout


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_are_the_tensors_that_transformers_writes(family):
    model = tiny_model(family)
    seen = 0
    for name, stack, layout in _stacks(model):
        saved = saved_tensors(model, {name: stack.detach()})
        runs = parts_in_files(model, name, layout)
        assert {part.name for part in runs} == saved.keys()
        rows = stack.detach().flatten(0, 1)
        for part in runs:
            first, last = part.run.rows
            assert torch.equal(rows[first:last].view(part.shape), saved[part.name]), part
            assert part.run.of in (layout.num_experts, layout.num_matrices)
        covered = sorted(part.run.rows for part in runs)
        assert covered[0][0] == 0
        assert covered[-1][1] == layout.shape[0]
        assert all(one[1] == other[0] for one, other in pairwise(covered))
        seen += 1
    assert seen


@pytest.mark.parametrize(
    ("layout", "pieces", "piece"),
    [
        (WeightLayout(48, 5, num_matrices=6, num_experts=3), 3, WeightLayout(16, 5, num_matrices=2)),
        (WeightLayout(48, 5, num_matrices=6, num_experts=3), 6, WeightLayout(8, 5)),
        (WeightLayout(48, 5, True, num_matrices=6, num_experts=3), 3, WeightLayout(16, 5, True, num_matrices=2)),
    ],
)
def test_pieces_share_a_stack_out(layout, pieces, piece):
    run = StackRun(layout, 1, pieces, pieces)
    assert run.piece == piece
    assert run.num_pieces == pieces - 1
    assert [run.share(layout.numel, i) for i in range(pieces)] == [
        (i * piece.numel, (i + 1) * piece.numel) for i in range(pieces)
    ]
    assert run.share(layout.numel, pieces - 1)[1] == layout.numel


def test_the_last_expert_is_read_from_behind_more_weights_than_32_bits_count(tmp_path):
    """From a file that is a hole but for that expert."""
    experts, width = 513, 2048
    layout, size = WeightLayout(experts * width, width, False, experts, experts), 2 * experts * width * width
    header = json.dumps({"s": {"dtype": "BF16", "shape": [experts, width, width], "data_offsets": [0, size]}}).encode()
    last = torch.arange(256).repeat(width * width // 256).bfloat16()
    with (tmp_path / "large").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(size - last.nbytes, os.SEEK_CUR)
        file.write(last.view(torch.uint8).numpy())
    run = StackRun(layout, experts - 1, experts, experts)
    assert run.share(layout.numel, run.first)[0] >= 1 << 31
    found = TensorFile(tmp_path / "large").read_rows("s", *run.rows)
    assert torch.equal(found, last.view(width, width))


def test_a_layer_that_is_no_stack_is_one_piece():
    layout = WeightLayout(12, 5, num_matrices=3)
    assert all_experts(layout).piece == layout
    assert all_experts(layout).rows == (0, 12)


def test_a_stack_that_is_written_in_another_order_is_named(monkeypatch):
    monkeypatch.setattr(
        "pst_ds.writing.expert_stacks.saved_tensors", lambda _, t: {"odd": next(iter(t.values())).flip(1)}
    )
    with pytest.raises(ValueError, match="odd"):
        parts_in_files(torch.nn.Module(), "x", WeightLayout(12, 5, num_matrices=3, num_experts=3))
