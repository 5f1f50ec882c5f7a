"""What every family adapter and reducer promises, held against tiny models with every kind of vision tower."""

import copy
import hashlib
import importlib
import inspect
import pkgutil

import pytest
import torch
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vzip
from tests import tiny
from vzip import UserError
from vzip.families import Family
from vzip.families.base import Family as Base
from vzip.reducers.base import Reducer
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random

TOWERS = sorted(tiny.TOWERS)
BUDGET = {"dominant": 4, "contextual": 2}
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=TOWERS)
def tower(request):
    return request.param


@pytest.fixture
def model(tower):
    return tiny.llava(tower)


@pytest.fixture
def processor(tower):
    return tiny.processor(tower)


TEXTS = ["<image>a<image>bc", "no picture", "de<image>"]


def batch(processor, texts=TEXTS, side="right"):
    """Rows with pictures of their own, padded."""
    pictures, numbers = [], iter(range(100))
    for text in texts:
        pictures.append([tiny.picture(next(numbers)) for _ in range(text.count("<image>"))])
    flat = [picture for row in pictures for picture in row] or None
    return processor(images=flat, text=texts, padding=True, padding_side=side, return_tensors="pt")


def logits(model, inputs, **keywords):
    with torch.no_grad():
        return model(**inputs, **keywords).logits


def with_labels(inputs):
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def marks(model):
    """Every hook, and every attribute that hides one of its class."""
    found = []
    for name, part in model.named_modules():
        found += [(name, key) for key in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks") for _ in vars(part)[key]]
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
def test_identity_is_the_plain_model_bit_for_bit(tower, shape):
    model, processor = tiny.llava(tower, **shape), tiny.processor(tower, grid=shape.get("grid", tiny.GRID))
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


@pytest.mark.parametrize(("feature_layer", "strategy"), [(-1, "default"), (1, "default"), (-2, "full"), (3, "full")])
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
    assert "get_image_features" not in vars(model.model)
    assert marks(model) == marked


def test_the_context_manager_detaches_also_after_an_error(model, processor):
    inputs = batch(processor)
    plain = logits(model, inputs)
    with vzip.attach(model, **BUDGET) as handle:
        assert handle.num_image_tokens() == 6
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
        vzip.attach(model, budget=8)
    assert torch.equal(logits(model, inputs), before)  # the first one is still in place
    handle.detach()
    vzip.attach(model, budget=8).detach()


# Instances, never classes


def test_models_in_one_process_do_not_see_each_other(tower, processor):
    models = [tiny.llava(tower) for _ in range(3)]
    inputs = batch(processor)
    plain = logits(models[2], inputs)
    handles = [vzip.attach(models[0], **BUDGET), vzip.attach(models[1], dominant=9, contextual=1)]
    for model, handle, count in zip(models[:2], handles, (6, 10), strict=True):
        rows = batch(handle.processor(processor))
        assert (rows["input_ids"] == model.config.image_token_id).sum() == 3 * count
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
        for parameter in twin.model.vision_tower.parameters():
            parameter.mul_(-1)
    assert not torch.equal(logits(twin, inputs), changed)  # it has a tower of its own too
    assert torch.equal(logits(model, inputs), before)
    changed = logits(twin, inputs)
    handle.detach()
    assert torch.equal(logits(twin, inputs), changed)


# Rows, processors, generation


@pytest.mark.parametrize("shape", [{}, {"grid": 3}, {"grid": 5}, {"layers": 2}, {"layers": 6}], ids=str)
def test_a_batch_is_its_rows_one_by_one(tower, shape):
    model, processor = tiny.llava(tower, **shape), tiny.processor(tower, grid=shape.get("grid", tiny.GRID))
    handle = vzip.attach(model, **BUDGET)
    inputs = batch(handle.processor(processor))
    together, image = logits(model, inputs), 0
    for row, text in enumerate(TEXTS):
        kept = inputs["attention_mask"][row].bool()
        alone = {"input_ids": inputs["input_ids"][row : row + 1, kept]}
        if count := text.count("<image>"):
            alone["pixel_values"] = inputs["pixel_values"][image : image + count]
            image += count
        torch.testing.assert_close(logits(model, alone)[0], together[row, kept], rtol=1e-4, atol=1e-5)


def test_the_pictures_are_used(model, processor):
    handle = vzip.attach(model, **BUDGET)
    inputs = batch(handle.processor(processor))
    before = logits(model, inputs)
    inputs["pixel_values"][1] = inputs["pixel_values"][0]
    changed = (logits(model, inputs) - before).abs().amax(dim=(1, 2)) > 0
    assert changed.tolist() == [True, False, False]


def test_handle_reduces_as_the_model_does(model, processor):
    handle = vzip.attach(model, **BUDGET)
    inputs = batch(handle.processor(processor))
    with torch.no_grad():
        features = handle.reduce(inputs["pixel_values"]).features
        assert features.shape == (3, 6, 32)
        want = model(**inputs).image_hidden_states
        assert torch.equal(want, handle.family.projector(features).flatten(0, 1))


def test_the_processor_expands_to_the_reduced_number(model, processor):
    plain = batch(processor)
    handle = vzip.attach(model, **BUDGET)
    reduced = handle.processor(processor)
    ids = batch(reduced)["input_ids"]
    image_id = model.config.image_token_id
    assert (ids == image_id).sum(dim=1).tolist() == [12, 0, 6]
    again = batch(processor)  # the original one is as it was
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    sizes = [(20, 30), (tiny.SIDE, tiny.SIDE), (400, 100)]
    assert reduced._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens == [6, 6, 6]
    assert [handle.num_image_tokens(size) for size in sizes] == [6, 6, 6]
    assert processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens == [tiny.GRID**2] * 3


def test_a_reduced_processor_can_be_saved(model, processor, tmp_path):
    plain = batch(processor)
    reduced = vzip.attach(model, **BUDGET).processor(processor)
    reduced.save_pretrained(tmp_path / "reduced")
    processor.save_pretrained(tmp_path / "plain")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "reduced" / file.name).read_bytes() == file.read_bytes()
    again = batch(AutoProcessor.from_pretrained(tmp_path / "reduced"))
    assert torch.equal(again["input_ids"], plain["input_ids"])


def test_one_processor_serves_several_budgets(processor, tower):
    counts = []
    for dominant in (3, 7):
        with vzip.attach(tiny.llava(tower), dominant=dominant, contextual=1) as handle:
            counts.append(handle.processor(processor))
    image_id = processor.image_token_id
    assert [(batch(reduced)["input_ids"] == image_id).sum().item() for reduced in counts] == [12, 24]


def test_greedy_generation_of_a_batch_is_row_by_row(model, processor):
    reduced = vzip.attach(model, **BUDGET).processor(processor)
    texts = ["<image>a<image>bc", "de<image>"]
    inputs = batch(reduced, texts, side="left")
    together = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    for row, images in enumerate([slice(0, 2), slice(2, 3)]):
        kept = inputs["attention_mask"][row].bool()
        ids = inputs["input_ids"][row : row + 1, kept]
        alone = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"][images], **GREEDY
        )
        assert torch.equal(alone[0, ids.shape[1] :], together[row])
    assert len(set(together.flatten().tolist())) > 2  # not the one token that a broken model repeats


def test_generation_is_forward_repeated(model, processor):
    reduced = vzip.attach(model, **BUDGET).processor(processor)
    inputs = batch(reduced, ["<image>abc"])
    answer = model.generate(**inputs, **GREEDY)
    ids = inputs["input_ids"]
    for _ in range(GREEDY["max_new_tokens"]):
        scores = logits(model, {"input_ids": ids, "pixel_values": inputs["pixel_values"]})[:, -1]
        scores[:, model.generation_config.eos_token_id or tiny.SPECIAL.index("</s>")] = -torch.inf
        ids = torch.cat([ids, scores.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(answer, ids)


def test_a_second_turn_reuses_the_cache_and_not_the_tower(model, processor):
    reduced = vzip.attach(model, **BUDGET).processor(processor)
    inputs = batch(reduced, ["<image>abc"])
    calls = count_calls(model.model.vision_tower)
    first = model.generate(**inputs, **GREEDY, use_cache=True, return_dict_in_generate=True)
    assert len(calls) == 1
    question = reduced.tokenizer("and now?", return_tensors="pt")["input_ids"]
    ids = torch.cat([first.sequences, question], dim=1)
    second = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values, **GREEDY)
    assert len(calls) == 1  # still: the picture lives in the cache
    scratch = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"], **GREEDY)
    assert torch.equal(second, scratch)


def test_several_samples_of_a_row(model, processor):
    reduced = vzip.attach(model, **BUDGET).processor(processor)
    inputs = batch(reduced, ["<image>a<image>bc", "de<image>"], side="left")
    sampling = {**GREEDY, "do_sample": True, "num_return_sequences": 2}
    assert model.generate(**inputs, **sampling).shape == (4, inputs["input_ids"].shape[1] + 8)
    certain = model.generate(**inputs, **sampling, top_k=1)  # leaves nothing to chance
    assert torch.equal(certain, model.generate(**inputs, **GREEDY).repeat_interleave(2, dim=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_run_with_a_float32_projector(tower, processor, dtype):
    model = tiny.llava(tower, dtype=dtype)
    model.model.multi_modal_projector.float()
    handle = vzip.attach(model, **BUDGET)
    inputs = with_labels(batch(handle.processor(processor)))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    answer = model(**inputs)
    answer.loss.backward()
    assert answer.logits.dtype == dtype and answer.logits.isfinite().all()
    for parameter in model.model.multi_modal_projector.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().sum() > 0
    exact = tiny.llava(tower)
    exact.load_state_dict(model.state_dict())
    vzip.attach(exact, **BUDGET)
    inputs["pixel_values"] = inputs["pixel_values"].float()
    assert abs(exact(**inputs).loss - answer.loss) < 0.02


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
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 3 * handle.num_image_tokens()
    assert logits(model, inputs).isfinite().all()


def test_a_budget_is_split_at_the_papers_ratio(model):
    handle = vzip.attach(model, budget=13)
    assert (handle.reducer.dominant, handle.reducer.contextual) == (11, 2)
    assert handle.num_image_tokens() == 13


# Refusals, before any work


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 18}, ["budget=18", "at most"]),
        ({"dominant": 10, "contextual": 20}, ["budget=30", "10 dominant", "20 contextual"]),
        ({"reducer": Random(budget=17)}, ["budget=17", "16 patches"]),
        ({}, ["reducer.budget"]),
        ({"budget": 6, "reducer": Identity()}, ["not both"]),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused_at_attach(model, settings, words):
    calls, marked = count_calls(model.model.vision_tower), marks(model)
    with pytest.raises(UserError) as error:
        vzip.attach(model, **settings)
    assert all(word in str(error.value) for word in words), error.value
    assert not calls and marks(model) == marked


def llama():
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "word"),
    [(llama, "LlamaForCausalLM"), (lambda: tiny.llava().model, "LlavaModel"), (lambda: torch.nn.Linear(2, 2), "Linear")],
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


def test_rows_with_too_few_placeholders_are_not_filled_silently(model, processor):
    vzip.attach(model, **BUDGET)
    with pytest.raises(ValueError, match="do not match"):
        logits(model, batch(processor))


# The seam in transformers


def test_the_seam_is_where_the_family_expects_it(processor):
    """`LlavaModel.forward`, and `generate`, take image features from the instance's `get_image_features().pooler_output`."""
    model, processor = tiny.llava(), tiny.processor()
    inputs = batch(processor)
    inner, calls = model.model, []
    marked = torch.randn(3, tiny.GRID**2, 48)

    def replaced(pixel_values, **kwargs):
        calls.append(pixel_values)
        return BaseModelOutputWithPooling(pooler_output=list(marked))

    inner.get_image_features = replaced
    with torch.no_grad():
        answer = model(**inputs)
    moved = "LlavaModel.forward no longer goes through get_image_features of the instance: vzip/families/llava.py must follow"
    assert len(calls) == 1, moved
    assert torch.equal(calls[0], inputs["pixel_values"]), moved
    assert torch.equal(answer.image_hidden_states.view_as(marked), marked), moved
    model.generate(**batch(processor, ["<image>a"] * 3, side="left"), **GREEDY)
    assert len(calls) == 2, moved


def test_what_generate_reads_of_the_replaced_method_is_unchanged(model):
    """generate() passes on what `inspect.signature` of the method names, and takes those arguments out of the others."""
    plain = inspect.signature(model.model.get_image_features)
    vzip.attach(model, **BUDGET)
    assert inspect.signature(model.model.get_image_features) == plain


def test_the_tapped_modules_are_where_the_tap_expects_them(model):
    family = vzip.families.family_of(model)
    assert family.num_layers_run == tiny.LAYERS - 1
    assert isinstance(family.projector, torch.nn.Module) and family.projector is model.model.multi_modal_projector
    assert family.tower is model.model.vision_tower
    assert family.language_model is model.model.language_model
    assert family.lm_head is model.lm_head


# What is on disk


def modules(package):
    return [
        (entry.name, importlib.import_module(f"{package.__name__}.{entry.name}"))
        for entry in pkgutil.iter_modules(package.__path__)
        if entry.name != "base"
    ]


def own_classes(module):
    return [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]


def overrides(cls, base):
    """Public members of the protocol or base class that the class, or a parent other than the base, defines."""
    names = [name for name in vars(base) if not name.startswith("_")] + list(vars(base).get("__annotations__", {}))
    defined = set().union(*(vars(parent) for parent in cls.__mro__ if parent not in (base, object)))
    return {name: name in defined for name in names}


@pytest.mark.parametrize(("name", "module"), modules(vzip.reducers), ids=lambda value: value if isinstance(value, str) else "")
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


@pytest.mark.parametrize(("name", "module"), modules(vzip.families), ids=lambda value: value if isinstance(value, str) else "")
def test_every_family_on_disk_is_one(name, module):
    classes = [value for value in own_classes(module) if issubclass(value, Family)]
    assert classes, f"vzip/families/{name}.py defines no family"
    inherited = {"projector", "refuse_unfit", "refuse_other_kind"}  # the base class's own
    for cls in classes:
        missing = [member for member, there in overrides(cls, Base).items() if not there and member not in inherited]
        assert not missing, f"{cls.__name__} lacks {missing}"
        assert vzip.families.families()[cls.model_type] is cls


def test_no_two_families_take_the_same_model():
    kinds = [cls.model_type for _, module in modules(vzip.families) for cls in own_classes(module) if issubclass(cls, Family)]
    assert len(kinds) == len(set(kinds))
