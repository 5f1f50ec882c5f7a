"""Projector checkpoints: what is written is what is loaded, and nothing is put where it does not belong."""

import json

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import vzip
from tests.helpers import tiny
from tests.helpers.errors import refused
from tests.helpers.runs import BUDGET, attached, edit_meta, projector_of, save_run, tune
from vzip import UserError
from vzip.runs.projector import (
    META,
    WEIGHTS,
    fingerprint,
    load_projector,
    locate,
    projector_meta,
    read_meta,
    reducers_of,
)


@pytest.fixture
def run(tmp_path, tiny_folder):
    """(folder, handle): a finished run, and the attached model that wrote it."""
    handle = tune(attached(tiny_folder))
    return save_run(tmp_path / "run", handle, tiny_folder), handle


def unchanged(handle):
    """Context: the projector is bit-identical afterwards, as it must be after a refusal."""

    class Unchanged:
        def __enter__(self):
            self.before = projector_of(handle)

        def __exit__(self, *error):
            if error[0] is None:
                assert all(
                    torch.equal(value, self.before[name]) for name, value in projector_of(handle).items()
                )

    return Unchanged()


def test_files_hold_the_projector_and_what_it_belongs_to(run, tiny_folder):
    folder, handle = run
    tensors = load_file(folder / WEIGHTS)
    assert sorted(tensors) == [
        f"model.multi_modal_projector.linear_{layer}.{kind}"
        for layer in (1, 2)
        for kind in ("bias", "weight")
    ]
    assert all(torch.equal(tensors[name], value) for name, value in projector_of(handle).items())
    meta = read_meta(folder)
    identity = {"id": str(tiny_folder), "model_type": "llava", "fingerprint": fingerprint(handle.family)}
    assert meta["base"] == identity | {"projector": None}
    options = {"merge": "sum", "keep_cls": True, "layer": None, "anyres": "released"}
    assert meta["reducer"] == {"name": "visionzip", **BUDGET, **options}
    assert sorted(path.name for path in folder.iterdir()) == [META, WEIGHTS]  # and nothing half-written


def test_saving_again_replaces_both_files(run, tiny_folder):
    folder, handle = run
    save_run(folder, tune(handle, seed=2), tiny_folder, note="second")
    assert read_meta(folder)["note"] == "second"
    assert all(
        torch.equal(load_file(folder / WEIGHTS)[name], value) for name, value in projector_of(handle).items()
    )
    assert sorted(path.name for path in folder.iterdir()) == [META, WEIGHTS]


def test_load_projector_brings_back_every_bit(run, tiny_folder):
    folder, handle = run
    fresh = attached(tiny_folder)
    assert not torch.equal(fresh.family.projector.linear_1.weight, handle.family.projector.linear_1.weight)
    load_projector(fresh, folder)
    assert all(torch.equal(value, projector_of(handle)[name]) for name, value in projector_of(fresh).items())
    base = dict(attached(tiny_folder).family.model.named_parameters())
    for name, value in fresh.family.model.named_parameters():
        assert name in projector_of(handle) or torch.equal(value, base[name])


def test_load_generates_what_the_model_that_wrote_it_does(run, tiny_folder):
    folder, handle = run
    question = {
        "images": [tiny.picture(1), tiny.picture(2)],
        "text": ["<image>a", "bcd<image>"],
        "padding": True,
    }
    inputs = handle.processor(tiny.processor())(**question, padding_side="left", return_tensors="pt")
    limits = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = handle.family.model.generate(**inputs, **limits)

    model, processor = vzip.load(folder, device="cpu")
    again = processor(**question, padding_side="left", return_tensors="pt")
    assert torch.equal(again["input_ids"], inputs["input_ids"])
    assert torch.equal(model.generate(**again, **limits), want)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())

    untuned = attached(tiny_folder).family.model
    assert not torch.equal(untuned(**inputs).logits, model(**again).logits)  # the projector matters here


def test_load_takes_another_place_and_precision_of_the_base(run, tmp_path):
    folder, _ = run
    moved = tiny.save_llava(tmp_path / "moved")
    edit_meta(folder, lambda meta: meta["base"].update(id=str(tmp_path / "gone")))
    model, _ = vzip.load(str(folder), base=str(moved), dtype=torch.bfloat16, device="cpu")
    assert model.lm_head.weight.dtype == torch.bfloat16
    projector = model.model.multi_modal_projector
    assert torch.equal(
        projector.linear_1.weight, load_file(folder / WEIGHTS)["model.multi_modal_projector.linear_1.weight"]
    )


def test_load_takes_a_precision_that_rounds_otherwise(run):
    """The base is compared as the run had it, and cast then: its parameters, not what is computed of positions."""
    model, _ = vzip.load(run[0], dtype=torch.float16, device="cpu")
    tensors = dict(model.named_parameters())
    dtypes = {name: value.dtype for name, value in tensors.items()}
    projector = {name for name in dtypes if "multi_modal_projector" in name}
    assert {dtypes[name] for name in projector} == {torch.float32}
    assert {dtypes[name] for name in dtypes.keys() - projector} == {torch.float16}
    assert {value.dtype for value in model.buffers() if value.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("reducer", [{"budget": 6}, {"reducer": "random"}, {"reducer": "identity"}], ids=str)
def test_every_reducer_comes_back(tmp_path, tiny_folder, reducer):
    if "reducer" in reducer:
        name = reducer["reducer"]
        reducer = {"reducer": vzip.reducers.create(name, {"budget": 5} if name == "random" else {})}
    handle = attached(tiny_folder, **reducer)
    model, processor = vzip.load(save_run(tmp_path / "run", handle, tiny_folder), device="cpu")
    ids = processor(images=tiny.picture(), text="<image>", return_tensors="pt")["input_ids"]
    assert (ids == model.config.image_token_id).sum() == handle.num_image_tokens()


def test_fingerprint_is_the_same_in_any_precision(tiny_folder):
    llava = vzip.families.families()["llava"]
    prints = set()
    for dtype in (torch.float32, torch.bfloat16):  # not float16, which rounds otherwise
        model = llava.load_model(str(tiny_folder), dtype=dtype)
        model.model.multi_modal_projector.float()
        prints.add(fingerprint(llava(model)))
    assert len(prints) == 1


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.encoder.layers.3.mlp.fc1.weight",
        "model.vision_tower.embeddings.class_embedding",
        "model.language_model.layers.0.input_layernorm.weight",
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_fingerprint_tells_one_changed_tensor(name):
    family = vzip.families.family_of(tiny.llava())
    before = fingerprint(family)
    with torch.no_grad():
        family.model.get_parameter(name).add_(1)
    assert fingerprint(family) != before


def test_fingerprint_ignores_the_projector():
    family = vzip.families.family_of(tiny.llava())
    before = fingerprint(family)
    with torch.no_grad():
        for parameter in family.projector.parameters():
            parameter.normal_()
    assert fingerprint(family) == before


def test_other_base_weights_are_refused(run, tmp_path):
    folder, _ = run
    other = tiny.save_llava(tmp_path / "other", seed=1)
    handle = attached(other)
    with unchanged(handle):
        refused(load_projector, handle, folder, words=["another base model", "frozen weights differ"])
    refused(vzip.load, folder, base=str(other), device="cpu", words=["another base model"])


@pytest.mark.parametrize(
    "shape", [{"layers": 6}, {"width": 64}, {"kind": "dinov2"}, {"kind": "siglip"}], ids=str
)
def test_another_architecture_is_refused(run, shape):
    handle = vzip.attach(tiny.llava(**shape), **BUDGET)
    with unchanged(handle):
        refused(load_projector, handle, run[0], words=["another base model"])


def test_another_model_type_is_refused(run, tiny_folder):
    folder, _ = run
    edit_meta(folder, lambda meta: meta["base"].update(model_type="llava_next"))
    handle = attached(tiny_folder)
    with unchanged(handle):
        refused(load_projector, handle, folder, words=["'llava_next'", "'llava'"])


def test_a_family_that_this_version_does_not_have_is_refused(run):
    folder, _ = run
    edit_meta(folder, lambda meta: meta["base"].update(model_type="flamingo"))
    refused(vzip.load, folder, words=["'flamingo'", "does not know"])


TRAINED_WITH = "trained with the reducer VisionZip(4 dominant + 2 contextual), not with "
OTHERS = {
    "random": ("random", {"budget": 6}, "Random(6 patches)"),
    "identity": ("identity", {}, "Identity(all tokens)"),
    "dominant": ("visionzip", {**BUDGET, "dominant": 5}, "VisionZip(5 dominant + 2 contextual)"),
    "contextual": ("visionzip", {**BUDGET, "contextual": 3}, "VisionZip(4 dominant + 3 contextual)"),
    "merge": (
        "visionzip",
        {**BUDGET, "merge": "average"},
        "VisionZip(4 dominant + 2 contextual, merge=average)",
    ),
    "keep_cls": (
        "visionzip",
        {**BUDGET, "keep_cls": False},
        "VisionZip(4 dominant + 2 contextual, keep_cls=False)",
    ),
    "layer": ("visionzip", {**BUDGET, "layer": 1}, "VisionZip(4 dominant + 2 contextual, layer=1)"),
    "anyres": (
        "visionzip",
        {**BUDGET, "anyres": "spatial"},
        "VisionZip(4 dominant + 2 contextual, anyres=spatial)",
    ),
}


@pytest.mark.parametrize("age", ["new", "old"])
@pytest.mark.parametrize("other", OTHERS)
def test_another_reducer_or_budget_is_refused(run, tiny_folder, other, age):
    name, settings, shown = OTHERS[other]
    if age == "old":
        forget_options(run[0])
    handle = attached(tiny_folder, reducer=vzip.reducers.create(name, settings))
    with unchanged(handle):
        refused(load_projector, handle, run[0], words=[TRAINED_WITH + shown])


# A run of version 0.1, whose reducer had no other settings.


def forget_options(folder):
    edit_meta(folder, lambda meta: [meta["reducer"].pop(name) for name in ("keep_cls", "layer", "anyres")])


def test_an_old_run_loads_as_the_reducer_that_it_had(run, tiny_folder):
    folder, handle = run
    forget_options(folder)
    assert json.loads((folder / META).read_text())["reducer"] == {
        "name": "visionzip",
        **BUDGET,
        "merge": "sum",
    }
    fresh = attached(tiny_folder)
    load_projector(fresh, folder)
    assert all(torch.equal(value, projector_of(handle)[name]) for name, value in projector_of(fresh).items())

    model, processor = vzip.load(folder, device="cpu")
    inputs = processor(images=tiny.picture(), text="<image>what?", return_tensors="pt")
    assert torch.equal(model(**inputs).logits, handle.family.model(**inputs).logits)


def test_an_old_random_run_loads_too(tmp_path, tiny_folder):
    handle = attached(tiny_folder, reducer=vzip.reducers.create("random", {"budget": 5}))
    folder = save_run(tmp_path / "run", handle, tiny_folder)
    edit_meta(folder, lambda meta: meta["reducer"].pop("anyres"))
    load_projector(attached(tiny_folder, reducer=vzip.reducers.create("random", {"budget": 5})), folder)


@pytest.mark.parametrize("other", OTHERS)
def test_reducers_of_gives_what_describe_wrote(other):
    name, settings, _ = OTHERS[other]
    reducer, family = vzip.reducers.create(name, settings), vzip.families.family_of(tiny.llava())
    meta = json.loads(json.dumps(projector_meta(family, reducer, base="x", base_fingerprint="y")))
    (again,) = reducers_of(meta).values()
    assert (type(again), again.settings(), repr(again)) == (type(reducer), reducer.settings(), repr(reducer))
    assert meta["reducer"]["name"] == name  # and is left in place


def test_a_reducer_setting_of_a_newer_version_is_refused(run, tiny_folder):
    folder, _ = run
    edit_meta(folder, lambda meta: meta["reducer"].update(temperature=0.5))
    handle = attached(tiny_folder)
    with unchanged(handle):
        refused(load_projector, handle, folder, words=["visionzip", "temperature"])
    refused(vzip.load, folder, device="cpu", words=["visionzip", "temperature"])


def test_a_run_of_every_option_comes_back(tmp_path):
    """The options are of the tuned projector too: a model of several tiles, its own order, another layer, no CLS."""
    options = {**BUDGET, "merge": "average", "keep_cls": False, "layer": 1, "anyres": "spatial"}
    folder = tiny.save_llava(tmp_path / "next", "next")
    model = vzip.families.families()["llava_next"].load_model(str(folder), dtype=torch.float32)
    handle = tune(vzip.attach(model, reducer=vzip.reducers.create("visionzip", options)))
    model, processor = vzip.load(save_run(tmp_path / "run", handle, folder), device="cpu")
    inputs = processor(images=tiny.picture(height=40, width=90), text="<image>what?", return_tensors="pt")
    assert torch.equal(model(**inputs).logits, handle.family.model(**inputs).logits)


def test_an_unknown_reducer_is_refused(run):
    edit_meta(run[0], lambda meta: meta["reducer"].update(name="fastv"))
    refused(vzip.load, run[0], device="cpu", words=["'fastv'", "visionzip"])


def test_a_folder_that_is_no_run_is_refused(tmp_path, tiny_folder):
    handle = attached(tiny_folder)
    for folder in (tmp_path, tmp_path / "nothing"):
        refused(load_projector, handle, folder, words=[str(folder), "is not a run folder", META])
    refused(vzip.load, tmp_path, words=["is not a run folder"])
    refused(vzip.load, tmp_path / "nothing", words=["nothing does not exist"])


def test_an_unfinished_run_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("name: x\n")
    refused(vzip.load, tmp_path, words=[str(tmp_path), "has not finished"])


def test_only_a_path_is_refused_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    assert locate("me/model") is None  # which may be on the hub
    for path in ("my-run", "./me/model", str(tmp_path / "gone" / "run")):
        refused(locate, path, words=[path, "does not exist"])
    (tmp_path / "me" / "run").mkdir()
    (tmp_path / "me" / "run" / "config.yaml").write_text("name: run\n")
    refused(locate, "me/model", words=["me/model does not exist"])  # beside runs it is one that was mistyped


@pytest.mark.parametrize("content", ['{"format": 1,\n "base": ', "", "[]", "null"])
def test_a_broken_meta_is_refused(run, content):
    folder, handle = run
    (folder / META).write_text(content)
    for call in (lambda: vzip.load(folder, device="cpu"), lambda: load_projector(handle, folder)):
        refused(call, words=[META])


@pytest.mark.parametrize("missing", ["base", "reducer", "dtype", "adapter"])
def test_a_meta_that_lacks_a_key_is_refused(run, missing):
    edit_meta(run[0], lambda meta: meta.pop(missing))
    refused(vzip.load, run[0], device="cpu", words=[META, missing])


@pytest.mark.parametrize("form", [0, 2, "1", None])
def test_an_unknown_format_is_refused(run, form):
    edit_meta(run[0], lambda meta: meta.update(format=form))
    refused(vzip.load, run[0], words=[META, f"format {form!r} is unknown", "reads format 1"])


def test_a_missing_base_is_refused_with_the_way_out(run, tmp_path):
    folder, _ = run
    gone = tmp_path / "gone"
    edit_meta(folder, lambda meta: meta["base"].update(id=str(gone)))
    refused(vzip.load, folder, device="cpu", words=[str(gone), "can't be loaded", "base=..."])
    gone.mkdir()
    refused(vzip.load, folder, device="cpu", words=[str(gone), "can't be loaded", "base=..."])


class Trap:
    """A pickle that would run code when opened."""

    def __reduce__(self):
        return (print, ("sprung",))


def lack_a_tensor(base):
    tensors = load_file(base / "model.safetensors")
    gone = next(name for name in tensors if "vision_tower" in name and name.endswith("k_proj.weight"))
    save_file(
        {name: value.clone() for name, value in tensors.items() if name != gone},
        base / "model.safetensors",
        {"format": "pt"},
    )


def hold_code(base):
    (base / "model.safetensors").unlink()
    torch.save(Trap(), base / "pytorch_model.bin")


def edit_config(base, change):
    config = json.loads((base / "config.json").read_text())
    change(config)
    (base / "config.json").write_text(json.dumps(config))


def be_wider(base):
    edit_config(base, lambda config: config["text_config"].update(intermediate_size=128))


def be_invalid(base):
    edit_config(base, lambda config: config["text_config"].update(hidden_size="wide"))


def break_tokenizer(base):
    (base / "tokenizer.json").write_text('{"version": 1}')


def lack_tokenizer(base):
    (base / "tokenizer.json").unlink()


def cut_weights(base):
    cut(None, base / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lack_a_tensor, ["lacks the weights", "k_proj.weight"]),
        (hold_code, ["holds more than tensors"]),
        (be_wider, ["can't be loaded"]),
        (be_invalid, ["can't be loaded"]),
        (break_tokenizer, ["can't be loaded"]),
        (lack_tokenizer, ["can't be loaded"]),
        (cut_weights, ["can't be loaded"]),
    ],
)
def test_a_broken_base_is_refused_with_the_way_out(run, tmp_path, damage, words, capfd):
    base = tiny.save_llava(tmp_path / "base")
    damage(base)
    with pytest.raises(UserError) as error:
        vzip.load(run[0], base=str(base), device="cpu")
    assert all(word in str(error.value) for word in [str(base), *words, "base=..."]), error.value
    assert "weights_only" not in str(error.value) and "sprung" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta["base"].pop("id"),
        lambda meta: meta["reducer"].pop("name"),
        lambda meta: meta.update(
            template={"name": "x", "user": "", "assistant": "", "end": "", "colour": "red"}
        ),
        lambda meta: meta.update(template={"name": "x"}),
    ],
)
def test_a_description_that_no_run_wrote_is_refused(run, change):
    edit_meta(run[0], change)
    refused(vzip.load, run[0], device="cpu", words=[str(run[0]), "tune again"])


def test_a_base_of_another_kind_is_refused_by_its_config(run, tmp_path):
    """Given the weights too, `transformers` would first make a LLaVA of the default size: 7 billion random weights."""
    LlamaConfig().save_pretrained(tmp_path / "text")
    tiny.processor().save_pretrained(tmp_path / "text")
    refused(vzip.load, run[0], base=str(tmp_path / "text"), device="cpu", words=["'llama'", "not 'llava'"])


def torch_save(tensors, path):
    torch.save(tensors, path)


def cut(tensors, path):
    path.write_bytes(path.read_bytes()[:-100])


def misname(tensors, path):
    save_file({name.removeprefix("model."): value for name, value in tensors.items()}, path)


def leave_one_out(tensors, path):
    save_file(dict(list(tensors.items())[1:]), path)


def add_one(tensors, path):
    save_file({**tensors, "lm_head.weight": torch.zeros(2, 2)}, path)


def turn(tensors, path):
    save_file({name: value.t().contiguous() for name, value in tensors.items()}, path)


def delete(tensors, path):
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (torch_save, ["can't be read"]),  # a pickle: never opened as one
        (cut, ["can't be read"]),
        (delete, ["can't be read"]),
        (misname, ["does not fit"]),
        (leave_one_out, ["does not fit"]),
        (add_one, ["does not fit"]),
        (turn, ["does not fit"]),
    ],
)
def test_broken_weights_are_refused_and_nothing_is_loaded(run, tiny_folder, damage, words):
    folder, _ = run
    tensors = {
        name: value.clone() for name, value in load_file(folder / WEIGHTS).items()
    }  # not a view of the file
    damage(tensors, folder / WEIGHTS)
    handle = attached(tiny_folder)
    with unchanged(handle):
        refused(load_projector, handle, folder, words=[WEIGHTS, *words])


def test_nothing_is_unpickled(run, tiny_folder, tmp_path):
    """A pickle that would write a file when opened."""

    class Trap:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "sprung",))

    folder, _ = run
    torch.save(Trap(), folder / WEIGHTS)
    refused(load_projector, attached(tiny_folder), folder, words=["can't be read"])
    assert not (tmp_path / "sprung").exists()
