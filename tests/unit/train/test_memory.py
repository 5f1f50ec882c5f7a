"""The size of a micro batch: the bytes that a token takes, and how many of them a card holds."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from data import cgroups
from scripts.bench.paths import kept_bytes
from tests.helpers import tiny
from tests.helpers.configs import composed, counted
from train.checks import check
from train.memory import (
    Card,
    LongestExamples,
    Packing,
    card_of,
    fit_packing,
    fitting_questions,
    largest_fitting,
    micro_batch_memory,
    resident_memory,
)
from train.trainable import make_trainable
from vzip import UserError
from vzip.cost import kept_memory, packed_memory
from vzip.families import family_of
from vzip.fast.language import PackedLanguage
from vzip.reducers.visionzip import VisionZip

pytestmark = pytest.mark.slow

PROJECTOR = {"llava-7b": 20_979_712, "llava-13b": 31_467_520, "next-7b": 20_979_712}


def packing_of(*overrides, longest=300, prefix=40, world_size=1, **changes):
    """The micro batch that the card of the settings holds."""
    cfg = OmegaConf.merge(composed(*overrides), changes)
    check(cfg)
    return fit_packing(
        cfg,
        counted(cfg.model.name),
        card_of(cfg),
        num_trainable=PROJECTOR[cfg.model.name],
        lengths=LongestExamples(longest, prefix),
        world_size=world_size,
    )


def memory_of(cfg, packing, *, longest=300, prefix=40):
    """Bytes of a run with that micro batch."""
    family = counted(cfg.model.name)
    resident = resident_memory(cfg, family, num_trainable=PROJECTOR[cfg.model.name], world_size=1)
    return resident + micro_batch_memory(cfg, family, packing, LongestExamples(longest, prefix))


# Bytes of a token


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kind", [(LlamaConfig, LlamaModel, 4), (Qwen2Config, Qwen2Model, 2)], ids=["llama", "qwen2"]
)
def test_a_layer_keeps_as_much_as_estimated(kind, dtype, recompute):
    make_config, make_model, num_key_heads = kind
    num_tokens = 96
    sizes = []
    for num_layers in (3, 5):
        config = make_config(
            hidden_size=64,
            intermediate_size=176,
            num_attention_heads=4,
            num_key_value_heads=num_key_heads,
            num_hidden_layers=num_layers,
            vocab_size=32,
        )
        model = make_model(config).to(dtype).requires_grad_(False).eval()
        sizes.append(kept_bytes(PackedLanguage(model, recompute=recompute), [num_tokens]))

    measured = (sizes[1] - sizes[0]) / 2 / num_tokens
    expected = kept_memory(config, itemsize=dtype.itemsize, recompute=recompute)

    # FlashAttention keeps its output, attention on a CPU does not.
    attended = dtype.itemsize * 64
    assert measured == pytest.approx(expected - attended, rel=0.01)


def test_vicunas_layers_keep_few_numbers_in_units_of_the_width():
    config = counted("llava-7b").model.config.text_config
    kept = partial(kept_memory, config, itemsize=2)
    assert kept() / config.hidden_size == 22.75
    assert kept(recompute=True) / config.hidden_size == 14
    assert kept(quantize="int8") > kept() and kept(lora=True) > kept()


def test_lora_in_the_language_model_takes_memory_for_its_inputs():
    def memory_with(lora):
        family = family_of(tiny.llava())
        make_trainable(family, OmegaConf.create({"projector": True, "lora": lora}))
        return packed_memory(family, VisionZip(budget=6), num_tokens=512, num_prefix=40)

    language = {"target": "language_model", "r": 2, "alpha": 4}
    projector = {"target": "projector", "r": 2, "alpha": 4}
    assert memory_with(projector) == memory_with(None) < memory_with(language)


# What a card holds


def test_a_24gb_card_tunes_7b_unquantized():
    packing = packing_of("model=llava-7b", "hardware=24gb")
    assert packing.tokens >= 2048 and not packing.recompute


def test_an_80gb_card_tunes_13b_unquantized():
    assert packing_of("model=llava-7b", "hardware=80gb") == Packing(16_384, recompute=False)
    packing = packing_of("model=llava-13b", "hardware=80gb")
    assert packing.tokens >= 8192 and not packing.recompute


def test_13b_on_24gb_is_refused_with_what_helps_and_that_helps():
    message = r"need 2\d\.\d GB, more than memory_gb=24; .*hardware=80gb.*zero3.*quantize=nf4"
    with pytest.raises(UserError, match=message):
        packing_of("model=llava-13b", "hardware=24gb")
    assert packing_of("model=llava-13b", "hardware=24gb", "quantize=nf4").tokens >= 2048
    assert packing_of("model=llava-13b", "hardware=24gb", "quantize=int8").tokens >= 1024
    assert packing_of("model=llava-13b", "hardware=24gb", "deepspeed=zero3", world_size=8).tokens >= 1024
    assert packing_of("model=llava-13b", "hardware=24gb", "deepspeed=zero3_offload").tokens >= 1024


@given(st.floats(16, 120), st.integers(1, 30_000), st.integers(0, 500))
def test_the_micro_batch_is_the_largest_useful_one_that_fits(memory_gb, longest, prefix):
    cfg = OmegaConf.merge(composed("model=llava-7b"), {"memory_gb": memory_gb})
    needed = partial(memory_of, cfg, longest=longest, prefix=prefix)
    room = 0.96 * memory_gb * 1e9 + 1
    smallest = -(-longest // 256) * 256
    try:
        packing = packing_of("model=llava-7b", memory_gb=memory_gb, longest=longest, prefix=prefix)
    except UserError as error:
        assert f"memory_gb={memory_gb:g}" in str(error)
        assert needed(Packing(smallest, recompute=True)) > room - 2
        return

    assert packing.tokens % 256 == 0 and longest <= packing.tokens <= max(16_384, smallest)
    assert needed(packing) <= room
    if packing.tokens < max(16_384, smallest):
        assert needed(Packing(packing.tokens + 256, packing.recompute)) > room - 2
    if packing.recompute:
        assert needed(Packing(max(2048, smallest), recompute=False)) > room - 2


@pytest.mark.parametrize(
    ("room", "smallest", "tokens"),
    [(255, 256, 0), (1000, 256, 768), (1e9, 256, 16_384), (1e9, 20_000, 20_000), (19_999, 20_000, 0)],
)
def test_the_largest_multiple_that_fits(room, smallest, tokens):
    assert largest_fitting(room, lambda tokens: tokens, smallest=smallest) == tokens


def test_a_long_prefix_takes_room(monkeypatch):
    """FlashAttention has it before each example. Without it, long examples take the room of their scores."""
    assert packing_of("model=llava-7b", "hardware=80gb").tokens == 16_384
    assert packing_of("model=llava-7b", "hardware=80gb", prefix=400).tokens < 12_000
    with_flash = packing_of("model=llava-7b", "hardware=80gb", longest=16_000)
    monkeypatch.setattr("train.memory.flash_runs", lambda cfg, family: False)
    with pytest.raises(UserError, match="an example of 16000 tokens"):
        packing_of("model=llava-7b", "hardware=80gb", longest=16_000)
    assert with_flash.tokens == packing_of("model=llava-7b", "hardware=80gb").tokens == 16_384


def test_settings_of_the_user_are_taken():
    small = ("model=llava-7b", "hardware=24gb")
    assert packing_of(*small, "batch.tokens=777") == Packing(777, recompute=False)
    assert packing_of(*small, "batch.tokens=3000") == Packing(3000, recompute=True)
    assert packing_of(*small, "batch.tokens=9000", "batch.recompute=false") == Packing(9000, recompute=False)
    large = packing_of("model=llava-7b", "hardware=80gb", "batch.recompute=true")
    assert large == Packing(16_384, recompute=True)
    assert packing_of("model=llava-7b", "memory_gb=20", "batch.recompute=false").tokens < 2048


def test_of_several_budgets_the_one_with_the_most_pictures_counts():
    smallest = packing_of("model=next-7b", "hardware=24gb", "reducer.budget=160")
    largest = packing_of("model=next-7b", "hardware=24gb", "reducer.budget=640")
    assert smallest.recompute != largest.recompute
    several = packing_of("model=next-7b", "hardware=24gb", "reducer.budget=[320,160,640]")
    assert several == Packing(2048, smallest.recompute)


def test_with_several_budgets_larger_memory_cuts_the_same_micro_batches():
    for size in (24, 40, 80):
        assert packing_of("model=llava-7b", f"memory_gb={size}", "reducer.budget=[64,128,192]").tokens == 2048


def test_an_example_longer_than_the_micro_batch_is_refused():
    with pytest.raises(UserError, match=r"batch\.tokens=512 is less than the 513 tokens"):
        packing_of("model=llava-7b", "hardware=80gb", "batch.tokens=512", longest=513)
    with pytest.raises(UserError, match=r"an example of 9000 tokens need .* more than memory_gb=24"):
        packing_of("model=llava-7b", "hardware=24gb", longest=9000)


def test_zero_shares_the_frozen_weights_or_moves_them_to_the_host():
    def weights(deepspeed, world_size):
        cfg = composed("model=llava-13b", f"deepspeed={deepspeed}")
        return resident_memory(cfg, counted("llava-13b"), num_trainable=0, world_size=world_size) / 1e9

    assert weights("zero0", 8) == weights("zero0", 1) > 26
    assert weights("zero3", 8) < weights("zero3", 2) < weights("zero0", 2)
    assert weights("zero3_offload", 1) < weights("zero3", 8)


def test_a_rank_has_its_share_of_half_of_the_memory_that_its_container_allows(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path)
    monkeypatch.setattr(cgroups, "OWN_GROUPS", tmp_path / "none")
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    cfg = composed()

    (tmp_path / "memory.max").write_text("max\n")
    alone = card_of(cfg).memory
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert alone > 1e8 and card_of(cfg).memory == alone // 2

    # torchrun has another name for it.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_SIZE")
    assert card_of(cfg).memory == alone // 2

    (tmp_path / "memory.max").write_text("4096000\n")
    assert card_of(cfg).memory == 1_024_000 and "memory_gb=null" in card_of(cfg).name
    assert card_of(composed("memory_gb=1.5")) == Card(1_500_000_000, "memory_gb=1.5")


def test_as_many_questions_at_once_as_the_card_holds(capsys):
    """A token of 7B keeps half a megabyte."""

    def questions(longest, *overrides):
        cfg = composed("model=llava-7b", *overrides)
        family = counted("llava-7b")
        num_trainable = PROJECTOR["llava-7b"]
        return fitting_questions(cfg, family, longest=longest, num_trainable=num_trainable, world_size=1)

    assert questions(640, "hardware=80gb") == 32
    assert capsys.readouterr().out == ""
    fewer = questions(640, "hardware=24gb")
    message = f"{fewer} questions of up to 640 tokens at once, not evaluate.batch=32"
    assert 8 <= fewer < 32 and message in capsys.readouterr().out
    assert questions(64, "hardware=24gb") == 32
    assert questions(90_000, "hardware=24gb") == 1
