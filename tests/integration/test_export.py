"""`make export`, as its users start it."""

import json
import sys

import pytest

from tests.helpers import tiny
from tests.helpers.commands import start
from tests.helpers.original import save_original
from tests.helpers.runs import attached, save_run, tune

pytestmark = pytest.mark.integration


def test_the_command_writes_an_export_or_says_what_to_do(tmp_path):
    base = save_original(tmp_path / "llava", tiny.llava(), mm_vision_tower=str(tmp_path / "some" / "clip"))
    run = save_run(tmp_path / "run", tune(attached(base)), base)
    command = [sys.executable, "-m", "scripts.export.main"]
    export = tmp_path / "export"
    done = start([*command, str(run), "llava", "--out", str(export)])
    assert done.returncode == 0, done.stderr
    assert "mm_projector.bin" in done.stdout
    assert (export / "mm_projector.bin").is_file()
    assert "`load_pretrained_model(FOLDER, model_base=BASE" in (export / "README.md").read_text()
    assert json.loads((export / "config.json").read_text())["mm_vision_tower"]

    refused = start([*command, str(tmp_path), "hf"])
    assert refused.returncode == 2 and f"error: {tmp_path} is not a run folder" in refused.stderr
    assert "Traceback" not in refused.stderr
