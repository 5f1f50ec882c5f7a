"""The benchmark of tuning at a minimal size: its examples, what it compares, counts and writes."""

import json

import numpy as np
import pytest
import torch

from data.batches.packing import shared_prefix
from scripts.bench import step as bench
from scripts.bench.examples import LENGTHS, NUM_PREFIX, make_collator, make_examples, necessary_flops
from scripts.bench.paths import make_fast, make_reference
from scripts.bench.shapes import Shape, shape_of, tunable_family
from tests.helpers import tiny
from vzip.cost import example_cost
from vzip.families.llava import Llava
from vzip.families.llava_next import LlavaNext
from vzip.templates.encode import IGNORED

CPU = torch.device("cpu")
SMALL = Shape("small", Llava, tiny.architecture("clip"), budget=7, batch_size=10, micro=4)
PATHS = {"reference", "fast"}


def run(arguments):
    """Run the command on the small model in place of the tiny one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "shape_of", {"tiny": SMALL}.get)
        patch.setattr("sys.argv", ["step", *arguments])
        bench.main.__wrapped__()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    target = tmp_path_factory.mktemp("bench") / "figures.json"
    run(["--rounds", "2", "--tokens", "1500", "--dtype", "float32", "--json", str(target)])
    return json.loads(target.read_text())


@pytest.fixture(scope="module")
def family():
    return tunable_family(SMALL, device=CPU, dtype=torch.float32)


@pytest.mark.slow
def test_gradients_agree_and_the_fast_path_runs_no_token_more_than_necessary(written):
    figures = written["shapes"]["tiny"]
    assert figures["gradient_difference"] < 1e-4
    assert figures["few_rows_difference"] == {"float32": pytest.approx(0, abs=1e-4)}
    assert figures["slots_per_necessary"]["fast"] == 1.0
    assert figures["slots_per_necessary"]["reference"] > 1.3

    # At least, in widths of two bytes: the inputs of both norms and what attention makes; queries, keys and
    # values, half as wide; gate and up, twice as wide. More where attention keeps its scores.
    assert 2 * (1 + 1 + 1 + 2 / 2 + 2 * 2) <= figures["kept_widths"] < 19

    sizes = [figures[name] for name in ("rows", "micro", "tokens", "dtype")]
    assert sizes == [10, 4, 1500, "float32"]


@pytest.mark.slow
def test_figures_follow_from_the_seconds(written):
    assert {"device", "cores", "torch", "commit", "date"} <= set(written["where"])

    figures = written["shapes"]["tiny"]
    seconds = figures["seconds"]
    for name in PATHS:
        assert len(seconds[name]) == 2
        assert figures["steps_per_s"][name]["least"] == pytest.approx(1 / max(seconds[name]))
        minutes = 66_529 / 10 * sum(seconds[name]) / 2 / 60
        assert figures["tenth_minutes"][name] == pytest.approx(minutes)
        assert 0 < figures["mfu"][name]["median"] < 1
        assert set(figures["stage_s"][name]) == set(bench.STAGES)
        assert min(figures["stage_s"][name].values()) > 0

    ratios = [slow / quick for slow, quick in zip(seconds["reference"], seconds["fast"], strict=True)]
    expected = {"median": sum(ratios) / 2, "least": min(ratios), "most": max(ratios)}
    assert figures["ratio"] == pytest.approx(expected)
    assert figures["first_step_s"] > 0 and figures["peak_flops"] > 0 and figures["peak_flops_from"]
    assert set(figures["peak_bytes"]) == PATHS


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", ["TOLERANCE", "FEW_TOLERANCE"])
def test_gradients_that_differ_end_the_benchmark(monkeypatch, tolerance):
    monkeypatch.setitem(getattr(bench, tolerance), "float32", 0.0)
    arguments = bench.parse_bench_arguments(["--rounds", "1", "--dtype", "float32"])
    message = r"the gradients differ by .* in float32, more than 0; times would say nothing"
    with pytest.raises(SystemExit, match=message):
        bench.measure_step(SMALL, arguments, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_large_model_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        run(["--shape", "tiny", "llava-13b"])
    message = "--shape llava-13b needs a GPU, and there is none; `--shape tiny` is for a CPU"
    assert message in capsys.readouterr().err


def test_examples_have_the_recorded_lengths_and_the_mix_of_them(family):
    examples = make_examples(family, num_examples=128)
    image_id = family.placeholder_id("image")
    with np.load(LENGTHS) as recorded:
        pairs = zip(recorded["text_tokens"].tolist(), recorded["label_tokens"].tolist(), strict=True)
        lengths = set(pairs)
        lengths_without_picture = set(recorded["text_only_tokens"].tolist())

    with_picture = [example for example in examples if example.media]
    assert len(examples) == 128 and len(with_picture) == 120
    assert {(len(example.ids) - 1, example.num_labels) for example in with_picture} <= lengths
    for example in with_picture:
        assert example.ids[NUM_PREFIX] == image_id and example.ids.count(image_id) == 1
    assert {len(example.ids) for example in examples if not example.media} <= lengths_without_picture

    # One to three answers, the last of which ends the example.
    num_answers = set()
    for example in examples:
        starts = zip(example.labels, example.labels[1:], strict=False)
        num_answers.add(sum(before == IGNORED != after for before, after in starts))
        assert example.labels[-1] == example.ids[-1]
    assert {2, 3} <= num_answers <= {1, 2, 3}

    assert len(shared_prefix(examples, [image_id])) == NUM_PREFIX
    assert list(examples) == list(make_examples(family, num_examples=128))


def test_both_paths_take_the_same_examples_and_the_reference_runs_the_authors_tower(family):
    examples = make_examples(family, num_examples=10)
    plan = bench.plan_of(examples, num_steps=1)
    reference = make_reference(family, SMALL.reducer, examples, plan, micro=4, device=CPU)
    fast = make_fast(family, SMALL.reducer, examples, plan, tokens=1500, device=CPU)
    assert reference.batches.num_tokens(0) == fast.batches.num_tokens(0)
    assert reference.batches.num_labels(0) == fast.batches.num_labels(0)

    # Only eager attention returns its maps.
    maps = []
    for path in (reference, fast):
        attention = path.loss.family.tower.encoder.layers[0].self_attn
        attention.register_forward_hook(lambda module, args, output: maps.append(output[1]))
        path.gradient(path.collate(0)[:1])
    assert maps[0].shape[-2:] == (17, 17) and maps[1] is None


def test_tiles_are_counted():
    shape = Shape("small", LlavaNext, tiny.architecture("next"), budget=35)
    family = tunable_family(shape, device=CPU, dtype=torch.float32)
    collator = make_collator(family, shape.reducer)
    examples = make_examples(family, num_examples=4)

    batch = collator(examples)

    assert batch.num_placeholders == {"image": 4 * 35}
    assert batch.media["image"].pixels.shape[:2] == (4, 5)
    assert (collator.lengths(examples) == batch.attention_mask.sum(dim=1)).all()


def test_necessary_operations_are_fewer_than_those_of_whole_examples(family):
    examples = list(make_examples(family, num_examples=20))
    with_picture = [example for example in examples if example.media]
    without = [example for example in examples if not example.media]

    total = 0
    for example in with_picture:
        cost = example_cost(
            family,
            SMALL.reducer,
            num_tiles=1,
            num_visual_tokens=7,
            num_text_tokens=len(example.ids) - 1,
        )
        total += cost.total

    assert 0.3 * total < necessary_flops(family, SMALL.reducer, with_picture) < 0.9 * total
    assert without and necessary_flops(family, SMALL.reducer, without) == 0


@pytest.mark.parametrize(
    ("name", "num_layers", "num_tokens"), [("tiny", 8, 64), ("llava-13b", 40, 64), ("next-7b", 32, 160)]
)
def test_shapes(name, num_layers, num_tokens):
    shape = shape_of(name)
    with torch.device("meta"):
        family = shape.family(shape.family.from_architecture(shape.architecture, dtype=torch.bfloat16))
    assert len(family.language_model.layers) == num_layers and family.num_patches == 576
    assert family.num_image_tokens(shape.reducer, (672, 672)) == num_tokens
    assert shape.with_layers(2).architecture["text_config"]["num_hidden_layers"] == 2
