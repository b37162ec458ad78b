"""What the check of packed parts refuses: every invariant broken once, then thousands of random mutations."""

import numpy as np
import pytest
import torch

from pst_ds.core.bits import INT_OF_SIZE
from pst_ds.formats import FORMATS, FormatError
from tests.pairs import every_pair

NAME = "model.layers.0.q_proj"
SHAPE = (5, 20)  # two whole bytes and half of one
ROUNDS = 1500
"""Mutations of each format."""


def whole_parts(name, shape=SHAPE, seed=0, dtype=torch.bfloat16):
    generator = np.random.default_rng(seed)
    keep = generator.random(shape) < 0.5
    keep[0, :2], keep[1, 2:4], keep[-1] = True, True, False
    if name == "2:4":
        keep &= (np.cumsum(keep.reshape(len(keep), -1, 4), axis=2) <= 2).reshape(keep.shape)
    weight = torch.from_numpy(generator.standard_normal(shape)).to(dtype)
    return FORMATS[name].pack(weight, torch.from_numpy(np.packbits(keep, axis=1, bitorder="little")), NAME)


def with_item(part, index, value):
    def change(parts):
        parts[part][index] = value

    return change


def replaced(part, make):
    def change(parts):
        parts[part] = make(parts[part])

    return change


def dropped(part):
    return lambda parts: parts.pop(part)


def added(parts):
    parts["bias"] = torch.zeros(5)


def move_a_bit_to_the_next_row(parts):
    """The number of values stays right, and the first row's offsets too."""
    parts["bitmask"][0, 0] &= 0b11111110
    parts["bitmask"][4, 0] |= 1


def swap_columns(parts):
    columns = parts["col_indices"].numpy()
    columns[[0, 1]] = columns[[1, 0]]


def claim(*shape):
    return replaced("shape", lambda old: torch.tensor(shape, dtype=torch.int64).view(old.shape))


EVERY_FORMAT = [
    ("a part is missing", dropped("shape"), "must have the parts .*, found"),
    ("a part too many", added, "must have the parts .*, found .*bias"),
    ("shape is float", replaced("shape", torch.Tensor.double), "shape must be int64"),
    ("shape of three", replaced("shape", lambda t: torch.cat([t, t[:1]])), "shape must be int64 of shape"),
    ("shape of no dims", replaced("shape", lambda t: t.flatten()[0]), "shape must be int64 of shape"),
    ("negative rows", claim(-5, 20), r"no matrix has the shape \(-5, 20\)"),
    ("negative twice", claim(-5, -20), "no matrix has the shape"),
    ("beyond 2**62 bytes", claim(1 << 31, 1 << 31), "no matrix has the shape"),
    ("overflows to a small number", claim(1 << 62, 4), "no matrix has the shape"),
    ("no columns, and rows without end", claim((1 << 63) - 1, 0), "no matrix has the shape"),
    ("another number of rows", claim(4, 20), "of a 4 x 20 matrix"),
    ("a part is no tensor", replaced("shape", lambda t: t.tolist()), "shape is a list"),
    ("a part has no values", replaced("shape", lambda t: t.to("meta")), "shape must be a contiguous tensor"),
]
BITS = [
    ("bits are signed", replaced("bitmask", lambda t: t.view(torch.int8)), "bitmask of .* must be torch.uint8"),
    ("bits are flat", replaced("bitmask", torch.Tensor.flatten), "bitmask of .* must be torch.uint8"),
    ("bits lie across", replaced("bitmask", lambda t: t.t().contiguous().t()), "bitmask must be a contiguous"),
    ("bits are one row short", replaced("bitmask", lambda t: t[:-1]), "bitmask of .* must be torch.uint8"),
    ("a padding bit", with_item("bitmask", (3, 2), 0x83), "bitmask has a bit set beyond the 20 inputs of row 3"),
]
VALUES = [
    ("values are integers", lambda t: t.view(torch.int16), "must be bf16, fp16, fp32 or fp64"),
    ("values are complex", lambda t: t.to(torch.complex64), "must be bf16, fp16, fp32 or fp64"),
    ("values are strided", lambda t: torch.stack([t, t], -1)[..., 0], "must be a contiguous tensor"),
    ("values are sparse", lambda t: t.to_sparse(), "must be a contiguous tensor"),
    ("a value is -0.0", lambda t: torch.where(torch.arange(t.numel()).view(t.shape) == 3, -0.0, t), "at position 3"),
]
OF_FORMAT = {
    "bitmask": [
        ("a bit too many", with_item("bitmask", (4, 0), 1), "bitmask keeps .* positions, and compressed has"),
        ("a value too few", replaced("compressed", lambda t: t[:-1]), "bitmask keeps"),
        ("values of two dims", replaced("compressed", lambda t: t[None]), "compressed of a 5 x 20 matrix"),
        ("a bit in another row", move_a_bit_to_the_next_row, "row_offsets of row 1 is"),
        ("offsets shifted", replaced("row_offsets", lambda t: t + 1), "row_offsets of row 0 is 1"),
        ("offsets that rise, but not right", with_item("row_offsets", 4, 0), "row_offsets of row 4 is 0"),
        ("negative offset", with_item("row_offsets", 2, -1), "row_offsets of row 2 is -1"),
        ("offsets are int32", replaced("row_offsets", torch.Tensor.int), "row_offsets of .* must be torch.int64"),
        ("offsets have an end", replaced("row_offsets", lambda t: torch.cat([t, t[-1:]])), "row_offsets of"),
    ],
    "2:4": [
        ("three of a group", with_item("bitmask", (2, 1), 0x37), "row 2 keeps 3 of the inputs 8 to 11"),
        ("one of a group", with_item("bitmask", (1, 0), 0x13), "row 1 keeps 1 of the inputs 4 to 7"),
        ("none of the last", with_item("bitmask", (4, 2), 0), "row 4 keeps 0 of the inputs 16 to 19"),
        ("flat values", replaced("compressed", torch.Tensor.flatten), "compressed of a 5 x 20 matrix"),
        ("another width of as many bytes", claim(5, 24), "compressed of a 5 x 24 matrix"),
        ("not groups of four", claim(5, 18), "needs in_features divisible by 4, got 18"),
        ("shape in a row", replaced("shape", torch.Tensor.flatten), r"shape must be int64 of shape \(2, 1\)"),
    ],
    "csr": [
        ("does not begin at 0", with_item("crow_indices", 0, 1), "must go from 0 to"),
        ("ends early", with_item("crow_indices", -1, 3), "must go from 0 to the number of values"),
        ("rows fall", with_item("crow_indices", 2, 0), "crow_indices decrease after row 1"),
        ("rows leave", with_item("crow_indices", 2, 1 << 20), "crow_indices decrease after row 2, from 1048576"),
        ("wide rows", replaced("crow_indices", torch.Tensor.long), "crow_indices of .* must be torch.int32"),
        ("column out of range", with_item("col_indices", 3, 20), "column 20, but the matrix has 20"),
        ("columns are wide", replaced("col_indices", torch.Tensor.int), "col_indices of .* must be torch.uint16"),
        ("columns are signed", replaced("col_indices", lambda t: t.view(torch.int16)), "must be torch.uint16"),
        ("columns fall", swap_columns, "must increase within a row, but row 0 has"),
        ("a column twice", with_item("col_indices", 1, 0), "row 0 has 0 before 0"),
        ("a value too few", replaced("values", lambda t: t[:-1]), "col_indices of a 5 x 20 matrix with"),
        ("more inputs than int32", claim(5, (1 << 31) + 1), "csr holds at most"),
        ("uint16 columns of many inputs", claim(5, 65537), "col_indices of .* must be torch.int32"),
    ],
}
BROKEN = [
    pytest.param(name, change, said, id=f"{name}-{what}")
    for name in FORMATS
    for what, change, said in [
        *EVERY_FORMAT,
        *(BITS if name != "csr" else []),
        *((what, replaced(FORMATS[name].values_name, make), said) for what, make, said in VALUES),
        *OF_FORMAT[name],
    ]
]


@pytest.mark.parametrize(("name", "change", "said"), BROKEN)
def test_each_invariant_broken_once_is_refused_by_name(name, change, said):
    parts = whole_parts(name)
    FORMATS[name].check(NAME, parts, SHAPE)
    change(parts)
    with pytest.raises(FormatError, match=f"^{NAME}: .*{said}"):
        FORMATS[name].check(NAME, parts)


@pytest.mark.parametrize("name", FORMATS)
def test_another_shape_than_the_model_needs_is_refused(name):
    with pytest.raises(FormatError, match=rf"^{NAME}: its shape is \(5, 20\), but must be \(20, 5\)"):
        FORMATS[name].check(NAME, whole_parts(name), (20, 5))


def test_negative_columns_of_wide_csr_are_refused():
    weight = torch.zeros(1, 70000)
    weight[0, :3] = 1.0
    parts = FORMATS["csr"].pack(weight)
    parts["col_indices"][0] = -1
    with pytest.raises(FormatError, match=f"^{NAME}: col_indices has column -1"):
        FORMATS["csr"].check(NAME, parts)


def test_falling_columns_are_found_behind_an_empty_first_row():
    parts = FORMATS["csr"].pack(torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]))
    parts["col_indices"].copy_(torch.tensor([0, 2, 1]))
    with pytest.raises(FormatError, match=f"^{NAME}: col_indices must increase .* row 1 has 2 before 1"):
        FORMATS["csr"].check(NAME, parts)


@every_pair
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("name", FORMATS)
def test_the_check_does_not_judge_values(name, value):
    parts = whole_parts(name)
    parts[FORMATS[name].values_name].flatten()[2] = value
    FORMATS[name].check(NAME, parts, SHAPE)


@pytest.mark.parametrize("name", ["bitmask", "2:4"])
def test_rows_without_end_and_without_bytes_take_no_time(name):
    """No columns: no byte of bits tells how many rows there are."""
    parts = FORMATS[name].pack(torch.empty(0, 0))
    rows = 1 << 58
    parts["shape"][0] = rows
    parts["bitmask"] = torch.empty(rows, 0, dtype=torch.uint8)
    if name == "bitmask":  # its offsets are real: one a row
        with pytest.raises(FormatError, match="row_offsets of"):
            FORMATS[name].check(NAME, parts)
        return
    parts["compressed"] = torch.empty(rows, 0)
    assert FORMATS[name].check(NAME, parts) == (rows, 0)
    assert FORMATS[name].unpack(parts).shape == (rows, 0)


# Mutations that leave dtypes and shapes, of good parts


def flip_a_bit(parts, generator):
    part = generator.choice(list(parts))
    flat = parts[part].view(-1).view(torch.uint8).numpy()
    flat[generator.integers(len(flat))] ^= np.uint8(1 << generator.integers(8))


def set_an_integer(parts, generator):
    part = generator.choice([part for part, t in parts.items() if not t.is_floating_point()])
    array = parts[part].numpy().reshape(-1)
    hostile = [0, 1, -1, 2, 5, 19, 20, 21, 255, 1 << 15, (1 << 31) - 1, 1 << 31, 1 << 62, -(1 << 63), (1 << 63) - 1]
    array[generator.integers(len(array))] = np.array(generator.choice(hostile)).astype(array.dtype)


def set_a_value(parts, generator):
    (part,) = (part for part, t in parts.items() if t.is_floating_point())
    flat = parts[part].view(-1)
    flat[generator.integers(flat.numel())] = float(generator.choice([0.0, -0.0, np.nan, np.inf, 1.5]))


def swap_neighbours(parts, generator):
    part = generator.choice([part for part, t in parts.items() if t.numel() > 1])
    array = parts[part].view(-1).view(INT_OF_SIZE.get(parts[part].element_size(), torch.uint8)).numpy()
    at = generator.integers(len(array) - 1)
    array[[at, at + 1]] = array[[at + 1, at]]


def permute_bits(parts, generator):
    """Of one row of a bitmask; its popcount stays right. Where there are no bits: of the columns of csr, in order."""
    if "bitmask" in parts:
        row = parts["bitmask"][int(generator.integers(len(parts["bitmask"])))]
        row.copy_(torch.from_numpy(np.packbits(generator.permutation(np.unpackbits(row.numpy())))))
    else:
        parts["col_indices"].numpy()[:] = np.sort(generator.integers(0, 20, parts["col_indices"].numel()))


# Mutations of dtypes, shapes and names, which come last


def resize(parts, generator):
    part = generator.choice(list(parts))
    dim = int(generator.integers(parts[part].dim()))
    size = parts[part].shape[dim]
    index = np.arange(max(0, size + int(generator.choice([-size, -2, -1, 1, 2])))) % size
    as_bytes = parts[part].view(INT_OF_SIZE.get(parts[part].element_size(), torch.uint8)).numpy()
    parts[part] = torch.from_numpy(np.take(as_bytes, index, axis=dim)).view(parts[part].dtype)


def reshape(parts, generator):
    part = generator.choice(list(parts))
    shapes = [(-1,), (1, -1), (-1, 1), tuple(parts[part].shape[::-1])]
    parts[part] = parts[part].reshape(shapes[generator.integers(len(shapes))])


def reinterpret(parts, generator):
    part = generator.choice(list(parts))
    every = [torch.uint8, torch.int8, torch.bool, torch.int16, torch.float16, torch.bfloat16, torch.uint16]
    every += [torch.int32, torch.float32, torch.int64, torch.float64]
    dtypes = [dtype for dtype in every if dtype.itemsize == parts[part].element_size()]
    parts[part] = parts[part].view(dtypes[generator.integers(len(dtypes))])


def lay_across(parts, generator):
    part = generator.choice([part for part, t in parts.items() if t.dim() == 2 and min(t.shape) > 1] or ["shape"])
    tensor = parts[part]
    parts[part] = tensor.t().clone(memory_format=torch.contiguous_format).t() if tensor.dim() == 2 else tensor[::2]


def swap_two(parts, generator):
    first, second = generator.choice(list(parts), 2, replace=False)
    parts[first], parts[second] = parts[second], parts[first]


def drop_or_rename(parts, generator):
    part = generator.choice(list(parts))
    tensor = parts.pop(part)
    if generator.random() < 0.5:
        parts[generator.choice(["compressed", "bitmask", "values", "row_offsets", "bias"])] = tensor


CONTENTS = [flip_a_bit, set_an_integer, set_a_value, swap_neighbours, permute_bits]
STRUCTURE = [resize, reshape, reinterpret, lay_across, swap_two, drop_or_rename]


def mutated(name, seed):
    """A good tensor of some shape and dtype, after one or two mutations."""
    generator = np.random.default_rng(seed)
    dtype = [torch.bfloat16, torch.float16, torch.float32, torch.float64][seed % 4]
    width = int(generator.choice([4, 8, 12, 20, 64, 100]))
    parts = whole_parts(name, (int(generator.integers(3, 7)), width), seed, dtype)
    generator.choice(CONTENTS)(parts, generator)
    if generator.random() < 0.6:
        generator.choice(CONTENTS + STRUCTURE)(parts, generator)
    return parts


def kept_positions(name, parts, shape):
    """Row bits, found without the package: of csr from its columns."""
    if name != "csr":
        return parts["bitmask"]
    keep = np.zeros(shape, dtype=bool)
    for row in range(shape[0]):
        begin, end = parts["crow_indices"][row : row + 2].tolist()
        for column in parts["col_indices"][begin:end].tolist():
            keep[row, column] = True
    return torch.from_numpy(np.packbits(keep, axis=1, bitorder="little"))


def refusal_of(name, parts):
    """What the check says, without the name; empty where the parts are whole."""
    try:
        FORMATS[name].check(NAME, parts)
    except FormatError as error:
        return str(error).removeprefix(f"{NAME}: ") if str(error).startswith(f"{NAME}: ") else f"no name: {error}"
    return ""


@pytest.mark.few(1)
@pytest.mark.parametrize("name", FORMATS)
def test_mutations_are_refused_by_name_or_are_whole_tensors(name):
    refused, whole = [], 0
    for seed in range(ROUNDS):
        parts = mutated(name, seed)
        if said := refusal_of(name, parts):
            refused.append(said)
            continue
        height, width = shape = tuple(parts["shape"].flatten().tolist())
        if height * width > 1 << 22:
            assert name == "csr"  # the only one whose parts do not grow with the inputs it claims
            continue
        whole += 1
        again = FORMATS[name].pack(FORMATS[name].unpack(parts), kept_positions(name, parts, shape))
        for part, tensor in parts.items():
            assert (tensor.dtype, tensor.shape) == (again[part].dtype, again[part].shape), (seed, part)
            assert tensor.view(torch.uint8).tolist() == again[part].view(torch.uint8).tolist(), (seed, part)
    assert not [said for said in refused if said.startswith("no name")]
    assert {said.split()[0] for said in refused} >= set(FORMATS[name].part_names)  # every part was caught
    assert whole > ROUNDS // 10  # and not everything was
