"""Projector checkpoints: what is written is what is loaded, and no projector is put where it does not
belong.
"""

import json
from contextlib import contextmanager

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import vzip
from tests.helpers import damage, tiny
from tests.helpers.errors import refused
from tests.helpers.runs import BUDGET, attached, edit_meta, projector_of, save_run, tune
from vzip.families import families, family_of
from vzip.reducers import create, names
from vzip.reducers.visionzip import VisionZip
from vzip.runs.meta import META, WEIGHTS, locate, read_meta
from vzip.runs.projector import fingerprint, load_projector

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def handle(tiny_folder):
    """The attached model that wrote the run."""
    return tune(attached(tiny_folder))


@pytest.fixture
def run(tmp_path, handle, tiny_folder):
    """A finished run that the test may change."""
    return save_run(tmp_path / "run", handle, tiny_folder)


@pytest.fixture
def fresh(tiny_folder):
    """An attached model that has not been tuned."""
    return attached(tiny_folder)


def assert_same_projector(handle, expected):
    projector = projector_of(handle)
    assert projector.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in projector.items())


@contextmanager
def unchanged(handle):
    """Check that the projector is bit-identical after the block."""
    before = projector_of(handle)
    yield
    assert_same_projector(handle, before)


# Writing and loading


def test_files_hold_the_projector_and_what_it_belongs_to(run, handle, tiny_folder):
    assert_same_projector(handle, load_file(run / WEIGHTS))

    meta = read_meta(run)
    assert meta["base"] == {
        "id": str(tiny_folder),
        "model_type": "llava",
        "fingerprint": fingerprint(handle.family),
        "projector": None,
    }
    options = {"merge": "sum", "keep_cls": True, "layer": None, "anyres": "released"}
    assert meta["reducer"] == {"name": "visionzip", **BUDGET, **options}
    # Nothing is left half-written.
    assert sorted(path.name for path in run.iterdir()) == [META, WEIGHTS]


def test_saving_again_replaces_both_files(run, tiny_folder):
    other = tune(attached(tiny_folder), seed=2)
    save_run(run, other, tiny_folder, note="second")
    assert read_meta(run)["note"] == "second"
    assert_same_projector(other, load_file(run / WEIGHTS))
    assert sorted(path.name for path in run.iterdir()) == [META, WEIGHTS]


def test_load_projector_brings_back_every_bit_and_changes_nothing_else(run, handle, fresh, tiny_folder):
    load_projector(fresh, run)
    assert_same_projector(fresh, projector_of(handle))
    base = dict(attached(tiny_folder).family.model.named_parameters())
    for name, value in fresh.family.model.named_parameters():
        is_projector = name in projector_of(handle)
        assert torch.equal(value, base[name]) != is_projector, name


def test_load_generates_what_the_model_that_wrote_it_does(run, handle, fresh):
    question = {
        "images": [tiny.picture(1), tiny.picture(2)],
        "text": ["<image>a", "bcd<image>"],
        "padding": True,
        "padding_side": "left",
        "return_tensors": "pt",
    }
    limits = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    inputs = handle.processor(tiny.processor())(**question)
    expected = handle.family.model.generate(**inputs, **limits)

    model, processor = vzip.load(run, device="cpu")
    loaded_inputs = processor(**question)
    assert torch.equal(loaded_inputs["input_ids"], inputs["input_ids"])
    assert torch.equal(model.generate(**loaded_inputs, **limits), expected)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    # The projector matters to these inputs.
    assert not torch.equal(fresh.family.model(**inputs).logits, model(**loaded_inputs).logits)


def test_load_finds_a_base_that_has_moved_and_casts_its_frozen_parameters(run, tmp_path):
    """float16 rounds other bits than the fingerprint does. Buffers, which positions need, stay."""
    moved = tiny.save_llava(tmp_path / "moved")
    edit_meta(run, lambda meta: meta["base"].update(id=str(tmp_path / "gone")))
    model, _ = vzip.load(str(run), base=str(moved), dtype=torch.float16, device="cpu")
    expected = load_file(run / WEIGHTS)["model.multi_modal_projector.linear_1.weight"]
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, expected)
    dtypes = {True: set(), False: set()}
    for name, parameter in model.named_parameters():
        dtypes["multi_modal_projector" in name].add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.float16}}
    assert {value.dtype for value in model.buffers() if value.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(
    "reducer",
    [
        VisionZip(budget=6),
        create("identity", {}),
        create("scope", {"budget": 6, "merge": "sum", "alpha": 0.5}),
        *(create(name, {"budget": 5}) for name in names() if name not in ("identity", "visionzip")),
    ],
    ids=repr,
)
def test_every_reducer_comes_back(tmp_path, tiny_folder, reducer):
    handle = attached(tiny_folder, reducer=reducer)
    model, processor = vzip.load(save_run(tmp_path / "run", handle, tiny_folder), device="cpu")
    ids = processor(images=tiny.picture(), text="<image>", return_tensors="pt")["input_ids"]
    assert (ids == model.config.image_token_id).sum() == handle.num_image_tokens()


def test_a_run_with_every_option_comes_back(tmp_path):
    """Several tiles in another order, another layer, no CLS, another merge."""
    folder = tiny.save_llava(tmp_path / "next", "next")
    reducer = VisionZip(**BUDGET, merge="average", keep_cls=False, layer=1)
    handle = tune(attached(folder, "next", reducer=reducer, anyres="spatial"))
    model, processor = vzip.load(save_run(tmp_path / "run", handle, folder), device="cpu")
    inputs = processor(images=tiny.picture(height=40, width=90), text="<image>what?", return_tensors="pt")
    assert torch.equal(model(**inputs).logits, handle.family.model(**inputs).logits)


# The base model


def test_fingerprint_is_the_same_in_any_precision(tiny_folder):
    # float16 is left out: it rounds other bits.
    fingerprints = set()
    for dtype in (torch.float32, torch.bfloat16):
        family = family_of(families()["llava"].load_model(str(tiny_folder), dtype=dtype))
        fingerprints.add(fingerprint(family))
    assert len(fingerprints) == 1


def test_fingerprint_sees_a_change_anywhere_but_in_the_projector():
    family = family_of(tiny.llava())
    seen = {fingerprint(family)}
    with torch.no_grad():
        for parameter in family.projector.parameters():
            parameter.normal_()
        assert fingerprint(family) in seen

        for name in (
            "model.vision_tower.encoder.layers.3.mlp.fc1.weight",
            "model.vision_tower.embeddings.class_embedding",
            "model.language_model.layers.0.input_layernorm.weight",
            "model.language_model.embed_tokens.weight",
            "lm_head.weight",
        ):
            family.model.get_parameter(name).add_(1)
            assert fingerprint(family) not in seen, name
            seen.add(fingerprint(family))


def test_other_base_weights_are_refused(run, tmp_path):
    other = tiny.save_llava(tmp_path / "other", seed=1)
    handle = attached(other)
    with unchanged(handle):
        refused(load_projector, handle, run, words=["another base model", "frozen weights differ"])
    refused(vzip.load, run, base=str(other), device="cpu", words=["another base model"])


@pytest.mark.parametrize(
    "shape", [{"layers": 6}, {"width": 64}, {"kind": "dinov2"}, {"kind": "siglip"}], ids=str
)
def test_another_architecture_is_refused(run, shape):
    handle = vzip.attach(tiny.llava(**shape), **BUDGET)
    with unchanged(handle):
        refused(load_projector, handle, run, words=["another base model"])


def test_another_model_type_is_refused(run, fresh):
    edit_meta(run, lambda meta: meta["base"].update(model_type="llava_next"))
    with unchanged(fresh):
        refused(load_projector, fresh, run, words=["'llava_next'", "'llava'"])


def test_a_base_of_another_type_is_refused_by_its_config(run, tmp_path):
    """With the weights, `transformers` would first make a LLaVA of the default size: 7 billion random
    weights.
    """
    LlamaConfig().save_pretrained(tmp_path / "text")
    tiny.processor().save_pretrained(tmp_path / "text")
    words = ["'llama'", "not 'llava'"]
    refused(vzip.load, run, base=str(tmp_path / "text"), device="cpu", words=words)


def test_a_missing_base_is_refused_with_the_way_out(run, tmp_path):
    gone = tmp_path / "gone"
    edit_meta(run, lambda meta: meta["base"].update(id=str(gone)))
    words = [str(gone), "can't be loaded", "base=..."]
    refused(vzip.load, run, device="cpu", words=words)
    gone.mkdir()
    refused(vzip.load, run, device="cpu", words=words)


def lack_a_tensor(base):
    tensors = load_file(base / "model.safetensors")
    missing = next(name for name in tensors if "vision_tower" in name and name.endswith("k_proj.weight"))
    others = {name: value.clone() for name, value in tensors.items() if name != missing}
    save_file(others, base / "model.safetensors", {"format": "pt"})


def hold_code(base):
    (base / "model.safetensors").unlink()
    torch.save(damage.Trap(base / "sprung"), base / "pytorch_model.bin")


def edit_text_config(base, **changes):
    config = json.loads((base / "config.json").read_text())
    config["text_config"] |= changes
    (base / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("make_damage", "words"),
    [
        (lack_a_tensor, ["lacks the weights", "k_proj.weight"]),
        (hold_code, ["holds more than tensors"]),
        (lambda base: edit_text_config(base, intermediate_size=128), []),
        (lambda base: edit_text_config(base, hidden_size="wide"), []),
        (lambda base: (base / "tokenizer.json").write_text('{"version": 1}'), []),
        (lambda base: (base / "tokenizer.json").unlink(), []),
        (lambda base: damage.cut(base / "model.safetensors"), []),
    ],
    ids=["missing tensor", "code", "other shapes", "bad config", "bad tokenizer", "no tokenizer", "cut"],
)
def test_a_broken_base_is_refused_with_the_way_out(run, tmp_path, make_damage, words):
    base = tiny.save_llava(tmp_path / "base")
    make_damage(base)
    words = [str(base), "can't be loaded", *words, "base=..."]
    with pytest.raises(vzip.UserError) as error:
        vzip.load(run, base=str(base), device="cpu")
    assert all(word in str(error.value) for word in words), error.value
    assert "weights_only" not in str(error.value) and not (base / "sprung").exists()


# The reducer


@pytest.mark.parametrize(
    "reducer",
    [
        create("random", {"budget": 6}),
        create("identity", {}),
        VisionZip(dominant=5, contextual=2),
        VisionZip(dominant=4, contextual=3),
        VisionZip(**BUDGET, merge="average"),
        VisionZip(**BUDGET, keep_cls=False),
        VisionZip(**BUDGET, layer=1),
    ],
    ids=repr,
)
def test_another_reducer_or_budget_is_refused(run, tiny_folder, reducer):
    handle = attached(tiny_folder, reducer=reducer)
    words = [f"trained with the reducer VisionZip(4 dominant + 2 contextual), not with {reducer}"]
    with unchanged(handle):
        refused(load_projector, handle, run, words=words)


def test_another_order_of_tiles_is_refused(run, tiny_folder):
    handle = attached(tiny_folder, **BUDGET, anyres="spatial")
    words = ["reducer.anyres=released", "not with spatial", "anyres='released'"]
    with unchanged(handle):
        refused(load_projector, handle, run, words=words)


# The run folder


def test_a_folder_that_is_not_a_finished_run_is_refused(tmp_path, fresh):
    for folder in (tmp_path, tmp_path / "nothing"):
        refused(load_projector, fresh, folder, words=[str(folder), "is not a run folder", META])
    refused(vzip.load, tmp_path, words=["is not a run folder"])
    refused(vzip.load, tmp_path / "nothing", words=["nothing does not exist"])
    (tmp_path / "config.yaml").write_text("name: x\n")
    refused(vzip.load, tmp_path, words=[str(tmp_path), "has not finished"])


def test_a_missing_path_is_refused_without_a_request_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    # This may be a hub id.
    assert locate("me/model") is None
    for path in ("my-run", "./me/model", str(tmp_path / "gone" / "run")):
        refused(locate, path, words=[path, "does not exist"])

    # Beside runs it is a run whose name was mistyped.
    (tmp_path / "me" / "run").mkdir()
    (tmp_path / "me" / "run" / "config.yaml").write_text("name: run\n")
    refused(locate, "me/model", words=["me/model does not exist"])


@pytest.mark.parametrize(
    "name", ["base", "base.id", "reducer", "reducer.name", "budget", "template", "dtype", "adapter"]
)
def test_a_meta_that_lacks_an_entry_is_refused(run, name):
    *parents, key = name.split(".")

    def remove(meta):
        del (meta[parents[0]] if parents else meta)[key]

    edit_meta(run, remove)
    refused(vzip.load, run, device="cpu", words=[str(run / META), name, "tune again"])


# The weights


CHANGES = {
    "other names": lambda tensors: {name.removeprefix("model."): value for name, value in tensors.items()},
    "one less": lambda tensors: dict(list(tensors.items())[1:]),
    "one more": lambda tensors: {**tensors, "lm_head.weight": torch.zeros(2, 2)},
    "transposed": lambda tensors: {name: value.t().contiguous() for name, value in tensors.items()},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(run, fresh, change):
    # Copies, because load_file gives views of the file.
    tensors = {name: value.clone() for name, value in load_file(run / WEIGHTS).items()}
    save_file(change(tensors), run / WEIGHTS)
    with unchanged(fresh):
        refused(load_projector, fresh, run, words=[WEIGHTS, "does not fit"])


def test_broken_weights_are_refused_and_nothing_is_unpickled(run, fresh, tmp_path):
    tensors = projector_of(fresh)
    with unchanged(fresh):
        for content in (tensors, damage.Trap(tmp_path / "sprung")):
            torch.save(content, run / WEIGHTS)
            refused(load_projector, fresh, run, words=[WEIGHTS, "can't be read"])
        for make_damage in (damage.cut, type(run).unlink):
            make_damage(run / WEIGHTS)
            refused(load_projector, fresh, run, words=[WEIGHTS, "can't be read"])
    assert not (tmp_path / "sprung").exists()
