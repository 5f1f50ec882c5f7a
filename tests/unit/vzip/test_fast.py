"""The parts of the fast path against plain PyTorch and the stock model, in float64, gradients included."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from tests.helpers import tiny
from tests.helpers.errors import refused
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
    "qwen3": lambda: Qwen3Model(Qwen3Config(**SHAPE, head_dim=16)),
}
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def language_model(kind, dtype=torch.float64):
    torch.manual_seed(0)
    return tiny.exact(MODELS[kind]().to(dtype).requires_grad_(False).eval())


def assert_close(actual, expected, tolerance=1e-12, least=0.0):
    """The error is small relative to `expected`, or to `least` if that is larger."""
    assert actual.shape == expected.shape
    scale = max(torch.linalg.vector_norm(expected), least)
    assert torch.linalg.vector_norm(actual - expected) <= tolerance * scale


def assert_same_gradients(actual, expected, inputs, **limits):
    """Two outputs are close, and so are the gradients that any loss of them has."""
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((actual * weight).sum(), inputs)
    references = torch.autograd.grad((expected * weight).sum(), inputs)
    for gradient, reference in zip(gradients, references, strict=True):
        assert_close(gradient, reference, **limits)


class Attention(nn.Module):
    """Stands in for a layer's attention."""

    layer_idx, attention_dropout = 0, 0.0


def attention_of_each_example(query, key, value, prefix, lengths):
    """float[1, T, H, c]: torch's own attention, one example after another."""
    outputs = []
    start = 0
    for length in lengths:
        tokens = slice(start, start + length)
        start += length
        keys = torch.cat([prefix[0][None], key[:, :, tokens]], dim=2)
        values = torch.cat([prefix[1][None], value[:, :, tokens]], dim=2)
        mask = torch.ones(length, keys.shape[2], dtype=torch.bool).tril(prefix[0].shape[1])
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, tokens], keys, values, attn_mask=mask, scale=0.3, enable_gqa=True
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 5), st.sampled_from([(4, 4), (4, 2), (3, 1)]))
def test_attention_is_that_of_each_example_alone(lengths, num_prefix, heads):
    num_heads, num_key_heads = heads
    torch.manual_seed(sum(lengths))
    inputs = []
    for count in (num_heads, num_key_heads, num_key_heads):
        shape = (1, count, sum(lengths), 8)
        inputs.append(torch.randn(shape, dtype=torch.float64, requires_grad=True))
    prefix = torch.randn(2, num_key_heads, num_prefix, 8, dtype=torch.float64).unbind()

    segments = Segments(lengths, [prefix])
    actual, _ = packed_attention(Attention(), *inputs, None, scaling=0.3, segments=segments)
    expected = attention_of_each_example(*inputs, prefix, lengths)
    assert_close(actual, expected)
    # Examples of a single token give the queries no gradient but rounding.
    assert_same_gradients(actual, expected, inputs, least=1.0)


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
    for actual, expected in (
        (fused.rms_norm(norm, hidden), norm(hidden)),
        (fused.swiglu_mlp(mlp, hidden), mlp(hidden)),
        (fused.swiglu_mlp(mlp, hidden, recompute=True), mlp(hidden)),
    ):
        assert_close(actual, expected)
        assert_same_gradients(actual, expected, hidden)


def test_a_machine_that_can_not_compile_is_refused(monkeypatch):
    def compiled(_):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore")

    monkeypatch.setattr(fused, "_compiled", compiled)
    reason = "kernels here (InvalidCxxCompiler: No working C++ compiler found); set compile=false"
    refused(fused.check_compiles, torch.device("cpu"), torch.float32, words=[reason])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_kernels_are_the_plain_ones():
    model = LlamaModel(LlamaConfig(**SHAPE)).requires_grad_(False)
    norm, mlp = model.norm, model.layers[0].mlp
    nn.init.normal_(norm.weight)
    hidden = torch.randn(7, 48, requires_grad=True)
    for actual, expected in (
        (fused.rms_norm(norm, hidden, compiled=True), fused.rms_norm(norm, hidden)),
        (fused.swiglu_mlp(mlp, hidden, compiled=True), fused.swiglu_mlp(mlp, hidden)),
    ):
        assert_close(actual, expected, tolerance=1e-6)
        assert_same_gradients(actual, expected, hidden, tolerance=1e-5)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 5))
def test_cross_entropy_in_chunks(num_labels, chunk_size):
    torch.manual_seed(num_labels)
    head = nn.Linear(6, 11, bias=False, dtype=torch.float64).requires_grad_(False)
    hidden = torch.randn(num_labels, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (num_labels,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vzip.fast.loss.MAX_LOGITS", 11 * chunk_size)
        actual = cross_entropy(head, hidden, targets)

    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    assert_close(actual, expected)
    assert_same_gradients(actual, expected, hidden)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_examples_give_the_stock_models_output(kind, recompute):
    model, lengths, prefix = language_model(kind), [9, 7, 3], [5, 6, 7, 8]
    embeddings = torch.randn(sum(lengths), 48, dtype=torch.float64, requires_grad=True)
    at = torch.tensor([2, 3, 8, 12, 18])
    language = PackedLanguage(model, recompute=recompute)
    segments = Segments(lengths, language.prefixes(prefix, embeddings.device))

    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    actual = language(embeddings, segments, at)
    assert {name: vars(module).get("forward") for name, module in model.named_modules()} == forwards
    assert model.config._attn_implementation == "sdpa"

    before = model.embed_tokens(torch.tensor([prefix]))
    outputs = []
    for example in embeddings.split(lengths):
        output = model(inputs_embeds=torch.cat([before, example[None]], dim=1))
        outputs.append(output.last_hidden_state[0, len(prefix) :])
    expected = torch.cat(outputs)[at]
    assert_close(actual, expected)
    assert_same_gradients(actual, expected, embeddings)


def test_models_that_the_fast_path_does_not_support_are_refused():
    check_language_model(MistralConfig(sliding_window=100), longest=100)
    check_language_model(Qwen2Config(sliding_window=100, use_sliding_window=False), longest=1000)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    check_language_model(LlamaConfig(rope_parameters=dynamic), longest=2048)
    for config, longest, words in (
        (MistralConfig(sliding_window=100), 101, ["100 tokens", "has 101", "engine=reference"]),
        (LlamaConfig(hidden_act="gelu"), 1, ["not 'llama' with 'gelu'"]),
        (LlamaConfig(attention_dropout=0.1), 1, ["attention_dropout=0.1"]),
        (LlamaConfig(rope_parameters=dynamic), 2049, ["rope_type='dynamic'"]),
    ):
        refused(check_language_model, config, longest=longest, words=words)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_flash_attention_is_that_of_blocks(num_key_heads):
    lengths, num_prefix, width = [300, 41, 7], 5, 64
    torch.manual_seed(0)
    counts = (4, num_key_heads, num_key_heads)
    tensors = [torch.randn(1, count, sum(lengths), width).bfloat16() for count in counts]
    prefix = [torch.randn(num_key_heads, num_prefix, width).bfloat16() for _ in range(2)]
    weight = torch.randn(1, sum(lengths), 4, width).bfloat16()

    results = []
    for to in ({"device": "cpu", "dtype": torch.float64}, {"device": "cuda", "dtype": torch.bfloat16}):
        inputs = [tensor.to(**to).requires_grad_() for tensor in tensors]
        segments = Segments(lengths, [tuple(tensor.to(**to) for tensor in prefix)])
        mixed, _ = packed_attention(Attention(), *inputs, None, scaling=0.125, segments=segments)
        gradients = torch.autograd.grad((mixed * weight.to(**to)).sum(), inputs)
        results.append([tensor.double().cpu() for tensor in (mixed, *gradients)])

    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected, tolerance=1e-2)
