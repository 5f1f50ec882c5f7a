"""What every family promises, held against tiny models of every family and every vision tower."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import vzip
from tests.helpers import tiny
from tests.helpers.models import (
    GREEDY,
    count_calls,
    digests,
    logits,
    marks,
    projector_gradients,
    train_projector,
    with_labels,
)
from vzip import UserError
from vzip.families import families, family_of
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip

pytestmark = pytest.mark.slow

KINDS = list(tiny.KINDS)
LLAVA = [kind for kind in KINDS if tiny.KINDS[kind][0] == "llava"]
BUDGET = {"dominant": 4, "contextual": 2}
SHAPES = [{}, {"grid": 3}, {"grid": 5}, {"layers": 2}, {"layers": 6}]

TEXTS = ["<image>a<image>bc", "no picture", "de<image>"]
SIZES = [(tiny.SIDE, tiny.SIDE), (40, 90), (150, 60)]
TILES = [1, 3, 4]
"""Tiles of pictures of these sizes, for models that put the tiles of all pictures in one list."""


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return tiny.llava(kind)


@pytest.fixture
def processor(kind):
    return tiny.processor(kind)


def batch(processor, texts=TEXTS, side="right"):
    """Padded examples, whose pictures have different sizes."""
    pictures, number = [], 0
    for text in texts:
        of_text = []
        for _ in range(text.count("<image>")):
            of_text.append(tiny.picture(number, *SIZES[number % 3]))
            number += 1
        if of_text:
            pictures.append(of_text)

    processed = processor(
        images=pictures or None, text=texts, padding=True, padding_side=side, return_tensors="pt"
    )
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    inputs = {name: processed[name] for name in names if name in processed}
    return inputs | tiny.media_arguments("image", processed)


def example(inputs, row, texts=TEXTS):
    """The inputs of one example of a batch, without padding."""
    mask = inputs["attention_mask"][row].bool()
    alone = {"input_ids": inputs["input_ids"][row : row + 1, mask]}
    if "mm_token_type_ids" in inputs:
        alone["mm_token_type_ids"] = inputs["mm_token_type_ids"][row : row + 1, mask]

    counts = [text.count("<image>") for text in texts]
    first = sum(counts[:row])
    if counts[row]:
        own = slice(first, first + counts[row])
        for name in ("pixel_values", "pixel_values_images", "image_sizes", "image_grid_thw"):
            if name in inputs:
                alone[name] = inputs[name][own]
        tiles = [TILES[number % 3] for number in range(sum(counts))]
        if "pixel_values" in inputs and len(inputs["pixel_values"]) == sum(tiles):
            alone["pixel_values"] = torch.cat(inputs["pixel_values"].split(tiles)[own])
        if "image_grid_thw" in inputs:
            # All patches lie one behind the other.
            num_patches = inputs["image_grid_thw"].prod(dim=1).tolist()
            alone["pixel_values"] = torch.cat(inputs["pixel_values"].split(num_patches)[own])
        if "batch_num_images" in inputs:
            alone["batch_num_images"] = torch.tensor([counts[row]])
    return alone


def num_placeholders(inputs, model):
    return (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()


def expected_placeholders(handle, texts=TEXTS):
    """Placeholders of the examples of a batch, by what the handle says of each picture."""
    counts, number = [], 0
    for text in texts:
        num_images = text.count("<image>")
        total = 0
        for _ in range(num_images):
            if handle.family.model_type == "llava_onevision" and num_images > 1:
                # Several images of an example are not cut into tiles.
                total += handle.family.num_tile_tokens(handle.reducer) + 1
            else:
                total += handle.num_image_tokens(SIZES[number % 3])
            number += 1
        counts.append(total)
    return counts


def in_precision(inputs, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


# ---- The identity reducer, and detaching ----


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_identity_is_the_plain_model_bit_for_bit(kind, shape):
    model = tiny.llava(kind, **shape)
    processor = tiny.processor(kind, grid=shape.get("grid", tiny.GRID))
    inputs = batch(processor)
    with torch.no_grad():
        plain = model(**with_labels(inputs))
        handle = vzip.attach(model, reducer=Identity())
        same_inputs = batch(handle.processor(processor))
        assert torch.equal(same_inputs["input_ids"], inputs["input_ids"])
        output = model(**with_labels(same_inputs))
    assert torch.equal(output.logits, plain.logits)
    assert torch.equal(output.loss, plain.loss)
    if hasattr(plain, "image_hidden_states"):
        assert torch.equal(output.image_hidden_states, plain.image_hidden_states)


@pytest.mark.parametrize("kind", LLAVA)
@pytest.mark.parametrize(
    ("feature_layer", "strategy"), [(-1, "default"), (1, "default"), (-2, "full"), (3, "full")]
)
def test_identity_follows_the_layer_and_the_strategy_of_the_model(kind, feature_layer, strategy):
    model, processor = tiny.llava(kind), tiny.processor(kind)
    model.config.vision_feature_layer = feature_layer
    model.config.vision_feature_select_strategy = processor.vision_feature_select_strategy = strategy
    inputs = batch(processor)
    plain = logits(model, inputs)
    handle = vzip.attach(model, reducer=Identity())
    assert torch.equal(batch(handle.processor(processor))["input_ids"], inputs["input_ids"])
    assert torch.equal(logits(model, inputs), plain)


def test_identity_has_the_gradients_of_the_plain_model(model, processor):
    inputs = with_labels(batch(processor))
    plain = projector_gradients(model, inputs)
    vzip.attach(model, reducer=Identity())
    for gradient, wanted in zip(projector_gradients(model, inputs), plain, strict=True):
        assert torch.equal(gradient, wanted)


def test_a_model_is_restored_by_detaching_and_by_leaving_the_block(model, processor):
    inputs = batch(processor)
    plain = logits(model, inputs)
    keys, marked = list(model.state_dict()), marks(model)

    def assert_restored():
        assert torch.equal(logits(model, inputs), plain)
        assert list(model.state_dict()) == keys
        assert not {"get_image_features", "get_video_features"} & set(vars(model.model))
        assert marks(model) == marked

    with vzip.attach(model, **BUDGET) as handle:
        assert logits(model, batch(handle.processor(processor))).shape[1] < plain.shape[1]
        handle.detach()
        assert_restored()
    assert_restored()  # detaching twice is harmless
    with pytest.raises(ZeroDivisionError), vzip.attach(model, **BUDGET):
        raise ZeroDivisionError
    assert_restored()


def test_an_old_handle_does_not_detach_a_new_reducer():
    model = tiny.llava()
    old = vzip.attach(model, **BUDGET)
    old.detach()
    vzip.attach(model, **BUDGET)
    old.detach()
    assert "get_image_features" in vars(model.model)


def test_attaching_twice_is_refused(model, processor):
    handle = vzip.attach(model, **BUDGET)
    inputs = batch(handle.processor(processor))
    before = logits(model, inputs)
    with pytest.raises(UserError, match=r"attached to this model already.*detach"):
        vzip.attach(model, dominant=7, contextual=1)
    assert torch.equal(logits(model, inputs), before)  # the first reducer is still in place
    handle.detach()
    vzip.attach(model, dominant=7, contextual=1).detach()


# ---- Instances, never classes ----


def test_models_in_one_process_do_not_see_each_other(kind, processor):
    """One model is not reduced, two are reduced to different budgets."""
    plain_model, first, second = (tiny.llava(kind) for _ in range(3))
    inputs = batch(processor)
    plain = logits(plain_model, inputs)
    handles = [vzip.attach(first, **BUDGET), vzip.attach(second, dominant=9, contextual=1)]
    for model, handle in zip((first, second), handles, strict=True):
        reduced = batch(handle.processor(processor))
        assert num_placeholders(reduced, model) == expected_placeholders(handle)
        assert logits(model, reduced).isfinite().all()
    assert torch.equal(logits(plain_model, inputs), plain)
    handles[0].detach()
    assert torch.equal(logits(first, inputs), plain)
    assert logits(second, batch(handles[1].processor(processor))).isfinite().all()


def test_a_deep_copy_is_whole(model, processor):
    handle = vzip.attach(model, **BUDGET)
    inputs = batch(handle.processor(processor))
    before = logits(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, inputs), before)

    # The copy has a projector and a tower of its own.
    with torch.no_grad():
        next(family_of(twin).projector.parameters()).mul_(-1)
    changed = logits(twin, inputs)
    assert not torch.equal(changed, before)
    with torch.no_grad():
        for parameter in family_of(twin).tower.parameters():
            parameter.mul_(-1)
    assert not torch.equal(logits(twin, inputs), changed)
    assert torch.equal(logits(model, inputs), before)

    changed = logits(twin, inputs)
    handle.detach()
    assert torch.equal(logits(twin, inputs), changed)


# ---- Batches and processors ----


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_batch_is_its_examples_one_by_one(kind, shape):
    model = tiny.llava(kind, **shape)
    processor = tiny.processor(kind, grid=shape.get("grid", tiny.GRID))
    handle = vzip.attach(model, **BUDGET)
    inputs = batch(handle.processor(processor))
    together = logits(model, inputs)
    for row in range(len(TEXTS)):
        mask = inputs["attention_mask"][row].bool()
        alone = logits(model, example(inputs, row))[0]
        torch.testing.assert_close(alone, together[row, mask], rtol=1e-4, atol=1e-5)


def test_the_pictures_are_used(model, processor):
    handle = vzip.attach(model, **BUDGET)
    inputs = batch(handle.processor(processor))
    before = logits(model, inputs)
    pixels = next(value for name, value in inputs.items() if name.startswith("pixel_values"))
    pixels[1] = pixels[0]
    changed = (logits(model, inputs) - before).abs().amax(dim=(1, 2)) > 0
    assert changed.tolist() == [True, False, False]


@pytest.mark.parametrize("kind", LLAVA)
def test_the_model_projects_the_reduced_tokens(kind):
    model, processor = tiny.llava(kind), tiny.processor(kind)
    handle = vzip.attach(model, **BUDGET)
    inputs = batch(handle.processor(processor))
    with torch.no_grad():
        features = tiny.reduce(handle, inputs["pixel_values"]).features
        assert features.shape == (3, 6, 32)
        projected = handle.family.projector(features).flatten(0, 1)
        assert torch.equal(model(**inputs).image_hidden_states, projected)


@pytest.mark.parametrize(
    "settings",
    [BUDGET, {"dominant": 7, "contextual": 1}, {"reducer": Identity()}, {"reducer": Random(budget=5)}],
    ids=str,
)
def test_the_processor_expands_to_the_reduced_number(model, processor, settings):
    plain = batch(processor)
    with vzip.attach(model, **settings) as handle:
        reduced = handle.processor(processor)
        inputs = batch(reduced)
        assert num_placeholders(inputs, model) == expected_placeholders(handle)
        assert logits(model, inputs).isfinite().all()

        sizes = [(20, 30), (tiny.SIDE, tiny.SIDE), (400, 100)]
        counts = [handle.num_image_tokens(size) + handle.family.num_around_image for size in sizes]
        if hasattr(type(processor), "_get_num_multimodal_tokens"):  # Video-LLaVA's has none
            assert reduced._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens == counts
            plain_counts = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
            assert (plain_counts == counts) == isinstance(handle.reducer, Identity)

    # The original processor is unchanged.
    again = batch(processor)
    assert all(torch.equal(again[name], plain[name]) for name in plain)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (*tiny.VIDEO, *tiny.NATIVE)])
def test_a_reduced_processor_is_saved_as_the_original_one(kind, tmp_path):
    processor = tiny.processor(kind)
    model = tiny.llava(kind)
    reduced = vzip.attach(model, **BUDGET).processor(processor)
    reduced.save_pretrained(tmp_path / "reduced")
    processor.save_pretrained(tmp_path / "plain")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "reduced" / file.name).read_bytes() == file.read_bytes()

    # A folder is opened by its config, which says whose layout it has.
    model.config.save_pretrained(tmp_path / "reduced")
    again = batch(families()[tiny.KINDS[kind][0]].load_processor(str(tmp_path / "reduced")))
    assert torch.equal(again["input_ids"], batch(processor)["input_ids"])


def test_a_budget_is_split_at_the_ratio_of_the_paper(model):
    tiles = family_of(model).budget_tiles
    handle = vzip.attach(model, budget=13 * tiles)
    assert (handle.reducer.dominant, handle.reducer.contextual) == (11, 2)
    assert handle.num_image_tokens() == 13 * handle.family.num_tiles((2 * tiny.SIDE, 2 * tiny.SIDE))


# ---- Generation ----


def test_generation_of_a_batch_is_that_of_its_examples(model, processor):
    reduced = vzip.attach(model, **BUDGET).processor(processor)
    texts = ["<image>a<image>bc", "de<image>"]
    inputs = batch(reduced, texts, side="left")
    length = inputs["input_ids"].shape[1]
    together = model.generate(**inputs, **GREEDY)
    for row in range(2):
        alone = example(inputs, row, texts)
        mask = torch.ones_like(alone["input_ids"])
        answer = model.generate(**alone, attention_mask=mask, **GREEDY)
        assert torch.equal(answer[0, alone["input_ids"].shape[1] :], together[row, length:])
    # A broken model would repeat a single token.
    assert len(set(together[:, length:].flatten().tolist())) > 2

    # Several samples of each example; top_k=1 leaves nothing to chance.
    sampling = {**GREEDY, "do_sample": True, "num_return_sequences": 2}
    assert model.generate(**inputs, **sampling).shape == (4, length + 8)
    certain = model.generate(**inputs, **sampling, top_k=1)
    assert torch.equal(certain, together.repeat_interleave(2, dim=0))


def test_generation_is_forward_repeated(model, processor):
    reduced = vzip.attach(model, **BUDGET).processor(processor)
    inputs = batch(reduced, ["<image>abc"])
    alone = example(inputs, 0, ["<image>abc"])
    for _ in range(GREEDY["max_new_tokens"]):
        scores = logits(model, alone)[:, -1]
        scores[:, model.generation_config.eos_token_id or tiny.SPECIAL.index("</s>")] = -torch.inf
        alone["input_ids"] = torch.cat([alone["input_ids"], scores.argmax(dim=-1, keepdim=True)], dim=1)
        if "mm_token_type_ids" in alone:
            alone["mm_token_type_ids"] = F.pad(alone["mm_token_type_ids"], (0, 1))
    assert torch.equal(model.generate(**inputs, **GREEDY), alone["input_ids"])


def test_a_second_turn_reuses_the_cache_and_not_the_tower(model, processor):
    reduced = vzip.attach(model, **BUDGET).processor(processor)
    inputs = batch(reduced, ["<image>abc"])
    calls = count_calls(family_of(model).tower)
    first = model.generate(**inputs, **GREEDY, use_cache=True, return_dict_in_generate=True)
    assert len(calls) == 1

    question = reduced.tokenizer("and now?", return_tensors="pt")["input_ids"]
    ids = torch.cat([first.sequences, question], dim=1)
    both_turns = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    second = model.generate(**both_turns, past_key_values=first.past_key_values, **GREEDY)
    assert len(calls) == 1  # the cache holds the picture

    images = {name: value for name, value in inputs.items() if name not in both_turns}
    assert torch.equal(second, model.generate(**both_turns, **images, **GREEDY))


# ---- Training ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_run_with_a_float32_projector(kind, processor, dtype):
    model = tiny.llava(kind, dtype=dtype)
    family_of(model).projector.float()
    handle = vzip.attach(model, **BUDGET)
    inputs = in_precision(with_labels(batch(handle.processor(processor))), dtype)
    model.requires_grad_(False)
    family_of(model).projector.requires_grad_(True)
    output = model(**inputs)
    output.loss.backward()
    assert output.logits.dtype == dtype and output.logits.isfinite().all()
    for parameter in family_of(model).projector.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().sum() > 0

    exact = tiny.llava(kind)
    exact.load_state_dict(model.state_dict())
    vzip.attach(exact, **BUDGET)
    assert abs(exact(**in_precision(inputs, torch.float32)).loss - output.loss) < 0.02


def test_gradient_checkpointing_changes_nothing(model, processor):
    handle = vzip.attach(model, **BUDGET)
    inputs = with_labels(batch(handle.processor(processor)))
    model.requires_grad_(False)
    family_of(model).projector.requires_grad_(True)
    plain = projector_gradients(model, inputs)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for gradient, wanted in zip(projector_gradients(model, inputs), plain, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_training_changes_the_projector_alone(model, processor):
    handle = vzip.attach(model, **BUDGET)
    before = digests(model)
    losses = train_projector(model, batch(handle.processor(processor)))
    assert losses[-1] < losses[0]

    after = digests(model)
    changed = {name for name in before if after[name] != before[name]}
    prefixes = handle.family.projector_names
    assert changed == {name for name in before if name.startswith(prefixes)} != set()


# ---- Mistakes, refused before any work ----


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reducer": VisionZip(budget=18)}, ["budget=18", "at most"]),
        ({"dominant": 10, "contextual": 20}, ["budget=30", "10 dominant", "20 contextual", "at most"]),
        ({"reducer": Random(budget=17)}, ["budget=17", "16 patches", "at most"]),
        ({}, ["reducer.budget"]),
        ({"budget": 6, "reducer": Identity()}, ["not both"]),
        ({"dominant": 4, "contextual": 2, "anyres": "x"}, ["anyres='x'", "released, spatial"]),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused_at_attach(kind, model, settings, words):
    if kind in tiny.NATIVE and "at most" in words:
        pytest.skip("a picture of any size may have fewer tokens than the budget, and keeps all of them")
    calls, marked = count_calls(family_of(model).tower), marks(model)
    with pytest.raises(UserError) as error:
        vzip.attach(model, **settings)
    assert all(word in str(error.value) for word in words), error.value
    assert not calls and marks(model) == marked


def llama():
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (llama, "LlamaForCausalLM"),
        (lambda: tiny.llava().model, "LlavaModel"),
        (lambda: torch.nn.Linear(2, 2), "Linear"),
    ],
    ids=["text-only", "inner-model", "no-config"],
)
def test_unsupported_models_are_refused(make, word):
    with pytest.raises(UserError) as error:
        vzip.attach(make(), **BUDGET)
    assert word in str(error.value) and "LlavaForConditionalGeneration" in str(error.value)


@pytest.mark.parametrize("feature_layer", [[-2, -1], 7, 0])
def test_a_feature_layer_that_no_reducer_can_use_is_refused_at_attach(feature_layer):
    model = tiny.llava()
    model.config.vision_feature_layer = feature_layer
    with pytest.raises(UserError, match="vision_feature_layer"):
        vzip.attach(model, **BUDGET)
    assert "get_image_features" not in vars(model.model)


def test_too_many_placeholders_are_not_filled_silently(model, processor):
    vzip.attach(model, **BUDGET)
    with pytest.raises(ValueError, match="do not match"):
        logits(model, batch(processor))
