"""What the check of packed codes and scales refuses: every rule broken once, then thousands of random mutations."""

import numpy as np
import pytest
import torch

from pst_ds.core.quantization import Grid, dequantize, quantize
from pst_ds.formats import FormatError
from pst_ds.storage_format import packed_format
from tests.formats.test_sparse_check import CONTENTS, NAME, STRUCTURE, permute_bits, replaced, with_item

SHAPE = (5, 36)
FORMS = [packed_format(p, g) for p in ("bitmask", "2:4", "dense") for g in (Grid(8), Grid(4), Grid(8, 32), Grid(4, 32))]
BY_NAME = {f"{form.name} {form.grid.group or 'row'}": form for form in FORMS}
ROUNDS = 900
"""Mutations of each format, 10,800 in all."""


def whole_parts(form, shape=SHAPE, seed=0):
    generator = np.random.default_rng(seed)
    keep = generator.random(shape) < 0.5
    keep[0, :3], keep[0, 3:], keep[-1] = True, False, False  # an odd row, and an empty one
    if form.packing == "2:4":
        keep &= (np.cumsum(keep.reshape(shape[0], -1, 4), axis=2) <= 2).reshape(shape)
    weight = torch.from_numpy(generator.standard_normal(shape)).float()
    return form.pack(weight, torch.from_numpy(np.packbits(keep, axis=1, bitorder="little")), NAME)


def claim(*shape):
    return replaced("shape", lambda old: torch.tensor(shape, dtype=torch.int64).view(old.shape))


EVERY_FORM = [
    ("no scales", lambda parts: parts.pop("scales"), "must have the parts .*, found"),
    ("values of v1 beside", lambda parts: parts.update(compressed=parts["codes"]), "must have the parts .*compressed"),
    ("scale of zero", with_item("scales", (2, 0), 0.0), "scale 0 of row 2 is 0; scales are at least"),
    ("infinite scale", with_item("scales", (0, 0), float("inf")), "scale 0 of row 0 is inf"),
    ("scale that is no number", with_item("scales", (4, 0), float("nan")), "scale 0 of row 4 is nan"),
    ("denormal scale", with_item("scales", (4, 0), -(2.0**-127)), "scale 0 of row 4 is -5.87747e-39"),
    ("scale whose products overflow", with_item("scales", (1, 0), 3e38), r"scale 0 of row 1 is [\d.]+e\+38"),
    ("wide scales", replaced("scales", torch.Tensor.float), "scales of .* must be torch.bfloat16"),
    ("scales of half floats", replaced("scales", torch.Tensor.half), "scales of .* must be torch.bfloat16"),
    ("a row of scales too few", replaced("scales", lambda t: t[:-1]), "scales of .* be torch.bfloat16 of shape"),
    ("a scale too many", replaced("scales", lambda t: torch.cat([t, t], 1)), "scales of .* be torch.bfloat16 of shape"),
    ("codes are float", replaced("codes", torch.Tensor.bfloat16), "codes must be torch.u?int8"),
    ("codes of the other sign", replaced("codes", lambda t: t.view({torch.int8: torch.uint8}.get(t.dtype, torch.int8))),
     "codes must be torch.u?int8"),
    ("codes too few", replaced("codes", lambda t: t[:-1]), "codes|needs"),
    ("other columns", claim(5, 64), "of a 5 x 64 matrix"),
    ("no columns", claim(5, 0), "of a 5 x 0 matrix"),
]  # fmt: skip
BY_BITS = {
    8: [("a code of -128", with_item("codes", ..., -128), "codes has -128 in byte 0; int8 codes go from -127 to 127")],
    4: [],
}
WITH_BITS = [
    ("a padding bit", with_item("bitmask", (3, 4), 0xF0), "bitmask has a bit set beyond the 36 inputs of row 3"),
    ("bits are signed", replaced("bitmask", lambda t: t.view(torch.int8)), "bitmask of .* must be torch.uint8"),
]
OF_BITMASK = [
    ("two bits too many", with_item("bitmask", (4, 0), 3), "positions, so codes must have .*but has"),
    ("a row of codes", replaced("codes", lambda t: t[None]), "codes of a 5 x 36 matrix"),
]
ROW_FORMS = [form for form in FORMS if form.grid.group is None]
BROKEN = [
    pytest.param(form, change, said, id=f"{form.name}-{what}")
    for form in ROW_FORMS
    for what, change, said in [
        *EVERY_FORM,
        *BY_BITS[form.grid.bits],
        *(WITH_BITS if form.packing != "dense" else []),
        *(OF_BITMASK if form.packing == "bitmask" else []),
    ]
]


@pytest.mark.parametrize(("form", "change", "said"), BROKEN)
def test_each_rule_broken_once_is_refused_by_name(form, change, said):
    parts = whole_parts(form)
    form.check(NAME, parts, SHAPE)
    change(parts)
    with pytest.raises(FormatError, match=f"^{NAME}: .*({said})"):
        form.check(NAME, parts)


def test_half_bytes_that_fill_up_a_row_are_zero():
    form = packed_format("bitmask", Grid(4))
    parts = whole_parts(form)
    parts["codes"][1] |= 0x30  # of three codes of the first row
    with pytest.raises(FormatError, match=f"^{NAME}: the last half byte of row 0 in codes is padding, and must be 0"):
        form.check(NAME, parts)
    form = packed_format("dense", Grid(4))
    parts = form.pack(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))
    parts["codes"][1, 2] |= 0x70
    with pytest.raises(FormatError, match="the last half byte of row 1"):
        form.check(NAME, parts)


def test_groups_that_do_not_divide_and_another_shape():
    form = packed_format("bitmask", Grid(4, 32))
    parts = whole_parts(form, (5, 64))
    parts["shape"][1] = 48
    with pytest.raises(FormatError, match=f"^{NAME}: groups of 32 do not divide 48 inputs; take row"):
        form.check(NAME, parts)
    with pytest.raises(FormatError, match=rf"^{NAME}: its shape is \(5, 36\), but must be \(36, 5\)"):
        packed_format("dense", Grid(8)).check(NAME, whole_parts(packed_format("dense", Grid(8))), (36, 5))


@pytest.mark.parametrize("form", [form for form in FORMS if form.grid.group], ids=lambda form: form.name)
def test_rows_without_end_and_without_bytes_take_no_time(form):
    """No columns, so no scales: no byte tells how many rows there are."""
    parts, rows = form.pack(torch.empty(0, 0)), 1 << 58
    parts["shape"].view(-1)[0] = rows
    for part in set(parts) - {"shape"}:
        if parts[part].dim() == 2:
            parts[part] = torch.empty(rows, 0, dtype=parts[part].dtype)
    assert form.check(NAME, parts) == (rows, 0)
    assert form.unpack(parts).shape == (rows, 0)
    if form.packing == "bitmask":
        parts["codes"] = torch.ones(4, dtype=parts["codes"].dtype)
        with pytest.raises(FormatError, match="codes has 4 bytes, but the matrix has no inputs"):
            form.check(NAME, parts)


def mutated(form, seed):
    """A good tensor of some shape, after one or two mutations."""
    generator = np.random.default_rng(seed)
    width = int(generator.choice([32, 64, 96] if form.grid.group else [4, 8, 12, 20, 64, 100]))
    parts = whole_parts(form, (int(generator.integers(3, 7)), width), seed)
    contents = [change for change in CONTENTS if change is not permute_bits or "bitmask" in parts]
    generator.choice(contents)(parts, generator)
    if generator.random() < 0.5:
        generator.choice(contents + STRUCTURE)(parts, generator)
    return parts


@pytest.mark.few(4)
@pytest.mark.parametrize("name", BY_NAME)
def test_mutations_are_refused_by_name_or_are_whole_tensors(name):
    form, refused, whole = BY_NAME[name], [], 0
    for seed in range(ROUNDS):
        parts = mutated(form, seed)
        try:
            form.check(NAME, parts)
        except FormatError as error:
            refused.append(str(error))
            continue
        whole += 1
        dense = form.unpack(parts)
        assert torch.isfinite(dense.bfloat16()).all()
        assert torch.equal(dense, dequantize(form.unpack_codes(parts), parts["scales"]))
        keep = parts.get("bitmask")
        keep = torch.full((len(dense), -(-dense.shape[1] // 8)), 255, dtype=torch.uint8) if keep is None else keep
        if dense.shape[1] % 8 and "bitmask" not in parts:
            keep[:, -1] = (1 << dense.shape[1] % 8) - 1
        again = form.pack_codes(*quantize(dense, None, form.grid, parts["scales"]), keep, NAME)
        for part, tensor in parts.items():
            assert (tensor.dtype, tensor.shape) == (again[part].dtype, again[part].shape), (seed, part)
            assert tensor.view(torch.uint8).tolist() == again[part].view(torch.uint8).tolist(), (seed, part)
    assert all(said.startswith(f"{NAME}: ") for said in refused)
    assert {word for said in refused for word in said.removeprefix(f"{NAME}: ").split()} >= {
        *form.part_names,
        "scale",
    }  # every part was caught
    assert whole > ROUNDS // 10  # and not everything was
