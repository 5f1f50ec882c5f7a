"""Fixtures of the tests of scripts/demo."""

from dataclasses import asdict

import pytest

from scripts.demo.main import open_model
from tests.helpers.runs import attached, save_run, tune
from vzip.templates.encode import vicuna


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    """A finished run with a budget of 6, without config.yaml."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    handle = tune(attached(tiny_folder))
    return save_run(folder, handle, tiny_folder, template=asdict(vicuna("s ")))


@pytest.fixture(scope="module")
def model(run):
    return open_model(str(run), base=None, template=None, max_new_tokens=5)
