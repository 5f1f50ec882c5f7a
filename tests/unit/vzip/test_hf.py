"""Models in the layout of transformers, from somebody else: no code runs, no file outside is read."""

import builtins
import json
import shutil
import struct

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import vzip
from tests.helpers import tiny
from tests.helpers.errors import refused
from vzip import Comparison, UserError
from vzip.checkpoints import hf
from vzip.checkpoints.shards import read_tensors
from vzip.families import families
from vzip.runs.meta import locate

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tmp_path, tiny_folder):
    """A tiny LLaVA that the test may change."""
    return shutil.copytree(tiny_folder, tmp_path / "base")


@pytest.fixture
def asked(monkeypatch):
    """What is asked at the terminal, where somebody says yes to everything."""
    questions = []

    def answer(question=""):
        questions.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    return questions


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | changes))


CODE = {
    "processor_config.json": ("processor_class", "AutoProcessor"),
    "tokenizer_config.json": ("tokenizer_class", "AutoTokenizer"),
    "preprocessor_config.json": ("image_processor_type", "AutoImageProcessor"),
    "config.json": ("model_type", "AutoConfig"),
}
"""For each file, the entry that names a class, and transformers' name for its kind."""


@pytest.mark.parametrize("name", CODE)
def test_a_models_own_code_never_runs_and_nobody_is_asked(base, asked, name):
    key, kind = CODE[name]
    (base / "own.py").write_text(f"open({str(base / 'sprung')!r}, 'w')\nclass Own:\n    pass\n")
    edit(base / name, **{key: "Own", "auto_map": {kind: "own.Own"}})
    for load in (hf.load_hf_processor, families()["llava"].load_processor, Comparison.open):
        # Where a known class can stand in for the model's own, the model is loaded.
        try:
            load(str(base))
        except UserError as error:
            assert "trust_remote_code" not in str(error)
    assert asked == []
    assert not (base / "sprung").exists()


def test_the_error_says_that_own_code_is_not_supported(base, asked):
    edit(base / "processor_config.json", processor_class="Own", auto_map={"AutoProcessor": "own.Own"})
    words = [str(base), "code of its own, which is never run here", "not supported"]
    refused(hf.load_hf_processor, str(base), words=words)
    refused(Comparison.open, base, words=words)


def test_code_beside_known_classes_is_not_looked_at(base, asked):
    trap = f"open({str(base / 'sprung')!r}, 'w')\n"
    (base / "own.py").write_text(trap)
    (base / "custom_generate").mkdir()
    (base / "custom_generate" / "generate.py").write_text(trap)
    edit(base / "config.json", auto_map={"AutoModelForImageTextToText": "own.Own"})
    edit(base / "generation_config.json", custom_generate=str(base))
    comparison = Comparison.open(base, device="cpu")
    with comparison.row("full") as (model, processor):
        inputs = processor(images=tiny.picture(), text="<image>", return_tensors="pt").to(model.dtype)
        model.generate(**inputs, max_new_tokens=1)
    assert asked == []
    assert not (base / "sprung").exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b'{"model_type": ["llava"]}', b'{"vzip": 3}']
)
def test_a_damaged_config_is_refused(base, content):
    (base / "config.json").write_bytes(content)
    for load in (Comparison.open, vzip.load):
        refused(load, str(base), words=[str(base)])


# Files outside of the folder


@pytest.fixture
def sharded(base):
    """The same model in shards with an index, which is returned."""
    tensors = load_file(base / "model.safetensors")
    save_file(tensors, base / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = base / "model.safetensors.index.json"
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (base / "model.safetensors").unlink()
    return index


@pytest.mark.parametrize("form", ["../{0}", "/{1}/{0}", "sub/../../{0}", "..", "."])
def test_an_index_names_no_file_outside_its_folder(base, sharded, form):
    outside = base.parent / "outside.safetensors"
    shutil.copy(base / "model-00001-of-00001.safetensors", outside)
    name = form.format(outside.name, str(base.parent).strip("/"))
    weight_map = json.loads(sharded.read_text())["weight_map"]
    edit(sharded, weight_map=weight_map | {next(iter(weight_map)): name})
    load = families()["llava"].load_model
    refused(load, str(base), dtype=torch.float32, words=[sharded.name, "not a file in its folder"])


def test_files_of_the_hubs_cache_may_be_links(base, sharded):
    """The cache keeps the content elsewhere, under a hash."""
    shard = base / "model-00001-of-00001.safetensors"
    shard.rename(base.parent / "blob")
    shard.symlink_to(base.parent / "blob")
    families()["llava"].load_model(str(base), dtype=torch.float32)


@pytest.mark.parametrize(
    "names", [["../tokenizer.5.0.json"], [".."], ["/x/tokenizer.5.0.json"], "tokenizer.json", [1]]
)
def test_a_tokenizer_names_no_file_outside_its_folder(base, names):
    shutil.copy(base / "tokenizer.json", base.parent / "tokenizer.5.0.json")
    edit(base / "tokenizer_config.json", fast_tokenizer_files=names)
    refused(hf.load_hf_processor, str(base), words=["fast_tokenizer_files", "not files in its folder"])


# Weights


HEADER = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()


@pytest.mark.parametrize("size", [2**63, 2**40, 10**6, 0, len(HEADER)])
def test_a_header_that_lies_about_its_size_or_its_offsets_is_refused(base, size):
    path = base / "model.safetensors"
    rest = HEADER if size == len(HEADER) else path.read_bytes()[8:]
    path.write_bytes(struct.pack("<Q", size) + rest)
    refused(read_tensors, path, words=[str(path), "can't be read"])
    model_class = families()["llava"].model_class
    refused(hf.load_hf_model, model_class, str(base), dtype=torch.float32, words=[str(base)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_with_values_that_are_not_finite_is_refused(base, value):
    tensors = {name: tensor.clone() for name, tensor in load_file(base / "model.safetensors").items()}
    name = next(name for name in tensors if name.endswith("k_proj.weight"))
    tensors[name].view(-1)[1] = value
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    words = [str(base), "k_proj.weight", "not finite"]
    refused(Comparison.open, base, dtype=torch.float32, words=words)


# Exports on the hub


def test_only_the_files_of_an_export_are_downloaded(tmp_path, monkeypatch):
    """The hub is out of reach here, so the call that would download is looked at."""
    (tmp_path / "config.json").write_text('{"vzip": {}}')
    calls = {}

    def download(repository, **options):
        calls[repository] = options
        return tmp_path

    monkeypatch.setattr("vzip.runs.meta.snapshot_download", download)
    monkeypatch.setattr("vzip.runs.meta.read_config", lambda source: {"vzip": {}})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate("me/export") == tmp_path
    patterns = calls["me/export"]["allow_patterns"]
    assert "*.safetensors" in patterns
    assert not any(name.endswith((".py", ".bin", ".pt", "*")) for name in patterns)
