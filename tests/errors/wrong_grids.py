"""Wrong inputs of rounding: in training, in pruning, in exports, and folders that other libraries have quantised."""

from __future__ import annotations

from .workshop import Workshop, Wrong, causal_setting, setting, words

_INT8 = 'quantization.values="int8"'


def _prune(*arguments: str):
    return lambda shop: shop.prune("--method", "sparsegpt", "--samples", "4", *arguments)


def _quantised_folder(shop: Workshop) -> list[str]:
    folder = shop.model(quantization_config={"quant_method": "gptq", "bits": 4})
    return ["export", str(folder), "--out", f"{shop.tmp}/out"]


GRIDS = {
    "rounding that begins before the masks of N:M are final": Wrong(
        causal_setting("pst.pattern='2:4'", "schedule.final_sparsity=0.5", _INT8, "quantization.start_fraction=0.3"),
        "quantization.start_fraction",
        "0.3",
        "Fix: quantization.start_fraction = 0.8",
    ),
    "rounding that begins before masks of N:M are final": Wrong(
        causal_setting(
            "pst.pattern='2:4'", "schedule.final_sparsity=0.5", _INT8,
            "quantization.start_fraction=0.79",
        ),
        "quantization.start_fraction",
        "0.79",
        "Fix: quantization.start_fraction = 0.8",
    ),
    "rounding without a step for it": Wrong(
        setting(_INT8, "schedule.cooldown_fraction=0"), "quantization.values", "int8", "Set schedule.cooldown_fraction"
    ),
    "groups in training that do not divide": Wrong(
        setting(_INT8, "quantization.group=32"), "encoder.layer.0.output.dense", "do not divide 60", "take row"
    ),
    "groups that there are not": Wrong(
        setting(_INT8, "quantization.group=48"), "quantization.group", "48", "must be one of 32, 64, 128, 'row'"
    ),
    "groups of an export that do not divide": Wrong(
        words("export", "{made}/causal", "--out", "{tmp}/out", "--values", "int4"), "weight", "groups of 64", "take"
    ),
    "groups of pruning that do not divide": Wrong(
        _prune("--bits", "4"), "model.layers.0.self_attn.q_proj", "do not divide 32", "Choose another group"
    ),
    "bits of another method": Wrong(
        lambda shop: shop.prune("--method", "wanda", "--bits", "4"),
        "--bits",
        "4",
        "--method sparsegpt and --keep-zeros",
    ),
    "zeros that are kept, and moved": Wrong(
        _prune("--keep-zeros", "--bits", "8", "--pattern", "row"), "--keep-zeros", "--pattern row", "Remove"
    ),
    "weights that are fitted after they are rounded": Wrong(
        _prune("--bits", "4", "--reconstruct", "2"), "--reconstruct", "2", "quantise the folder with --method sparsegpt"
    ),
    "a group without bits": Wrong(_prune("--group", "32"), "--group", "32", "Set --bits 4 or 8"),
    "zeros that are kept, and nothing to do": Wrong(
        _prune("--keep-zeros"), "--keep-zeros", "prunes nothing more", "Set --bits 4 or 8"
    ),
    "zeros that are kept, and others": Wrong(
        _prune("--keep-zeros", "--bits", "8", "--sparsity", "0.5"), "--keep-zeros", "--sparsity 0.5", "Remove"
    ),
    "a base that another library has quantised": Wrong(
        _quantised_folder, "{tmp}/model", "is quantised (gptq)", "Export the model before it was quantised"
    ),
}  # fmt: skip
