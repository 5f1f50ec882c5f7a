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

pytestmark = pytest.mark.slow

GROUPS = ("model", "reducer", "data", "deepspeed", "tune", "track", "hardware")


def projector(vision, text):
    """Parameters of two layers with bias."""
    return vision * text + text + text * text + text


CLIP_336, CLIP_224, SIGLIP = 303_507_456, 303_179_776, 397_747_744
INTERN_300M = 304_012_288
QWEN_TOWER = 630_470_400 + 1_505_280  # and its patch embedding
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
    "qwen2.5-vl-3b": (QWEN_TOWER, 1280 + projector(5120, 5120) - 5120 * 3072 - 3072, 3_085_938_688),
    "qwen3-vl-2b": (306_242_560, 100_714_496, 1_720_574_976),
    "qwen3-vl-4b": (306_242_560, 109_105_152, 4_022_468_096),
    "qwen3-vl-8b": (415_891_440, 160_496_896, 8_190_735_360),
    "internvl3-1b": (INTERN_300M, 8192 + projector(4096, 896), 629_697_920),
    "internvl3-2b": (INTERN_300M, 8192 + projector(4096, 1536), 1_776_283_136),
    "internvl3-8b": (INTERN_300M, 8192 + projector(4096, 3584), 7_612_820_992),
    "internvl3.5-1b": (INTERN_300M, 8192 + projector(4096, 1024), 751_632_384),
    "internvl3.5-2b": (INTERN_300M, 8192 + projector(4096, 2048), 2_031_739_904),
    "internvl3.5-4b": (INTERN_300M, 8192 + projector(4096, 2560), 4_411_424_256),
    "internvl3.5-8b": (INTERN_300M, 8192 + projector(4096, 4096), 8_190_735_360),
    "qwen2.5-vl-7b": (QWEN_TOWER, 1280 + projector(5120, 5120) - 5120 * 1536 - 1536, 7_615_616_512),
}
BUDGETS = {  # tokens of a picture of the usual size, as in the paper or in docs/models.md: before, after
    "llava-7b": (576, 64),
    "llava-13b": (576, 64),
    "next-7b": (2928, 160),
    "next-13b": (2928, 160),
    "mini-gemini-7b": (576, 64),
    "mini-gemini-13b": (576, 64),
    "qwen2.5-vl-7b": (576, 64),
    "qwen3-vl-2b": (576, 64),
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
    assert len(list(targets(cfg))) == 3  # the model, the reducer and the template
    assert isinstance(config.instantiate_target(cfg.model.template), Template)
    family = counted(cfg.model.name)
    reducer = config.build_reducer(cfg)
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
    for part in (*family.frozen_parts.values(), family.projector, family.language_model, family.lm_head):
        assert num_parameters(part) > 0


def num_parameters(*modules):
    """Parameters in the modules, each counted once: language model and head may share some."""
    unique = {id(parameter): parameter.numel() for module in modules for parameter in module.parameters()}
    return sum(unique.values())


@pytest.mark.parametrize("name", members("model"))
def test_only_the_projector_of_a_model_is_trainable(name):
    family = count_model(composed(f"model={name}"))
    opened = make_trainable(family, composed("tune=projector").tune).parameters
    in_projector = {id(parameter) for parameter in family.projector.parameters()}
    projector = {key for key, value in family.model.named_parameters() if id(value) in in_projector}
    trainable = {key for key, parameter in family.model.named_parameters() if parameter.requires_grad}
    assert set(opened) == projector == trainable

    if name in COUNTS:
        before = sum(num_parameters(part) for part in family.frozen_parts.values())
        after = num_parameters(family.language_model, family.lm_head)
        assert (before, num_parameters(family.projector), after) == COUNTS[name]
        # Besides two linear layers, the mergers of Qwen-VL and the projector of InternVL have norms, and
        # Qwen3-VL has four mergers.
        num_opened = {"qwen2_5_vl": 5, "qwen3_vl": 24, "internvl": 6}
        assert len(opened) == num_opened.get(family.model_type, 4)


def test_real_models_have_documented_counts():
    small = {name for name in members("model") if name == "smol" or name.endswith("-tiny")}
    assert set(COUNTS) == set(members("model")) - small


@pytest.mark.parametrize(("name", "expected"), BUDGETS.items(), ids=BUDGETS)
def test_the_default_budget_of_a_model_is_the_documented_one(name, expected):
    family, reducer = counted(name), config.build_reducer(composed(f"model={name}"))
    assert (family.num_image_tokens(Identity()), family.num_image_tokens(reducer)) == expected


@pytest.mark.parametrize(("total", "share"), [(160, (27, 5)), (320, (54, 10)), (640, (108, 20))])
def test_budgets_of_next_are_the_papers_totals_over_five_tiles(total, share):
    cfg = composed("model=next-7b", f"reducer.budget={total}")
    reducer = config.build_reducer(cfg)
    assert (reducer.dominant, reducer.contextual) == share
    family = counted("next-7b")
    sizes = {5: (672, 672), 4: (336, 1008), 3: (336, 672)}
    for num_tiles, size in sizes.items():
        assert family.num_image_tokens(reducer, size) == total * num_tiles // 5


def test_video_llava_has_the_papers_136_tokens():
    cfg = composed("model=video-llava-7b")
    family = counted("video-llava-7b")
    assert family.num_video_tokens(config.build_reducer(cfg), cfg.model.num_frames) == 136
    assert family.num_video_tokens(Identity(), cfg.model.num_frames) == 8 * 257  # its frames keep their CLS


@pytest.mark.parametrize("name", [name for name in members("model") if name.endswith("-tiny")])
def test_tiny_models_stand_for_families(name):
    larger = {counted(other).model_type for other in COUNTS}
    assert counted(name).model_type in larger and composed(f"model={name}").weights == "random"


def test_the_source_of_the_pictures_makes_no_other_run():
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
    # The engine cuts a step into micro batches itself. Any other number here would scale the loss.
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
def test_an_experiment_changes_more_than_its_groups(name):
    content = yaml.safe_load((CONFIGS / "exp" / f"{name}.yaml").read_text())
    groups = []
    for entry in content["defaults"]:
        for group, member in entry.items():
            groups.append(f"{group.removeprefix('override /')}={member}")
    is_sweep = content.get("hydra", {}).get("sweeper", {}).get("params")
    assert is_sweep or composed(f"+exp={name}") != composed(*groups)

    # The command line wins over an experiment.
    cfg = composed(f"+exp={name}", "optim.lr=0.125", "reducer=random")
    assert cfg.optim.lr == 0.125
    assert cfg.reducer["_target_"].endswith("Random")


@pytest.mark.parametrize("name", [name for name in members("model") if name.endswith("-13b")])
def test_a_13b_model_is_its_7b_model_with_a_larger_language_model(name):
    large = OmegaConf.to_container(composed(f"model={name}"), resolve=True)
    small = OmegaConf.to_container(composed(f"model={name.replace('13b', '7b')}"), resolve=True)
    sizes = {
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    }
    for settings in (large["model"], small["model"]):
        del settings["name"], settings["id"]
        for key in sizes:
            del settings["architecture"]["text_config"][key]
    assert large == small


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


def differences(architecture, checkpoint, path=""):
    """Fields of the YAML file that the checkpoint's config lacks, or has with another value."""
    for key, value in architecture.items():
        if isinstance(value, dict):
            yield from differences(value, checkpoint.get(key, {}), f"{path}{key}.")
        elif key not in checkpoint or checkpoint[key] != value:
            yield f"{path}{key}: {value} in the YAML file, {checkpoint.get(key)} in the checkpoint"


def test_the_architecture_of_the_embedded_default_is_that_of_the_prepared_model():
    path = data_dir() / "smol" / "model" / "config.json"
    if not path.is_file():
        pytest.skip(f"the embedded default is not prepared: no {path}; run `make data`")
    architecture = OmegaConf.to_container(composed("model=smol").model.architecture, resolve=True)
    assert list(differences(architecture, json.loads(path.read_text()))) == []


def test_the_wandb_sweep_starts_runs_that_compose():
    sweep = yaml.safe_load((ROOT / "scripts" / "sweep.yaml").read_text())
    assert (ROOT / sweep["program"]).is_file() and sweep["command"][-1] == "${args_no_hyphens}"
    for last in (0, -1):
        chosen = {}
        for name, values in sweep["parameters"].items():
            chosen[name] = values["value"] if "value" in values else values["values"][last]
        cfg = composed(*(f"{name}={value}" for name, value in chosen.items()))
        for name, value in chosen.items():
            assert "." not in name or OmegaConf.select(cfg, name) == value
