"""Pictures pixel by pixel: sizes, colours, where a threshold is, and what is merged in a long run."""

import io

import numpy as np
import pytest
from PIL import Image

from pst_ds.train.monitor import images as pictures

VIOLET, GREEN, YELLOW = [68, 1, 84, 255], [33, 145, 140, 255], [253, 231, 37, 255]
ORANGE, BLUE = [224, 130, 40, 255], [60, 130, 220, 255]


def test_flips_are_on_a_logarithmic_scale():
    shares = np.array([0.0, 1e-6, 1e-5, 1e-3, 1e-1, 0.5])
    assert pictures.flips_on_scale(shares).tolist() == pytest.approx([0.0, 0.0, 0.0, 0.5, 1.0, 1.0])


def test_shares_are_shown_relative_to_their_mean():
    shares = [[0.0, 0.1], [0.1, 0.2]]
    found = pictures.PALETTE[pictures.shaded(pictures.share_on_scale(shares))]
    assert found.tolist() == [[VIOLET, GREEN], [GREEN, YELLOW]]
    assert pictures.share_on_scale([[0.0, 0.0]]).tolist() == [[0.0, 0.0]]


def test_a_histogram_has_kept_on_pruned_and_the_threshold_between():
    pruned, kept = [0, 8, 4, 0, 0], [0, 0, 4, 2, 0]
    found = pictures.PALETTE[pictures.histogram(kept, pruned, 2.5)]
    bins, width = 3, pictures.HISTOGRAM_WIDTH // 3
    assert found.shape[1] == bins * width  # empty ends are left out
    floor = found.shape[0] - 2

    def heights(i, colour):
        return int((found[:floor, i * width] == colour).all(-1).sum())

    assert [heights(i, ORANGE) for i in range(3)] == [floor, floor // 2, 0]
    assert [heights(i, BLUE) for i in range(3)] == [0, floor // 2, floor // 4 + floor % 4 // 2]
    line = round(1.5 * width)
    assert (found[:, line, :3] == 0).all()
    assert (found[:, [line - 1, line + 1]] == 255).all()
    without = pictures.PALETTE[pictures.histogram(kept, pruned, None)]
    assert (found != without).any(-1).any(0).nonzero()[0].tolist() == [line - 1, line, line + 1]


@pytest.mark.parametrize("threshold", [-3.0, 0.0, 64.0, 99.0])
def test_a_threshold_beyond_the_bins_is_drawn_at_the_edge(threshold):
    found = pictures.PALETTE[pictures.histogram([1] * 64, [0] * 64, threshold)]
    line = found[:, 1 if threshold < 32 else -2]
    assert (line == [0, 0, 0, 255]).all()


def test_a_histogram_of_nothing_is_empty():
    found = pictures.PALETTE[pictures.histogram([0] * 64, [0] * 64, None)]
    assert not found[:-2].any()


@pytest.mark.parametrize("updates", [1, 255, 256, 257, 513, 1500])
def test_long_histories_are_merged_without_losing_flips_or_the_last_sparsity(updates):
    weights = [100, 300]
    history = pictures.MaskHistory(weights)
    flipped = np.random.default_rng(0).integers(0, 50, (updates, 2))
    for i in range(updates):
        history.add([100 - i % 100, 300 - i % 100], flipped[i])
    sparsity, flips = history.sparsity(), history.flips()
    assert sparsity.shape == flips.shape
    merged = 1
    while -(-updates // merged) > pictures.MOST_COLUMNS:
        merged *= 2
    assert flips.shape[1] == -(-updates // merged)
    last = (updates - 1) % 100
    assert sparsity[:, -1].tolist() == pytest.approx([last / 100, last / 300])
    means = [flipped[i : i + merged].mean(0) / weights for i in range(0, updates, merged)]
    np.testing.assert_allclose(flips.T, means, atol=1e-12)


def test_a_file_has_the_colours_of_the_palette():
    drawn = pictures.histogram([5, 3], [1, 2], 0.5)
    for smallest in (False, True):
        read = Image.open(io.BytesIO(pictures.png_of(drawn, smallest=smallest)))
        assert read.mode == "P"
        assert (np.array(read.convert("RGBA")) == pictures.PALETTE[drawn]).all()
