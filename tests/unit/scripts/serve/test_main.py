"""Which folder is served, and what is refused before vLLM starts."""

import json

import pytest

from scripts.serve.main import served_folder
from vzip import UserError


def test_a_run_is_exported_once_and_an_export_is_served_at_once(run, capsys):
    folder = served_folder(str(run), None)
    assert folder == run / "export" / "hf"
    assert (
        json.loads((folder / "config.json").read_text())["architectures"][0] == "VZipForConditionalGeneration"
    )
    assert "exporting" in capsys.readouterr().out

    # Neither the run nor its export needs another one.
    assert served_folder(str(run), None) == served_folder(str(folder), None) == folder
    assert "exporting" not in capsys.readouterr().out


def test_what_can_not_be_served_is_refused(run, tiny_folder, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        served_folder(str(tmp_path / "nosuch"), None)
    with pytest.raises(UserError, match="not a run folder"):
        served_folder(str(tmp_path), None)
    with pytest.raises(UserError, match="is a base model"):
        served_folder(str(tiny_folder), None)

    (run / "meta.json").write_text('{"format": 1')
    with pytest.raises(UserError, match=r"meta\.json"):
        served_folder(str(run), None)


def test_a_damaged_export_is_refused(run):
    folder = served_folder(str(run), None)
    config = folder / "config.json"
    content = json.loads(config.read_text())

    content["vzip"]["format"] = 2
    config.write_text(json.dumps(content))
    with pytest.raises(UserError, match="format 2 is unknown"):
        served_folder(str(folder), None)

    config.write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        served_folder(str(folder), None)
