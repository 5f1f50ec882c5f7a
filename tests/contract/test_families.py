"""What every family adapter and reducer promises, held against tiny models of every family and every vision tower."""

import copy
import functools
import hashlib
import importlib
import inspect
import pkgutil

import pytest
import torch
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vzip
from tests.helpers import tiny
from vzip import UserError
from vzip.families import Family
from vzip.families.base import Family as Base
from vzip.reducers.base import Reducer
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip

KINDS = list(tiny.KINDS)
LLAVA = [kind for kind in KINDS if tiny.KINDS[kind][0] == "llava"]
BUDGET = {"dominant": 4, "contextual": 2}
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return tiny.llava(kind)


@pytest.fixture
def processor(kind):
    return tiny.processor(kind)


TEXTS = ["<image>a<image>bc", "no picture", "de<image>"]
SIZES = [(tiny.SIDE, tiny.SIDE), (40, 90), (150, 60)]


def batch(processor, texts=TEXTS, side="right"):
    """Rows with pictures of their own, of mixed sizes, padded."""
    numbers = iter(range(100))
    rows = [
        [tiny.picture(number := next(numbers), *SIZES[number % 3]) for _ in range(text.count("<image>"))]
        for text in texts
    ]
    pictures = [row for row in rows if row] or None
    made = processor(images=pictures, text=texts, padding=True, padding_side=side, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask")} | tiny.media_arguments(
        "image", made
    )


def images_of(inputs, row, texts=TEXTS):
    """The model's inputs for the pictures of one row of `batch`."""
    counts = [text.count("<image>") for text in texts]
    mine = slice(sum(counts[:row]), sum(counts[: row + 1]))
    if not counts[row]:
        return {}
    found = {
        name: inputs[name][mine]
        for name in ("pixel_values", "pixel_values_images", "image_sizes")
        if name in inputs
    }
    return found | ({"batch_num_images": torch.tensor([counts[row]])} if "batch_num_images" in inputs else {})


def token_counts(handle, texts=TEXTS):
    """Placeholders of the rows of `batch`."""
    numbers, counts = iter(range(100)), []
    for text in texts:
        sizes = [SIZES[next(numbers) % 3] for _ in range(text.count("<image>"))]
        single = handle.family.model_type == "llava_onevision" and len(sizes) > 1
        tile = handle.family.num_tile_tokens(handle.reducer) + 1
        counts.append(sum(tile if single else handle.num_image_tokens(size) for size in sizes))
    return counts


def logits(model, inputs, **keywords):
    with torch.no_grad():
        return model(**inputs, **keywords).logits


def with_labels(inputs):
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def in_precision(inputs, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def marks(model):
    """Every hook, and every attribute that hides one of its class."""
    found = []
    for name, part in model.named_modules():
        found += [
            (name, key)
            for key in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            for _ in vars(part)[key]
        ]
        found += [(name, key) for key in vars(part) if callable(vars(part)[key]) and hasattr(type(part), key)]
    return found


def digests(model, *, without):
    """sha256 of every parameter and buffer but the named module's."""
    return {
        name: hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if not name.startswith(without)
    }


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


# The identity reducer, and coming back


@pytest.mark.parametrize("shape", [{}, {"grid": 3}, {"grid": 5}, {"layers": 2}, {"layers": 6}], ids=str)
def test_identity_is_the_plain_model_bit_for_bit(kind, shape):
    model, processor = tiny.llava(kind, **shape), tiny.processor(kind, grid=shape.get("grid", tiny.GRID))
    inputs = batch(processor)
    with torch.no_grad():
        plain = model(**with_labels(inputs))
        handle = vzip.attach(model, reducer=Identity())
        reduced = batch(handle.processor(processor))
        assert torch.equal(reduced["input_ids"], inputs["input_ids"])
        answer = model(**with_labels(reduced))
    assert torch.equal(answer.logits, plain.logits)
    assert torch.equal(answer.loss, plain.loss)
    assert torch.equal(answer.image_hidden_states, plain.image_hidden_states)


@pytest.mark.parametrize("tower", LLAVA)
@pytest.mark.parametrize(
    ("feature_layer", "strategy"), [(-1, "default"), (1, "default"), (-2, "full"), (3, "full")]
)
def test_identity_follows_the_models_layer_and_selection(tower, feature_layer, strategy):
    model, processor = tiny.llava(tower), tiny.processor(tower)
    model.config.vision_feature_layer = feature_layer
    model.config.vision_feature_select_strategy = processor.vision_feature_select_strategy = strategy
    inputs = batch(processor)
    plain = logits(model, inputs)
    handle = vzip.attach(model, reducer=Identity())
    assert torch.equal(batch(handle.processor(processor))["input_ids"], inputs["input_ids"])
    assert torch.equal(logits(model, inputs), plain)


def test_identity_trains_as_the_plain_model_does(model, processor):
    inputs, projector = with_labels(batch(processor)), model.model.multi_modal_projector

    def gradients():
        model.zero_grad()
        model(**inputs).loss.backward()
        return [parameter.grad.clone() for parameter in projector.parameters()]

    plain = gradients()
    vzip.attach(model, reducer=Identity())
    assert all(torch.equal(a, b) for a, b in zip(gradients(), plain, strict=True))


def test_detach_restores_the_model(model, processor):
    inputs = batch(processor)
    plain, keys, marked = logits(model, inputs), list(model.state_dict()), marks(model)
    handle = vzip.attach(model, **BUDGET)
    logits(model, batch(handle.processor(processor)))
    handle.detach()
    assert torch.equal(logits(model, inputs), plain)
    assert list(model.state_dict()) == keys
    assert not {"get_image_features", "get_video_features"} & set(vars(model.model))
    assert marks(model) == marked


def test_the_context_manager_detaches_also_after_an_error(model, processor):
    inputs = batch(processor)
    plain = logits(model, inputs)
    with vzip.attach(model, **BUDGET) as handle:
        assert handle.num_image_tokens() == 6 * handle.family.num_tiles((2 * tiny.SIDE, 2 * tiny.SIDE))
        assert logits(model, batch(handle.processor(processor))).shape[1] < plain.shape[1]
    assert torch.equal(logits(model, inputs), plain)
    with pytest.raises(ZeroDivisionError):
        with vzip.attach(model, **BUDGET):
            raise ZeroDivisionError
    assert torch.equal(logits(model, inputs), plain)


def test_detaching_twice_is_harmless():
    model = tiny.llava()
    with vzip.attach(model, **BUDGET) as handle:
        handle.detach()
    handle.detach()
    assert "get_image_features" not in vars(model.model)


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
    assert torch.equal(logits(model, inputs), before)  # the first one is still in place
    handle.detach()
    vzip.attach(model, dominant=7, contextual=1).detach()


# Instances, never classes


def test_models_in_one_process_do_not_see_each_other(kind, processor):
    """One unreduced, and two reduced with different budgets."""
    models = [tiny.llava(kind) for _ in range(3)]
    inputs = batch(processor)
    plain = logits(models[2], inputs)
    handles = [vzip.attach(models[0], **BUDGET), vzip.attach(models[1], dominant=9, contextual=1)]
    for model, handle in zip(models[:2], handles, strict=True):
        rows = batch(handle.processor(processor))
        assert (rows["input_ids"] == model.config.image_token_id).sum(dim=1).tolist() == token_counts(handle)
        assert logits(model, rows).isfinite().all()
    assert torch.equal(logits(models[2], inputs), plain)
    handles[0].detach()
    assert torch.equal(logits(models[0], inputs), plain)
    assert logits(models[1], batch(handles[1].processor(processor))).isfinite().all()


def test_a_deep_copy_is_whole(model, processor):
    handle = vzip.attach(model, **BUDGET)
    inputs = batch(handle.processor(processor))
    before = logits(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, inputs), before)
    with torch.no_grad():
        twin.model.multi_modal_projector.linear_2.weight.add_(1)
    assert torch.equal(logits(model, inputs), before)
    assert not torch.equal(logits(twin, inputs), before)
    changed = logits(twin, inputs)
    with torch.no_grad():
        for parameter in vzip.families.family_of(twin).tower.parameters():
            parameter.mul_(-1)
    assert not torch.equal(logits(twin, inputs), changed)  # it has a tower of its own too
    assert torch.equal(logits(model, inputs), before)
    changed = logits(twin, inputs)
    handle.detach()
    assert torch.equal(logits(twin, inputs), changed)


# Rows, processors, generation


@pytest.mark.parametrize("shape", [{}, {"grid": 3}, {"grid": 5}, {"layers": 2}, {"layers": 6}], ids=str)
def test_a_batch_is_its_rows_one_by_one(kind, shape):
    model, processor = tiny.llava(kind, **shape), tiny.processor(kind, grid=shape.get("grid", tiny.GRID))
    handle = vzip.attach(model, **BUDGET)
    inputs = batch(handle.processor(processor))
    together = logits(model, inputs)
    for row in range(len(TEXTS)):
        kept = inputs["attention_mask"][row].bool()
        alone = {"input_ids": inputs["input_ids"][row : row + 1, kept], **images_of(inputs, row)}
        torch.testing.assert_close(logits(model, alone)[0], together[row, kept], rtol=1e-4, atol=1e-5)


def test_the_pictures_are_used(model, processor):
    handle = vzip.attach(model, **BUDGET)
    inputs = batch(handle.processor(processor))
    before = logits(model, inputs)
    pixels = next(iter(tiny.media_arguments("image", inputs).values()))
    pixels[1] = pixels[0]
    changed = (logits(model, inputs) - before).abs().amax(dim=(1, 2)) > 0
    assert changed.tolist() == [True, False, False]


@pytest.mark.parametrize("kind", LLAVA)
def test_handle_reduces_as_the_model_does(kind):
    model, processor = tiny.llava(kind), tiny.processor(kind)
    handle = vzip.attach(model, **BUDGET)
    inputs = batch(handle.processor(processor))
    with torch.no_grad():
        features = tiny.reduce(handle, inputs["pixel_values"]).features
        assert features.shape == (3, 6, 32)
        want = model(**inputs).image_hidden_states
        assert torch.equal(want, handle.family.projector(features).flatten(0, 1))


def test_the_processor_expands_to_the_reduced_number(model, processor):
    plain = batch(processor)
    handle = vzip.attach(model, **BUDGET)
    reduced = handle.processor(processor)
    ids = batch(reduced)["input_ids"]
    image_id = model.config.image_token_id
    assert (ids == image_id).sum(dim=1).tolist() == token_counts(handle)
    again = batch(processor)  # the original one is as it was
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    sizes = [(20, 30), (tiny.SIDE, tiny.SIDE), (400, 100)]
    counts = [handle.num_image_tokens(size) for size in sizes]
    assert counts == [6 * handle.family.num_tiles(size) for size in sizes]
    if hasattr(type(processor), "_get_num_multimodal_tokens"):  # Video-LLaVA's has none
        assert reduced._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens == counts
        plain_counts = processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
        handle.detach()
        with vzip.attach(model, reducer=Identity()) as full:
            assert plain_counts == [full.num_image_tokens(size) for size in sizes]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in tiny.VIDEO])
def test_a_reduced_processor_can_be_saved(kind, tmp_path):
    model, processor = tiny.llava(kind), tiny.processor(kind)
    plain = batch(processor)
    reduced = vzip.attach(model, **BUDGET).processor(processor)
    reduced.save_pretrained(tmp_path / "reduced")
    processor.save_pretrained(tmp_path / "plain")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "reduced" / file.name).read_bytes() == file.read_bytes()
    again = batch(AutoProcessor.from_pretrained(tmp_path / "reduced"))
    assert torch.equal(again["input_ids"], plain["input_ids"])


def test_one_processor_serves_several_budgets(processor, kind):
    for handle in [vzip.attach(tiny.llava(kind), dominant=dominant, contextual=1) for dominant in (3, 7)]:
        ids = batch(handle.processor(processor))["input_ids"]
        assert (ids == processor.image_token_id).sum(dim=1).tolist() == token_counts(handle)


def test_greedy_generation_of_a_batch_is_row_by_row(model, processor):
    reduced = vzip.attach(model, **BUDGET).processor(processor)
    texts = ["<image>a<image>bc", "de<image>"]
    inputs = batch(reduced, texts, side="left")
    together = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    for row in range(2):
        kept = inputs["attention_mask"][row].bool()
        ids = inputs["input_ids"][row : row + 1, kept]
        alone = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **images_of(inputs, row, texts), **GREEDY
        )
        assert torch.equal(alone[0, ids.shape[1] :], together[row])
    assert len(set(together.flatten().tolist())) > 2  # not the one token that a broken model repeats


def test_generation_is_forward_repeated(model, processor):
    reduced = vzip.attach(model, **BUDGET).processor(processor)
    inputs = batch(reduced, ["<image>abc"])
    answer = model.generate(**inputs, **GREEDY)
    ids = inputs["input_ids"]
    for _ in range(GREEDY["max_new_tokens"]):
        scores = logits(model, {"input_ids": ids, **images_of(inputs, 0, ["<image>abc"])})[:, -1]
        scores[:, model.generation_config.eos_token_id or tiny.SPECIAL.index("</s>")] = -torch.inf
        ids = torch.cat([ids, scores.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(answer, ids)


def test_a_second_turn_reuses_the_cache_and_not_the_tower(model, processor):
    reduced = vzip.attach(model, **BUDGET).processor(processor)
    inputs = batch(reduced, ["<image>abc"])
    calls = count_calls(vzip.families.family_of(model).tower)
    first = model.generate(**inputs, **GREEDY, use_cache=True, return_dict_in_generate=True)
    assert len(calls) == 1
    question = reduced.tokenizer("and now?", return_tensors="pt")["input_ids"]
    ids = torch.cat([first.sequences, question], dim=1)
    second = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values, **GREEDY
    )
    assert len(calls) == 1  # still: the picture lives in the cache
    images = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    scratch = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **images, **GREEDY)
    assert torch.equal(second, scratch)


@pytest.mark.parametrize("kind", KINDS)
def test_several_samples_of_a_row(kind):
    model, processor = tiny.llava(kind), tiny.processor(kind)
    reduced = vzip.attach(model, **BUDGET).processor(processor)
    inputs = batch(reduced, ["<image>a<image>bc", "de<image>"], side="left")
    sampling = {**GREEDY, "do_sample": True, "num_return_sequences": 2}
    assert model.generate(**inputs, **sampling).shape == (4, inputs["input_ids"].shape[1] + 8)
    certain = model.generate(**inputs, **sampling, top_k=1)  # leaves nothing to chance
    assert torch.equal(certain, model.generate(**inputs, **GREEDY).repeat_interleave(2, dim=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_run_with_a_float32_projector(kind, processor, dtype):
    model = tiny.llava(kind, dtype=dtype)
    model.model.multi_modal_projector.float()
    handle = vzip.attach(model, **BUDGET)
    inputs = with_labels(batch(handle.processor(processor)))
    inputs = in_precision(inputs, dtype)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    answer = model(**inputs)
    answer.loss.backward()
    assert answer.logits.dtype == dtype and answer.logits.isfinite().all()
    for parameter in model.model.multi_modal_projector.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().sum() > 0
    exact = tiny.llava(kind)
    exact.load_state_dict(model.state_dict())
    vzip.attach(exact, **BUDGET)
    assert abs(exact(**in_precision(inputs, torch.float32)).loss - answer.loss) < 0.02


def test_gradient_checkpointing_changes_nothing(model, processor):
    handle = vzip.attach(model, **BUDGET)
    inputs, projector = with_labels(batch(handle.processor(processor))), model.model.multi_modal_projector
    model.requires_grad_(False)
    projector.requires_grad_(True)

    def gradients():
        model.zero_grad()
        model(**inputs).loss.backward()
        return [parameter.grad.clone() for parameter in projector.parameters()]

    plain = gradients()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b)


def test_training_changes_the_projector_alone(model, processor):
    handle = vzip.attach(model, **BUDGET)
    name, projector = handle.family.projector_name, handle.family.projector
    model.requires_grad_(False)
    projector.requires_grad_(True)
    model.train()
    before = digests(model, without=name)
    start = [parameter.detach().clone() for parameter in projector.parameters()]
    inputs = with_labels(batch(handle.processor(processor)))
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(torch.equal(a, b) for a, b in zip(projector.parameters(), start, strict=True))
    assert digests(model, without=name) == before
    assert all(name in key for key in set(digests(model, without="nothing")) - set(before))


@pytest.mark.parametrize("reducer", [Identity(), Random(budget=5)], ids=repr)
def test_other_reducers_attach_alike(model, processor, reducer):
    handle = vzip.attach(model, reducer=reducer)
    inputs = batch(handle.processor(processor))
    assert (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist() == token_counts(handle)
    assert logits(model, inputs).isfinite().all()


def test_a_budget_is_split_at_the_papers_ratio(model):
    tiles = vzip.families.family_of(model).budget_tiles
    handle = vzip.attach(model, budget=13 * tiles)
    assert (handle.reducer.dominant, handle.reducer.contextual) == (11, 2)
    assert handle.num_image_tokens() == 13 * handle.family.num_tiles((2 * tiny.SIDE, 2 * tiny.SIDE))


# Refusals, before any work


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"reducer": VisionZip(budget=18)}, ["budget=18", "at most"]),
        ({"dominant": 10, "contextual": 20}, ["budget=30", "10 dominant", "20 contextual"]),
        ({"reducer": Random(budget=17)}, ["budget=17", "16 patches"]),
        ({}, ["reducer.budget"]),
        ({"budget": 6, "reducer": Identity()}, ["not both"]),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused_at_attach(model, settings, words):
    calls, marked = count_calls(vzip.families.family_of(model).tower), marks(model)
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


def test_rows_with_too_many_placeholders_are_not_filled_silently(model, processor):
    vzip.attach(model, **BUDGET)
    with pytest.raises(ValueError, match="do not match"):
        logits(model, batch(processor))


# The seam in transformers


def test_the_seam_is_where_the_family_expects_it(model, processor):
    """forward, and generate, take features from the instance's `get_image_features().pooler_output`."""
    inputs = batch(processor, ["<image>a", "de<image>"], side="left")
    inner, calls = model.model, []
    plain = type(inner).get_image_features

    @functools.wraps(plain)
    def replaced(*args, **kwargs):
        output = plain(inner, *args, **kwargs)
        marked = [torch.randn_like(part) for part in output.pooler_output]
        calls.append(torch.cat(marked))
        return BaseModelOutputWithPooling(
            pooler_output=type(output.pooler_output)(marked)
            if isinstance(output.pooler_output, list | tuple)
            else torch.stack(marked)
        )

    inner.get_image_features = replaced
    with torch.no_grad():
        answer = model(**inputs)
    moved = f"{type(inner).__name__} no longer goes through its get_image_features: its file in vzip/families must follow"
    assert len(calls) == 1, moved
    assert torch.equal(answer.image_hidden_states.reshape_as(calls[0]), calls[0]), moved
    model.generate(**inputs, **GREEDY)
    assert len(calls) == 2, moved


def test_what_generate_reads_of_the_replaced_methods_is_unchanged(model):
    """generate() passes on what `inspect.signature` of the method names, and takes those arguments out of the others."""
    methods = vzip.families.family_of(model).patched_methods
    plain = {name: inspect.signature(getattr(model.model, name)) for name in methods}
    vzip.attach(model, **BUDGET)
    assert {name: inspect.signature(getattr(model.model, name)) for name in methods} == plain


def test_the_parts_of_the_model_are_where_the_family_expects_them(model):
    family = vzip.families.family_of(model)
    assert family.num_layers_run(Identity()) == tiny.LAYERS - 1
    assert family.projector is model.get_submodule(family.projector_name)
    assert family.language_model is model.model.language_model and family.lm_head is model.lm_head
    parts = [*family.frozen_parts.values(), family.projector, family.language_model, family.lm_head]
    held = [id(parameter) for part in parts for parameter in part.parameters()]
    left = {name for name, parameter in model.named_parameters() if id(parameter) not in held}
    assert len(held) == len(set(held)) and left <= {"model.image_newline"}


# What is on disk


def modules(package):
    return [
        (entry.name, importlib.import_module(f"{package.__name__}.{entry.name}"))
        for entry in pkgutil.iter_modules(package.__path__)
        if entry.name not in ("base", "anyres", "features")
    ]


def own_classes(module):
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]


def inner_class(cls):
    """The class of the module that the seams are on."""
    kind = next(kind for kind, (model_type, *_) in tiny.KINDS.items() if model_type == cls.model_type)
    return type(tiny.llava(kind).model)


def overrides(cls, base):
    """Public members of the protocol or base class that the class, or a parent other than the base, defines."""
    names = [name for name in vars(base) if not name.startswith("_")] + list(
        vars(base).get("__annotations__", {})
    )
    parents = [parent for parent in cls.__mro__ if parent not in (base, object)]
    defined = set().union(
        *(vars(parent).keys() | inspect.get_annotations(parent).keys() for parent in parents)
    )
    return {name: name in defined for name in names}


@pytest.mark.parametrize(
    ("name", "module"), modules(vzip.reducers), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_reducer_on_disk_is_one(name, module):
    (cls,) = [value for value in own_classes(module) if hasattr(value, "name")]
    assert cls.name == name
    assert isinstance(cls.uses_attention, bool)
    assert all(overrides(cls, Reducer).values()), overrides(cls, Reducer)
    assert inspect.signature(cls.num_tokens) == inspect.signature(Reducer.num_tokens)
    assert inspect.signature(cls.__call__) == inspect.signature(Reducer.__call__)
    assert inspect.signature(cls.settings) == inspect.signature(Reducer.settings)
    parameters = inspect.signature(cls).parameters.values()
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)
    assert name in vzip.reducers.names()


@pytest.mark.parametrize(
    ("name", "module"), modules(vzip.families), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_family_on_disk_is_one(name, module):
    classes = [value for value in own_classes(module) if issubclass(value, Family)]
    assert classes, f"vzip/families/{name}.py defines no family"
    for cls in classes:
        assert not [name for name in ("model_type", "model_class") if not overrides(cls, Base)[name]]
        assert all(hasattr(inner_class(cls), name) for name in cls(None).patched_methods)
        assert vzip.families.families()[cls.model_type] is cls
        assert cls.model_type in {kind for kind, *_ in tiny.KINDS.values()}, (
            "tests/helpers/tiny.py has no model of this family"
        )


def test_no_two_families_take_the_same_model():
    kinds = [
        cls.model_type
        for _, module in modules(vzip.families)
        for cls in own_classes(module)
        if issubclass(cls, Family)
    ]
    assert len(kinds) == len(set(kinds))
