"""The adapter to one family of models: its parts, its numbers of tokens, and what it computes.

A LLaVA-type model of transformers turns pictures into embeddings of the language model in one
method of its inner module (`get_image_features`, `get_video_features`): vision tower, one of its
layers, projector. A family does the same in two steps:

    features = family.visual_features(kind, inputs, reducer)  # tower, reducer, order: frozen
    tokens = family.project(features)                         # projector: the part that learns

The features depend on frozen weights alone, so they can be cached.

`install` patches that method on one model instance. It then returns
`project(visual_features(...))`.

Legend of shapes: B pictures (images, tiles or frames), n visual tokens, d_llm width of the language
model.
"""

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vzip.checkpoints import hf
from vzip.checkpoints.shards import read_config
from vzip.errors import UserError, check_choice
from vzip.families.anyres import ANYRES
from vzip.families.features import VisualFeatures
from vzip.media import EXTRA_NAMES, PIXEL_NAMES, MediaInputs
from vzip.reducers.base import Reducer, VisionTokens
from vzip.reducers.identity import Identity
from vzip.tap import layer_index, run_tower, tower_layout

HANDLED_OPTIONS = ("vision_feature_select_strategy", "vision_aspect_ratio", "return_dict")
"""Arguments of patched methods that the vision tower does not take; the config has their values."""


def num_dropped_tokens(config: Any) -> int:
    """Return how many leading tokens the model drops: 1 (CLS) for "default", 0 for "full"."""
    return 1 if config.vision_feature_select_strategy == "default" else 0


class Family:
    """Adapter of one family of models, around one model.

    A subclass in this folder is found by its `model_type`. The defaults suit models that keep their
    parts where transformers' LLaVA keeps them.

    Args:
        model: the conditional-generation model.
        anyres: order of the tokens of several tiles, see `vzip.families.anyres`.

    Raises:
        UserError: an unknown order.
    """

    model_type: ClassVar[str]
    """`config.model_type` of the models that the family takes."""
    model_class: ClassVar[type]
    """The class of these models."""
    original: ClassVar[Any] = None
    """Module of `vzip.checkpoints.original` for folders of the model's own code; None without."""
    projector_name: ClassVar[str] = "model.multi_modal_projector"
    """Name of the projector among the model's modules."""
    frozen_names: ClassVar[Mapping[str, str]] = {"vision tower": "model.vision_tower"}
    """Titles and names of the other modules before the language model, the vision tower first."""
    kinds: ClassVar[tuple[str, ...]] = ("image",)
    """Kinds of media that the model takes: "image", "video"."""
    stacked: ClassVar[tuple[str, ...]] = ()
    """Kinds of media whose features the model wants as one tensor instead of a list."""
    budget_tiles: ClassVar[int] = 1
    """Number of tiles whose tokens a `budget` counts together."""
    config_of_features: ClassVar[tuple[str, ...]] = ("vision_feature_layer", "vision_feature_select_strategy")
    """Entries of the model's config that `visual_features` depends on."""
    export_note: ClassVar[str | None] = None
    """Why an export can't be loaded with `transformers` alone; None if it can."""

    def __init__(self, model: Any, *, anyres: str = "released") -> None:
        check_choice("reducer.anyres", anyres, ANYRES)
        self.model = model
        self.anyres = anyres

    # ---- Loading ----

    @classmethod
    def load_model(cls, path: str, *, dtype: torch.dtype) -> Any:
        """Load the model of a folder or hub id, on the CPU.

        Raises:
            OSError: no such folder or hub id, or no config.json in it.
            UserError: a broken file, a model of another family, or missing weights, of which
                `transformers` only warns.
        """
        config = read_config(path)
        if cls.original is not None and cls.original.is_original(config):
            return cls.original.load_model(path, dtype=dtype)

        # transformers would load another family's weights and only warn that none of them fit.
        model_type = config.get("model_type")
        if model_type != cls.model_type:
            raise UserError(
                f"{path} holds a model of type {model_type!r}, not {cls.model_type!r}; "
                f"give one of that family"
            )
        return hf.load_hf_model(cls.model_class, path, dtype=dtype)

    @classmethod
    def load_processor(cls, path: str) -> Any:
        """Load the processor, which counts all tokens. Raises the same errors as `load_model`."""
        if cls.original is not None and cls.original.is_original(read_config(path)):
            return cls.original.load_processor(path)
        return hf.load_hf_processor(path)

    @classmethod
    def from_architecture(cls, architecture: dict[str, Any], *, dtype: torch.dtype) -> Any:
        """Build the model with random weights, on torch's default device ("meta" for counting)."""
        model_class: Any = cls.model_class
        return model_class._from_config(model_class.config_class(**architecture), dtype=dtype).eval()

    def without_weights(self) -> Self:
        """Return an adapter around the config alone, which counts tokens in a data worker."""
        return type(self)(SimpleNamespace(config=self.model.config), anyres=self.anyres)

    def original_config(self, processor: Any) -> dict[str, Any] | None:
        """Return `config.json` for the model's own code; None if that can't load the model."""
        return None

    # ---- The parts of the model ----

    def _module(self, name: str) -> nn.Module:
        """Return a module by its name in the model."""
        # Found from the inner module, because a patched method has no other.
        module: nn.Module = self.model.model.get_submodule(name.removeprefix("model."))
        return module

    @property
    def tower(self) -> nn.Module:
        """The vision tower whose attention reducers read."""
        return self._module(next(iter(self.frozen_names.values())))

    @property
    def frozen_parts(self) -> dict[str, nn.Module]:
        """Modules before the language model except the projector, by title."""
        return {title: self._module(name) for title, name in self.frozen_names.items()}

    @property
    def projector(self) -> nn.Module:
        return self._module(self.projector_name)

    @property
    def language_model(self) -> nn.Module:
        return self._module("model.language_model")

    @property
    def lm_head(self) -> nn.Module:
        module: nn.Module = self.model.lm_head
        return module

    def drop_towers(self) -> None:
        """Free the memory of the frozen parts, for a model that only projects cached features."""
        for name in self.frozen_names.values():
            self.model.set_submodule(name, nn.Module())

    # ---- Sizes and counts ----

    @property
    def has_cls(self) -> bool:
        """Whether the vision tower has a CLS token."""
        return tower_layout(self.model.config.vision_config).has_cls

    @property
    def tile_side(self) -> int:
        """Side in pixels of the square picture that the tower takes."""
        return int(self.model.config.vision_config.image_size)

    @property
    def num_patches(self) -> int:
        """Patches of one picture of the tower's size."""
        return int((self.tile_side // self.model.config.vision_config.patch_size) ** 2)

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of images that the processor cuts in different ways."""
        return [(self.tile_side, self.tile_side)]

    @property
    def other_flops(self) -> int:
        """FLOPs of the other frozen parts for one picture. The model must be on the meta device."""
        return 0

    def num_layers_run(self, reducer: Reducer) -> int:
        """Count the layers of the tower that run, up to the last one that is needed."""
        config = self.model.config
        num_layers = config.vision_config.num_hidden_layers

        # The features' own layer, and that of the attention if it comes later.
        run = layer_index(config.vision_feature_layer, num_layers) + 1
        if reducer.uses_attention and reducer.layer is not None:
            run = max(run, layer_index(reducer.layer, num_layers, setting="reducer.layer") + 1)
        return run

    def num_tile_tokens(self, reducer: Reducer) -> int:
        """Count the tokens that remain of one picture. Raises UserError if it has fewer."""
        dropped = num_dropped_tokens(self.model.config)
        return reducer.num_tokens(self.num_patches, has_cls=self.has_cls, num_dropped=dropped)

    def num_tiles(self, image_size: tuple[int, int]) -> int:
        """Count the pictures that the tower sees of one image of (height, width) pixels."""
        return 1

    def num_image_tokens(self, reducer: Reducer, image_size: tuple[int, int] | None = None) -> int:
        """Count the placeholders of one image. Raises UserError for a side below 1 pixel."""
        self.check_image_size(image_size)
        return self.num_tile_tokens(reducer)

    def num_example_tokens(self, reducer: Reducer, image_sizes: Sequence[tuple[int, int] | None]) -> int:
        """Count the placeholders of all images of one example together."""
        return sum(self.num_image_tokens(reducer, size) for size in image_sizes)

    def num_video_tokens(self, reducer: Reducer, num_frames: int) -> int:
        """Count the placeholders of one video. Raises UserError if the model takes no videos."""
        raise UserError(f"{self.model_type!r} models take no videos")

    def num_processed_tokens(self, reducer: Reducer, kind: str, inputs: MediaInputs, index: int) -> int:
        """Count the placeholders of image or video number `index` among the processed ones."""
        if kind == "video":
            return self.num_video_tokens(reducer, len(inputs.pixels[index]))
        return self.num_image_tokens(reducer)

    def placeholder_id(self, kind: str) -> int:
        """Id of the token that stands for one visual token of an image, or of a video."""
        return int(getattr(self.model.config, f"{kind}_token_id"))

    def feature_settings(self) -> dict[str, Any]:
        """Return the entries of the model's config that `visual_features` depends on."""
        return {name: getattr(self.model.config, name) for name in self.config_of_features}

    def describe_reduction(self, reducer: Reducer) -> dict[str, Any]:
        """Return the reducer's name and settings, and the order of tiles, for checkpoints."""
        settings = {"name": reducer.name, **reducer.settings()}

        # Without a reduction, the model's own code orders the tokens.
        if not isinstance(reducer, Identity):
            settings["anyres"] = self.anyres
        return settings

    # ---- Checks before any work ----

    @staticmethod
    def check_image_size(image_size: tuple[int, int] | None) -> None:
        """Raise UserError if a side is below one pixel."""
        if image_size is not None and min(image_size) < 1:
            raise UserError(
                f"image_size={tuple(image_size)} is no picture; "
                f"give (height, width) in pixels, both at least 1"
            )

    def check_reducer(self, reducer: Reducer) -> None:
        """Raise UserError if a picture has too few tokens, or the tower too few layers."""
        self.num_tile_tokens(reducer)
        self.num_layers_run(reducer)

    def check_cacheable(self, reducer: Reducer) -> None:
        """Raise UserError if the visual features alone do not determine the projector's output."""

    # ---- The two computations ----

    def vision_tokens(self, reducer: Reducer, pixel_values: Tensor, **options: Any) -> VisionTokens:
        """Run the vision tower on float[B, 3, height, width], and return the reducer's input."""
        dropped = num_dropped_tokens(self.model.config)
        return self._run_tower(self.tower, reducer, pixel_values, num_dropped=dropped, **options)

    def _run_tower(
        self,
        tower: nn.Module,
        reducer: Reducer,
        pixel_values: Tensor,
        *,
        num_dropped: int,
        **options: Any,
    ) -> VisionTokens:
        """Run a tower up to the layers that the model and the reducer ask for."""
        # A caller of the patched method may ask for another layer than the config does.
        feature_layer = options.pop("vision_feature_layer", None)
        if feature_layer is None:
            feature_layer = self.model.config.vision_feature_layer

        # Attention is computed only for reducers that read it.
        attention_layer = None
        if reducer.uses_attention:
            attention_layer = feature_layer if reducer.layer is None else reducer.layer

        tower_options = {name: value for name, value in options.items() if name not in HANDLED_OPTIONS}
        return run_tower(
            tower,
            pixel_values,
            feature_layer=feature_layer,
            num_dropped=num_dropped,
            attention_layer=attention_layer,
            **tower_options,
        )

    def visual_features(
        self, kind: str, inputs: MediaInputs, reducer: Reducer, **options: Any
    ) -> VisualFeatures:
        """Run everything before the projector on all images, or all videos: the frozen part.

        Args:
            kind: "image" or "video".
            inputs: with normalized pixels.
            reducer: reduces each picture (image, tile or frame) by itself.
            options: `vision_feature_layer`, and arguments of the tower.
        """
        # An image is a single picture here, so its tokens keep the order of the reducer.
        features = reducer(self.vision_tokens(reducer, inputs.pixels, **options)).features
        return VisualFeatures.in_order(features, num_media=len(features))

    def project(self, features: VisualFeatures) -> Tensor:
        """Project the tokens: float[n, d_llm], in their order in the language model."""
        return self.run_projector(features.features).flatten(0, -2)

    def run_projector(self, features: Tensor) -> Tensor:
        """Run the projector in its own precision, and return float[..., d_llm]."""
        # The projector is trained in float32, also beside a bf16 model.
        dtype = next(self.projector.parameters()).dtype
        projected: Tensor = self.projector(features.to(dtype))
        return projected

    # ---- Patching one model instance ----

    @property
    def patched_methods(self) -> dict[str, str]:
        """Kinds of media, by the name of the inner module's method that is replaced for them."""
        return {f"get_{kind}_features": kind for kind in self.kinds}

    def install(self, reducer: Reducer) -> None:
        """Make this model instance reduce its pictures, until `uninstall`. Classes never change.

        Raises:
            UserError: a reducer is attached already.
        """
        # An attribute of the instance hides the method of its class. Other models keep that one.
        inner = self.model.model
        if set(self.patched_methods) & set(vars(inner)):
            raise UserError("a reducer is attached to this model already; call detach() on its handle first")

        for name, kind in self.patched_methods.items():
            method = getattr(type(inner), name)
            setattr(inner, name, types.MethodType(_patched(method, self, kind, reducer), inner))

    def uninstall(self) -> None:
        """Give the model instance its own methods back."""
        for name in self.patched_methods:
            delattr(self.model.model, name)


def _patched(method: Callable[..., Any], family: Family, kind: str, reducer: Reducer) -> Callable[..., Any]:
    """Make a method of `project(visual_features(...))` with the signature that `generate` reads."""
    signature = inspect.signature(method)
    family_class = type(family)
    anyres = family.anyres

    @functools.wraps(method)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        # All arguments by name, including those that `method` takes as **kwargs.
        arguments = dict(signature.bind_partial(self, *args, **kwargs).arguments)
        del arguments["self"]
        more_arguments = arguments.pop("kwargs", {})
        arguments |= more_arguments

        # Pixels and sizes are inputs; everything else is an option of the tower.
        inputs = MediaInputs.from_processed(kind, arguments)
        options = {
            name: value
            for name, value in arguments.items()
            if name not in PIXEL_NAMES[kind] and name not in EXTRA_NAMES
        }

        # `self` is the inner module, or its copy in a deep copy of the model. So a new adapter is
        # made around it: `family` still holds the first model.
        adapter = family_class(SimpleNamespace(config=self.config, model=self), anyres=anyres)
        features = adapter.visual_features(kind, inputs, reducer, **options)
        tokens = adapter.project(features)

        # The model wants the tokens of each image, or video, apart.
        of_each = list(torch.split(tokens, features.counts.tolist()))
        return BaseModelOutputWithPooling(
            pooler_output=torch.stack(of_each) if kind in family_class.stacked else of_each
        )

    return patched
