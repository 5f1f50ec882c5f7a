"""Reading meta.json: whatever a damaged or a stranger's file holds, it is refused with what to do."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import vzip
from tests.helpers.broken import JSON
from tests.helpers.errors import refused
from tests.helpers.runs import attached, edit_meta, save_run, tune
from vzip import UserError
from vzip.files import sha256_of
from vzip.runs.export import write_hf
from vzip.runs.meta import META, WEIGHTS, read_finished, read_meta, reducers_of, template_of
from vzip.runs.projector import load_projector, load_weights, save_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder):
    """A finished run. Tests share it, and must not change it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return save_run(folder, tune(attached(tiny_folder)), tiny_folder)


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize(
    "content",
    [b"", b'{"format": 1, ', b"\xff\xfe\x00", b"\x00" * 100, b"[" * 100_000, b"[]", b"7", b"1" * 10_000],
    ids=["empty", "half", "binary", "NULs", "nested", "a list", "a number", "digits"],
)
def test_a_file_that_is_no_object_is_refused(run, content):
    (run / META).write_bytes(content)
    refused(vzip.load, run, device="cpu", words=[str(run / META)])
    refused(read_finished, run, words=[str(run / META)])


WRONG = [
    ("format", 2),
    ("format", "1"),
    ("format", None),
    ("format", True),
    ("format", [1]),
    ("dtype", "int9"),
    ("dtype", "load"),
    ("dtype", 16),
    ("base", "llava"),
    ("base.id", 3),
    ("base.id", None),
    ("base.model_type", ["llava"]),
    ("base.fingerprint", {}),
    ("base.projector", 1),
    ("budget", -6),
    ("budget", True),
    ("budget", 6.0),
    ("budget", 10**400),
    ("other_budgets", []),
    ("other_budgets", {"6": "visionzip"}),
    ("other_budgets", {"six": {"name": "visionzip"}}),
    ("other_budgets", {"-6": {"name": "visionzip"}}),
    ("other_budgets", {"\u0666": {"name": "visionzip"}}),
    ("other_budgets", {"8": {"name": ["visionzip"]}}),
    ("reducer", None),
    ("reducer.name", ["visionzip"]),
    ("reducer.layer", "last"),
    ("reducer.layer", [1]),
    ("reducer.dominant", 10**30),
    ("reducer.alpha", "much"),
    ("reducer.temperature", None),
    ("reducer.object_layer", "last"),
    ("reducer.merge", 3),
    ("reducer.anyres", "spiral"),
    ("reducer.anyres", {}),
    ("template", None),
    ("template", []),
    ("template", {"name": "x"}),
    ("template.user", 5),
    ("template.controls", "</s>"),
    ("template.controls", [1]),
    ("template.captions", "yes"),
    ("adapter", "no"),
    ("trained", {"a": 1}),
    ("sha256", []),
    ("sha256", {WEIGHTS: 1}),
]


def set_entry(run, name, value):
    """Change an entry of meta.json, or of one of its groups."""
    *parents, key = name.split(".")

    def change(meta):
        for parent in parents:
            meta = meta[parent]
        meta[key] = value

    edit_meta(run, change)


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_entry_is_named(run, name, value):
    set_entry(run, name, value)
    refused(vzip.load, run, device="cpu", words=[str(run / META), name.split(".")[-1]])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("base.model_type", "flamingo", ["'flamingo'", "does not know"]),
        ("reducer.name", "fastv", ["'fastv'", "visionzip"]),
        ("reducer.temperature", 0.5, ["visionzip", "temperature"]),
        ("template.colour", "red", ["template is unknown", "colour", "tune again"]),
    ],
)
def test_what_another_version_may_know_is_refused_by_name(run, name, value, words):
    set_entry(run, name, value)
    refused(vzip.load, run, device="cpu", words=words)


@pytest.mark.parametrize("path", ["x" * 5_000, "a\0b", "/dev/zero", "."])
def test_a_starting_projector_that_is_no_file_is_gone(run, path):
    edit_meta(run, lambda meta: meta["base"].update(projector=path))
    assert vzip.Comparison.open(run, device="cpu").rows == ("tuned",)


@given(st.data())
def test_whatever_an_entry_holds_nothing_but_a_user_error_is_raised(finished, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("changed")
    meta = json.loads((finished / META).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        groups = [meta, *(value for value in meta.values() if isinstance(value, dict) and value)]
        group = data.draw(st.sampled_from(groups))
        group[data.draw(st.sampled_from(sorted(group)))] = data.draw(JSON)
    (folder / META).write_text(json.dumps(meta))
    try:
        read = read_meta(folder)
        reducers_of(read)
        template_of(read, source=folder)
    except UserError as error:
        assert str(error)


# Sums, and values that are not finite


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_refused(run, finished, tiny_folder):
    flip_a_bit(run / WEIGHTS)
    words = [str(run / WEIGHTS), "sha256"]
    refused(vzip.load, run, device="cpu", words=words)
    refused(load_projector, attached(tiny_folder), run, words=words)

    # Runs of older versions have no sums.
    edit_meta(run, lambda meta: meta.pop("sha256"))
    vzip.load(run, device="cpu")


def test_the_projector_of_another_run_is_refused(run, tmp_path, tiny_folder):
    other = save_run(tmp_path / "other", tune(attached(tiny_folder), seed=7), tiny_folder)
    shutil.copy(other / WEIGHTS, run / WEIGHTS)
    refused(vzip.load, run, device="cpu", words=[str(run / WEIGHTS), "from another run"])


def test_an_export_has_the_sum_of_its_projector(run, tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    write_hf(run, folder)
    assert read_meta(folder)["sha256"] == {WEIGHTS: sha256_of(folder / WEIGHTS)}
    vzip.load(folder, device="cpu")

    tensors = {name: value.clone() + 1 for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    refused(vzip.load, folder, device="cpu", words=[str(folder / WEIGHTS), "sha256"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_neither_saved_nor_loaded(run, tiny_folder, value):
    before = (run / WEIGHTS).read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(run / WEIGHTS).items()}
    name = next(iter(tensors))
    tensors[name].view(-1)[-1] = value
    words = [name, "not finite"]
    refused(save_checkpoint, run, tensors, read_meta(run), words=words)
    assert (run / WEIGHTS).read_bytes() == before

    save_file(tensors, run / WEIGHTS)
    edit_meta(run, lambda meta: meta.pop("sha256"))
    refused(vzip.load, run, device="cpu", words=words)
    refused(load_weights, attached(tiny_folder).family, run / WEIGHTS, words=words)


def test_any_changed_value_of_the_base_is_noticed(run, tiny_folder, tmp_path):
    """The values between those that the first version of a fingerprint looked at, too."""
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    tensors = {name: value.clone() for name, value in load_file(base / "model.safetensors").items()}
    name = next(name for name in tensors if name.endswith("mlp.fc1.weight"))
    tensors[name].view(-1)[1] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    refused(vzip.load, run, base=str(base), device="cpu", words=["another base model"])

    tensors[name].view(-1)[1] = torch.nan
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    refused(vzip.load, run, base=str(base), device="cpu", words=[str(base), "not finite"])
