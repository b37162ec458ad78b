"""Pictures pixel by pixel: sizes, colours, and where a threshold is."""

import io

import numpy as np
import pytest
from PIL import Image

from pst_ds.train.monitor import images as pictures

ORANGE, BLUE = [224, 130, 40, 255], [60, 130, 220, 255]


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


def test_a_file_has_the_colours_of_the_palette():
    drawn = pictures.histogram([5, 3], [1, 2], 0.5)
    read = Image.open(io.BytesIO(pictures.png_of(drawn)))
    assert read.mode == "P"
    assert (np.array(read.convert("RGBA")) == pictures.PALETTE[drawn]).all()
