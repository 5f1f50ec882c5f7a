"""The parts of the fast path against plain PyTorch and the stock model, in float64, gradients included."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaModel, MistralConfig, MistralModel, Qwen2Config, Qwen2Model

from tests.helpers import tiny
from vzip import UserError
from vzip.fast import fused
from vzip.fast.attention import packed_attention
from vzip.fast.language import PackedLanguage, check_language_model
from vzip.fast.loss import cross_entropy
from vzip.fast.segments import Segments

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
MODELS = {
    "llama": lambda: LlamaModel(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralModel(MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**SHAPE)),
}
ROWS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def language_model(kind, dtype=torch.float64):
    torch.manual_seed(0)
    return tiny.exact(MODELS[kind]().to(dtype).requires_grad_(False).eval())


def assert_close(found, expected, tolerance=1e-12, least=0.0):
    """Relative to what is expected, or to `least` where that may be zero but for rounding."""
    assert found.shape == expected.shape
    assert torch.linalg.vector_norm(found - expected) <= tolerance * max(
        torch.linalg.vector_norm(expected), least
    )


class Attention(nn.Module):
    layer_idx, attention_dropout = 0, 0.0


@settings(max_examples=40, deadline=None)
@given(ROWS, st.integers(0, 5), st.sampled_from([(4, 4), (4, 2), (3, 1)]))
def test_attention_is_that_of_each_row_alone(lengths, num_prefix, heads):
    (num_heads, num_key_heads), width, num_tokens = heads, 8, sum(lengths)
    torch.manual_seed(num_tokens)
    query, key, value = (
        torch.randn(1, count, num_tokens, width, dtype=torch.float64, requires_grad=True)
        for count in (num_heads, num_key_heads, num_key_heads)
    )
    prefix = tuple(torch.randn(num_key_heads, num_prefix, width, dtype=torch.float64) for _ in range(2))
    segments = Segments(lengths, [prefix])
    found, _ = packed_attention(Attention(), query, key, value, None, scaling=0.3, segments=segments)

    rows = []
    for part_query, part_key, part_value in zip(
        *(x.split(lengths, dim=2) for x in (query, key, value)), strict=True
    ):
        keys, values = (
            torch.cat([p[None], x], dim=2) for p, x in zip(prefix, (part_key, part_value), strict=True)
        )
        seen = torch.ones(part_query.shape[2], keys.shape[2], dtype=torch.bool).tril(num_prefix)
        rows.append(
            F.scaled_dot_product_attention(
                part_query, keys, values, attn_mask=seen, scale=0.3, enable_gqa=True
            )
        )
    expected = torch.cat(rows, dim=2).transpose(1, 2)
    assert_close(found, expected)
    weight = torch.randn_like(expected)
    for one, other in zip(
        *(torch.autograd.grad((x * weight).sum(), (query, key, value)) for x in (found, expected)),
        strict=True,
    ):
        assert_close(one, other, least=1.0)  # rows of a single token give the queries nothing


def test_rows_of_like_length_share_a_block():
    empty = (torch.zeros(1, 0, 1),) * 2
    assert [block.num_rows for block in Segments([50, 48, 41, 30, 29, 5], [empty]).blocks] == [3, 2, 1]
    assert [block.num_rows for block in Segments([1000] * 5, [empty]).blocks] == [2, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_the_stock_models_to_the_bit(dtype):
    norm = LlamaModel(LlamaConfig(**SHAPE)).norm.to(dtype)
    nn.init.normal_(norm.weight)
    hidden = torch.randn(7, 48).to(dtype)
    assert torch.equal(fused.rms_norm(norm, hidden), norm(hidden))


def test_gradients_of_norm_and_mlp():
    model = language_model("llama")
    norm, mlp = model.norm, model.layers[0].mlp
    nn.init.normal_(norm.weight)
    hidden = torch.randn(7, 48, dtype=torch.float64, requires_grad=True)
    for ours, plain in (
        (fused.rms_norm(norm, hidden), norm(hidden)),
        (fused.swiglu_mlp(mlp, hidden), mlp(hidden)),
        (fused.swiglu_mlp(mlp, hidden, recompute=True), mlp(hidden)),
    ):
        assert_close(ours, plain)
        weight = torch.randn_like(plain)
        assert_close(*(torch.autograd.grad((x * weight).sum(), hidden)[0] for x in (ours, plain)))


def test_a_machine_that_can_not_compile_is_told(monkeypatch):
    def compiled(_):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore")

    monkeypatch.setattr(fused, "_compiled", compiled)
    with pytest.raises(
        UserError, match=r"no kernels here \(InvalidCxxCompiler: No .* found\); set compile=false"
    ):
        fused.check_compiles(torch.device("cpu"), torch.float32)


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_kernels_are_the_plain_ones():
    model = LlamaModel(LlamaConfig(**SHAPE)).requires_grad_(False)
    norm, mlp = model.norm, model.layers[0].mlp
    nn.init.normal_(norm.weight)
    hidden = torch.randn(7, 48, requires_grad=True)
    for compiled, plain in (
        (fused.rms_norm(norm, hidden, compiled=True), fused.rms_norm(norm, hidden)),
        (fused.swiglu_mlp(mlp, hidden, compiled=True), fused.swiglu_mlp(mlp, hidden)),
    ):
        assert_close(compiled, plain, tolerance=1e-6)
        weight = torch.randn_like(plain)
        assert_close(
            *(torch.autograd.grad((x * weight).sum(), hidden)[0] for x in (compiled, plain)), tolerance=1e-5
        )


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5))
def test_cross_entropy_in_chunks(num_labels, num_rows):
    torch.manual_seed(num_labels)
    head = nn.Linear(6, 11, bias=False, dtype=torch.float64).requires_grad_(False)
    hidden, targets = (
        torch.randn(num_labels, 6, dtype=torch.float64, requires_grad=True),
        torch.randint(11, (num_labels,)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vzip.fast.loss.MAX_LOGITS", 11 * num_rows)
        found = cross_entropy(head, hidden, targets)
    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    assert_close(found, expected)
    assert_close(*(torch.autograd.grad(3 * x, hidden)[0] for x in (found, expected)))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_rows_are_the_stock_models(kind, recompute):
    model, lengths, prefix = language_model(kind), [9, 7, 3], [5, 6, 7, 8]
    embeddings = torch.randn(sum(lengths), 48, dtype=torch.float64, requires_grad=True)
    at = torch.tensor([2, 3, 8, 12, 18])
    language = PackedLanguage(model, recompute=recompute)
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    found = language(embeddings, Segments(lengths, language.prefixes(prefix, embeddings.device)), at)
    assert {name: vars(module).get("forward") for name, module in model.named_modules()} == forwards
    assert model.config._attn_implementation == "sdpa"

    before = model.embed_tokens(torch.tensor([prefix]))
    rows = [model(inputs_embeds=torch.cat([before, row[None]], dim=1)) for row in embeddings.split(lengths)]
    expected = torch.cat([row.last_hidden_state[0, len(prefix) :] for row in rows])[at]
    assert_close(found, expected)
    weight = torch.randn_like(expected)
    assert_close(*(torch.autograd.grad((x * weight).sum(), embeddings)[0] for x in (found, expected)))


def test_models_that_the_fast_path_does_not_know_are_refused():
    check_language_model(MistralConfig(sliding_window=100), longest=100)
    check_language_model(Qwen2Config(sliding_window=100, use_sliding_window=False), longest=1000)
    with pytest.raises(UserError, match=r"attends to 100 tokens, the longest row has 101.*engine=reference"):
        check_language_model(MistralConfig(sliding_window=100), longest=101)
    with pytest.raises(UserError, match="not 'llama' with 'gelu'"):
        check_language_model(LlamaConfig(hidden_act="gelu"), longest=1)
    with pytest.raises(UserError, match=r"attention_dropout=0\.1"):
        check_language_model(LlamaConfig(attention_dropout=0.1), longest=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_flash_attention_is_that_of_blocks(num_key_heads):
    lengths, num_prefix, width = [300, 41, 7], 5, 64
    torch.manual_seed(0)
    tensors = [torch.randn(1, heads, sum(lengths), width) for heads in (4, num_key_heads, num_key_heads)]
    prefix = tuple(torch.randn(num_key_heads, num_prefix, width).bfloat16() for _ in range(2))
    weight, results = torch.randn(1, sum(lengths), 4, width).bfloat16().double(), []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        given = [tensor.bfloat16().to(device, dtype).requires_grad_() for tensor in tensors]
        segments = Segments(lengths, [tuple(part.to(device, dtype) for part in prefix)])
        mixed, _ = packed_attention(Attention(), *given, None, scaling=0.125, segments=segments)
        found = torch.autograd.grad((mixed * weight.to(device, dtype)).sum(), given)
        results.append([tensor.double().cpu() for tensor in (mixed, *found)])
    for expected, found in zip(*results, strict=True):
        assert_close(found, expected, tolerance=1e-2)
