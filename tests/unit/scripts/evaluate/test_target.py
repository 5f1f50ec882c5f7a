"""What is evaluated: the settings of a run, an export or a base model, and the identity of its weights."""

import argparse
import os
import shutil
from dataclasses import asdict

import pytest
from huggingface_hub import constants

from scripts.evaluate import target as target_module
from scripts.evaluate.target import digest, find_target, settings_of_run
from tests.helpers import tiny
from tests.helpers.errors import refused
from tests.helpers.runs import edit_meta
from vzip.runs.export import write_hf
from vzip.runs.meta import ADAPTER, read_meta
from vzip.templates.encode import vicuna

OTHER_BUDGETS = {"9": {"name": "visionzip", "dominant": 7, "contextual": 2}}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def target_of(source, folder, budget=None):
    arguments = argparse.Namespace(source=str(source), budget=budget, out=folder, batch_size=None)
    return find_target(arguments)


def as_tuples(settings):
    return [(setting.name, setting.row, setting.budget) for setting in settings]


def test_settings_of_a_run(run):
    expected = [("full", "full", None), ("free", "free", 6), ("tuned", "tuned", 6)]
    assert as_tuples(settings_of_run(run)) == expected

    edit_meta(run, lambda meta: meta.update(other_budgets=OTHER_BUDGETS))
    names = [setting.name for setting in settings_of_run(run)]
    assert names == ["full", "free-6", "free-9", "tuned-6", "tuned-9"]


def test_a_run_without_its_starting_projector_has_the_tuned_setting_alone(run, tmp_path, capsys):
    edit_meta(run, lambda meta: meta["base"].update(projector=str(tmp_path / "gone.bin")))
    assert as_tuples(settings_of_run(run)) == [("tuned", "tuned", 6)]
    assert "full and training-free are left out" in capsys.readouterr().out


def test_results_stay_in_their_folder(run, tmp_path, tiny_folder, monkeypatch):
    """Neither a link in a received run nor a model that is named by dots leads out of it."""
    (tmp_path / "home").mkdir()
    (run / "eval").symlink_to(tmp_path / "home")
    refused(target_of, run, None, words=["eval is a link out of the run's folder"])
    (run / "eval").unlink()
    (run / "adapter" / "folder").mkdir(parents=True)
    assert target_of(run, None).folder == run / "eval"

    monkeypatch.chdir(shutil.copytree(tiny_folder, tmp_path / "model"))
    assert target_of(".", None, budget=[6]).folder == target_module.ROOT / "runs" / "eval" / "model"


def test_settings_of_a_base_model(tiny_folder, tmp_path):
    expected = [("full", "full", None), ("free-6", "free", 6), ("free-9", "free", 9)]
    assert as_tuples(target_of(tiny_folder, tmp_path, budget=[6, 9]).settings) == expected


def test_settings_of_an_export(run, tmp_path):
    edit_meta(run, lambda meta: meta.update(other_budgets=OTHER_BUDGETS))
    export = tmp_path / "export"
    export.mkdir()
    write_hf(run, export)

    target = target_of(export, tmp_path)
    assert as_tuples(target.settings) == [("tuned-6", "tuned", 6), ("tuned-9", "tuned", 9)]
    assert target.run is None
    assert target.names == [read_meta(export)["base"]["id"]]
    words = ["an export, which has its own budgets; leave --budget out"]
    refused(target_of, export, tmp_path, budget=[6], words=words)


def test_bad_sources_are_refused(run, tmp_path):
    refused(target_of, run, tmp_path, budget=[6], words=["which has its own budgets; leave --budget out"])
    refused(target_of, "llava-hf/x", tmp_path, words=["llava-hf/x is not a run folder", "--budget 64"])
    refused(target_of, tmp_path, tmp_path, words=["is not a run folder"])

    (run / "config.yaml").write_text("name: x\n")
    refused(target_of, run, tmp_path, words=["has not finished: it has no result.json"])


def test_a_base_model_with_a_recipe_is_asked_in_the_recipes_template(run, tiny_folder, tmp_path):
    # The recipe of the 13B model inherits its template from the 7B model.
    for name in ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"):
        assert target_of(name, tmp_path, budget=[64]).template == asdict(vicuna())
    assert target_of(tiny_folder, tmp_path, budget=[6]).template is None
    assert target_of(run, tmp_path).template is None  # a run has its own


def test_other_weights_are_another_model(run, tiny_folder, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    adapter = run / ADAPTER / "adapter_model.safetensors"
    adapter.parent.mkdir()
    adapter.write_bytes(b"some")

    def identities():
        return target_of(run, tmp_path).model, target_of(base, tmp_path, budget=[6]).model

    before = identities()
    (base / "README.md").write_text("a model card changes nothing")
    assert identities() == before

    adapter.write_bytes(b"more")
    shutil.copy(tiny.save_llava(tmp_path / "other", seed=1) / "model.safetensors", base)
    after = identities()
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_a_large_file_is_identified_by_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(target_module, "LARGE_FILE", 2)
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    before = digest([path])
    os.utime(path, ns=(1, 1))
    assert digest([path]) != before
