"""Settings as the command line composes them, and the models they describe."""

from functools import cache

from tests.conftest import ROOT
from train import config
from train.models import count_model

CONFIGS = ROOT / "configs"
CONFIG_FILES = sorted(CONFIGS.rglob("*.yaml"))


def members(group):
    """The names of a group's YAML files."""
    return sorted(path.stem for path in CONFIG_FILES if path.parent == CONFIGS / group)


@cache
def composed(*overrides):
    """The settings that `make tune ARGS="OVERRIDES"` runs with. Do not change them: other tests share
    them.
    """
    return config.compose_settings(*overrides)


@cache
def counted(model):
    """The family of a model in configs/model, on the meta device. Do not change it: other tests share it."""
    return count_model(composed(f"model={model}"))
