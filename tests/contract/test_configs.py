"""Every YAML file below configs/ composes, resolves, and builds what it names; mistakes fail by name."""

import json

import pytest
import torch
import yaml
from deepspeed.runtime.config import DeepSpeedConfig
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import OmegaConf

from data.paths import data_dir
from tests.conftest import ROOT
from tests.helpers.configs import CONFIG_FILES, CONFIGS, composed, counted, members
from train import config
from train.checks import check
from train.engine import deepspeed_config
from train.models import count_model
from train.trainable import make_trainable
from vzip.families import Family, families
from vzip.reducers import names
from vzip.reducers.identity import Identity
from vzip.templates.encode import Template

GROUPS = ("model", "reducer", "data", "deepspeed", "tune", "track", "hardware")


def projector(vision, text):
    """Parameters of two layers with bias."""
    return vision * text + text + text * text + text


CLIP_336, CLIP_224, SIGLIP = 303_507_456, 303_179_776, 397_747_744
VICUNA_7B, VICUNA_13B = 6_607_605_760 + 32064 * 4096, 12_852_352_000 + 32064 * 5120
COUNTS = {  # parameters before the projector, of the projector, of language model and head
    "llava-7b": (CLIP_336, projector(1024, 4096), VICUNA_7B),
    "llava-13b": (CLIP_336, projector(1024, 5120), VICUNA_13B),
    "next-7b": (CLIP_336, projector(1024, 4096), VICUNA_7B),
    "next-13b": (CLIP_336, projector(1024, 5120), VICUNA_13B),
    "next-mistral-7b": (CLIP_336, projector(1024, 4096), 7_110_922_240 + 32064 * 4096),
    "video-llava-7b": (2 * CLIP_224, projector(1024, 4096), VICUNA_7B),
    "mini-gemini-7b": (CLIP_336 + 196_227_264 + 6_963_456, projector(1024, 4096), VICUNA_7B),
    "mini-gemini-13b": (CLIP_336 + 196_227_264 + 6_963_456, projector(1024, 5120), VICUNA_13B),
    "onevision-0.5b": (SIGLIP, projector(1152, 896), 494_090_112),
    "onevision-7b": (SIGLIP, projector(1152, 3584), 7_616_075_264),
}
BUDGETS = {  # tokens of the paper's picture: before, after
    "llava-7b": (576, 64),
    "llava-13b": (576, 64),
    "next-7b": (2928, 160),
    "next-13b": (2928, 160),
    "mini-gemini-7b": (576, 64),
    "mini-gemini-13b": (576, 64),
}


def targets(node):
    """All settings with a `_target_`, however deep."""
    if OmegaConf.is_dict(node):
        if "_target_" in node:
            yield node
        for key in node:
            yield from targets(node[key])


def override_of(path):
    """What a user types to get this file."""
    group = path.parent.name
    return f"+exp={path.stem}" if group == "exp" else f"{group}={path.stem}"


def test_every_file_is_the_defaults_or_a_group_member():
    folders = {path.parent.relative_to(CONFIGS).as_posix() for path in CONFIG_FILES}
    assert folders == {".", "exp", *GROUPS}
    assert [path.name for path in CONFIG_FILES if path.parent == CONFIGS] == ["tune.yaml"]
    assert all(members(group) for group in GROUPS)


@pytest.mark.parametrize("path", [path for path in CONFIG_FILES if path.parent != CONFIGS], ids=override_of)
def test_a_file_composes_resolves_and_builds(path):
    cfg = composed(override_of(path))
    check(cfg)
    settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)

    assert "???" not in json.dumps(settings)
    assert config.run_name(cfg)
    built = [node for node in targets(cfg) if node is not cfg.model]
    assert len(built) == 2  # the reducer and the template
    assert isinstance(config.instantiate_target(cfg.model.template), Template)
    family, reducer = counted(cfg.model.name), config.build_reducer(cfg)
    family.check_reducer(reducer)
    assert 1 <= family.num_image_tokens(reducer) <= family.num_image_tokens(Identity())


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_a_file_says_what_it_is_for(path):
    lines = [line for line in path.read_text().splitlines() if line != "# @package _global_"]
    assert lines[0].startswith("# ") and len(lines[0]) > 20


def test_a_member_is_what_it_is_named():
    assert all(composed(f"model={name}").model.name == name for name in members("model"))
    assert all(composed(f"tune={name}").tune.name == name for name in members("tune"))


@pytest.mark.parametrize("name", members("model"))
def test_a_model_builds_without_memory(name):
    cfg = composed(f"model={name}")
    cls = get_class(cfg.model["_target_"])
    family = counted(name)

    assert issubclass(cls, Family) and type(family) is cls
    assert all(parameter.is_meta for parameter in family.model.parameters())
    assert family.model.config.model_type == cls.model_type
    assert hasattr(torch, cfg.model.dtype)
    parts = (*family.frozen_parts.values(), family.projector, family.language_model, family.lm_head)
    assert all(sum(p.numel() for p in part.parameters()) > 0 for part in parts)


@pytest.mark.parametrize("name", members("model"))
def test_a_models_tower_and_language_model_stay_frozen(name):
    family = count_model(composed(f"model={name}"))
    opened = make_trainable(family, composed("tune=projector").tune).parameters
    projector = {f"{family.projector_name}.{key}" for key, _ in family.projector.named_parameters()}
    assert set(opened) == projector == {key for key, p in family.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("name", "expected"), COUNTS.items(), ids=COUNTS)
def test_a_models_parameters_are_as_documented(name, expected):
    family = count_model(composed(f"model={name}"))
    opened = make_trainable(family, composed("tune=projector").tune).parameters
    total = {
        id(p): p.numel() for part in (family.language_model, family.lm_head) for p in part.parameters()
    }  # may be tied
    before = sum(p.numel() for part in family.frozen_parts.values() for p in part.parameters())
    assert (before, sum(p.numel() for p in opened.values()), sum(total.values())) == expected
    assert len(opened) == 4


def test_real_models_have_documented_counts():
    small = {name for name in members("model") if name == "smol" or name.endswith("-tiny")}
    assert set(COUNTS) == set(members("model")) - small


@pytest.mark.parametrize(("name", "expected"), BUDGETS.items(), ids=BUDGETS)
def test_a_models_default_budget_is_the_papers(name, expected):
    family, reducer = counted(name), config.build_reducer(composed(f"model={name}"))
    assert (family.num_image_tokens(Identity()), family.num_image_tokens(reducer)) == expected


@pytest.mark.parametrize(("total", "share"), [(160, (27, 5)), (320, (54, 10)), (640, (108, 20))])
def test_budgets_of_next_are_the_papers_totals_over_five_tiles(total, share):
    cfg = composed("model=next-7b", f"reducer.budget={total}")
    reducer = config.build_reducer(cfg)
    assert (reducer.dominant, reducer.contextual) == share
    assert [
        counted("next-7b").num_image_tokens(reducer, size) for size in ((672, 672), (336, 1008), (336, 672))
    ] == [
        total,
        total * 4 // 5,
        total * 3 // 5,
    ]


def test_video_llava_has_the_papers_136_tokens():
    cfg = composed("model=video-llava-7b")
    family = counted("video-llava-7b")
    assert family.num_video_tokens(config.build_reducer(cfg), cfg.model.num_frames) == 136
    assert family.num_video_tokens(Identity(), cfg.model.num_frames) == 8 * 257  # its frames keep their CLS


@pytest.mark.parametrize("name", [name for name in members("model") if name.endswith("-tiny")])
def test_tiny_models_stand_for_families(name):
    larger = {counted(other).model_type for other in COUNTS}
    assert counted(name).model_type in larger and composed(f"model={name}").weights == "random"


def test_where_pictures_come_from_makes_no_other_run():
    plain = composed("model=llava-7b")
    mirrored = composed(
        "model=llava-7b",
        "data.pictures.coco=[/sets/train2017.zip]",
        "data.address=null",
        "data.num_workers=9",
    )
    assert config.run_name(mirrored) == config.run_name(plain)
    assert config.run_name(composed("model=llava-7b", "data.sources=[coco]")) != config.run_name(plain)


@pytest.mark.parametrize("model", members("model"))
def test_a_model_brings_data_that_the_command_line_can_change(model):
    chosen = composed(f"model={model}").data
    other = next(name for name in members("data") if composed(f"data={name}").data != chosen)
    assert chosen.path and composed(f"model={model}", f"data={other}").data == composed(f"data={other}").data
    assert composed(f"data={other}", f"model={model}").data == composed(f"data={other}").data


@pytest.mark.parametrize("name", members("deepspeed"))
def test_deepspeed_accepts_the_group(name):
    cfg = composed(f"deepspeed={name}", "batch.size=24", "batch.micro=4", "optim.max_grad_norm=0.5")
    parsed = DeepSpeedConfig(deepspeed_config(cfg))

    assert parsed.zero_config.stage == cfg.deepspeed.zero_optimization.stage
    # A step's micro batches are the engine's affair: any other number here would scale its loss.
    assert parsed.train_micro_batch_size_per_gpu == 1 and parsed.gradient_accumulation_steps == 1
    assert parsed.gradient_clipping == 0.5
    offloads = [key for key in cfg.deepspeed.zero_optimization if key.startswith("offload")]
    assert all(getattr(parsed.zero_config, key).device == "cpu" for key in offloads)


@pytest.mark.parametrize("name", members("data"))
def test_a_data_set_names_its_files_and_an_estimate(name):
    data = composed(f"data={name}").data
    assert data.path.endswith(".json") and data.image_folder and "held_out" in data
    assert 0 < data.fraction <= 1 and data.max_tokens > 0 and data.num_workers >= 0
    assert data.expected.rows > 0 and data.expected.text_tokens > 0


def test_every_adapter_on_disk_has_a_file():
    reducers = {config.build_reducer(composed(f"reducer={name}")).name for name in members("reducer")}
    assert reducers == set(names())
    assert {type(counted(name)) for name in members("model")} == set(families().values())


def test_an_experiment_is_added_not_replaced():
    # Hydra refuses `+exp=NAME` where the defaults list holds `exp` already.
    entries = yaml.safe_load((CONFIGS / "tune.yaml").read_text())["defaults"]
    groups = [key for entry in entries for key in (entry if isinstance(entry, dict) else [entry])]
    assert groups[:2] == ["schema", "_self_"]  # the schema first, or values are not typed
    assert set(GROUPS) <= set(groups)
    assert not any("exp" in group.split() or "optional exp" in group for group in groups)


@pytest.mark.parametrize("name", members("exp"))
def test_the_command_line_wins_over_an_experiment(name):
    cfg = composed(f"+exp={name}", "optim.lr=0.125", "reducer=random")
    assert cfg.optim.lr == 0.125 and cfg.reducer["_target_"].endswith("Random")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optim.learning_rate=1", "optim.learning_rate"),
        ("reducer.bugdet=3", "reducer.bugdet"),
        ("nosuch=1", "nosuch"),
        ("model.budgt=3", "model.budgt"),
        ("data.fractoin=0.5", "data.fractoin"),
        ("deepspeed.zero_optimization.stge=1", "deepspeed.zero_optimization.stge"),
        ("optim.lr=abc", "optim.lr"),
        ("batch.size=1.5", "batch.size"),
        ("seed=first", "seed"),
        ("fresh=maybe", "fresh"),
        ("reducer=visionzap", "reducer/visionzap"),
        ("model=lava-7b", "model/lava-7b"),
        ("hardware=24g", "hardware/24g"),
        ("memory_gb=much", "memory_gb"),
        ("+exp=nosuch", "exp/nosuch"),
    ],
)
def test_a_mistyped_key_or_value_fails_by_name(override, key):
    with pytest.raises(HydraException) as error:
        composed(override)
    assert key in str(error.value)


@pytest.mark.parametrize(
    ("content", "key"),
    [("optim: {learning_rate: 1}", "learning_rate"), ("optim: {lr: abc}", "abc"), ("nosuch: 1", "nosuch")],
)
def test_a_mistake_in_a_file_fails_by_name(tmp_path, content, key):
    with pytest.raises(HydraException) as error:
        experiment(tmp_path, content)
    assert key in str(error.value)


def experiment(folder, content):
    (folder / "exp").mkdir()
    (folder / "exp" / "mine.yaml").write_text(f"# @package _global_\n{content}\n")
    return composed(f"hydra.searchpath=[file://{folder}]", "+exp=mine")


def test_a_learning_rate_without_a_point_is_a_number(tmp_path):
    assert yaml.safe_load("2e-5") == "2e-5"  # the trap that the typed schema closes
    for cfg in (
        composed("optim.lr=2e-5"),
        experiment(tmp_path, "optim: {lr: 2e-5}"),
        composed("model=llava-7b"),
    ):
        assert isinstance(cfg.optim.lr, float) and cfg.optim.lr == 2e-5


def differences(named, found, path=""):
    """Fields that the YAML file names and the checkpoint's config has otherwise, or not at all."""
    for key, value in named.items():
        if isinstance(value, dict):
            yield from differences(value, found.get(key, {}), f"{path}{key}.")
        elif key not in found or found[key] != value:
            yield f"{path}{key}: {value} in the YAML file, {found.get(key)} in the checkpoint"


def test_the_embedded_defaults_architecture_is_the_prepared_ones():
    path = data_dir() / "smol" / "model" / "config.json"
    if not path.is_file():
        pytest.skip(f"the embedded default is not prepared: no {path}; run `make data`")
    architecture = OmegaConf.to_container(composed("model=smol").model.architecture, resolve=True)
    assert list(differences(architecture, json.loads(path.read_text()))) == []


def test_the_wandb_sweep_starts_runs_that_compose():
    sweep = yaml.safe_load((ROOT / "scripts" / "sweep.yaml").read_text())
    assert (ROOT / sweep["program"]).is_file() and sweep["command"][-1] == "${args_no_hyphens}"
    for last in (0, -1):
        chosen = {
            name: values.get("value", values.get("values", [None])[last])
            for name, values in sweep["parameters"].items()
        }
        cfg = composed(*(f"{name}={value}" for name, value in chosen.items()))
        assert all(OmegaConf.select(cfg, name) == value for name, value in chosen.items() if "." in name)
