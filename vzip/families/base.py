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

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vzip.errors import UserError, check_choice
from vzip.families.anyres import ANYRES
from vzip.families.features import LanguageInputs, VisualFeatures
from vzip.families.install import check_not_attached, features_method, replace_method
from vzip.families.loading import Loading
from vzip.families.looking import Looking
from vzip.media import MediaInputs
from vzip.reducers.base import Reducer, VisionTokens, received_layers
from vzip.reducers.identity import Identity
from vzip.tap import layer_index, run_tower, tower_layout

HANDLED_OPTIONS = ("vision_feature_select_strategy", "vision_aspect_ratio", "return_dict")
"""Arguments of patched methods that the vision tower does not take; the config has their values."""


def num_dropped_tokens(config: Any) -> int:
    """Return how many leading tokens the model drops: 1 (CLS) for "default", 0 for "full"."""
    return 1 if config.vision_feature_select_strategy == "default" else 0


class Family(Loading, Looking):
    """Adapter of one family of models, around one model.

    A subclass in this folder is found by its `model_type`. The defaults suit models that keep their
    parts where transformers' LLaVA keeps them.

    Args:
        model: the conditional-generation model.
        anyres: order of the tokens of several tiles, see `vzip.families.anyres`.

    Raises:
        UserError: an unknown order.
    """

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
    num_around_image: ClassVar[int] = 0
    """Tokens that the model's processor writes around the placeholders of an image."""
    has_grids: ClassVar[bool] = False
    """Whether visual tokens have positions of time, row and column in the language model."""
    export_note: ClassVar[str | None] = None
    """Why an export can't be loaded with `transformers` alone; None if it can."""

    def __init__(self, model: Any, *, anyres: str = "released") -> None:
        check_choice("reducer.anyres", anyres, ANYRES)
        self.model = model
        self.anyres = anyres

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
    def projector_names(self) -> tuple[str, ...]:
        """Names of the modules that make up the projector."""
        return (self.projector_name,)

    @property
    def projector_modules(self) -> tuple[nn.Module, ...]:
        """The modules that make up the projector, as the model runs them."""
        return tuple(self._module(name) for name in self.projector_names)

    @property
    def projector(self) -> nn.Module:
        """The projector, as one module."""
        modules = self.projector_modules
        return modules[0] if len(modules) == 1 else nn.ModuleList(modules)

    @property
    def language_model(self) -> nn.Module:
        """The language model, without `lm_head`."""
        return self._module("model.language_model")

    @property
    def lm_head(self) -> nn.Module:
        """The layer that computes the logits."""
        module: nn.Module = self.model.lm_head
        return module

    @property
    def tower_layers(self) -> nn.Module:
        """The vision tower without the projector, which may be a part of it."""
        return self.tower

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
    def feature_width(self) -> int:
        """Numbers of a token before the projector."""
        return int(self.model.config.vision_config.hidden_size)

    @property
    def tile_side(self) -> int:
        """Side in pixels of the square picture that the tower takes."""
        return int(self.model.config.vision_config.image_size)

    @property
    def num_patches(self) -> int:
        """Patches of one picture of the tower's size."""
        return int((self.tile_side // self.model.config.vision_config.patch_size) ** 2)

    @property
    def num_groups(self) -> int:
        """What a reducer chooses from in one picture: its patches, or groups that become one token."""
        # The projector takes the patches of a group side by side, so their number follows from its width.
        return self.num_patches * int(self.model.config.vision_config.hidden_size) // self.feature_width

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of images that the processor cuts in different ways."""
        return [(self.tile_side, self.tile_side)]

    @property
    def patches_seen(self) -> list[int]:
        """How many patches a patch sees in each layer of the tower."""
        return [self.num_patches] * int(self.model.config.vision_config.num_hidden_layers)

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
        for layer in received_layers(reducer, range(1, num_layers + 1)):
            if layer is not None:
                run = max(run, layer_index(layer, num_layers, setting="reducer.object_layer") + 1)
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

    def written(self, processor: Any, reducer: Reducer, kind: str, inputs: MediaInputs, index: int) -> str:
        """Return the text that a processor writes for a processed image or video."""
        token: str = getattr(processor, f"{kind}_token")
        return token * self.num_processed_tokens(reducer, kind, inputs, index)

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
        num_layers = self.model.config.vision_config.num_hidden_layers
        received = received_layers(reducer, range(1, num_layers + 1))

        tower_options = {name: value for name, value in options.items() if name not in HANDLED_OPTIONS}
        return run_tower(
            tower,
            pixel_values,
            feature_layer=feature_layer,
            num_dropped=num_dropped,
            attention_layer=attention_layer,
            received_layers=[feature_layer if layer is None else layer for layer in received],
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

    def project_deep(self, features: VisualFeatures) -> tuple[Tensor, ...]:
        """Project what is added behind the first layers of the language model: float[n, d_llm] each."""
        return ()

    def positions(
        self,
        input_ids: Tensor,
        features: Mapping[str, VisualFeatures],
        *,
        counted: Tensor,
        first: Tensor,
    ) -> Tensor | None:
        """Number the tokens of some sequences; None if the language model only counts them.

        Args:
            input_ids: int64[T], the sequences one behind the other.
            features: by kind, for the placeholders in `input_ids`.
            counted: bool[T], false for padding.
            first: int64[T], the index of the first token of each token's sequence.

        Returns:
            int64[3, T]
        """
        return None

    def text_arguments(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Return the arguments of the model that depend on token ids int64[B, L] alone."""
        return {}

    def language_arguments(self, inputs: LanguageInputs) -> dict[str, Any]:
        """Return the arguments of the language model besides the embeddings."""
        return {} if inputs.positions is None else {"position_ids": inputs.positions}

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
        check_not_attached(self)
        for name, kind in self.patched_methods.items():
            replace_method(self, name, features_method(self, name, kind, reducer))

    def uninstall(self) -> None:
        """Give the model instance its own methods back."""
        for name in self.patched_methods:
            delattr(self.model.model, name)

    def features_for_model(
        self, kind: str, inputs: MediaInputs, reducer: Reducer, **options: Any
    ) -> VisualFeatures:
        """Compute `visual_features` for the patched method, whose model runs them at once."""
        return self.visual_features(kind, inputs, reducer, **options)

    def model_output(self, kind: str, features: VisualFeatures) -> Any:
        """Project the tokens, and return them as the model's own method would."""
        # The model wants the tokens of each image, or video, apart.
        of_each = list(torch.split(self.project(features), features.counts.tolist()))
        return BaseModelOutputWithPooling(
            pooler_output=torch.stack(of_each) if kind in self.stacked else of_each
        )
