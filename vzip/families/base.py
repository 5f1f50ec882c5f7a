"""What a family adapter tells the rest: where the parts of a VLM are, how many tokens a picture takes, and the seam.

The seam is a method of the model's inner module (in transformers 5: `get_image_features`, `get_video_features`), which does
tower -> layer -> projector: on an attached model it is replaced, on the instance, by the family's `features`, which are made in
two steps: `reduced` depends on frozen weights alone, so that what it returns can be kept; then `placed` projects.

Legend of shapes: B pictures (images, tiles or frames), n visual tokens, d_llm width of the language model.
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

from vzip.checkpoints import hf as whole
from vzip.checkpoints.shards import read_config
from vzip.errors import UserError
from vzip.families.features import VisualFeatures
from vzip.reducers.base import Reducer, ReducerOutput, VisionTokens
from vzip.tap import layer_index, run_tower, tower_layout


def num_dropped(config: Any) -> int:
    """LLaVA's "default" selection drops the first token, "full" keeps all."""
    return 1 if config.vision_feature_select_strategy == "default" else 0


def run_vision_tower(
    tower: nn.Module, config: Any, reducer: Reducer, pixel_values: Tensor, **settings: Any
) -> VisionTokens:
    """Vision tokens of float[B, 3, height, width], with the attention that the reducer asks for.

    `settings` may hold `vision_feature_layer` and `num_dropped`, by default the config's; the others are the tower's.
    """
    layer = settings.pop("vision_feature_layer", None)
    layer = config.vision_feature_layer if layer is None else layer
    attention_layer = (layer if reducer.layer is None else reducer.layer) if reducer.uses_attention else None
    dropped = settings.pop("num_dropped", num_dropped(config))
    for handled in ("vision_feature_select_strategy", "image_sizes", "return_dict"):
        settings.pop(handled, None)
    return run_tower(
        tower,
        pixel_values,
        feature_layer=layer,
        num_dropped=dropped,
        attention_layer=attention_layer,
        **settings,
    )


def project(inner: nn.Module, features: Tensor) -> Tensor:
    """float[..., d_llm]: the projector's output, in its own precision (float32 master weights on a bf16 model)."""
    projector: Any = inner.multi_modal_projector
    projected: Tensor = projector(features.to(next(projector.parameters()).dtype))
    return projected


class Family:
    """Adapter of one VLM family, around one model. A subclass in this folder is found by `model_type`.

    The defaults here suit models that keep their parts where transformers' LLaVA keeps them.

    Args:
        model: the conditional-generation model.
    """

    model_type: ClassVar[str]
    """`config.model_type` of the models that the family takes."""
    model_class: ClassVar[type]
    """Their class."""
    original: ClassVar[Any] = None
    """Module of `vzip.checkpoints` for folders in the layout of the model's own code: `is_original`, `load_family`,
    `load_unreduced_processor`."""
    projector_name: ClassVar[str] = "model.multi_modal_projector"
    """Name of the projector among the model's modules."""
    frozen_names: ClassVar[Mapping[str, str]] = {"vision tower": "model.vision_tower"}
    """Titles and names of the other modules before the language model; the first is the tower that is tapped."""
    kinds: ClassVar[tuple[str, ...]] = ("image",)
    """Media that a row may hold: "image", "video"."""
    stacked: ClassVar[tuple[str, ...]] = ()
    """Kinds whose features the model wants as one tensor, and not as a list."""
    budget_tiles: ClassVar[int] = 1
    """Pictures that a `budget` is the total of."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    def load_model(cls, path: str, *, dtype: torch.dtype) -> Any:
        """The model of a folder or a hub id, on the CPU.

        Raises:
            OSError: there is neither, or it has no config.json.
            UserError: a broken file, weights that are not there, or another family's, of which `transformers` only warns.
        """
        config = read_config(path)
        if cls.original is not None and cls.original.is_original(config):
            return cls.original.load_model(path, dtype=dtype)
        if (kind := config.get("model_type")) != cls.model_type:
            raise UserError(
                f"{path} holds a model of type {kind!r}, not {cls.model_type!r}; give one of that family"
            )
        return whole.load_hf_model(cls.model_class, path, dtype=dtype)

    @classmethod
    def load_processor(cls, path: str) -> Any:
        """Its processor, unreduced. Raises as above."""
        if cls.original is not None and cls.original.is_original(read_config(path)):
            return cls.original.load_processor(path)
        return whole.load_hf_processor(path)

    @classmethod
    def from_architecture(cls, architecture: dict[str, Any], *, dtype: torch.dtype) -> Any:
        """The model with random weights, on torch's default device ("meta" for counting)."""
        model_class: Any = cls.model_class
        return model_class._from_config(model_class.config_class(**architecture), dtype=dtype).eval()

    def without_weights(self) -> Self:
        """The same adapter around the config alone: it counts tokens, and is light enough for a data worker."""
        return type(self)(SimpleNamespace(config=self.model.config))

    @property
    def has_cls(self) -> bool:
        """Whether the tapped tower has a CLS token."""
        return tower_layout(self.model.config.vision_config).has_cls

    @property
    def tower(self) -> nn.Module:
        """The vision tower that is tapped."""
        return self.frozen_parts[next(iter(self.frozen_names))]

    @property
    def frozen_parts(self) -> dict[str, nn.Module]:
        """Modules before the language model that are not the projector, by title."""
        return {title: self.model.get_submodule(name) for title, name in self.frozen_names.items()}

    @property
    def language_model(self) -> nn.Module:
        module: nn.Module = self.model.model.language_model
        return module

    @property
    def lm_head(self) -> nn.Module:
        module: nn.Module = self.model.lm_head
        return module

    @property
    def projector(self) -> nn.Module:
        module: nn.Module = self.model.get_submodule(self.projector_name)
        return module

    @property
    def tile_side(self) -> int:
        """Pixels of the side of the square that the tower takes."""
        return int(self.model.config.vision_config.image_size)

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of images that the processor cuts in different ways."""
        return [(self.tile_side, self.tile_side)]

    @property
    def other_flops(self) -> int:
        """FLOPs that the frozen parts beside the tapped tower take for one picture; asked of a model on the meta device."""
        return 0

    def num_layers_run(self, reducer: Reducer) -> int:
        """Layers of the tower up to the last one that is needed; those after it are not run."""
        config = self.model.config
        num_layers = config.vision_config.num_hidden_layers
        run = layer_index(config.vision_feature_layer, num_layers) + 1
        if reducer.uses_attention and reducer.layer is not None:
            run = max(run, layer_index(reducer.layer, num_layers, setting="reducer.layer") + 1)
        return run

    @property
    def num_patches(self) -> int:
        """Of one picture of the tower's size."""
        return int((self.tile_side // self.model.config.vision_config.patch_size) ** 2)

    def num_tile_tokens(self, reducer: Reducer) -> int:
        """Tokens that one picture of the tower's size becomes. Raises UserError if the budget does not fit."""
        return reducer.num_tokens(
            self.num_patches, has_cls=self.has_cls, num_dropped=num_dropped(self.model.config)
        )

    def num_tiles(self, image_size: tuple[int, int]) -> int:
        """Pictures that the tower sees of one image of (height, width) pixels."""
        return 1

    def num_image_tokens(self, reducer: Reducer, image_size: tuple[int, int] | None = None) -> int:
        """Placeholders that one image of (height, width) pixels takes. Raises UserError for a size that is none."""
        self.refuse_wrong_size(image_size)
        return self.num_tile_tokens(reducer)

    def num_example_tokens(self, reducer: Reducer, image_sizes: Sequence[tuple[int, int] | None]) -> int:
        """Placeholders that all images of one row take together."""
        return sum(self.num_image_tokens(reducer, size) for size in image_sizes)

    @staticmethod
    def refuse_wrong_size(image_size: tuple[int, int] | None) -> None:
        """Raises UserError for sides below one pixel."""
        if image_size is not None and min(image_size) < 1:
            raise UserError(
                f"image_size={tuple(image_size)} is no picture; give (height, width) in pixels, both at least 1"
            )

    def num_video_tokens(self, reducer: Reducer, num_frames: int) -> int:
        """Placeholders that one video of `num_frames` frames takes."""
        raise UserError(f"{self.model_type!r} models take no videos")

    def num_processed_tokens(self, reducer: Reducer, kind: str, inputs: Mapping[str, Any], index: int) -> int:
        """Placeholders of image or video `index` of what the processor returned, unreduced."""
        if kind == "video":
            return self.num_video_tokens(reducer, len(inputs["pixel_values_videos"][index]))
        return self.num_image_tokens(reducer)

    def refuse_unfit(self, reducer: Reducer) -> None:
        """Raises UserError, before any work, if the budget does not fit a picture or the tower has no such layer."""
        self.num_tile_tokens(reducer)
        self.num_layers_run(reducer)

    def reduce(self, reducer: Reducer, pixel_values: Tensor, **kwargs: Any) -> ReducerOutput:
        """The reducer's output for float[B, 3, height, width], each picture by itself, before the projector."""
        return reducer(self.vision_tokens(self.model.model, reducer, pixel_values, **kwargs))

    def refuse_uncacheable(self, reducer: Reducer) -> None:
        """Raises UserError, before any work, if `reduced` can't give all that the projector's output depends on."""

    def reduce_media(self, reducer: Reducer, kind: str, inputs: Mapping[str, Tensor]) -> VisualFeatures:
        """All images, or all videos, of what `vzip.media.model_inputs` returns, behind the reducer."""
        (_, pixels), *more = inputs.items()
        return self.reduced(kind, self.model.model, reducer, pixels, **dict(more))

    def media_features(self, reducer: Reducer, kind: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """float[n, d_llm]: projected tokens of all images, or all videos, one after the other.

        `inputs` are what `vzip.media.model_inputs` returns; or the fields of a `VisualFeatures`, which need neither tower nor reducer.
        """
        if "features" in inputs:
            return self.placed(self.model.model, VisualFeatures(**inputs))
        (_, pixels), *more = inputs.items()
        return torch.cat(self.features(kind, self.model.model, reducer, pixels, **dict(more)))

    def drop_towers(self) -> None:
        """Free the frozen parts' memory, for a model that only takes what `reduced` made. Take its fingerprint before."""
        for name in self.frozen_names.values():
            self.model.set_submodule(name, nn.Module())

    def placeholder_id(self, kind: str) -> int:
        """Id of the token that stands for a visual token of an image, or of a video."""
        return int(getattr(self.model.config, f"{kind}_token_id"))

    @classmethod
    def vision_tokens(cls, inner: Any, reducer: Reducer, pixel_values: Tensor, **kwargs: Any) -> VisionTokens:
        """What the reducer gets of float[B, 3, height, width]."""
        tower = inner.get_submodule(next(iter(cls.frozen_names.values())).removeprefix("model."))
        return run_vision_tower(tower, inner.config, reducer, pixel_values, **kwargs)

    @classmethod
    def reduced(cls, kind: str, inner: Any, reducer: Reducer, pixels: Any, **inputs: Any) -> VisualFeatures:
        """All images, or all videos, behind the reducer and before the projector; `pixels` and `inputs` are the seam's."""
        features = reducer(cls.vision_tokens(inner, reducer, pixels, **inputs)).features
        return VisualFeatures.as_it_is(features, num_media=len(features))

    @classmethod
    def placed(cls, inner: Any, reduced: VisualFeatures) -> Tensor:
        """float[n, d_llm]: the projected tokens, each at its place; here they stand as they are."""
        return project(inner, reduced.features).flatten(0, -2)

    @classmethod
    def features(cls, kind: str, inner: Any, reducer: Reducer, pixels: Any, **inputs: Any) -> list[Tensor]:
        """float[n, d_llm] of each image, or video: projected tokens. The arguments are those of `reduced`."""
        reduced = cls.reduced(kind, inner, reducer, pixels, **inputs)
        return list(torch.split(cls.placed(inner, reduced), reduced.counts.tolist()))

    @property
    def seams(self) -> dict[str, str]:
        """Kinds of media by the methods of the inner module that are replaced for them."""
        return {f"get_{kind}_features": kind for kind in self.kinds}

    def install(self, reducer: Reducer) -> None:
        """Make this model instance reduce its pictures. `uninstall` takes it back."""
        inner = self.model.model
        if set(self.seams) & set(vars(inner)):
            raise UserError("a reducer is attached to this model already; call detach() on its handle first")
        for name, kind in self.seams.items():
            seam = _patched_method(getattr(type(inner), name), type(self), kind, reducer)
            setattr(inner, name, types.MethodType(seam, inner))

    def uninstall(self) -> None:
        for name in self.seams:
            delattr(self.model.model, name)


def _patched_method(
    method: Callable[..., Any], family: type[Family], kind: str, reducer: Reducer
) -> Callable[..., Any]:
    """The family's features as a method with the signature of `method`, which generate() reads."""
    signature = inspect.signature(method)
    pixels = list(signature.parameters)[1]  # its name differs between versions of transformers

    # `self`, not the inner module of today, so that a deep copy of the model is whole.
    @functools.wraps(method)
    def seam(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind_partial(self, *args, **kwargs).arguments)
        given.pop("self")
        features = family.features(
            kind, self, reducer, given.pop(pixels, None), **given.pop("kwargs", {}), **given
        )
        return BaseModelOutputWithPooling(
            pooler_output=torch.stack(features) if kind in family.stacked else features
        )

    return seam
