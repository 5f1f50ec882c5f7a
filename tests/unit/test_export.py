"""Exports of runs: whoever loads one has the run's tuned model, with vzip, with plain transformers, with peft."""

import argparse
import json
import os
import shutil
import signal
import stat
import sys
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
from scripts import push
from scripts.export import main as command
from tests.helpers import tiny
from tests.helpers.configs import composed
from tests.helpers.runs import attached, edit_meta, family_class, logits, save_run, tune
from train.trainable import make_trainable
from vzip import Comparison, UserError
from vzip.checkpoints.original.llava import _check_config, _llava_config
from vzip.checkpoints.original.llava_config import llava_config
from vzip.checkpoints.original.renaming import read_projector
from vzip.families import families
from vzip.reducers.identity import Identity
from vzip.reducers.visionzip import VisionZip
from vzip.runs.export import _original_config, write_hf, write_llava, write_peft
from vzip.runs.projector import ADAPTER, WEIGHTS, fingerprint, projector_meta, save_checkpoint

IN_TRANSFORMERS = [kind for kind in tiny.KINDS if kind != "mini-gemini"]
LORA = {"projector": "projector_lora", "language_model": "language_lora"}


@pytest.fixture(scope="module", params=tiny.KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def exported(kind, tmp_path_factory):
    """(run, export, base) of each kind of model."""
    folder = tmp_path_factory.mktemp("exported")
    base = tiny.save_llava(folder / "base", kind)
    run = save_run(folder / "run", tune(attached(base, kind)), base)
    (folder / "export").mkdir()
    write_hf(run, folder / "export")
    return run, folder / "export", base


@pytest.fixture
def run(tmp_path, tiny_folder):
    return save_run(tmp_path / "run", tune(attached(tiny_folder)), tiny_folder)


def arguments(run, to, **more):
    """Of the command."""
    absent = {"out": None, "base": None, "budget": None, "copy": False, "force": False}
    return argparse.Namespace(run=run, to=to, **{**absent, **more})


def empty(folder):
    folder.mkdir()
    return folder


def question(processor):
    return processor(images=tiny.picture(3, 60, 100), text="<image>what is it?", return_tensors="pt")


def answers(model, processor):
    """Of several pictures, tokens that are sampled from a seed, so that they differ where a logit does."""
    torch.manual_seed(0)
    return model.generate(**question(processor), max_new_tokens=12, do_sample=True, pad_token_id=0)


def test_vzip_loads_an_export_as_the_run(exported):
    run, folder, _ = exported
    (model, processor), (want, wanted) = vzip.load(folder, device="cpu"), vzip.load(run, device="cpu")
    assert torch.equal(question(processor)["input_ids"], question(wanted)["input_ids"])
    assert torch.equal(logits(model, processor), logits(want, wanted))
    assert torch.equal(answers(model, processor), answers(want, wanted))


def test_without_vzip_an_export_is_the_model_with_all_tokens(exported, kind):
    run, folder, base = exported
    if kind in IN_TRANSFORMERS:
        model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    else:
        model, info = family_class(kind).model_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert "get_image_features" not in vars(model.model)
    handle = attached(base, kind, reducer=Identity())
    handle.family.model.load_state_dict(load_file(run / WEIGHTS), strict=False)
    processor = family_class(kind).load_processor(str(folder))
    assert torch.equal(logits(model, processor), logits(handle.family.model, processor))
    untuned = attached(base, kind, reducer=Identity())
    assert not torch.equal(logits(model, processor), logits(untuned.family.model, processor))


def test_the_processor_needs_no_vzip_either(run, tmp_path, tiny_folder):
    write_hf(run, empty(tmp_path / "export"))
    processor = AutoProcessor.from_pretrained(tmp_path / "export")
    ids = question(processor)["input_ids"]
    assert torch.equal(ids, question(AutoProcessor.from_pretrained(tiny_folder))["input_ids"])


def test_an_export_has_the_row_tuned_alone(run, tmp_path):
    write_hf(run, empty(tmp_path / "export"))
    comparison = Comparison.open(tmp_path / "export", device="cpu")
    assert comparison.rows == ("tuned",)
    with comparison.row("tuned") as (model, processor):
        assert torch.equal(logits(model, processor), logits(*vzip.load(run, device="cpu")))
    with pytest.raises(
        UserError, match=r"row='free' does not exist here; an export holds the tuned projector alone"
    ):
        comparison.reducer("free")


def test_the_projector_keeps_its_precision_and_the_template_its_words(tmp_path, tiny_folder):
    handle = tune(attached(tiny_folder, dtype=torch.bfloat16), seed=2)
    handle.family.projector.float()
    tune(handle)  # bits that bfloat16 has no room for
    words = {
        "name": "plainly",
        "user": "Q: ",
        "assistant": " A:",
        "end": "</s>",
        "adds_bos": True,
        "captions": False,
    }
    run = save_run(tmp_path / "run", handle, tiny_folder, dtype="bfloat16", template=words)
    write_hf(run, empty(tmp_path / "export"))
    (model, processor), (want, wanted) = (
        vzip.load(path, device="cpu") for path in (tmp_path / "export", run)
    )
    assert torch.equal(logits(model, processor), logits(want, wanted))
    assert torch.equal(
        model.model.multi_modal_projector.linear_1.weight, handle.family.projector.linear_1.weight
    )
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "export")
    rounded = handle.family.projector.linear_1.weight.to(torch.bfloat16)
    assert torch.equal(plain.model.multi_modal_projector.linear_1.weight, rounded)
    template = AutoProcessor.from_pretrained(tmp_path / "export").chat_template
    assert template == wanted.chat_template and "Q: " in template


def sharded(folder):
    tiny.llava().save_pretrained(folder, max_shard_size="60KB")
    tiny.processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("copy", [False, True], ids=["linked", "copied"])
def test_shards_without_the_projector_are_linked_and_the_others_written(tmp_path, copy):
    base = sharded(tmp_path / "base")
    run = save_run(tmp_path / "run", tune(attached(base)), base)
    write_hf(run, empty(tmp_path / "export"), copy=copy)
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "export").glob("*.safetensors")) == [*shards, WEIGHTS]
    held = {name for name in shards if any("multi_modal_projector" in key for key in load_file(base / name))}
    assert held and held != set(shards)
    same = {name for name in shards if (tmp_path / "export" / name).samefile(base / name)}
    assert same == (set() if copy else set(shards) - held)
    want = logits(*vzip.load(run, device="cpu"))
    shutil.rmtree(base)  # a hard link outlives it
    assert torch.equal(logits(*vzip.load(tmp_path / "export", device="cpu")), want)


def test_a_base_on_another_disk_is_linked_by_its_name(tmp_path):
    if not os.access("/dev/shm", os.W_OK) or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk: /dev/shm")
    base = sharded(tmp_path / "base")
    run = save_run(tmp_path / "run", tune(attached(base)), base)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        folder = Path(place)
        write_hf(run, folder)
        assert any(path.is_symlink() and path.samefile(base / path.name) for path in folder.iterdir())
        assert torch.equal(logits(*vzip.load(folder, device="cpu")), logits(*vzip.load(run, device="cpu")))
        shutil.rmtree(base)
        with pytest.raises(UserError, match="Export the run again, with --copy"):
            vzip.load(folder, device="cpu")


def test_where_the_base_was_is_not_passed_on(run, tmp_path, tiny_folder):
    edit_meta(run, lambda meta: meta["base"].update(id=str(tmp_path / "gone" / "my-llava")))
    write_hf(run, empty(tmp_path / "export"), base=str(tiny_folder))
    config = (tmp_path / "export" / "config.json").read_text()
    assert '"id": "my-llava"' in config and str(tmp_path) not in config and str(tiny_folder) not in config


def test_a_base_in_pytorchs_format_is_written_anew(tmp_path):
    base = tiny.save_llava(tmp_path / "base")
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    run = save_run(tmp_path / "run", tune(attached(base)), base)
    write_hf(run, empty(tmp_path / "export"))
    assert torch.equal(
        logits(*vzip.load(tmp_path / "export", device="cpu")), logits(*vzip.load(run, device="cpu"))
    )
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_budget_becomes_the_default_and_the_others_stay(tmp_path, tiny_folder):
    handle = tune(attached(tiny_folder))
    others = {"9": {"name": "visionzip", **VisionZip(budget=9).settings()}}
    run = save_run(tmp_path / "run", handle, tiny_folder, other_budgets=others)
    write_hf(run, empty(tmp_path / "export"), budget=9)
    for budget, num_tokens in ((None, 9), (9, 9), (6, 6)):
        model, processor = vzip.load(tmp_path / "export", budget=budget, device="cpu")
        assert (question(processor)["input_ids"] == model.config.image_token_id).sum() == num_tokens
    with pytest.raises(UserError, match="not tuned for budget=7, but for 6, 9"):
        write_hf(run, empty(tmp_path / "other"), budget=7)


def save_lora_run(folder, base, target):
    """A run with LoRA that is not zero any more, written as `train.checkpoint` does."""
    family = vzip.families.family_of(family_class("clip").load_model(str(base), dtype=torch.float32))
    reducer, print_of_base = VisionZip(budget=6), fingerprint(family)
    tuned = make_trainable(
        family,
        OmegaConf.create(
            {"projector": target == "language_model", "lora": {"target": target, "r": 4, "alpha": 8}}
        ),
    )
    with torch.no_grad():
        for parameter in tuned.parameters.values():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    tuned.peft_model.save_pretrained(folder / ADAPTER)
    named = {
        name.replace(".base_layer", ""): p
        for name, p in family.model.named_parameters()
        if "lora_" not in name
    }
    projector = {
        name: p.detach().clone() for name, p in named.items() if name.startswith(family.projector_name)
    }
    meta = projector_meta(family, reducer, base=str(base), base_fingerprint=print_of_base)
    save_checkpoint(
        folder, projector, meta | {"dtype": "float32", "adapter": True, "trained": list(tuned.parameters)}
    )
    return folder


@pytest.mark.parametrize("target", ["projector", "language_model"])
def test_lora_is_merged_into_a_whole_model(target, tmp_path, tiny_folder):
    run = save_lora_run(tmp_path / "run", tiny_folder, target)
    want = logits(*vzip.load(run, device="cpu"))
    assert not torch.allclose(want, logits(*attached_base(tiny_folder)), atol=1e-2)
    write_hf(run, empty(tmp_path / "export"))
    torch.testing.assert_close(
        logits(*vzip.load(tmp_path / "export", device="cpu")), want, rtol=1e-5, atol=1e-5
    )


def attached_base(base):
    handle = attached(base, budget=6)
    return handle.family.model, handle.processor(tiny.processor())


@pytest.mark.parametrize("target", [None, "projector", "language_model"])
def test_peft_loads_the_adapter_as_the_run(target, tmp_path, tiny_folder):
    if target:
        run = save_lora_run(tmp_path / "run", tiny_folder, target)
    else:
        run = save_run(tmp_path / "run", tune(attached(tiny_folder, budget=6)), tiny_folder)
    write_peft(run, empty(tmp_path / "adapter"))
    model = family_class("clip").load_model(str(tiny_folder), dtype=torch.float32)
    PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    handle = vzip.attach(model, budget=6)
    want = logits(*vzip.load(run, device="cpu"))
    torch.testing.assert_close(logits(model, handle.processor(tiny.processor())), want, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(tiny_folder)


def test_peft_takes_a_projector_of_every_family(exported, kind, tmp_path):
    run, _, base = exported
    write_peft(run, empty(tmp_path / "adapter"))
    model = family_class(kind).load_model(str(base), dtype=torch.float32)
    PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    handle = vzip.attach(model, dominant=4, contextual=2)
    processor = handle.processor(family_class(kind).load_processor(str(base)))
    assert torch.equal(logits(model, processor), logits(*vzip.load(run, device="cpu")))


def test_llavas_projector_is_the_runs_bit_for_bit(exported, tmp_path):
    run, _, _ = exported
    write_llava(run, empty(tmp_path / "llava"))
    want = load_file(run / WEIGHTS)
    tensors = torch.load(tmp_path / "llava" / "mm_projector.bin", weights_only=True)
    assert sorted(tensors) == [
        f"model.mm_projector.{layer}.{part}" for layer in (0, 2) for part in ("bias", "weight")
    ]
    assert torch.equal(
        tensors["model.mm_projector.2.bias"], want["model.multi_modal_projector.linear_2.bias"]
    )
    for form in ("bin", "safetensors"):
        again = read_projector(tmp_path / "llava" / f"mm_projector.{form}")
        assert again.keys() == want.keys() and all(torch.equal(again[name], want[name]) for name in want)


def test_llavas_config_describes_the_same_model(tiny_folder):
    """As our own reader of that layout understands it; the vocabulary ends where `<image>` was added."""
    family = attached(tiny_folder).family
    written = json.loads(json.dumps(llava_config(family.model.config, tiny.processor(), "some/clip")))
    _check_config("here", written)
    config = family.model.config
    read = _llava_config(written, config.vision_config)
    for name in (
        "image_token_id",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "image_seq_length",
    ):
        assert getattr(read, name) == getattr(config, name)
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
    ):
        assert getattr(read.text_config, name) == getattr(config.text_config, name)
    assert (written["mm_vision_tower"], written["mm_hidden_size"], written["rope_theta"]) == (
        "some/clip",
        32,
        10000.0,
    )


def test_the_real_llava_gets_a_config_and_other_towers_do_not(tmp_path, tiny_folder):
    """LLaVA's code finds its tower by name, which the layout of transformers does not hold."""
    config = LlavaConfig(**OmegaConf.to_container(composed("model=llava-7b").model.architecture))
    config.save_pretrained(tmp_path)
    written = _original_config(
        families()["llava"](SimpleNamespace(config=config)), tiny.processor(), str(tmp_path)
    )
    assert (written["mm_vision_tower"], written["mm_hidden_size"]) == (
        "openai/clip-vit-large-patch14-336",
        1024,
    )
    assert (written["vocab_size"], written["hidden_size"], written["num_hidden_layers"]) == (32000, 4096, 32)
    assert _original_config(attached(tiny_folder).family, tiny.processor(), str(tiny_folder)) is None


def test_what_llavas_format_has_no_place_for_is_refused(tmp_path, tiny_folder):
    run = save_lora_run(tmp_path / "run", tiny_folder, "language_model")
    with pytest.raises(UserError, match="LoRA in the language model"):
        write_llava(run, empty(tmp_path / "llava"))
    base = tiny.save_llava(tmp_path / "relu")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"projector_hidden_act": "relu"}))
    with pytest.raises(UserError, match=r"this projector \(relu, .* is not LLaVA's mlp2x_gelu"):
        write_llava(save_run(tmp_path / "other", tune(attached(base)), base), tmp_path / "llava")


@pytest.mark.parametrize("write", [write_hf, write_llava, write_peft])
def test_what_is_no_finished_run_of_this_base_is_refused(write, run, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="is not a run folder"):
        write(tmp_path / "nothing", tmp_path)
    with pytest.raises(UserError, match="another base model"):
        write(run, tmp_path, base=str(tiny.save_llava(tmp_path / "other", seed=1)))
    (run / "config.yaml").write_text("name: x\n")
    with pytest.raises(UserError, match=r"has not finished: it has no result.json"):
        write(run, tmp_path)


def test_an_export_is_neither_exported_again_nor_put_on_another_base(run, tmp_path, tiny_folder):
    folder = empty(tmp_path / "export")
    write_hf(run, folder)
    with pytest.raises(UserError, match="is an export itself"):
        write_hf(folder, tmp_path)
    with pytest.raises(UserError, match="holds its base model; leave base out"):
        vzip.load(folder, base=str(tiny_folder))
    shutil.copy(
        tiny.save_llava(tmp_path / "other", seed=1) / "model.safetensors", tmp_path / "all.safetensors"
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    other = load_file(tmp_path / "all.safetensors")
    save_file(
        {name: other[name] for name in index if name in other}, folder / "model-00001-of-00001.safetensors"
    )
    with pytest.raises(UserError, match="frozen weights differ"):
        vzip.load(folder, device="cpu")


def test_nothing_in_an_export_is_unpickled(run, tmp_path):
    class Trap:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "sprung",))

    write_hf(run, empty(tmp_path / "export"))
    torch.save(Trap(), tmp_path / "export" / WEIGHTS)
    with pytest.raises(UserError, match="can't be loaded"):
        vzip.load(tmp_path / "export", device="cpu")
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Puts a folder into a hub's cache, as one that was downloaded: links to blobs."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def put(folder, repo):
        place = tmp_path / "cache" / f"models--{repo.replace('/', '--')}"
        snapshot = place / "snapshots" / ("0" * 40)
        for part in (snapshot, place / "blobs", place / "refs"):
            part.mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        for number, path in enumerate(sorted(folder.iterdir())):
            shutil.copy(path, place / "blobs" / str(number))
            (snapshot / path.name).symlink_to(place / "blobs" / str(number))

    return put


def test_base_and_export_may_be_on_the_hub(hub_cache, tmp_path):
    hub_cache(sharded(tmp_path / "base"), "someone/base")
    run = save_run(tmp_path / "run", tune(attached("someone/base")), "someone/base")
    write_hf(run, empty(tmp_path / "export"))
    blobs = {path.stat().st_ino for path in (tmp_path / "cache").rglob("blobs/*")}
    assert any(path.stat().st_ino in blobs for path in (tmp_path / "export").iterdir())
    hub_cache(tmp_path / "export", "me/export")
    assert torch.equal(logits(*vzip.load("me/export", device="cpu")), logits(*vzip.load(run, device="cpu")))
    assert Comparison.open("me/export", device="cpu").meta["base"]["id"] == "someone/base"


@pytest.mark.parametrize("to", command.FORMATS)
def test_the_command_writes_an_export_with_its_card(to, run):
    settings = composed("model=llava-7b", "optim.lr=0.002", "data.path=a/train.json")
    (run / "config.yaml").write_text(OmegaConf.to_yaml(settings, resolve=True))
    rows = [
        {"name": "full", "num_visual_tokens": 16, "num_questions": 8, "metrics": {"open": 0.5, "all": 0.25}}
    ]
    (run / "result.json").write_text(json.dumps({"rows": rows}))
    meta = json.loads((run / "meta.json").read_text())
    data = {"hash": "f00d", "num_rows": 1234, "fraction": 0.1, "seed": 3}
    (run / "meta.json").write_text(json.dumps(meta | {"data": data}))
    target = command.export(arguments(run, to))
    assert target == run / "export" / to and command.has_our_card(target)
    card = (target / "README.md").read_text()
    said = [
        "# llava-7b,",
        "VisionZip(4 dominant + 2 contextual)",
        "| full | 16 | 8 | 0.500 | 0.250 |",
        "1,234 rows of `train.json`",
    ]
    said += ["seed 3; manifest hash `f00d`", "lr: 0.002", "licence, which is unknown here", "Apache-2.0"]
    assert [words for words in said if words not in card] == []
    assert (
        str(run) not in card and meta["base"]["id"] not in card
    )  # places on this machine are nobody's concern
    assert [path.name for path in (run / "export").iterdir()] == [to]


def test_the_card_names_the_bases_licence(tmp_path):
    base = tiny.save_llava(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: llama2\n---\n# A base\n")
    target = command.export(arguments(save_run(tmp_path / "run", attached(base), base), "llava"))
    card = (target / "README.md").read_text()
    assert "license: llama2\n" in card and "under its licence: llama2, as its card says" in card


def test_a_card_that_is_no_yaml_names_no_licence_and_is_no_export(tmp_path):
    base = tiny.save_llava(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: [llama2\n---\n# A base\n")
    target = command.export(arguments(save_run(tmp_path / "run", attached(base), base), "llava"))
    assert "licence, which is unknown here" in (target / "README.md").read_text()
    with pytest.raises(UserError, match="is no export, so that it is not replaced"):
        command.check_target(base, force=True)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_are_for_whom_the_umask_lets_read_and_linked_ones_stay(umask, mode, tmp_path):
    base = sharded(tmp_path / "base")
    run = save_run(tmp_path / "run", tune(attached(base)), base)
    before = {path: path.stat().st_mode for path in base.iterdir()}
    old = os.umask(umask)
    try:
        target = command.export(arguments(run, "hf"))
    finally:
        os.umask(old)
    own = [path for path in target.iterdir() if path.stat().st_nlink == 1]
    assert target / WEIGHTS in own and {stat.S_IMODE(path.stat().st_mode) for path in own} == {mode}
    assert {path: path.stat().st_mode for path in base.iterdir()} == before


def full(*_, **__):
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


@pytest.mark.parametrize("place", ["/proc/nothing/hf", "file/x", "full"])
def test_a_place_that_can_not_be_written_is_refused(place, run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    if place == "full":
        monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"can't be written.*\n.*choose another place with --out"):
        command.export(arguments(run, "llava", out=tmp_path / place))
    assert not (tmp_path / "full").exists()


def test_only_an_older_export_is_replaced_and_only_when_asked(run, tmp_path, tiny_folder):
    target = command.export(arguments(run, "llava"))
    with pytest.raises(UserError, match="is an export already; replace it with --force"):
        command.export(arguments(run, "llava"))
    (target / "left").write_text("")
    command.export(arguments(run, "llava", force=True))
    assert not (target / "left").exists() and (target / "mm_projector.bin").is_file()
    with pytest.raises(UserError, match="is there already and is no export"):
        command.export(arguments(run, "hf", out=tiny_folder, force=True))


@pytest.mark.parametrize(
    ("to", "more", "words"),
    [
        ("gguf", {}, "TO=gguf is unknown; choose one of: hf, llava, peft"),
        ("peft", {"copy": True}, "are of TO=hf, not of TO=peft"),
        ("llava", {"budget": 6}, "are of TO=hf, not of TO=llava"),
        ("hf", {"base": "nowhere"}, "the base model nowhere can't be loaded"),
    ],
)
def test_a_refused_export_leaves_nothing(to, more, words, run, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=words):
        command.export(arguments(run, to, **more))
    assert not (run / "export").is_dir() or not list((run / "export").iterdir())


def test_a_kill_while_it_writes_leaves_no_export_and_the_next_one_cleans_up(tmp_path):
    target = tmp_path / "hf"
    child = os.fork()
    if not child:
        with command.written_beside(target) as folder:
            (folder / "half").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert not target.exists()
    with command.written_beside(target) as folder:
        (folder / "whole").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"] and [
        path.name for path in target.iterdir()
    ] == ["whole"]
    with pytest.raises(RuntimeError), command.written_beside(target) as folder:
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["hf"] and (target / "whole").is_file()


def test_push_lists_what_links_lead_to_and_refuses_what_is_gone(tmp_path, capsys, monkeypatch):
    folder = empty(tmp_path / "hf")
    (folder / "README.md").write_text("---\ntags: [vzip]\n---\n")
    (tmp_path / "shard").write_bytes(bytes(5_000_000))
    (folder / "model-1.safetensors").symlink_to(tmp_path / "shard")
    monkeypatch.setattr(sys, "argv", ["push.py", str(folder), "--repo", "me/model", "--private", "--dry-run"])
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    push.main()
    shown = capsys.readouterr().out
    assert "model-1.safetensors" in shown and shown.count("5.000") == 2
    assert f"{folder} to me/model, private if it is new" in shown and "nothing was sent" in shown
    (tmp_path / "shard").unlink()
    with pytest.raises(UserError, match=r"model-1.safetensors link to files of the base model that are gone"):
        push.files_of(folder)
    with pytest.raises(UserError, match="is not an export"):
        push.files_of(tmp_path)


def test_push_teaches_who_has_no_token(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(UserError, match="no token for the hub"):
        push.push(tmp_path, "me/model", private=True)


@pytest.mark.parametrize(
    "fault", [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:9")], ids=["offline", "no network"]
)
def test_push_says_that_there_is_no_network(fault, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(constants, *fault)
    with pytest.raises(UserError, match="--repo me/model could not be sent"):
        push.push(tmp_path, "me/model", private=True)
