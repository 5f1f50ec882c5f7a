"""Settings: which are refused and how, and what is built from them."""

from dataclasses import fields, is_dataclass

import pytest
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data.batches.dataset import BatchPlan
from tests.helpers.configs import composed
from train import config
from train.checks import check
from train.settings import Config, check_argument, setting_names
from vzip import UserError
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip

pytestmark = pytest.mark.slow


def test_the_defaults_pass():
    check(composed())

    # The settings of a finished run are read from its config.yaml, which has no types.
    check(OmegaConf.create(OmegaConf.to_yaml(composed(), resolve=True)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.size=0", "batch.size=0 must be positive"),
        ("batch.micro=-1", "batch.micro=-1"),
        ("batch.tokens=0", "batch.tokens=0"),
        ("save_every=0", "save_every=0"),
        ("optim.epochs=0", "optim.epochs=0"),
        ("optim.lr=-1e-5", "optim.lr=-1e-05"),
        ("optim.lr=nan", "optim.lr=nan must be positive"),
        ("optim.warmup=1", "optim.warmup=1.0 must lie in [0, 1)"),
        ("optim.warmup=-0.1", "optim.warmup=-0.1"),
        ("optim.max_steps=0", "optim.max_steps=0"),
        ("optim.betas=[0.9]", "optim.betas=[0.9] must be two numbers"),
        ("optim.betas=[0.9,1.5]", "optim.betas=[0.9, 1.5]"),
        ("optim.weight_decay=-1", "optim.weight_decay=-1.0 must be at least 0"),
        ("optim.max_grad_norm=-1", "optim.max_grad_norm=-1"),
        ("optim.lr=1e38", "optim.lr=1e+38 must be at most 1000"),
        ("optim.weight_decay=1e30", "optim.weight_decay=1e+30 must be at most"),
        ("optim.betas=[nan,0.9]", "optim.betas=[nan, 0.9]"),
        ("optim.warmup=nan", "optim.warmup=nan"),
        ("optim.max_grad_norm=inf", "optim.max_grad_norm=inf"),
        ("optim.epochs=1e30", "optim.epochs=1e+30 must be at most"),
        ("evaluate.batch=0", "evaluate.batch=0"),
        ("evaluate.max_new_tokens=0", "evaluate.max_new_tokens=0"),
        ("evaluate.questions=-1", "evaluate.questions=-1"),
        ("memory_gb=0", "memory_gb=0.0 must be positive"),
        ("data.num_workers=-1", "data.num_workers=-1"),
        ("data.max_tokens=0", "data.max_tokens=0 must be a whole number, at least 1"),
        ("data.fraction=0", "data.fraction=0.0 must be a number in (0, 1]"),
        ("data.sources=coco", "data.sources=coco must be a list of sources, e.g. [coco, gqa]"),
        ("data.sources=[]", "data.sources=[] must be a list of sources"),
        ("model=video-llava-7b model.num_frames=0", "model.num_frames=0"),
        ("name=..", "name=.. must be the name of a folder below `runs`"),
        ("name=a/b", "name=a/b must be the name of a folder"),
        ("tune.projector=false", "tune.projector=false and tune.lora=null tune nothing"),
        ("tune.lora=true", "tune.lora=True must be null or a mapping"),
        ("tune=projector_lora tune.lora.r=0", "tune.lora.r=0"),
        ("tune=projector_lora tune.lora.r=1.5", "tune.lora.r=1.5 must be a whole number"),
        ("tune=projector_lora +tune.lora.rank=4", "tune.lora.rank is no setting"),
        ("tune=projector_lora tune.lora.target=vision", "choose one of: projector, language_model"),
        ("deepspeed.zero_optimization.stage=4", "stage=4 does not exist; choose one"),
        ("deepspeed=zero3 quantize=nf4", "quantize=nf4 does not go with ZeRO 3"),
        ("reducer.budget=[4,4]", "reducer.budget=[4, 4] must be a whole number, or a list of different ones"),
        ("reducer.budget=[4,8] data.cache=true", "does not go with data.cache=true"),
        ("+lr=1e-4", "lr is no setting; did you mean optim.lr?"),
        ("+optim.lrr=4", "optim.lrr is no setting; did you mean optim.lr?"),
        ("+inexact=nf4", "inexact is no setting any more: it was renamed to quantize"),
    ],
)
def test_a_wrong_setting_is_refused_with_a_reason(override, message):
    with pytest.raises(UserError) as error:
        check(composed(*override.split()))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("engine=quick", "expected one of [fast, reference]"),
        ("weights=none", "expected one of [pretrained, random]"),
        ("quantize=int4", "expected one of [nf4, int8]"),
        ("model.dtype=float16", "expected one of [float32, bfloat16, float64]"),
        ("data.fraction=abc", "could not be converted to Float"),
        ("tune.projector=maybe", "not a valid bool"),
        ("track.wandb=maybe", "not a valid bool"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(override, reason):
    with pytest.raises(HydraException, match=override) as error:
        composed(override)
    assert reason in str(error.value.__cause__)  # Hydra prints it below its own message


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data.text_rows=false", "data.text_rows is no setting any more: it was renamed to data.text_exam"),
        ("++data.text_rows=false", "it was renamed to data.text_examples"),
        ("model.bugdet=4", "model.bugdet is no setting; did you mean model.budget?"),
    ],
)
def test_a_wrong_name_on_the_command_line_is_refused_with_the_right_one(argument, message):
    with pytest.raises(UserError) as error:
        check_argument(argument)
    assert message in str(error.value)


OTHER_ARGUMENTS = """
    model=smol optim.lr=1,2 tune.lora.r=4 data.expected.rows=9 data.pictures.coco=[x] +optim.new=1
    model.architecture.text_config.hidden_size=8 reducer.anything=1 hydra.mode=RUN --multirun
    /runs/optim.x=y/run
"""


def test_other_arguments_are_left_to_hydra():
    for argument in OTHER_ARGUMENTS.split():
        check_argument(argument)


def test_values_without_a_type_are_checked_too():
    """The settings of the control and of a finished run come without a schema."""
    for wrong in ({"engine": "quick"}, {"batch": {"size": "many"}}, {"data": {"cache": 1}}):
        cfg = OmegaConf.create(OmegaConf.to_container(composed(), resolve=True))
        with pytest.raises(UserError, match=r"does not exist|must be"):
            check(OmegaConf.merge(cfg, wrong))


def test_a_dataclass_has_a_default_or_names_what_yaml_sets():
    """Every setting that Hydra composes is in the schema, so that `setting_names` is the whole list."""

    def names_in(group, schema, prefix=""):
        for field in fields(schema):
            if is_dataclass(field.type):
                names_in(group[field.name], field.type, f"{prefix}{field.name}.")
        assert set(group) == {field.name for field in fields(schema)}, prefix

    names_in(composed(), Config)


def test_every_setting_is_described():
    described = dict(config.describe_settings())
    assert set(setting_names()) <= set(described)
    assert all(described.values())
    assert {"reducer.budget", "tune.lora.r"} <= set(described)
    assert "optim.lr                      Peak learning rate.\n" in config.settings_help()
    assert max(len(line) for line in config.settings_help().splitlines()) <= 100
    assert "$" not in config.settings_help()  # Hydra would look for a name behind it


@pytest.mark.parametrize(
    ("overrides", "num_examples", "num_steps"),
    [
        ((), 400, 25),
        (("optim.epochs=2.5",), 400, 62),
        (("optim.epochs=0.1",), 400, 2),
        (("optim.max_steps=7",), 400, 7),
        (("optim.max_steps=700",), 400, 25),
    ],
)
def test_steps_follow_from_examples_and_epochs(overrides, num_examples, num_steps):
    for engine in ("fast", "reference"):
        cfg = composed(f"engine={engine}", "batch.size=16", "batch.micro=8", *overrides)
        assert config.batch_plan(cfg, num_examples=num_examples, world_size=1).num_steps == num_steps


def test_a_batch_that_can_not_be_cut_names_what_fits():
    def plan(micro, world_size, *, engine="reference"):
        cfg = composed(f"engine={engine}", "batch.size=12", f"batch.micro={micro}")
        return config.batch_plan(cfg, num_examples=100, world_size=world_size)

    message = r"batch\.size=12 .* batch\.micro=8 x 1 ranks; batch\.micro can be 1, 2, 3, 4, 6, 12$"
    with pytest.raises(UserError, match=message):
        plan(8, 1)
    with pytest.raises(UserError, match=r"x 2 ranks; batch\.micro can be 1, 2, 3, 6$"):
        plan(4, 2)
    with pytest.raises(UserError, match="multiple of 5"):
        plan(4, 5)
    # The fast path cuts as it likes.
    assert plan(8, 5, engine="fast") == BatchPlan(size=12, world_size=5, num_steps=8, seed=0)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 64), micro=st.integers(1, 64), world_size=st.integers(1, 9))
def test_the_advised_batch_works(size, micro, world_size):
    def plan(micro):
        changes = {"batch": {"size": size, "micro": micro}}
        cfg = OmegaConf.merge(composed("engine=reference"), changes)
        return config.batch_plan(cfg, num_examples=100, world_size=world_size)

    try:
        assert plan(micro).size == size
        assert size % (micro * world_size) == 0
    except UserError as error:
        advice = str(error).split("; ")[1]
        fitting = advice.removeprefix("batch.micro can be ").split(", ") if "micro" in advice else []
        assert bool(fitting) == (size % world_size == 0)
        for number in fitting:
            plan(int(number))


def test_too_few_examples_are_refused():
    with pytest.raises(UserError, match="has an answer to learn from"):
        config.batch_plan(composed(), num_examples=0, world_size=1)
    with pytest.raises(UserError, match=r"batch\.size=16 is more than the 3 examples"):
        config.batch_plan(composed("batch.size=16"), num_examples=3, world_size=1)


def test_the_name_is_a_function_of_the_settings():
    name = config.run_name(composed("seed=3"))
    assert name == config.run_name(composed("seed=3").copy())
    assert name.startswith("smol-visionzip-8-projector-seed3-")
    assert config.run_name(composed("reducer=identity")).startswith("smol-identity-projector-seed0-")
    assert config.run_name(composed("name=mine", "seed=3")) == "mine"


def test_a_run_is_recognised_by_the_settings_it_has_written():
    cfg = composed("quantize=nf4", "engine=reference", "optim.lr=1e-4")
    written = OmegaConf.create(OmegaConf.to_yaml(cfg, resolve=True))
    assert config.identity(written) == config.identity(cfg)
    assert config.run_name(written) == config.run_name(cfg)


def test_the_name_changes_with_the_settings_that_change_results():
    names = [config.run_name(composed())]
    for override in (
        *("optim.lr=1e-4", "model.budget=9", "data.fraction=0.2", "seed=1"),
        *("tune=projector_lora", "batch.micro=4", "weights=random"),
    ):
        names.append(config.run_name(composed(override)))
    assert len(set(names)) == len(names)

    for override in ("fresh=true", "track=none", "dry_run=true", "runs=elsewhere"):
        assert config.run_name(composed(override)) == names[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reducer.budget=null", "give reducer.budget"),
        ("reducer.merge=median", "reducer.merge='median' does not exist"),
        ("reducer.contextual=-1", "give reducer.budget, or both"),
    ],
)
def test_a_reducers_own_error_reaches_the_user(override, message):
    with pytest.raises(UserError) as error:
        config.build_reducer(composed(override))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "vzip.reducers.random.Random", "budget": 8, "bugdet": 3},
        {"_target_": "vzip.reducers.random.Random", "budget": 8, "tiles": "many"},
        {"_target_": "vzip.reducers.nosuch.NoSuch"},
    ],
)
def test_a_target_that_can_not_be_built_is_named(node):
    with pytest.raises(UserError, match=node["_target_"]):
        config.instantiate_target(OmegaConf.create(node))


@pytest.mark.parametrize(
    ("overrides", "reducer"),
    [
        (
            ["model.budget=64", "reducer.merge=average"],
            VisionZip(dominant=54, contextual=10, merge="average"),
        ),
        (["model=llava-7b", "reducer.budget=192"], VisionZip(dominant=162, contextual=30)),
        (["model=next-mistral-7b", "model.budget=320"], VisionZip(dominant=54, contextual=10)),
        (
            ["model=next-7b", "reducer.dominant=27", "reducer.contextual=5"],
            VisionZip(dominant=27, contextual=5),
        ),
        (["model=next-7b", "reducer.anyres=spatial"], VisionZip(dominant=27, contextual=5)),  # the family's
        (["model=onevision-0.5b"], VisionZip(dominant=68, contextual=13)),  # of one tile
        (["model=video-llava-7b"], VisionZip(dominant=14, contextual=3)),  # of one frame
        (["+exp=ablate-no-cls"], VisionZip(dominant=7, contextual=1, keep_cls=False)),
        (["+exp=ablate-early-layer"], VisionZip(dominant=7, contextual=1, layer=4)),
        (["+exp=ablate-no-dominant"], VisionZip(dominant=0, contextual=8)),
        (["model=next-7b", "reducer=random"], Random(budget=32)),
        (["model=next-7b", "reducer=identity"], Identity()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_has_the_reducer_that_its_settings_name(overrides, reducer):
    built = config.build_reducer(composed(*overrides))
    assert (type(built), built.settings()) == (type(reducer), reducer.settings())


@pytest.mark.parametrize("reducer", ["visionzip", "random"])
def test_a_budget_that_five_tiles_can_not_share_is_refused(reducer):
    with pytest.raises(UserError, match=r"^reducer\.budget=161 .* 5 tiles.* 160 or 165$"):
        config.build_reducer(composed("model=next-7b", f"reducer={reducer}", "reducer.budget=161"))
    # A budget of one tile has no such limit.
    assert config.build_reducer(composed("model=llava-7b", f"reducer={reducer}", "reducer.budget=161"))
