"""FLOPs of an example follow from tiles, tokens and the layers that are run."""

import pytest

from tests.helpers.configs import counted
from vzip.cost import example_cost
from vzip.reducers.visionzip import VisionZip


def test_flops_follow_tiles_tokens_and_layers():
    family = counted("llava-7b")

    def cost(*, layer=None, num_tiles=1, num_visual_tokens=64):
        return example_cost(
            family,
            VisionZip(budget=64, layer=layer),
            num_tiles=num_tiles,
            num_visual_tokens=num_visual_tokens,
            num_text_tokens=100,
        )

    plain = cost()
    patches, width, inner = 576, 1024, 4096
    layer = patches * 2 * (4 * width**2 + 2 * width * inner) + 4 * patches**2 * width
    assert plain.tower == pytest.approx(23 * layer, rel=1e-6)
    assert plain.projector == 2 * 64 * 2 * (width * 4096 + 4096**2)

    five_tiles = cost(num_tiles=5)
    assert five_tiles.tower == 5 * plain.tower and five_tiles.language == plain.language
    many_tokens = cost(num_visual_tokens=320)
    assert many_tokens.projector == 5 * plain.projector and many_tokens.tower == plain.tower

    # The tower runs up to the later of the layers that the model and the reducer read.
    assert cost(layer=4).tower == cost(layer=-2).tower == plain.tower
    assert cost(layer=-1).tower == pytest.approx(24 * layer, rel=1e-6)
