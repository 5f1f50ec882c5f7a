"""The command that writes an export with its model card."""

import argparse
import json
import os
import signal
import stat

import pytest
import torch
from huggingface_hub import ModelCard, constants
from omegaconf import OmegaConf

from scripts.export import main as command
from tests.helpers import tiny
from tests.helpers.configs import composed
from tests.helpers.errors import refused
from tests.helpers.runs import attached, save_run, tune
from vzip.runs.meta import WEIGHTS


def arguments(run, to, **options):
    """The arguments of the command."""
    defaults = {"out": None, "base": None, "budget": None, "copy": False, "force": False}
    return argparse.Namespace(run=run, to=to, **defaults | options)


@pytest.mark.parametrize("to", command.FORMATS)
def test_an_export_has_a_card(to, run):
    settings = composed("model=llava-7b", "optim.lr=0.002", "data.path=a/train.json")
    (run / "config.yaml").write_text(OmegaConf.to_yaml(settings, resolve=True))
    rows = []
    for name, tokens, score in (("full", 16, 0.5), ("tuned", 6, 0.4)):
        metrics = {"open": score, "all": 0.25}
        rows.append({"name": name, "num_visual_tokens": tokens, "num_questions": 8, "metrics": metrics})
    (run / "result.json").write_text(json.dumps({"rows": rows}))
    meta = json.loads((run / "meta.json").read_text())
    data = {"hash": "f00d", "num_rows": 1234, "fraction": 0.1, "seed": 3}
    (run / "meta.json").write_text(json.dumps(meta | {"data": data}))

    target = command.export(arguments(run, to))
    assert target == run / "export" / to
    assert [path.name for path in (run / "export").iterdir()] == [to]
    card = (target / "README.md").read_text()
    expected = [
        "# llava-7b,",
        "VisionZip(4 dominant + 2 contextual)",
        "| full | 16 | 8 | .500 | .250 |",
        "| tuned | 6 | 8 | .400 (80%) | .250 (100%) |",
        "1,234 examples of `train.json`",
        "seed 3; manifest hash `f00d`",
        "lr: 0.002",
        "licence, which is unknown here",
        "Apache-2.0",
    ]
    assert [words for words in expected if words not in card] == []

    # The hub shows the scores of the tuned model.
    data = ModelCard(card).data
    scores = [(result.metric_name, result.metric_value) for result in data.eval_results]
    assert scores == [("open, 6 visual tokens", 0.4), ("all, 6 visual tokens", 0.25)]
    assert data.library_name == ("peft" if to == "peft" else "transformers")

    # Paths on this machine don't leak.
    assert str(run) not in card
    assert meta["base"]["id"] not in card


def test_a_card_holds_no_variable_of_the_environment(run, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cret")
    settings = "{seed: '${oc.env:SECRET}', optim: {lr: '${oc.env:SECRET}'}, data: {path: '${oc.env:SECRET}'}"
    settings += ", model: {name: '${oc.env:SECRET}'}}"
    (run / "config.yaml").write_text(settings)
    (run / "result.json").write_text('{"rows": []}')
    target = command.export(arguments(run, "llava"))
    assert not any(b"s3cret" in path.read_bytes() for path in target.iterdir())


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b'{"rows": [1]}', b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.yaml", "result.json", "meta.json"])
def test_a_damaged_run_is_not_exported(name, content, run):
    (run / "config.yaml").write_text("seed: 0")
    (run / "result.json").write_text('{"rows": []}')
    (run / name).write_bytes(content)
    # Other entries of config.yaml than settings are nobody's business.
    if (name, content) == ("config.yaml", b'{"rows": [1]}'):
        return
    refused(command.export, arguments(run, "llava"), words=[name])
    assert not list(run.glob("export/*"))


def test_an_export_does_not_follow_a_link_out_of_the_run(run, tmp_path):
    (tmp_path / "home").mkdir()
    (run / "export").symlink_to(tmp_path / "home")
    refused(command.export, arguments(run, "llava"), words=["export is a link out of the run's folder"])
    assert not list((tmp_path / "home").iterdir())


@pytest.mark.parametrize("card", ["tags: vzip", "tags: 5", "tags: {vzip: 1}", "[vzip]", "- " * 20_000])
def test_a_strange_card_is_not_ours(card, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    refused(command.check_target, tmp_path, force=True, words=["is not an export"])


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("license: llama2", "under its licence: llama2, according to its card"),
        ("license: [llama2", "licence, which is unknown here"),
    ],
    ids=["a licence", "no YAML"],
)
def test_the_card_names_the_licence_of_the_base(card, licence, tmp_path):
    base = tiny.save_llava(tmp_path / "base")
    (base / "README.md").write_text(f"---\n{card}\n---\n# A base\n")
    run = save_run(tmp_path / "run", attached(base), base)
    written = (command.export(arguments(run, "llava")) / "README.md").read_text()
    assert licence in written
    assert ("license: llama2\n" in written) == ("according" in licence)
    refused(command.check_target, base, force=True, words=["is not an export, so it is not replaced"])


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_new_files_have_the_usual_permissions_and_linked_ones_keep_theirs(umask, mode, tmp_path):
    base = tmp_path / "base"
    tiny.llava().save_pretrained(base, max_shard_size="60KB")
    tiny.processor().save_pretrained(base)
    run = save_run(tmp_path / "run", tune(attached(base)), base)
    before = {path: path.stat().st_mode for path in base.iterdir()}
    old = os.umask(umask)
    try:
        target = command.export(arguments(run, "hf"))
    finally:
        os.umask(old)
    own = [path for path in target.iterdir() if path.stat().st_nlink == 1]
    assert target / WEIGHTS in own
    assert {stat.S_IMODE(path.stat().st_mode) for path in own} == {mode}
    assert {path: path.stat().st_mode for path in base.iterdir()} == before


def raise_full_disk(*_, **__):
    raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")


@pytest.mark.parametrize("place", ["/proc/nothing/hf", "file/x", "full"])
def test_a_target_that_can_not_be_written_is_refused(place, run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    if place == "full":
        monkeypatch.setattr(torch, "save", raise_full_disk)
    words = ["can't be written", "\n", "choose another place with --out"]
    refused(command.export, arguments(run, "llava", out=tmp_path / place), words=words)
    assert not (tmp_path / "full").exists()


def test_only_an_older_export_is_replaced_and_only_when_asked(run, tiny_folder):
    target = command.export(arguments(run, "llava"))
    words = ["is an export already; replace it with --force"]
    refused(command.export, arguments(run, "llava"), words=words)
    (target / "leftover").write_text("")
    command.export(arguments(run, "llava", force=True))
    assert not (target / "leftover").exists()
    assert (target / "mm_projector.bin").is_file()
    words = ["exists and is not an export"]
    refused(command.export, arguments(run, "hf", out=tiny_folder, force=True), words=words)


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("gguf", {}, "TO=gguf is unknown; choose one of: hf, llava, peft"),
        ("peft", {"copy": True}, "belong to TO=hf, not to TO=peft"),
        ("llava", {"budget": 6}, "belong to TO=hf, not to TO=llava"),
        ("hf", {"base": "nowhere"}, "the base model nowhere can't be loaded"),
    ],
)
def test_a_refused_export_leaves_nothing(to, options, message, run, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(command.export, arguments(run, to, **options), words=[message])
    assert not list(run.glob("export/*"))


def test_a_killed_export_leaves_nothing_for_the_next_one(tmp_path):
    target = tmp_path / "hf"
    child = os.fork()
    if not child:
        with command.atomic_folder(target) as folder:
            (folder / "half").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert not target.exists()

    with command.atomic_folder(target) as folder:
        (folder / "whole").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert [path.name for path in target.iterdir()] == ["whole"]

    with pytest.raises(RuntimeError), command.atomic_folder(target) as folder:
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert (target / "whole").is_file()
