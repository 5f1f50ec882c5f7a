"""Exports of bases in the layouts of other code, and the command as its users start it."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText

import vzip
from scripts.export import main as command
from tests.helpers import tiny
from tests.helpers.commands import start
from tests.helpers.original import save_original
from tests.helpers.runs import attached, logits, save_run, tune
from tests.unit.test_export import arguments
from tests.unit.test_mini_gemini import build, save_public
from vzip.checkpoints.original.renaming import read_projector
from vzip.runs.projector import WEIGHTS

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of a base in the layout of LLaVA's own code."""
    folder = tmp_path_factory.mktemp("original")
    base = save_original(folder / "llava", tiny.llava(), mm_vision_tower=str(folder / "some" / "clip"))
    return save_run(folder / "run", tune(attached(base)), base)


def test_a_base_in_llavas_layout_becomes_a_whole_model(run, tmp_path):
    target = command.export(arguments(run, "hf", out=tmp_path / "hf"))
    assert torch.equal(logits(*vzip.load(target, device="cpu")), logits(*vzip.load(run, device="cpu")))
    _, info = AutoModelForImageTextToText.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_llavas_loader_gets_the_config_of_the_base(run, tmp_path):
    target = command.export(arguments(run, "llava", out=tmp_path / "llava"))
    base = json.loads((run / "meta.json").read_text())["base"]["id"]
    want, got = (
        json.loads(path.read_text()) for path in ((tmp_path / base / "config.json"), target / "config.json")
    )
    assert {key: value for key, value in got.items() if key in want} == want
    assert read_projector(target / "mm_projector.bin").keys() == read_projector(run / WEIGHTS).keys()
    assert "`load_pretrained_model(FOLDER, model_base=BASE" in (target / "README.md").read_text()


def test_a_public_mini_gemini_becomes_a_whole_model(tmp_path):
    base = save_public(tmp_path, build(), towers=False)
    run = save_run(tmp_path / "run", tune(attached(base, "mini-gemini")), base)
    target = command.export(arguments(run, "hf"))

    def said(path):
        model, processor = vzip.load(path, device="cpu")
        with torch.no_grad():
            return model(
                **processor(images=[tiny.picture(1)], text=["w1 <image> w2"], return_tensors="pt")
            ).logits

    assert torch.equal(said(target), said(run))


def test_the_command_ends_with_what_there_is_or_what_to_do(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export.py", str(run), "llava", "--out", str(tmp_path / "llava")])
    command.main()
    assert "mm_projector.bin" in capsys.readouterr().out
    done = start([sys.executable, "-m", "scripts.export.main", str(tmp_path), "hf"])
    assert done.returncode == 2 and f"error: {tmp_path} is not a run folder" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "export").exists()
