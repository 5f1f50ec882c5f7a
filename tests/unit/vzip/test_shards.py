"""Files of weights: every format is read, broken files are refused, and no code in them runs."""

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from tests.helpers import damage, tiny
from tests.helpers.errors import refused
from tests.helpers.original import original_tensors, save_weights
from vzip.checkpoints import shards
from vzip.checkpoints.original.llava import load_model, load_processor, load_tokenizer


def assert_equal_tensors(tensors, expected):
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in expected.items())


@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_weights_are_read_in_every_form(tmp_path, form, num_shards):
    expected = original_tensors(tiny.llava())
    save_weights(tmp_path, expected, form, num_shards)
    assert_equal_tensors(shards.read_weights(str(tmp_path)), expected)


def test_safetensors_are_preferred(tmp_path):
    expected = original_tensors(tiny.llava())
    save_weights(tmp_path, expected, "safetensors")
    damage.write_html(tmp_path / "pytorch_model-00001-of-00002.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    assert_equal_tensors(shards.read_weights(str(tmp_path)), expected)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_only_the_preferred_format_of_a_hub_id_is_downloaded(tmp_path, monkeypatch, form):
    patterns = []

    def download(path, *, allow_patterns):
        assert path == "liuhaotian/tiny"
        patterns.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(shards, "snapshot_download", download)
    save_weights(tmp_path, original_tensors(tiny.llava()), form)
    shards.read_weights("liuhaotian/tiny")
    expected = [["model*.safetensors", "*.index.json"], ["pytorch_model*.bin", "*.index.json"]]
    assert patterns == expected[: 1 if form == "safetensors" else 2]


def test_files_from_before_pytorch_1_6_are_read(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert_equal_tensors(shards.read_tensors(tmp_path / "old.bin"), tensors)


def test_a_missing_shard_is_refused(tmp_path):
    save_weights(tmp_path, original_tensors(tiny.llava()), num_shards=3)
    shard = next(tmp_path.glob("*-00002-of-00003.*"))
    shard.unlink()
    refused(shards.read_weights, str(tmp_path), words=[str(tmp_path), "lacks", shard.name])


@pytest.mark.parametrize("make_damage", damage.DAMAGES, ids=lambda function: function.__name__)
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_broken_file_is_refused(tmp_path, form, make_damage):
    file = tmp_path / f"weights.{form}"
    (torch.save if form == "bin" else save_file)({"a": torch.zeros(300)}, file)
    make_damage(file)
    refused(shards.read_tensors, file, words=[str(file), "can't be read"])


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, zipped):
    file = tmp_path / "weights.bin"
    trap = {"a": damage.Trap(tmp_path / "sprung")}
    torch.save(trap, file, _use_new_zipfile_serialization=zipped)
    refused(shards.read_tensors, file, words=[str(file), "can't be read", "run as code"])
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a":'])
def test_a_broken_index_is_refused(tmp_path, content):
    (tmp_path / "pytorch_model.bin.index.json").write_text(content)
    words = ["pytorch_model.bin.index.json", "not an index of shards"]
    refused(shards.read_weights, str(tmp_path), words=words)


def test_a_folder_without_weights_is_refused(tmp_path):
    words = [str(tmp_path), "no weights", "model.safetensors", "pytorch_model.bin", "merge_lora_weights"]
    refused(shards.read_weights, str(tmp_path), words=words)


def test_a_missing_folder_is_an_oserror(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def load(path):
        return load_model(path, dtype=torch.float32)

    for path in (tmp_path, tmp_path / "gone"):
        for call in (shards.read_config, load_tokenizer, load_processor, load):
            with pytest.raises(OSError):
                call(str(path))
    with pytest.raises(OSError):
        shards.read_weights(str(tmp_path / "gone"))
