"""How large a micro batch is: the bytes that a token takes, and what a card holds of them."""

import importlib.util
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from scripts.bench.paths import kept_bytes
from tests.helpers import tiny
from tests.helpers.configs import composed, counted
from train import memory
from train.checks import check
from train.config import build_reducer
from train.memory import (
    Card,
    LongestExamples,
    Packing,
    card_of,
    fit_packing,
    fitting_questions,
    micro_batch_memory,
    resident_memory,
)
from train.models import load_family, quantize_language_model
from train.plan import print_plan
from train.trainable import make_trainable
from vzip import UserError
from vzip.cost import example_cost, kept_memory, packed_memory, weight_memory
from vzip.families import families, family_of
from vzip.fast.language import PackedLanguage
from vzip.runs.projector import fingerprint

PROJECTOR = {"llava-7b": 20_979_712, "llava-13b": 31_467_520, "next-7b": 20_979_712}


def packing_of(*overrides, longest=300, prefix=40, world_size=1, **changes):
    """What the card of the settings holds."""
    cfg = OmegaConf.merge(composed(*overrides), changes)
    check(cfg)
    name, size = cfg.model.name, {"lengths": LongestExamples(longest, prefix), "world_size": world_size}
    return fit_packing(cfg, counted(name), card_of(cfg), num_trainable=PROJECTOR[name], **size)


def needed(cfg, packing, *, longest=300, prefix=40, world_size=1):
    """Bytes of a run with that micro batch."""
    family = counted(cfg.model.name)
    resident = resident_memory(cfg, family, num_trainable=PROJECTOR[cfg.model.name], world_size=world_size)
    return resident + micro_batch_memory(cfg, family, packing, LongestExamples(longest, prefix))


# Bytes of a token


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kind", [(LlamaConfig, LlamaModel, 4), (Qwen2Config, Qwen2Model, 2)], ids=["llama", "qwen2"]
)
def test_a_layer_keeps_as_much_as_is_reckoned(kind, dtype, recompute):
    make_config, make_model, num_key_heads = kind
    shape = {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_attention_heads": 4,
        "num_key_value_heads": num_key_heads,
    }
    num_tokens, sizes = 96, []
    for num_layers in (3, 5):
        config = make_config(**shape, num_hidden_layers=num_layers, vocab_size=32)
        model = make_model(config).to(dtype).requires_grad_(False).eval()
        sizes.append(kept_bytes(PackedLanguage(model, recompute=recompute), [num_tokens]))
    measured = (sizes[1] - sizes[0]) / 2 / num_tokens
    expected = kept_memory(config, itemsize=dtype.itemsize, recompute=recompute)
    attended = dtype.itemsize * 64  # FlashAttention keeps its output, attention on a CPU does not
    assert measured == pytest.approx(expected - attended, rel=0.01)


def test_vicuna_keeps_what_the_cuts_promise():
    config = counted("llava-7b").model.config.text_config
    in_width = {
        name: kept_memory(config, itemsize=2, **given) / config.hidden_size for name, given in KEPT.items()
    }
    assert in_width["plain"] == 22.75
    assert in_width["recompute"] == 14
    assert in_width["int8"] > in_width["plain"] and in_width["lora"] > in_width["plain"]


KEPT = {"plain": {}, "recompute": {"recompute": True}, "int8": {"quantize": "int8"}, "lora": {"lora": True}}


def test_lora_in_the_language_model_takes_memory_for_its_inputs():
    def memory_of(lora):
        family = family_of(tiny.llava())
        make_trainable(family, OmegaConf.create({"projector": True, "lora": lora}))
        reducer = build_reducer(composed("model=llava-7b", "reducer.budget=6"))
        return packed_memory(family, reducer, num_tokens=512, num_prefix=40)

    language, projector = (
        {"target": target, "r": 2, "alpha": 4} for target in ("language_model", "projector")
    )
    assert memory_of(projector) == memory_of(None) < memory_of(language)


# What a card holds


def test_a_24gb_card_tunes_7b_unquantised():
    packing = packing_of("model=llava-7b", "hardware=24gb")
    assert packing.tokens >= 2048 and not packing.recompute


def test_an_80gb_card_tunes_13b_unquantised():
    assert packing_of("model=llava-7b", "hardware=80gb") == Packing(16_384, recompute=False)
    packing = packing_of("model=llava-13b", "hardware=80gb")
    assert packing.tokens >= 8192 and not packing.recompute


def test_13b_on_24gb_is_refused_with_what_helps_and_that_helps():
    with pytest.raises(
        UserError, match=r"need 2\d\.\d GB, more than memory_gb=24; .*hardware=80gb.*zero3.*quantize=nf4"
    ):
        packing_of("model=llava-13b", "hardware=24gb")
    assert packing_of("model=llava-13b", "hardware=24gb", "quantize=nf4").tokens >= 2048
    assert packing_of("model=llava-13b", "hardware=24gb", "quantize=int8").tokens >= 1024
    assert packing_of("model=llava-13b", "hardware=24gb", "deepspeed=zero3", world_size=8).tokens >= 1024
    assert packing_of("model=llava-13b", "hardware=24gb", "deepspeed=zero3_offload").tokens >= 1024


@settings(max_examples=40, deadline=None)
@given(st.floats(16, 120), st.integers(1, 30_000), st.integers(0, 500))
def test_the_micro_batch_is_the_largest_of_use_that_fits(memory_gb, longest_row, prefix):
    cfg = OmegaConf.merge(composed("model=llava-7b"), {"memory_gb": memory_gb})
    needs = partial(needed, cfg, longest=longest_row, prefix=prefix)
    room = 0.96 * memory_gb * 1e9 + 1
    longest = -(-longest_row // 256) * 256
    try:
        packing = packing_of("model=llava-7b", memory_gb=memory_gb, longest=longest_row, prefix=prefix)
    except UserError as error:
        assert f"memory_gb={memory_gb:g}" in str(error)
        assert needs(Packing(longest, recompute=True)) > room - 2
        return
    assert packing.tokens % 256 == 0 and longest_row <= packing.tokens <= max(16_384, longest)
    assert needs(packing) <= room
    if packing.tokens < max(16_384, longest):
        assert needs(Packing(packing.tokens + 256, packing.recompute)) > room - 2
    if packing.recompute:
        assert needs(Packing(max(2048, longest), recompute=False)) > room - 2


def test_a_long_prefix_takes_its_room(monkeypatch):
    """FlashAttention has it before each row; where there is none, long rows take the room of their scores."""
    assert packing_of("model=llava-7b", "hardware=80gb").tokens == 16_384
    assert packing_of("model=llava-7b", "hardware=80gb", prefix=400).tokens < 12_000
    plain = packing_of("model=llava-7b", "hardware=80gb", longest=16_000)
    monkeypatch.setattr(memory, "flash_runs", lambda cfg, family: False)
    with pytest.raises(UserError, match="a row of 16000 tokens"):
        packing_of("model=llava-7b", "hardware=80gb", longest=16_000)
    assert plain.tokens == packing_of("model=llava-7b", "hardware=80gb").tokens == 16_384


def test_what_is_given_is_taken():
    assert packing_of("model=llava-7b", "hardware=24gb", "batch.tokens=777") == Packing(777, recompute=False)
    assert packing_of("model=llava-7b", "hardware=24gb", "batch.tokens=3000") == Packing(3000, recompute=True)
    assert (
        packing_of("model=llava-7b", "hardware=24gb", "batch.tokens=9000", "batch.recompute=false").tokens
        == 9000
    )
    assert packing_of("model=llava-7b", "hardware=80gb", "batch.recompute=true") == Packing(
        16_384, recompute=True
    )
    assert packing_of("model=llava-7b", "memory_gb=20", "batch.recompute=false").tokens < 2048


def test_of_several_budgets_the_one_with_the_most_pictures_counts():
    alone = [
        packing_of("model=next-7b", "hardware=24gb", f"reducer.budget={budget}") for budget in (160, 640)
    ]
    assert alone[0].recompute != alone[1].recompute
    several = packing_of("model=next-7b", "hardware=24gb", "reducer.budget=[320,160,640]")
    assert several == Packing(2048, alone[0].recompute)


def test_with_several_budgets_larger_memory_makes_no_other_micro_batches():
    for size in (24, 40, 80):
        assert packing_of("model=llava-7b", f"memory_gb={size}", "reducer.budget=[64,128,192]").tokens == 2048


def test_a_row_longer_than_the_micro_batch_is_a_user_error():
    with pytest.raises(UserError, match=r"batch\.tokens=512 is less than the 513 tokens"):
        packing_of("model=llava-7b", "hardware=80gb", "batch.tokens=512", longest=513)
    with pytest.raises(UserError, match=r"a row of 9000 tokens need .* more than memory_gb=24"):
        packing_of("model=llava-7b", "hardware=24gb", longest=9000)


def test_zero_shares_the_frozen_weights_or_moves_them_to_the_host():
    def weights(deepspeed, world_size):
        cfg = composed("model=llava-13b", f"deepspeed={deepspeed}")
        return resident_memory(cfg, counted("llava-13b"), num_trainable=0, world_size=world_size) / 1e9

    assert weights("zero0", 8) == weights("zero0", 1) > 26
    assert weights("zero3", 8) < weights("zero3", 2) < weights("zero0", 2)
    assert weights("zero3_offload", 1) < weights("zero3", 8)


def test_a_cpu_shares_half_of_its_memory_and_no_more_than_its_group_has(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    (tmp_path / "memory.max").write_text("max\n")
    cfg = composed()
    alone = card_of(cfg).memory
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert alone > 1e8 and card_of(cfg).memory == alone // 2
    (tmp_path / "memory.max").write_text("4096000\n")
    assert card_of(cfg) == Card(1_024_000, card_of(cfg).name) and "memory_gb=null" in card_of(cfg).name
    assert card_of(composed("memory_gb=1.5")) == Card(1_500_000_000, "memory_gb=1.5")


def test_memory_is_positive():
    with pytest.raises(UserError, match="memory_gb=0"):
        check(composed("memory_gb=0"))


# Answers


def test_as_many_questions_at_once_as_the_card_holds(monkeypatch):
    """Of 7B, whose tokens keep half a megabyte each."""
    said = []
    monkeypatch.setattr(memory, "all_gather_list", list)
    monkeypatch.setattr(memory, "print_rank0", said.append)

    def questions(longest, *overrides):
        cfg = composed("model=llava-7b", *overrides)
        held = {"num_trainable": PROJECTOR["llava-7b"], "world_size": 1}
        return fitting_questions(cfg, counted("llava-7b"), longest=longest, **held)

    assert questions(640, "hardware=80gb") == 32 and not said
    fewer = questions(640, "hardware=24gb")
    assert (
        8 <= fewer < 32
        and f"{fewer} questions of up to 640 tokens at once, and not evaluate.batch=32" in said[0]
    )
    assert questions(64, "hardware=24gb") == 32
    assert questions(90_000, "hardware=24gb") == 1


# The plan


def plan_of(capsys, monkeypatch, *overrides):
    """The rows of the plan, by name."""
    monkeypatch.setenv("COLUMNS", "400")
    print_plan(composed(*overrides), world_size=1)
    cells = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    return {row[1]: row[2] for row in cells if len(row) == 4}


def test_the_plan_shows_the_micro_batch_of_the_card(capsys, monkeypatch):
    plan = plan_of(capsys, monkeypatch, "model=llava-7b", "hardware=24gb")
    assert plan["a micro batch"] == "up to 2,048 packed tokens, nothing computed twice"
    assert plan["memory a rank"].endswith("GB, of memory_gb=24; all weights 14.2 GB")
    plan = plan_of(
        capsys, monkeypatch, "model=llava-7b", "hardware=24gb", "batch.tokens=3000", "quantize=nf4"
    )
    assert (
        plan["a micro batch"].startswith("up to 3,000") and "gradients are not exact" in plan["memory a rank"]
    )
    plan = plan_of(capsys, monkeypatch, "model=llava-7b", "engine=reference", "batch.micro=4")
    assert plan["a micro batch"].startswith("4 rows, padded")


def test_the_plan_of_a_model_that_does_not_fit_says_so_and_goes_on(capsys, monkeypatch):
    plan = plan_of(capsys, monkeypatch, "model=llava-13b", "memory_gb=8")
    assert plan["a micro batch"].startswith("none: weights") and "memory a rank" not in plan
    assert "time on one H100" in plan


# Quantised


def test_quantised_weights_are_counted_without_the_package():
    family = counted("llava-13b")
    num_linear = 40 * (4 * 5120**2 + 3 * 5120 * 13824)
    exact = weight_memory(family)
    assert exact - weight_memory(family, quantize="int8") == num_linear
    assert exact - weight_memory(family, quantize="nf4") == pytest.approx((2 - 0.516) * num_linear, rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantize=int4"], r"quantize=int4 must be one of: nf4, int8"),
        (["quantize=nf4", "deepspeed=zero3"], r"quantize=nf4 does not go with ZeRO 3.*zero0"),
    ],
)
def test_what_can_not_be_quantised_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        check(composed(*overrides))


def test_a_missing_package_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"quantize=nf4 .*`pip install bitsandbytes`"):
        load_family(composed("quantize=nf4", "model.id=/nowhere"))


NEAR = {"nf4": 0.5, "int8": 0.05}
"""Relative errors in a model of random weights, which 4 bits suit less than trained ones."""


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize(
    "lora", [None, {"target": "language_model", "r": 2, "alpha": 4}], ids=["projector", "lora"]
)
@pytest.mark.parametrize("kind", ["clip", "onevision"])
def test_a_quantised_model_is_near_and_belongs_to_the_same_base(monkeypatch, kind, lora, quantize):
    said = []
    monkeypatch.setattr("train.models.print_rank0", said.append)
    model = tiny.llava(kind)
    family = families()[tiny.KINDS[kind][0]](model)
    before = fingerprint(family)
    trainable = make_trainable(family, OmegaConf.create({"projector": True, "lora": lora}))
    reducer = build_reducer(composed("model=llava-7b", "reducer.budget=6"))
    costs = example_cost(family, reducer, num_tiles=1, num_visual_tokens=6, num_text_tokens=9)
    reckoned = weight_memory(family, quantize=quantize)

    features, direction = torch.randn(1, 7, model.config.vision_config.hidden_size), torch.randn(1, 7, 48)

    def outcome():
        """The output, and the gradients of the projector."""
        model.zero_grad()
        embeddings = family.projector(features)
        output = family.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        (output * direction).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in trainable.parameters.values())
        return [output.detach(), *(p.grad.clone() for p in family.projector.parameters())]

    exact = outcome()
    quantize_language_model(family, quantize)
    frozen = {name: p.clone() for name, p in family.language_model.named_parameters() if not p.requires_grad}
    found = outcome()
    assert not torch.equal(found[0], exact[0])
    for one, other in zip(found, exact, strict=True):
        assert torch.linalg.vector_norm(one - other) <= NEAR[quantize] * torch.linalg.vector_norm(other)
    torch.optim.AdamW(trainable.parameters.values(), lr=1.0).step()
    assert all(torch.equal(p, frozen[n]) for n, p in family.language_model.named_parameters() if n in frozen)
    assert not any(
        p.requires_grad for n, p in family.model.named_parameters() if n not in trainable.parameters
    )
    assert len(said) == 1 and f"quantize={quantize}" in said[0]
    # Counting does not change, and the fingerprint that a run keeps is the one from before.
    assert weight_memory(family, quantize=quantize) == reckoned
    assert example_cost(family, reducer, num_tiles=1, num_visual_tokens=6, num_text_tokens=9) == costs
    assert fingerprint(family) != before
