"""The benchmark of both engines at a minimal size: what it compares, counts and writes."""

import json

import numpy as np
import pytest
import torch

from data.batches.packing import shared_prefix
from data.examples.tokens import Examples
from scripts.bench import step as bench
from scripts.bench.paths import make_fast, make_reference
from scripts.bench.shapes import (
    LENGTHS,
    NUM_PREFIX,
    Shape,
    make_collator,
    make_family,
    make_steps,
    necessary_flops,
    shape_of,
)
from tests.helpers import tiny
from vzip.cost import example_cost
from vzip.families.llava import Llava
from vzip.families.llava_next import LlavaNext
from vzip.templates.encode import IGNORED

CPU = torch.device("cpu")
SMALL = Shape("small", Llava, tiny.architecture("clip"), budget=7, rows=10, micro=4)
WAYS = {"reference", "fast"}


def run(arguments):
    """The command, on the small model in place of the tiny one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "shape_of", {"tiny": SMALL}.get)
        patch.setattr("sys.argv", ["bench.py", *arguments])
        bench.main()


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    target = tmp_path_factory.mktemp("bench") / "figures.json"
    run(["--rounds", "2", "--tokens", "1500", "--dtype", "float32", "--json", str(target)])
    return json.loads(target.read_text())


@pytest.fixture(scope="module")
def family():
    return make_family(SMALL, device=CPU, dtype=torch.float32)


def test_gradients_agree_and_the_fast_way_runs_no_token_more_than_necessary(figures):
    found = figures["shapes"]["tiny"]
    assert found["gradient_difference"] < 1e-4 and found["few_rows_difference"] == {
        "float32": pytest.approx(0, abs=1e-4)
    }
    assert found["slots_per_necessary"]["fast"] == 1.0
    assert found["slots_per_necessary"]["reference"] > 1.3
    # Two bytes each: the norms' inputs, queries, keys and values half as wide, gate and up twice as wide; attention's on a GPU.
    assert 2 * (1 + 1 + 1 + 2 / 2 + 2 * 2) <= found["kept_widths"] < 19
    assert (found["rows"], found["micro"], found["tokens"], found["dtype"]) == (10, 4, 1500, "float32")


def test_figures_follow_from_the_seconds(figures):
    assert {"device", "cores", "torch", "commit", "date"} <= set(figures["where"])
    found = figures["shapes"]["tiny"]
    for name in WAYS:
        slowest = max(found["seconds"][name])
        assert len(found["seconds"][name]) == 2
        assert found["steps_per_s"][name]["least"] == pytest.approx(1 / slowest)
        assert found["tenth_minutes"][name] == pytest.approx(
            66_529 / 10 * sum(found["seconds"][name]) / 2 / 60
        )
        assert 0 < found["mfu"][name]["median"] < 1
        assert set(found["stage_s"][name]) == set(bench.STAGES) and min(found["stage_s"][name].values()) > 0
    ratios = [a / b for a, b in zip(found["seconds"]["reference"], found["seconds"]["fast"], strict=True)]
    assert found["ratio"] == pytest.approx(
        {"median": sum(ratios) / 2, "least": min(ratios), "most": max(ratios)}
    )
    assert found["first_step_s"] > 0 and found["peak_flops"] > 0 and found["peak_flops_from"]
    assert set(found["peak_bytes"]) == WAYS


@pytest.mark.parametrize("checked", ["TOLERANCE", "FEW_TOLERANCE"])
def test_gradients_that_differ_end_it(monkeypatch, checked):
    monkeypatch.setitem(getattr(bench, checked), "float32", 0.0)
    with pytest.raises(
        SystemExit, match=r"the gradients differ by .* in float32, more than 0; times would say nothing"
    ):
        bench.measure_step(SMALL, bench.parse_bench_arguments(["--rounds", "1", "--dtype", "float32"]), CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_a_large_model_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        run(["--shape", "tiny", "llava-13b"])
    assert (
        "--shape llava-13b needs a GPU, and there is none; `--shape tiny` is for a CPU"
        in capsys.readouterr().err
    )


def test_rows_have_the_recorded_lengths_and_the_mix_of_them(family):
    steps = make_steps(family, num_steps=2, num_examples=128)
    image_id = family.placeholder_id("image")
    with np.load(LENGTHS) as recorded:
        lengths = set(zip(recorded["text_tokens"].tolist(), recorded["label_tokens"].tolist(), strict=True))
        alone = set(recorded["text_only_tokens"].tolist())
    for rows in steps:
        pictured = [row for row in rows if row.media]
        assert len(rows) == 128 and len(pictured) == 120
        assert {(len(row.ids) - 1, row.num_labels) for row in pictured} <= lengths
        assert {len(row.ids) for row in rows if not row.media} <= alone
        assert all(row.ids[NUM_PREFIX] == image_id and row.ids.count(image_id) == 1 for row in pictured)
        assert all(row.labels[-1] == row.ids[-1] for row in rows)
        starts = [
            sum(a == IGNORED != b for a, b in zip(row.labels, row.labels[1:], strict=False)) for row in rows
        ]
        assert {2, 3} <= set(starts) <= {1, 2, 3}
    assert len(shared_prefix(Examples.of([*steps[0], *steps[1]]), [image_id])) == NUM_PREFIX
    assert steps == make_steps(family, num_steps=2, num_examples=128)


def test_both_ways_take_the_same_rows_and_the_reference_runs_the_released_tower(family):
    steps = make_steps(family, num_steps=1, num_examples=10)
    reference = make_reference(family, SMALL.reducer, steps, micro=4, device=CPU)
    fast = make_fast(family, SMALL.reducer, steps, tokens=1500, device=CPU)
    assert reference.steps[0].num_tokens(0) == fast.steps[0].num_tokens(0)
    assert reference.steps[0].num_labels(0) == fast.steps[0].num_labels(0)
    maps = []
    for way in (reference, fast):
        attention = way.loss.family.tower.encoder.layers[0].self_attn
        attention.register_forward_hook(lambda module, args, output: maps.append(output[1]))
        way.gradient(way.collate(0)[:1])
    assert maps[0].shape[-2:] == (17, 17) and maps[1] is None


def test_tiles_are_counted():
    shape = Shape("small", LlavaNext, tiny.architecture("next"), budget=35)
    family = make_family(shape, device=CPU, dtype=torch.float32)
    collate = make_collator(family, shape.reducer)
    (rows,) = make_steps(family, num_steps=1, num_examples=4)
    batch = collate(rows)
    assert batch.num_placeholders == {"image": 4 * 35}
    assert batch.media["image"]["pixel_values"].shape[:2] == (4, 5)
    assert (collate.lengths(Examples.of(rows)) == batch.attention_mask.sum(dim=1)).all()


def test_necessary_operations_are_fewer_than_those_of_whole_rows(family):
    rows = [row for row in make_steps(family, num_steps=1, num_examples=20)[0] if row.media]
    whole = [
        example_cost(
            family, SMALL.reducer, num_tiles=1, num_visual_tokens=7, num_text_tokens=len(row.ids) - 1
        ).total
        for row in rows
    ]
    assert 0.3 * sum(whole) < necessary_flops(family, SMALL.reducer, rows) < 0.9 * sum(whole)
    assert necessary_flops(family, SMALL.reducer, [row for row in rows if not row.media]) == 0


@pytest.mark.parametrize(
    "name, layers, tokens", [("tiny", 8, 64), ("llava-13b", 40, 64), ("next-7b", 32, 160)]
)
def test_shapes(name, layers, tokens):
    shape = shape_of(name)
    with torch.device("meta"):
        family = shape.family(shape.family.from_architecture(shape.architecture, dtype=torch.bfloat16))
    assert len(family.language_model.layers) == layers and family.num_patches == 576
    assert family.num_image_tokens(shape.reducer, (672, 672)) == tokens
    assert shape.shallow(2).architecture["text_config"]["num_hidden_layers"] == 2
