"""Exports of runs: whoever loads one gets the run's tuned model, with vzip, with plain transformers,
with peft.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaConfig

import vzip
from tests.helpers import damage, tiny
from tests.helpers.configs import composed
from tests.helpers.errors import refused
from tests.helpers.lora import save_lora_run
from tests.helpers.mini_gemini import build, save_public
from tests.helpers.original import save_original
from tests.helpers.runs import (
    attached,
    edit_meta,
    family_class,
    logits,
    save_run,
    tune,
)
from vzip import Comparison, UserError
from vzip.checkpoints.original.llava import _check_config, _llava_config
from vzip.checkpoints.original.llava_config import llava_config
from vzip.checkpoints.original.renaming import read_projector
from vzip.families import families
from vzip.reducers.identity import Identity
from vzip.reducers.visionzip import VisionZip
from vzip.runs.export import _llava_loader_config, write_hf, write_llava, write_peft
from vzip.runs.meta import WEIGHTS

pytestmark = pytest.mark.slow

IN_TRANSFORMERS = [kind for kind in tiny.KINDS if kind != "mini-gemini"]


QUICK = ("clip", "next", "mini-gemini")
"""Kinds that `make check` exports; `make test` exports all of them."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in tiny.KINDS],
)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def exported(kind, tmp_path_factory):
    """(run, export, base) of each kind of model."""
    folder = tmp_path_factory.mktemp("exported")
    base = tiny.save_llava(folder / "base", kind)
    run = save_run(folder / "run", tune(attached(base, kind)), base)
    return run, write(write_hf, run, folder / "export"), base


@pytest.fixture
def run(tmp_path, tiny_folder):
    return save_run(tmp_path / "run", tune(attached(tiny_folder)), tiny_folder)


def write(function, run, folder, **settings):
    """Export a run to a new folder; returns the folder."""
    folder.mkdir()
    function(run, folder, **settings)
    return folder


def question(processor):
    return processor(images=tiny.picture(3, 60, 100), text="<image>what is it?", return_tensors="pt")


def sample(model, processor):
    """Tokens that are sampled from a seed, so that they differ where a logit does."""
    torch.manual_seed(0)
    return model.generate(**question(processor), max_new_tokens=12, do_sample=True, pad_token_id=0)


def assert_same_model(folder, run):
    assert torch.equal(logits(*vzip.load(folder, device="cpu")), logits(*vzip.load(run, device="cpu")))


def assert_complete(folder, model_class=AutoModelForImageTextToText):
    """Plain transformers finds every tensor, and no other; returns the model."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


# For vzip and transformers


def test_vzip_loads_an_export_as_the_run(exported):
    run, folder, _ = exported
    loaded, expected = vzip.load(folder, device="cpu"), vzip.load(run, device="cpu")
    assert torch.equal(question(loaded[1])["input_ids"], question(expected[1])["input_ids"])
    assert torch.equal(logits(*loaded), logits(*expected))
    assert torch.equal(sample(*loaded), sample(*expected))


def test_without_vzip_an_export_is_the_tuned_model_with_all_tokens(exported, kind):
    run, folder, base = exported
    is_known = kind in IN_TRANSFORMERS
    model = assert_complete(
        folder, AutoModelForImageTextToText if is_known else family_class(kind).model_class
    )
    assert "get_image_features" not in vars(model.model)

    processor = family_class(kind).load_processor(str(folder))
    handle = attached(base, kind, reducer=Identity())
    untuned = logits(handle.family.model, processor)
    handle.family.model.load_state_dict(load_file(run / WEIGHTS), strict=False)
    assert torch.equal(logits(model, processor), logits(handle.family.model, processor))
    assert not torch.equal(logits(model, processor), untuned)


def test_an_export_has_only_the_setting_tuned(run, tmp_path, tiny_folder):
    folder = write(write_hf, run, tmp_path / "export")
    comparison = Comparison.open(folder, device="cpu")
    assert comparison.rows == ("tuned",)
    with comparison.row("tuned") as (model, processor):
        assert torch.equal(logits(model, processor), logits(*vzip.load(run, device="cpu")))
    words = ["row='free' does not exist here; an export holds the tuned projector alone"]
    refused(comparison.reducer, "free", words=words)

    # Its processor needs no vzip, and counts all tokens.
    ids = question(AutoProcessor.from_pretrained(folder))["input_ids"]
    assert torch.equal(ids, question(AutoProcessor.from_pretrained(tiny_folder))["input_ids"])


def test_the_projector_keeps_its_precision_and_the_template_its_texts(tmp_path, tiny_folder):
    handle = attached(tiny_folder, dtype=torch.bfloat16)
    handle.family.projector.float()
    tune(handle)
    template = {"name": "plainly", "user": "Q: ", "assistant": " A:", "end": "</s>", "adds_bos": True}
    run = save_run(tmp_path / "run", handle, tiny_folder, dtype="bfloat16", template=template)
    folder = write(write_hf, run, tmp_path / "export")
    assert_same_model(folder, run)

    expected = handle.family.projector.linear_1.weight
    model, processor = vzip.load(folder, device="cpu")
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, expected)
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    rounded = expected.to(torch.bfloat16)
    assert torch.equal(plain.model.multi_modal_projector.linear_1.weight, rounded)

    written = AutoProcessor.from_pretrained(folder).chat_template
    assert written == processor.chat_template and "Q: " in written


def save_sharded(folder):
    tiny.llava().save_pretrained(folder, max_shard_size="60KB")
    tiny.processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("copy", [False, True], ids=["linked", "copied"])
def test_shards_without_the_projector_are_linked_and_the_others_written(tmp_path, copy):
    base = save_sharded(tmp_path / "base")
    run = save_run(tmp_path / "run", tune(attached(base)), base)
    folder = write(write_hf, run, tmp_path / "export", copy=copy)
    shards = {path.name for path in base.glob("*.safetensors")}
    assert {path.name for path in folder.glob("*.safetensors")} == {*shards, WEIGHTS}

    with_projector = set()
    for name in shards:
        if any("multi_modal_projector" in key for key in load_file(base / name)):
            with_projector.add(name)
    assert with_projector and with_projector != shards
    linked = {name for name in shards if (folder / name).samefile(base / name)}
    assert linked == (set() if copy else shards - with_projector)

    # A hard link outlives its source.
    expected = logits(*vzip.load(run, device="cpu"))
    shutil.rmtree(base)
    assert torch.equal(logits(*vzip.load(folder, device="cpu")), expected)


def test_a_base_on_another_disk_is_linked_by_its_name(tmp_path):
    if not os.access("/dev/shm", os.W_OK) or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk: /dev/shm")
    base = save_sharded(tmp_path / "base")
    run = save_run(tmp_path / "run", tune(attached(base)), base)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        write_hf(run, folder)
        assert any(path.is_symlink() and path.samefile(base / path.name) for path in folder.iterdir())
        assert_same_model(folder, run)
        shutil.rmtree(base)
        refused(vzip.load, folder, device="cpu", words=["Export the run again, with --copy"])


def test_paths_of_this_machine_do_not_leak(run, tmp_path, tiny_folder):
    edit_meta(run, lambda meta: meta["base"].update(id=str(tmp_path / "gone" / "my-llava")))
    folder = write(write_hf, run, tmp_path / "export", base=str(tiny_folder))
    config = (folder / "config.json").read_text()
    assert '"id": "my-llava"' in config and str(tmp_path) not in config and str(tiny_folder) not in config


def test_a_base_in_pytorchs_format_is_written_anew(tmp_path):
    base = tiny.save_llava(tmp_path / "base")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    run = save_run(tmp_path / "run", tune(attached(base)), base)
    folder = write(write_hf, run, tmp_path / "export")
    assert_same_model(folder, run)
    assert_complete(folder)


def test_a_budget_becomes_the_default_and_the_others_stay(tmp_path, tiny_folder):
    run = save_run(tmp_path / "run", tune(attached(tiny_folder)), tiny_folder, VisionZip(budget=9))
    folder = write(write_hf, run, tmp_path / "export", budget=9)
    for budget, num_tokens in ((None, 9), (9, 9), (6, 6)):
        model, processor = vzip.load(folder, budget=budget, device="cpu")
        assert (question(processor)["input_ids"] == model.config.image_token_id).sum() == num_tokens
    refused(write_hf, run, tmp_path / "other", budget=7, words=["not tuned for budget=7, but for 6, 9"])


# LoRA and peft


@pytest.mark.parametrize("target", ["projector", "language_model"])
def test_lora_is_merged_into_a_complete_model_and_its_adapter_is_loaded_by_peft(
    target, tmp_path, tiny_folder
):
    run = save_lora_run(tmp_path / "run", tiny_folder, target)
    expected = logits(*vzip.load(run, device="cpu"))
    base = attached(tiny_folder)
    untuned = logits(base.family.model, base.processor(tiny.processor()))
    assert not torch.allclose(expected, untuned, atol=1e-2)

    folder = write(write_hf, run, tmp_path / "export")
    merged = logits(*vzip.load(folder, device="cpu"))
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)

    adapter = write(write_peft, run, tmp_path / "adapter")
    loaded = logits(*load_with_peft(adapter, tiny_folder))
    torch.testing.assert_close(loaded, expected, rtol=1e-5, atol=1e-5)


def load_with_peft(folder, base, kind="clip"):
    """(model, processor): a base with an exported adapter, reduced to 6 tokens."""
    model = family_class(kind).load_model(str(base), dtype=torch.float32)
    PeftModel.from_pretrained(model, str(folder))
    handle = vzip.attach(model, dominant=4, contextual=2)
    return model, handle.processor(family_class(kind).load_processor(str(base)))


def test_peft_loads_a_projector_of_every_family(exported, kind, tmp_path):
    run, _, base = exported
    folder = write(write_peft, run, tmp_path / "adapter")
    assert torch.equal(logits(*load_with_peft(folder, base, kind)), logits(*vzip.load(run, device="cpu")))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)


# LLaVA's own code


def test_llavas_projector_is_the_runs_bit_for_bit(exported, kind, tmp_path):
    run, _, _ = exported
    if kind in (*tiny.NATIVE, *tiny.SHUFFLED):
        with pytest.raises(UserError, match=r"TO=llava.*(merger|layer_norm).*choose TO=hf"):
            write(write_llava, run, tmp_path / "refused")
        return

    folder = write(write_llava, run, tmp_path / "llava")
    expected = load_file(run / WEIGHTS)
    tensors = torch.load(folder / "mm_projector.bin", weights_only=True)
    names = [f"model.mm_projector.{layer}.{part}" for layer in (0, 2) for part in ("bias", "weight")]
    assert sorted(tensors) == names
    bias = expected["model.multi_modal_projector.linear_2.bias"]
    assert torch.equal(tensors["model.mm_projector.2.bias"], bias)
    for form in ("bin", "safetensors"):
        again = read_projector(folder / f"mm_projector.{form}")
        assert again.keys() == expected.keys()
        assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_llavas_config_describes_the_same_model(tiny_folder):
    """Our own reader of that layout understands it; the vocabulary ends where `<image>` was added."""
    config = attached(tiny_folder).family.model.config
    written = json.loads(json.dumps(llava_config(config, tiny.processor(), "some/clip")))
    _check_config("here", written)
    read = _llava_config(written, config.vision_config)
    names = ("image_token_id", "vision_feature_layer", "vision_feature_select_strategy", "image_seq_length")
    assert all(getattr(read, name) == getattr(config, name) for name in names)
    names = ("hidden_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_parameters")
    assert all(getattr(read.text_config, name) == getattr(config.text_config, name) for name in names)
    assert (written["mm_vision_tower"], written["mm_hidden_size"]) == ("some/clip", 32)
    assert written["rope_theta"] == 10000.0


def test_the_real_llava_gets_a_config_and_other_towers_do_not(tmp_path, tiny_folder):
    """LLaVA's code finds its tower by name, which the layout of transformers does not hold."""
    config = LlavaConfig(**OmegaConf.to_container(composed("model=llava-7b").model.architecture))
    config.save_pretrained(tmp_path)
    family = families()["llava"](SimpleNamespace(config=config))
    written = _llava_loader_config(family, tiny.processor(), str(tmp_path))
    assert written["mm_vision_tower"] == "openai/clip-vit-large-patch14-336"
    assert (written["mm_hidden_size"], written["vocab_size"]) == (1024, 32000)
    assert (written["hidden_size"], written["num_hidden_layers"]) == (4096, 32)
    tiny_family = attached(tiny_folder).family
    assert _llava_loader_config(tiny_family, tiny.processor(), str(tiny_folder)) is None


def test_what_llavas_format_can_not_hold_is_refused(tmp_path, tiny_folder):
    run = save_lora_run(tmp_path / "run", tiny_folder, "language_model")
    refused(write, write_llava, run, tmp_path / "llava", words=["LoRA in the language model"])

    base = tiny.save_llava(tmp_path / "relu")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"projector_hidden_act": "relu"}))
    run = save_run(tmp_path / "other", tune(attached(base)), base)
    words = ["this projector (relu, ", "is not LLaVA's mlp2x_gelu"]
    refused(write_llava, run, tmp_path / "llava", words=words)


# Bases in the layouts of other code


def test_a_base_in_llavas_layout_becomes_a_complete_model_and_gives_its_config(tmp_path):
    tower = str(tmp_path / "some" / "clip")
    base = save_original(tmp_path / "base", tiny.llava(), mm_vision_tower=tower)
    run = save_run(tmp_path / "run", tune(attached(base)), base)
    folder = write(write_hf, run, tmp_path / "export")
    assert_same_model(folder, run)
    assert_complete(folder)

    folder = write(write_llava, run, tmp_path / "llava")
    config = [json.loads((path / "config.json").read_text()) for path in (base, folder)]
    assert config[0] == config[1]


def test_a_public_mini_gemini_becomes_a_complete_model(tmp_path):
    base = save_public(tmp_path, build(), towers=False)
    run = save_run(tmp_path / "run", tune(attached(base, "mini-gemini")), base)
    assert_same_model(write(write_hf, run, tmp_path / "export"), run)


# What is refused


@pytest.mark.parametrize("function", [write_hf, write_llava, write_peft])
def test_what_is_not_a_finished_run_of_this_base_is_refused(function, run, tmp_path):
    (tmp_path / "nothing").mkdir()
    refused(function, tmp_path / "nothing", tmp_path, words=["is not a run folder"])
    other = tiny.save_llava(tmp_path / "other", seed=1)
    refused(function, run, tmp_path, base=str(other), words=["another base model"])
    (run / "config.yaml").write_text("name: x\n")
    refused(function, run, tmp_path, words=["has not finished: it has no result.json"])


def test_an_export_is_neither_exported_again_nor_put_on_another_base(run, tmp_path, tiny_folder):
    folder = write(write_hf, run, tmp_path / "export")
    refused(write_hf, folder, tmp_path, words=["is an export itself"])
    refused(vzip.load, folder, base=str(tiny_folder), words=["holds its base model; leave base out"])

    other = load_file(tiny.save_llava(tmp_path / "other", seed=1) / "model.safetensors")
    shard = folder / "model-00001-of-00001.safetensors"
    changed = {name: other[name] for name in load_file(shard)}
    shard.unlink()
    save_file(changed, shard)
    refused(vzip.load, folder, device="cpu", words=["frozen weights differ"])


def test_nothing_in_an_export_is_unpickled(run, tmp_path):
    folder = write(write_hf, run, tmp_path / "export")
    torch.save(damage.Trap(tmp_path / "sprung"), folder / WEIGHTS)
    refused(vzip.load, folder, device="cpu", words=["can't be loaded"])
    assert not (tmp_path / "sprung").exists()


# The hub


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A function that puts a folder into a hub's cache, as a download would: links to blobs."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def put(folder, repo):
        cached = tmp_path / "cache" / f"models--{repo.replace('/', '--')}"
        snapshot = cached / "snapshots" / ("0" * 40)
        for part in (snapshot, cached / "blobs", cached / "refs"):
            part.mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        for number, path in enumerate(sorted(folder.iterdir())):
            shutil.copy(path, cached / "blobs" / str(number))
            (snapshot / path.name).symlink_to(cached / "blobs" / str(number))

    return put


def test_base_and_export_may_be_on_the_hub(hub_cache, tmp_path):
    hub_cache(save_sharded(tmp_path / "base"), "someone/base")
    run = save_run(tmp_path / "run", tune(attached("someone/base")), "someone/base")
    folder = write(write_hf, run, tmp_path / "export")
    blobs = {path.stat().st_ino for path in (tmp_path / "cache").rglob("blobs/*")}
    assert any(path.stat().st_ino in blobs for path in folder.iterdir())
    hub_cache(folder, "me/export")
    assert_same_model("me/export", run)
    assert Comparison.open("me/export", device="cpu").meta["base"]["id"] == "someone/base"
