"""Nothing that a stranger's run or model names is built, imported or run."""

import ast
import json
import sys

import pytest
import torch
from omegaconf import OmegaConf

import vzip
from scripts.common.held_out import with_pictures
from scripts.efficiency.questions import held_out_pictures
from scripts.evaluate.questions import write_questions
from scripts.export import main as exports
from scripts.figures import main as figures
from scripts.report import read_runs
from tests.contract.test_house import SOURCES
from tests.helpers.damage import Trap
from tests.helpers.errors import refused
from tests.helpers.runs import attached, save_run, tune
from train import config

pytestmark = pytest.mark.slow


def hub_load(folder):
    """PyTorch's hub runs `hubconf.py` of a folder."""
    (folder / "hubconf.py").write_text(f"def f():\n    open({str(folder / 'sprung')!r}, 'w')\n")
    return {"_target_": "torch.hub.load", "repo_or_dir": str(folder), "model": "f", "source": "local"}


def unpickle(folder):
    torch.save(Trap(folder / "sprung"), folder / "x.pt")
    return {"_target_": "torch.load", "f": str(folder / "x.pt"), "weights_only": False}


def write_text(folder):
    return {"_target_": "pathlib.Path.write_text", "_args_": [str(folder / "sprung"), "x"]}


def module_in_the_run(folder):
    """A module beside the files of the run, whose folder Python can import."""
    (folder / "evil.py").write_text(f"open({str(folder / 'sprung')!r}, 'w')\ndef f():\n    pass\n")
    return {"_target_": "evil.f"}


def function_of_ours(folder):
    return {"_target_": "vzip.files.write_json", "path": str(folder / "sprung"), "content": 1}


def class_of_ours(folder):
    return {"_target_": "vzip.videos.VideoFile", "path": str(folder / "x.mp4")}


def hidden_in_a_template(folder):
    return {"_target_": "vzip.templates.chatml", "system": write_text(folder)}


def hidden_in_a_list(folder):
    return {"_target_": "vzip.templates.chatml", "system": [write_text(folder)]}


TRAPS = [
    hub_load,
    unpickle,
    write_text,
    module_in_the_run,
    function_of_ours,
    class_of_ours,
    hidden_in_a_template,
    hidden_in_a_list,
]


@pytest.fixture(params=TRAPS, ids=lambda trap: trap.__name__)
def trap(request, tmp_path, monkeypatch):
    """A folder, and a node of settings that creates the file `sprung` in it when it is built."""
    folder = tmp_path / "runs" / "received"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(folder)
    yield folder, request.param(folder)
    assert not (folder / "sprung").exists()
    assert "evil" not in sys.modules


def test_settings_build_only_what_vzip_has_for_it(trap):
    _, node = trap
    cfg = OmegaConf.create({"model": node, "reducer": node})
    refused(config.instantiate_target, cfg.model, words=[node["_target_"]])
    refused(config.build_reducers, cfg, words=[node["_target_"]])
    refused(config.family_class, cfg, words=[node["_target_"], "no family"])


@pytest.fixture
def received(trap, tiny_folder, data_folder):
    """A finished run whose config.yaml names the trap wherever something is built in training."""
    folder, node = trap
    save_run(folder, tune(attached(tiny_folder)), tiny_folder)
    settings = {
        "model": {"_target_": node, "name": "tiny", "template": node, "architecture": node},
        "reducer": node,
        "data": {
            "path": str(data_folder / "train.json"),
            "held_out": str(data_folder / "test.json"),
            "image_folder": str(data_folder / "images"),
        },
        "evaluate": {"questions": 2},
        "deepspeed": {"a": node},
    }
    settings["model"]["_target_"] = node["_target_"]
    # Without references in the YAML, which are refused before anything else.
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    row = {"name": "full", "num_visual_tokens": 16, "num_questions": 2, "metrics": {"all": 0.5}}
    result = {"rows": [row], "seed": 0, "num_steps": 1, "manifest": "0" * 64}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text("")
    return folder


@pytest.mark.parametrize(
    "trap", [hub_load, hidden_in_a_template], indirect=True, ids=lambda trap: trap.__name__
)
def test_no_command_builds_what_a_received_run_names(received, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VZIP_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(sys, "argv", ["figures", str(received), "--figures", "kept-tokens", "recovery"])
    figures.main.__wrapped__()
    assert (received / "figures" / "recovery.png").is_file()

    monkeypatch.setattr(sys, "argv", ["export", str(received), "llava"])
    exports.main.__wrapped__()
    refused(read_runs, received.parent, words=["holds no run of this version"])
    assert "received was left out" in capsys.readouterr().out

    assert len(held_out_pictures(received, 2)) == 2
    assert len(with_pictures(received)) == 8
    assert (write_questions(received) / "questions.parquet").is_file()
    vzip.load(received, device="cpu")


def test_no_call_lets_a_model_run_code():
    """transformers asks at the terminal where nobody says no."""
    silent = []
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            is_load = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained"
            if is_load and getattr(node.func.value, "id", "") != "PeftModel":
                refusals = [word for word in node.keywords if word.arg == "trust_remote_code"]
                if not refusals or refusals[0].value.value is not False:
                    silent.append(f"{path}:{node.lineno}")
    assert silent == []
