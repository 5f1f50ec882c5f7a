"""Every adapter and reducer on disk is complete, and transformers keeps its parts where adapters
expect them.
"""

import functools
import importlib
import inspect
import pkgutil

import pytest
import torch

import vzip
from tests.helpers import tiny
from tests.helpers.models import GREEDY
from vzip.families import Family, families, family_of
from vzip.reducers.base import Reducer
from vzip.reducers.identity import Identity

NO_ADAPTERS = (
    "anyres",
    "base",
    "encoded",
    "features",
    "grids",
    "install",
    "loading",
    "looking",
    "patches",
    "positions",
    *vzip.reducers.SHARED,
)
"""Modules of these folders that define neither adapter nor reducer."""


@pytest.fixture(params=list(tiny.KINDS))
def model(request):
    return tiny.llava(request.param)


# ---- The patched methods ----


@pytest.mark.parametrize("kind", list(tiny.KINDS))
def test_the_model_takes_its_features_from_the_patched_method(kind):
    """Forward and generate read `get_image_features().pooler_output` of the instance, once."""
    model = tiny.llava(kind)
    inputs = tiny.processor(kind)(
        images=[[tiny.picture(0)], [tiny.picture(1, 40, 90)]],
        text=["<image>a", "de<image>"],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    inner, returned = model.model, []
    plain = type(inner).get_image_features

    @functools.wraps(plain)
    def replaced(*args, **kwargs):
        output = plain(inner, *args, **kwargs)
        features = output.pooler_output
        noise = [torch.randn_like(image) for image in features]
        returned.append(torch.cat(noise))
        is_list = isinstance(features, list | tuple)
        output.pooler_output = noise if is_list else torch.stack(noise)
        return output

    inner.get_image_features = replaced
    with torch.no_grad():
        output = model(**inputs)
    name = type(inner).__name__
    moved = f"{name} does not use its get_image_features any more: adapt its file in vzip/families"
    assert len(returned) == 1, moved
    if hasattr(output, "image_hidden_states"):
        assert torch.equal(output.image_hidden_states.reshape_as(returned[0]), returned[0]), moved
    model.generate(**inputs, **GREEDY)
    assert len(returned) == 2, moved


def test_patched_methods_keep_the_signature_that_generate_reads(model):
    methods = family_of(model).patched_methods
    plain = {name: inspect.signature(getattr(model.model, name)) for name in methods}
    vzip.attach(model, dominant=4, contextual=2)
    assert {name: inspect.signature(getattr(model.model, name)) for name in methods} == plain


def test_the_parts_of_the_model_are_where_the_family_expects_them(model):
    family = family_of(model)
    # The features of these models are those of the last layer but one.
    assert family.num_layers_run(Identity()) == tiny.LAYERS - (not family.has_grids)
    projector = [model.get_submodule(name) for name in family.projector_names]
    of_modules = [parameter for part in projector for parameter in part.parameters()]
    assert [id(value) for value in family.projector.parameters()] == [id(value) for value in of_modules]
    assert family.language_model is model.model.language_model and family.lm_head is model.lm_head
    for title, name in family.frozen_names.items():
        assert family.frozen_parts[title] is model.get_submodule(name)

    parts = [*family.frozen_parts.values(), family.projector, family.language_model, family.lm_head]
    in_parts = [id(parameter) for part in parts for parameter in part.parameters()]
    outside = {name for name, parameter in model.named_parameters() if id(parameter) not in in_parts}
    assert len(in_parts) == len(set(in_parts)) and outside <= {"model.image_newline"}


# ---- Files on disk ----


def classes_in(package):
    """The classes that each adapter module of a package defines, by the module's name."""
    by_module = {}
    for entry in pkgutil.iter_modules(package.__path__):
        if entry.name in NO_ADAPTERS:
            continue
        module = importlib.import_module(f"{package.__name__}.{entry.name}")
        by_module[entry.name] = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and value.__module__ == module.__name__
        ]
    return by_module


@pytest.mark.parametrize(("name", "classes"), classes_in(vzip.reducers).items())
def test_every_reducer_on_disk_is_complete(name, classes):
    (cls,) = [value for value in classes if hasattr(value, "name")]
    assert cls.name == name and name in vzip.reducers.names()
    assert isinstance(cls.uses_attention, bool)

    members = {member for member in vars(Reducer) if not member.startswith("_")}
    members |= set(inspect.get_annotations(Reducer))
    assert not [member for member in members if not hasattr(cls, member)]
    for method in ("num_tokens", "__call__", "settings"):
        assert inspect.signature(getattr(cls, method)) == inspect.signature(getattr(Reducer, method))
    parameters = inspect.signature(cls).parameters.values()
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)


@pytest.mark.parametrize(("name", "classes"), classes_in(vzip.families).items())
def test_every_family_on_disk_is_complete(name, classes):
    (cls,) = [value for value in classes if issubclass(value, Family)]
    assert {"model_type", "model_class"} <= set(vars(cls))
    assert families()[cls.model_type] is cls  # no two families take the same models

    kinds = [kind for kind, (model_type, *_) in tiny.KINDS.items() if model_type == cls.model_type]
    assert kinds, "tests/helpers/tiny.py has no model of this family"
    inner_class = type(tiny.llava(kinds[0]).model)
    assert all(hasattr(inner_class, method) for method in cls(None).patched_methods)
