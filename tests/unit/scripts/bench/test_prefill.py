"""The benchmark of prefill: its shapes, its cost formula, its table and file."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scripts.bench import prefill as bench_prefill
from scripts.bench.prefill import DIVISORS, SHAPES, build_family, noise_inputs
from scripts.common.prefill import PARTS, Prefill
from vzip.cost import attention_flops, linear_flops
from vzip.reducers.visionzip import VisionZip

pytestmark = pytest.mark.slow

CPU, META = torch.device("cpu"), torch.device("meta")


def counted_flops(work):
    # The MATH kernel consists of matrix products, which are counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "num_tiles"), [("llava-7b", 1), ("next-7b", 5)])
def test_the_formula_counts_what_runs(name, num_tiles):
    family = build_family(name, tiny=True, device=CPU)
    reducer = VisionZip(budget=64 * family.budget_tiles, tiles=family.budget_tiles)
    case = Prefill(family, reducer, noise_inputs(family, reducer, batch=1))
    size = case.size(case.language())

    # The formula counts the half of attention that a causal kernel computes.
    num_tokens = case.inputs["input_ids"].shape[1]
    masked_half = attention_flops(family.language_model.config, num_tokens) // 2
    assert counted_flops(case.language) == size["language_flops"] + masked_half

    # It leaves out the tower's convolution, CLS, and the row of attention that the reducer asks for.
    weight = family.tower.get_submodule("embeddings.patch_embedding").weight
    convolution = num_tiles * 2 * 576 * weight.numel()
    expected = size["whole_flops"] + masked_half + convolution
    assert counted_flops(case.whole) == pytest.approx(expected, rel=0.003)
    assert size["whole_flops"] > 1.2 * size["language_flops"]


@pytest.mark.slow
def test_the_tiny_shapes_have_the_proportions_of_the_published_ones():
    names = {name for series in SHAPES.values() for names in series for name in names}
    published = {name: build_family(name, tiny=False, device=META) for name in names}
    small = {name: build_family(name, tiny=True, device=META) for name in names}

    for name in names:
        large_language, small_language = published[name].language_model, small[name].language_model
        assert published[name].num_patches == small[name].num_patches == 576
        assert large_language.config.hidden_size == 16 * small_language.config.hidden_size
        assert next(large_language.parameters()).dtype == torch.bfloat16

    def ratio(families):
        large = linear_flops(families["llava-13b"].language_model)
        return large / linear_flops(families["llava-7b"].language_model)

    assert ratio(small) == pytest.approx(ratio(published), rel=0.01)


def test_the_command_compares_a_large_reduced_model_with_a_small_full_one(monkeypatch, call, tmp_path):
    monkeypatch.setitem(SHAPES, "tiny", (("llava-7b", "llava-13b"),))
    monkeypatch.setattr(bench_prefill, "DIVISORS", DIVISORS | {"hidden_size": 64, "intermediate_size": 64})
    path = tmp_path / "prefill.json"
    options = ["--batch", 1, "--rounds", 1, "--new-tokens", 1, "--json", path]
    printed = call(bench_prefill.main, *options)

    (series,) = json.loads(path.read_text())["series"]
    num_visual = {name: row["num_visual_tokens"] for name, row in series["cases"].items()}
    reduced = {f"llava-13b, {budget}": budget for budget in (192, 128, 64)}
    assert num_visual == {"llava-7b, all": 576} | reduced
    assert all(name in printed for name in num_visual) and "llava-13b against llava-7b" in printed
    for row in series["cases"].values():
        assert all(len(row[part]["seconds"]) == 1 for part in PARTS)
