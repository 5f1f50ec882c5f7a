"""The benchmark of the vision tower: a baseline that computes the same, and the command."""

import json

import pytest
import torch

from scripts.bench import tower as bench_tower
from scripts.bench.released import eager_copy, released_tokens
from tests.helpers import tiny
from vzip.reducers.base import ReducerOutput
from vzip.reducers.visionzip import VisionZip
from vzip.tap import run_tower, tower_layout

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SMALL = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 140,
    "patch_size": 14,
}


def ours(tower, pixels):
    return run_tower(tower, pixels, feature_layer=-2, num_dropped=1, attention_layer=-2)


def relative_error(one, other):
    return (one - other).norm() / other.norm()


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_the_authors_path_keeps_and_merges_the_same_tokens(kind):
    tower = tiny.llava(kind).model.vision_tower
    pixels = torch.randn(3, 3, tiny.SIDE, tiny.SIDE)
    with torch.no_grad():
        theirs, own = released_tokens(eager_copy(tower), pixels), ours(tower, pixels)
    for name in ("features", "saliency", "keys"):
        assert relative_error(getattr(theirs, name), getattr(own, name)) < 1e-5

    for reducer in (VisionZip(dominant=6, contextual=3), VisionZip(dominant=1, contextual=1)):
        before, after = reducer(theirs), reducer(own)
        for name in ("dominant", "contextual", "slots"):
            assert torch.equal(getattr(before, name), getattr(after, name))
        assert relative_error(before.features, after.features) < 1e-5


def test_the_authors_path_runs_all_layers_on_the_same_weights_and_leaves_the_tower_alone():
    tower = tiny.llava().model.vision_tower
    eager = eager_copy(tower)
    pixels = torch.randn(1, 3, tiny.SIDE, tiny.SIDE)

    last_layer_runs = []
    for model in (tower, eager):
        layers = model.get_submodule(tower_layout(model.config).layers)
        layers[-1].mlp.register_forward_hook(lambda *_, model=model: last_layer_runs.append(model))

    released_tokens(eager, pixels)
    ours(tower, pixels)
    assert last_layer_runs == [eager]  # ours stops before the last layer

    pairs = zip(tower.parameters(), eager.parameters(), strict=True)
    assert all(one is other for one, other in pairs)
    assert tower.config._attn_implementation == "sdpa"


def test_the_towers_attention_is_far_from_uniform():
    tower = bench_tower.make_tower(SMALL, device=CPU, dtype=torch.float32)
    saliency = ours(tower, torch.randn(2, 3, 140, 140)).saliency
    most_salient = saliency.sort(dim=1, descending=True).values[:, :10]  # a tenth of the patches
    assert (most_salient.sum(dim=1) > 0.2).all()


def test_the_share_in_common_compares_sets():
    def output(dominant, contextual):
        none = torch.zeros(2, 0)
        return ReducerOutput(none, torch.tensor(dominant), torch.tensor(contextual), none)

    one = output([[0, 3, 5], [0, 1, 2]], [[7], [8]])
    other = output([[0, 5, 7], [0, 1, 4]], [[3], [8]])
    assert bench_tower.share_in_common(one, one) == 1
    assert bench_tower.share_in_common(one, other) == (1 + 3 / 4) / 2


@pytest.mark.slow
def test_the_command_measures_prints_and_writes(monkeypatch, call, tmp_path):
    path = tmp_path / "tower.json"
    options = ["--dtype", "float32", "bfloat16", "--batch", 1, 2, "--rounds", 2, "--json", path]
    monkeypatch.setattr(bench_tower, "clip_large", lambda: SMALL)
    printed = call(bench_tower.main, *options)

    rows = json.loads(path.read_text())["rows"]
    cases = [(row["dtype"], row["batch"]) for row in rows]
    assert cases == [("float32", 1), ("float32", 2), ("bfloat16", 1), ("bfloat16", 2)]
    assert all(row["same_tokens"] and row["feature_difference"] < 1e-5 for row in rows[:2])
    assert all(row["in_common"] > 0.7 for row in rows[2:])
    assert all(len(times) == 2 for row in rows for times in row["seconds"].values())
    assert all(f"{row['ratio']:.2f}" in printed for row in rows) and "torch" in printed


def test_the_command_stops_if_the_tokens_differ(monkeypatch):
    def other_pictures(tower, pixels):
        return bench_tower.reduce_released(eager_copy(tower), -pixels)

    monkeypatch.setattr(bench_tower, "reduce_ours", other_pictures)
    tower = bench_tower.make_tower(SMALL, device=CPU, dtype=torch.float32)
    with pytest.raises(SystemExit, match="different tokens"):
        bench_tower.measure_tower(tower, batch=1, rounds=1, device=CPU)
