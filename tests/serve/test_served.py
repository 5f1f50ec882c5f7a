"""What a served model's config.json must say."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.helpers import tiny
from vzip import UserError
from vzip.families import families
from vzip.integrations.vllm import served


def config(**vzip):
    """The config of a tiny LLaVA with a description of its reducer."""
    settings = families()["llava"].model_class.config_class(**tiny.architecture())
    settings.vzip = {"format": 1, "budget": 6, "reducer": {"name": "visionzip", "budget": 6}, **vzip}
    return settings


def test_a_card_knows_its_budgets():
    known = served.ServedReducers(config(other_budgets={"11": {"name": "visionzip", "budget": 11}}))
    assert (known.default, known.largest, list(known.reducers)) == (6, 11, [6, 11])
    assert known.reducer(None) is known.reducers[6]
    assert known.takes_several_images


@pytest.mark.parametrize(
    ("vzip", "words"),
    [
        ({"format": 2}, "vzip.format=2 is unknown"),
        ({"reducer": {"name": "nosuch"}}, "reducer='nosuch' is unknown"),
        ({"reducer": {"name": "visionzip", "budget": 400}}, "400"),
    ],
)
def test_a_card_that_can_not_be_served_is_refused(vzip, words):
    with pytest.raises(UserError, match=words):
        served.ServedReducers(config(**vzip))


def test_a_config_without_a_card_is_refused():
    with pytest.raises(UserError, match="make export TO=hf"):
        served.ServedReducers(SimpleNamespace(model_type="llava"))


def test_another_version_of_vllm_is_refused(monkeypatch):
    served.check_version()
    monkeypatch.setattr(served.vllm, "__version__", "0.40.1")
    with pytest.raises(UserError, match=r"this is 0\.40\.1"):
        served.check_version()


def test_the_plugin_is_imported_without_torch():
    code = "import sys, vzip.integrations.vllm; sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_reducer_alone_is_a_card_of_its_own():
    # What --hf-overrides gives for a model that was not tuned.
    settings = config()
    settings.vzip = {"reducer": {"name": "visionzip", "budget": 6}}
    assert list(served.ServedReducers(settings).reducers) == [6]
    settings.vzip = {"reducer": {"name": "identity"}}
    assert list(served.ServedReducers(settings).reducers) == [16]


def test_a_family_that_was_not_tested_is_refused():
    settings = SimpleNamespace(model_type="video_llava", vzip={"reducer": {"name": "identity"}})
    with pytest.raises(UserError, match="model_type"):
        served.ServedReducers(settings)


def test_stages_of_a_pipeline_are_refused():
    served.check_stages(SimpleNamespace(pipeline_parallel_size=1))
    with pytest.raises(UserError, match="--tensor-parallel-size instead"):
        served.check_stages(SimpleNamespace(pipeline_parallel_size=2))
