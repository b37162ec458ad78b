"""Other libraries' weights, packed here by loops as their sources describe it, and read back."""

import json

import numpy as np
import pytest
import torch

from pst_ds.formats import FormatError
from pst_ds.formats.foreign import METHODS, ForeignFormat

NF4 = torch.linspace(-1.0, 1.0, 16).double().pow(3).float()  # any table of 16 numbers does


def _words(fields, bits):
    """Unsigned numbers (rows, n), n * bits a multiple of 32, side by side in int32 words."""
    held = 32 // bits
    words = np.zeros((len(fields), fields.shape[1] // held), np.uint32)
    for row in range(len(fields)):
        for i, value in enumerate(fields[row].tolist()):
            words[row, i // held] |= np.uint32(value << (i % held * bits))
    return torch.from_numpy(words.view(np.int32))


def gptq(bits=4, version=1, order=False, outputs=32, inputs=64, size=16, seed=0):
    """(parts, settings, weight)."""
    rng = np.random.default_rng(seed)
    codes, zeros = rng.integers(0, 1 << bits, (outputs, inputs)), rng.integers(1, 1 << bits, (inputs // size, outputs))
    scales = torch.from_numpy(rng.uniform(0.01, 0.1, (inputs // size, outputs))).half()
    group_of = np.arange(inputs) // size
    if order:
        group_of = rng.permutation(group_of)
    weight = np.zeros((outputs, inputs))
    for o in range(outputs):
        for i in range(inputs):
            weight[o, i] = float(scales[group_of[i], o]) * (codes[o, i] - zeros[group_of[i], o])
    parts = {"qweight": _words(codes, bits).t().contiguous(), "qzeros": _words(zeros - (version == 1), bits)}
    parts |= {"scales": scales, "g_idx": torch.from_numpy(group_of).int()}
    settings = {"bits": bits, "group_size": size, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    return parts, settings, torch.from_numpy(weight)


def awq(outputs=32, inputs=64, size=32, seed=0):
    rng = np.random.default_rng(seed)
    codes, zeros = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 16, (inputs // size, outputs))
    scales = torch.from_numpy(rng.uniform(0.01, 0.1, (inputs // size, outputs))).half()
    weight = np.zeros((outputs, inputs))
    for o in range(outputs):
        for i in range(inputs):
            weight[o, i] = float(scales[i // size, o]) * (codes[i, o] - zeros[i // size, o])

    def packed(numbers):
        mixed = np.empty_like(numbers)
        for first in range(0, outputs, 8):
            for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                mixed[:, first + place] = numbers[:, first + output]
        return _words(mixed, 4)

    parts = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}
    return parts, {"bits": 4, "group_size": size, "version": "gemm"}, torch.from_numpy(weight)


def bitsandbytes4(nested=True, outputs=12, inputs=48, seed=0):
    rng = np.random.default_rng(seed)
    numel, size, every = outputs * inputs, 64, 4
    codes = rng.integers(0, 16, numel)
    parts = {"codes": torch.from_numpy(codes[::2] << 4 | codes[1::2]).to(torch.uint8).unsqueeze(1), "quant_map": NF4}
    state = {"quant_type": "nf4", "blocksize": size, "dtype": "bfloat16", "shape": [outputs, inputs]}
    if nested:
        state |= {"nested_blocksize": every, "nested_dtype": "float32", "nested_offset": 0.25}
        table = torch.from_numpy(np.sort(rng.uniform(-1, 1, 256))).float()
        absmax = torch.from_numpy(rng.integers(0, 256, numel // size)).to(torch.uint8)
        outer = torch.from_numpy(rng.uniform(0.1, 1, -(-(numel // size) // every))).float()
        parts |= {"absmax": absmax, "nested_absmax": outer, "nested_quant_map": table}
        largest = [float(table[int(a)]) * float(outer[i // every]) + 0.25 for i, a in enumerate(absmax)]
    else:
        parts["absmax"] = torch.from_numpy(rng.uniform(0.1, 1, numel // size)).float()
        largest = parts["absmax"].tolist()
    parts["quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    weight = torch.tensor([float(NF4[code]) * largest[i // size] for i, code in enumerate(codes)]).view(outputs, inputs)
    return parts, {}, weight


def bitsandbytes8(outputs=5, inputs=7, seed=0):
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(rng.integers(-127, 128, (outputs, inputs))).to(torch.int8)
    largest = torch.from_numpy(rng.uniform(0.1, 1, outputs)).float()
    parts = {"codes": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, {}, codes.double() * largest.double().unsqueeze(1) / 127


def mxfp4(experts=2, outputs=6, inputs=64, seed=0):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16))
    scales = rng.integers(117, 137, blocks.shape[:-1])
    weight = torch.zeros(experts, inputs, outputs)
    for e, o, g, b in np.ndindex(blocks.shape):
        for half in range(2):
            bits = int(blocks[e, o, g, b]) >> 4 * half & 15
            sign, exponent, fraction = -1 if bits & 8 else 1, bits >> 1 & 3, bits & 1
            value = sign * ((1 + fraction / 2) * 2.0 ** (exponent - 1) if exponent else fraction / 2)
            weight[e, 32 * g + 2 * b + half, o] = value * 2.0 ** (int(scales[e, o, g]) - 127)
    parts = {"blocks": torch.from_numpy(blocks), "scales": torch.from_numpy(scales)}
    return {name: part.to(torch.uint8) for name, part in parts.items()}, {}, weight


MADE = {
    "gptq": gptq,
    "gptq 8 bits": lambda seed=0: gptq(8, seed=seed),
    "gptq 2 bits": lambda seed=0: gptq(2, seed=seed),
    "gptq version 2": lambda seed=0: gptq(version=2, seed=seed),
    "gptq in order of activations": lambda seed=0: gptq(order=True, seed=seed),
    "awq": awq,
    "bitsandbytes 4 bits": bitsandbytes4,
    "bitsandbytes 4 bits, one table": lambda seed=0: bitsandbytes4(nested=False, seed=seed),
    "bitsandbytes 8 bits": bitsandbytes8,
    "mxfp4": mxfp4,
}


@pytest.mark.parametrize("kind", MADE)
def test_a_weight_is_what_its_library_says(kind):
    parts, settings, weight = MADE[kind]()
    found = ForeignFormat(kind.partition(" ")[0], settings).unpack("x", parts)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), weight.double(), rtol=1e-6, atol=1e-9)


def test_gptq_without_groups_of_its_own_has_consecutive_ones():
    parts, settings, weight = gptq()
    del parts["g_idx"]
    found = ForeignFormat("gptq", settings).unpack("x", parts)
    torch.testing.assert_close(found.double(), weight, rtol=1e-6, atol=1e-9)


def test_mxfp4_is_as_transformers_reads_it():
    from transformers.integrations import mxfp4 as theirs

    parts, _, _ = mxfp4(seed=3)
    expected = theirs.convert_moe_packed_tensors(parts["blocks"], parts["scales"], dtype=torch.float32)
    assert torch.equal(ForeignFormat("mxfp4").unpack("x", parts), expected)


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("gptq", (".qweight", ".qzeros", ".scales", ".g_idx")),
        ("awq", (".qweight", ".qzeros", ".scales")),
        ("bitsandbytes", (".weight", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax",
                          ".weight.nested_quant_map", ".weight.quant_state.bitsandbytes__nf4")),
        ("bitsandbytes", (".weight", ".SCB", ".weight_format")),
        ("mxfp4", ("_blocks", "_scales")),
    ],
)  # fmt: skip
def test_the_tensors_of_a_file_belong_to_their_weights(method, parts):
    plain = ["model.norm.weight", "model.layers.0.mlp.up.bias", "lm_head.weight", "model.layers.0.scales"]
    settings = {"bits": 4} if method in ("gptq", "awq") else {}
    found = ForeignFormat(method, settings).weights([f"a.up{part}" for part in parts] + plain)
    name = "a.up" if method == "mxfp4" else "a.up.weight"
    assert found.keys() == {name}
    assert sorted(found[name].values()) == sorted(f"a.up{part}" for part in parts)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("aqlm", {}, "aqlm is not supported; gptq, awq, bitsandbytes, mxfp4 are"),
        ("gptq", {"bits": 3}, "gptq is supported with 2, 4 or 8 bits, not 3"),
        ("gptq", {}, "not None"),
        ("gptq", {"bits": 4, "checkpoint_format": "marlin"}, "as gptq or gptq_v2, not 'marlin'"),
        ("awq", {"bits": 4, "version": "gemv"}, "awq is supported with 4 bits, version gemm, not 4 bits, gemv"),
    ],
)
def test_settings_that_are_not_read_are_named(method, settings, message):
    with pytest.raises(FormatError, match=message):
        ForeignFormat(method, settings)


def _damaged(parts, rng):
    """Parts of which one is another in dtype, shape or values, or is gone."""
    name = str(rng.choice(sorted(parts)))
    part, changed = parts[name], dict(parts)
    match rng.integers(6):
        case 0:
            del changed[name]
        case 1:
            changed[name] = part.float()
        case 2:
            changed[name] = part.reshape(-1)[: int(rng.integers(part.numel() + 1))]
        case 3:
            changed[name] = part.transpose(0, -1).contiguous() if part.dim() else part.reshape(1, 1)
        case 4:
            flat = part.clone().contiguous().view(-1)
            data = flat.view(torch.uint8) if flat.numel() else flat
            if data.numel():
                data[int(rng.integers(data.numel()))] = int(rng.integers(256))
            changed[name] = flat.view(part.shape)
        case _:
            changed[name] = changed[str(rng.choice(sorted(parts)))]
    return changed


@pytest.mark.parametrize("kind", MADE)
def test_damaged_parts_are_refused_by_name_or_are_a_finite_weight(kind):
    rng, refused = np.random.default_rng(1), 0
    whole = {seed: MADE[kind](seed=seed) for seed in range(3)}
    for turn in range(200):
        parts, settings, _ = whole[turn % 3]
        try:
            found = ForeignFormat(kind.partition(" ")[0], settings).unpack("layer.weight", _damaged(parts, rng))
        except FormatError as error:
            refused += str(error).startswith("layer.weight: its ")
            continue
        assert bool(torch.isfinite(found).all())
    assert refused > 20
    assert kind.partition(" ")[0] in METHODS
