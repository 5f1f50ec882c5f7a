"""What `make tune` would refuse, `make data-check` refuses before it."""

import json

import pytest

from data.paths import data_dir
from scripts.prepare.check import check_data
from tests.helpers import tiny
from train.config import compose_settings
from vzip import UserError

pytestmark = pytest.mark.slow


def settings_of(overrides, folder, *changes):
    """The settings of a run on the data in a folder."""
    of_data = [f"data.path={folder}/train.json", f"data.image_folder={folder}/images", "data.held_out=null"]
    return compose_settings(*overrides, *of_data, *changes)


def test_data_that_can_be_tuned_on_passes_and_bad_rows_are_named(overrides, tmp_path, capsys):
    path = tiny.save_data(tmp_path, 120)
    entries = json.loads(path.read_text())
    entries[3]["conversations"] = []
    path.write_text(json.dumps(entries))
    check_data(settings_of(overrides, tmp_path))

    printed = " ".join(capsys.readouterr().out.split())
    assert "left out: row-3 (invalid): conversations is not a list" in printed
    # Other tests have prepared data of that name too.
    reports = (data_dir() / "prepared").glob("train-*/check.json")
    report = max(reports, key=lambda path: path.stat().st_mtime)
    assert [bad["id"] for bad in json.loads(report.read_text())["left_out"]] == ["row-3"]


REFUSED = {
    "text alone": ({"text_only": 9}, [], "no example of data.path=.* the projector can learn nothing"),
    "no label": ({}, ["data.max_tokens=1"], "has an answer to learn from within data.max_tokens=1"),
    "few rows": ({}, ["batch.size=10"], "batch.size=10 is more than the 9 examples"),
    "micro": ({}, ["engine=reference", "batch.micro=3"], "batch.size=8 is not a multiple"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_run_would_refuse_is_refused(overrides, tmp_path, case):
    data, changes, message = REFUSED[case]
    tiny.save_data(tmp_path, 9, **data)
    with pytest.raises(UserError, match=message):
        check_data(settings_of(overrides, tmp_path, *changes))
    if case == "text alone":  # from which LoRA in the language model learns
        check_data(settings_of(overrides, tmp_path, "tune=language_lora"))


def test_pictures_of_questions_that_changed_are_named(overrides, tmp_path):
    tiny.save_data(tmp_path, 9)
    questions = tiny.save_data(tmp_path, 8, text_only=0, held_out=True)
    cfg = settings_of(overrides, tmp_path, f"data.held_out={questions}")
    check_data(cfg)
    tiny.picture(99).save(tmp_path / "images" / "noise" / "test3.png")
    with pytest.raises(UserError, match=r"1 of 8 pictures .*\n  noise/test3\.png"):
        check_data(cfg)
