"""Fixtures of the tests of scripts/evaluate."""

from dataclasses import asdict

import pytest

from tests.helpers.runs import attached, save_run, tune
from vzip.templates.encode import vicuna


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    """A finished run with a budget of 6, without config.yaml."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return save_run(folder, tune(attached(tiny_folder)), tiny_folder, template=asdict(vicuna()))
