"""What benchmarks rest on: works in turns, honest peaks, a baseline that computes the same, commands that run."""

import gc
import json
import sys
from argparse import ArgumentTypeError

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vzip
from scripts.bench import prefill as bench_prefill
from scripts.bench import tower as bench_tower
from scripts.bench.prefill import FRACTIONS, SHAPES, Prefill, build_shape, made_up_inputs
from scripts.bench.released import eager_copy, released_tokens
from scripts.common.timing import alternating, peak_flops, peak_memory, sheet_peak, where
from tests.helpers import tiny
from train.cli import writable
from vzip.cost import attention_flops, linear_flops
from vzip.families import family_of
from vzip.reducers.base import ReducerOutput
from vzip.reducers.identity import Identity
from vzip.reducers.visionzip import VisionZip
from vzip.tap import run_tower, tower_layout

CPU, META = torch.device("cpu"), torch.device("meta")
MEGABYTE = 2**20
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL_PICTURE = {"image_size": 140, "patch_size": 14}
linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read off /proc")


def test_works_run_in_turns_after_a_warm_up_and_each_starts_a_round():
    calls = []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = alternating(works, rounds=4, device=CPU)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(time > 0 for times in seconds.values() for time in times)


@linux
def test_the_peak_is_what_a_work_takes_on_top():
    there = torch.ones(64 * MEGABYTE // 4)

    def work():
        torch.ones(96 * MEGABYTE // 4)  # given back before the work ends

    assert 95 * MEGABYTE < peak_memory(work, CPU) < 100 * MEGABYTE
    assert peak_memory(there.sum, CPU) < 4 * MEGABYTE  # the peak before has been forgotten


@linux
def test_memory_that_the_allocator_kept_is_counted():
    def work():
        return [
            torch.ones(16 * 1024) for _ in range(1024)
        ]  # 64 KiB each, which are not given back one by one

    kept = work()
    end = torch.ones(16 * 1024)
    del kept
    assert peak_memory(work, CPU) >= 60 * MEGABYTE
    del end


@linux
def test_garbage_does_not_hide_what_a_work_takes():
    garbage = [torch.ones(64 * MEGABYTE // 4)]
    garbage.append(garbage)
    del garbage

    def work():
        gc.collect()
        torch.ones(64 * MEGABYTE // 4)

    assert peak_memory(work, CPU) > 60 * MEGABYTE


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_the_peak_of_a_known_gpu_is_its_data_sheets(name, peak):
    assert sheet_peak(name) == peak


def test_another_devices_peak_is_measured_and_says_so():
    peak, source = peak_flops(CPU, torch.float32)
    assert peak > 1e8 and "product" in source and "float32" in source


def test_figures_say_what_they_hold_for():
    machine = where(CPU)
    assert (
        machine["device"]
        and machine["cores"] >= 1
        and machine["commit"]
        and machine["torch"] == torch.__version__
    )


def test_a_place_that_can_not_be_written_is_refused_before_anything_is_measured(tmp_path):
    path = str(tmp_path / "new" / "figures.json")
    assert str(writable(path)) == path and (tmp_path / "new").is_dir()
    with pytest.raises(ArgumentTypeError, match="can't be written"):
        writable("/proc/nowhere/figures.json")


def relative_error(one, other):
    return (one - other).norm() / other.norm()


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
@pytest.mark.parametrize(
    "reducer", [VisionZip(dominant=6, contextual=3), VisionZip(dominant=1, contextual=1)], ids=repr
)
def test_the_released_way_keeps_and_merges_the_same(kind, reducer):
    tower, pixels = tiny.llava(kind).model.vision_tower, torch.randn(3, 3, tiny.SIDE, tiny.SIDE)
    with torch.no_grad():
        released = released_tokens(eager_copy(tower), pixels)
        ours = run_tower(tower, pixels, feature_layer=-2, num_dropped=1, attention_layer=-2)
        for name in ("features", "saliency", "keys"):
            assert relative_error(getattr(released, name), getattr(ours, name)) < 1e-5
        before, after = reducer(released), reducer(ours)
    for name in ("dominant", "contextual", "slots"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert relative_error(before.features, after.features) < 1e-5


def test_the_released_way_runs_all_layers_on_the_same_weights_and_leaves_the_tower():
    tower, pixels = tiny.llava().model.vision_tower, torch.randn(1, 3, tiny.SIDE, tiny.SIDE)
    eager, mlps = eager_copy(tower), []
    for part in (tower, eager):
        layers = part.get_submodule(tower_layout(part.config).layers)
        layers[-1].mlp.register_forward_hook(lambda module, args, output, part=part: mlps.append(part))
    released_tokens(eager, pixels)
    assert mlps == [eager]
    run_tower(tower, pixels, feature_layer=-2, num_dropped=1, attention_layer=-2)
    assert mlps == [eager]  # ours stops before the last layer
    assert all(one is other for one, other in zip(tower.parameters(), eager.parameters(), strict=True))
    assert tower.config._attn_implementation == "sdpa"


def test_the_towers_attention_is_not_near_uniform():
    tower = bench_tower.make_tower(SMALL | SMALL_PICTURE, device=CPU, dtype=torch.float32)
    saliency = run_tower(
        tower, torch.randn(2, 3, 140, 140), feature_layer=-2, num_dropped=1, attention_layer=-2
    ).saliency
    top = saliency.sort(dim=1, descending=True).values[:, :10].sum(dim=1)  # a tenth of the patches
    assert (top > 0.2).all()


def test_the_share_in_common_is_of_sets():
    def kept(dominant, contextual):
        none = torch.zeros(2, 0)
        return ReducerOutput(none, torch.tensor(dominant), torch.tensor(contextual), none)

    one = kept([[0, 3, 5], [0, 1, 2]], [[7], [8]])
    other = kept([[0, 5, 7], [0, 1, 4]], [[3], [8]])
    assert bench_tower.share_in_common(one, one) == 1
    assert bench_tower.share_in_common(one, other) == (1 + 3 / 4) / 2


def run(command, monkeypatch, capsys, *arguments):
    """What a command prints."""
    monkeypatch.setattr(sys, "argv", [command.__file__, *arguments])
    command.main()
    return capsys.readouterr().out


def test_bench_tower_compares_prints_and_writes(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_tower, "CLIP_LARGE", SMALL)
    monkeypatch.setattr(bench_tower, "PICTURE", SMALL_PICTURE)
    path = tmp_path / "tower.json"
    given = ("--dtype", "float32", "bfloat16", "--batch", "1", "2", "--rounds", "2", "--json", str(path))
    printed = run(bench_tower, monkeypatch, capsys, *given)
    rows = json.loads(path.read_text())["rows"]
    assert [(row["dtype"], row["batch"]) for row in rows] == [
        (dtype, batch) for dtype in ("float32", "bfloat16") for batch in (1, 2)
    ]
    assert all(row["same_tokens"] and row["feature_difference"] < 1e-5 for row in rows[:2])
    assert all(row["in_common"] > 0.7 for row in rows[2:])
    assert all(len(times) == 2 for row in rows for times in row["seconds"].values())
    assert all(f"{row['ratio']:.2f}" in printed for row in rows) and "torch" in printed


def test_bench_tower_stops_where_the_tokens_differ(monkeypatch):
    monkeypatch.setattr(
        bench_tower,
        "reduce_ours",
        lambda tower, pixels: bench_tower.reduce_released(eager_copy(tower), -pixels),
    )
    tower = bench_tower.make_tower(SMALL | SMALL_PICTURE, device=CPU, dtype=torch.float32)
    with pytest.raises(SystemExit, match="different tokens"):
        bench_tower.measure_tower(tower, batch=1, rounds=1, device=CPU)


CASES = [
    ("clip", Identity()),
    ("clip", VisionZip(budget=6)),
    ("next", Identity()),
    ("next", VisionZip(budget=20, tiles=5)),
]


def prefill_of(kind, reducer):
    torch.manual_seed(0)
    family = family_of(tiny.llava(kind))
    return Prefill(family, reducer, made_up_inputs(family, reducer, batch=2, num_text=7))


@pytest.mark.parametrize(("kind", "reducer"), CASES, ids=str)
def test_what_is_timed_is_what_the_model_generates(kind, reducer):
    case = prefill_of(kind, reducer)
    whole, language = case.whole(), case.language()
    torch.testing.assert_close(whole.logits, language.logits)
    with vzip.attach(case.family.model, reducer=reducer):
        settings = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
        settings["attention_mask"] = torch.ones_like(case.inputs["input_ids"])
        generated = case.family.model.generate(**case.inputs, **settings)
    for prefilled in (whole, language, language):  # the cache is as it was after each
        assert torch.equal(case.decode(prefilled, num_tokens=4), generated[:, -4:])
    num_tokens = case.inputs["input_ids"].shape[1]
    size = case.size(language)
    assert (
        size["kv_bytes"] == 2 * 2 * 2 * 2 * 12 * 4 * num_tokens
    )  # rows, layers, keys and values, heads, width, float32
    assert size["num_text_tokens"] == 7 and size["num_visual_tokens"] == case.family.num_image_tokens(reducer)


@pytest.mark.parametrize("name", ["llava-7b", "next-7b"])
def test_the_formula_counts_what_runs(name):
    family = build_shape(name, tiny=True, device=CPU)
    reducer = VisionZip(budget=64 * family.budget_tiles, tiles=family.budget_tiles)
    case = Prefill(family, reducer, made_up_inputs(family, reducer, batch=1))
    size, counted = case.size(case.language()), {}
    for part in ("language", "whole"):
        with (
            FlopCounterMode(display=False) as counter,
            sdpa_kernel(SDPBackend.MATH),
        ):  # which is made of counted products
            getattr(case, part)()
        counted[part] = counter.get_total_flops()
    num_tokens = case.inputs["input_ids"].shape[1]
    masked = (
        attention_flops(family.language_model.config, num_tokens) // 2
    )  # the half that a causal kernel leaves out
    assert counted["language"] == size["language_flops"] + masked
    # The formula leaves out the tower's convolution, the CLS token, and the row of attention that the reducer asks for.
    convolution = 5 if name == "next-7b" else 1
    convolution *= 2 * 576 * family.tower.get_submodule("embeddings.patch_embedding").weight.numel()
    assert counted["whole"] == pytest.approx(size["whole_flops"] + masked + convolution, rel=0.003)
    assert size["whole_flops"] > 1.2 * size["language_flops"]


def test_the_shapes_are_the_published_ones_and_the_tiny_ones_have_their_proportions():
    names = {name for series in SHAPES.values() for names in series for name in names}
    published = {name: build_shape(name, tiny=False, device=META) for name in names}
    small = {name: build_shape(name, tiny=True, device=META) for name in names}
    for name in names:
        assert published[name].num_patches == small[name].num_patches == 576
        assert (
            published[name].language_model.config.hidden_size
            == 16 * small[name].language_model.config.hidden_size
        )
        assert next(published[name].language_model.parameters()).dtype == torch.bfloat16

    def ratio(families):
        return linear_flops(families["llava-13b"].language_model) / linear_flops(
            families["llava-7b"].language_model
        )

    assert ratio(small) == pytest.approx(ratio(published), rel=0.01)


def test_bench_prefill_sets_the_big_reduced_model_against_the_small_full_one(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(SHAPES, "tiny", (("llava-7b", "llava-13b"),))
    monkeypatch.setattr(bench_prefill, "FRACTIONS", FRACTIONS | {"hidden_size": 64, "intermediate_size": 64})
    path = tmp_path / "prefill.json"
    given = ("--batch", "1", "--rounds", "1", "--new-tokens", "1", "--json", str(path))
    printed = run(bench_prefill, monkeypatch, capsys, *given)
    (series,) = json.loads(path.read_text())["series"]
    visual = {name: row["num_visual_tokens"] for name, row in series["cases"].items()}
    assert visual == {"llava-7b, all": 576, "llava-13b, 192": 192, "llava-13b, 128": 128, "llava-13b, 64": 64}
    assert all(
        len(row[part]["seconds"]) == 1 for row in series["cases"].values() for part in bench_prefill.PARTS
    )
    assert all(name in printed for name in visual) and "llava-13b against llava-7b" in printed
