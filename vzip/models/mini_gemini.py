"""Mini-Gemini (arXiv 2403.18814): a LLaVA with a second tower and *patch info mining*.

The picture goes to a ConvNeXt in high resolution, and to CLIP in low resolution. Each CLIP patch
then attends to the ConvNeXt features of its own region of the picture, and the result is added to
the patch. The number of tokens does not change.

Source of the formulas: the released code (repository dvlab-research/MGM, `mgm/model/mgm_arch.py`),
for `image_grid` = 1.

Legend of shapes: B images, N patches of the small picture, M high-resolution features of a patch's
region, d width of CLIP, c channels of all ConvNeXt stages together, S side of the ConvNeXt's first
map.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    ConvNextConfig,
    ConvNextPreTrainedModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaModel,
    LlavaProcessor,
    PreTrainedConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.convnext.modeling_convnext import ConvNextEmbeddings, ConvNextStage

from vzip.errors import UserError

CONVNEXT_LARGE = {
    "depths": [3, 3, 27, 3],
    "hidden_sizes": [192, 384, 768, 1536],
    "image_size": 768,
}
"""Arguments of `ConvNextConfig` for OpenCLIP's `convnext_large_d_320` of all public models."""


class MiniGeminiConfig(LlavaConfig):  # type: ignore[misc]
    """A `LlavaConfig` with one more config, `high_resolution_config`, for the ConvNeXt.

    `high_resolution_config.image_size` is the side of `pixel_values`, `vision_config.image_size`
    that of the small picture.
    """

    model_type = "mini_gemini"
    sub_configs: ClassVar[dict[str, Any]] = {
        "text_config": AutoConfig,
        "vision_config": AutoConfig,
        "high_resolution_config": ConvNextConfig,
    }

    high_resolution_config: dict[str, Any] | PreTrainedConfig | None = None
    """Config of the ConvNeXt; None stands for `CONVNEXT_LARGE`."""

    def __post_init__(self, **kwargs: Any) -> None:
        if self.high_resolution_config is None:
            self.high_resolution_config = CONVNEXT_LARGE
        if not isinstance(self.high_resolution_config, PreTrainedConfig):
            self.high_resolution_config = ConvNextConfig(**self.high_resolution_config)
        super().__post_init__(**kwargs)

    @property
    def grid(self) -> int:
        """Patches along one side of the small picture."""
        side: int = self.vision_config.image_size // self.vision_config.patch_size
        return side


def check_mini_gemini_config(config: MiniGeminiConfig) -> None:
    """Raise UserError for a config that does not work with mining.

    Each patch needs a region of whole high-resolution features, and all tokens must be patches of
    one layer.
    """
    high: Any = config.high_resolution_config
    # Each side must hold a whole number of ConvNeXt patches for each CLIP patch.
    stride = high.patch_size * config.grid
    if high.image_size % stride:
        raise UserError(
            f"high_resolution_config.image_size={high.image_size} can't be cut into "
            f"{config.grid} x {config.grid} regions of whole features; give a multiple of {stride}"
        )
    if config.vision_feature_select_strategy != "default":
        raise UserError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} would give "
            "mining the CLS token, which has no region of the picture; set it to 'default'"
        )
    if not isinstance(config.vision_feature_layer, int):
        raise UserError(
            f"vision_feature_layer={config.vision_feature_layer!r} names several layers; give one, e.g. -2"
        )


AutoConfig.register(MiniGeminiConfig.model_type, MiniGeminiConfig, exist_ok=True)


class HighResolutionTower(ConvNextPreTrainedModel):  # type: ignore[misc]
    """ConvNeXt without its pooling head: the maps of all stages, in the size of the first one.

    The blocks are those of transformers. The released code runs OpenCLIP's, which are timm's. Both
    compute the same (timm's LayerNorm has eps 1e-6, except in `convnext_xxlarge`);
    `vzip.checkpoints.original.mini_gemini` renames the weights.
    """

    # It has no attention, so any implementation that the rest of the model uses is fine.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: ConvNextConfig) -> None:
        super().__init__(config)
        self.embeddings = ConvNextEmbeddings(config)
        self.stages = nn.ModuleList()
        in_width = config.hidden_sizes[0]
        for index, (depth, width) in enumerate(zip(config.depths, config.hidden_sizes, strict=True)):
            # Every stage but the first halves the side of the map.
            stride = 1 if index == 0 else 2
            self.stages.append(ConvNextStage(config, in_width, width, stride=stride, depth=depth))
            in_width = width
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Compute float[B, c, S, S] from float[B, 3, height, width]."""
        # S is height / 4, and c the sum of the stages' widths.
        features = self.embeddings(pixel_values.to(self.dtype))
        maps: list[Tensor] = []
        for stage in self.stages:
            features = stage(features)
            # The first map is the largest, and has its size already.
            maps.append(_resize(features, maps[0].shape[-2:]) if maps else features)
        return torch.cat(maps, dim=1)


def _resize(images: Tensor, size: Any) -> Tensor:
    """Interpolate bilinearly, in float32 at least, like the released code."""
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=False).to(images.dtype)


class PatchInfoMining(nn.Module):
    """Adds to each patch of the small picture what it attends to in its region of the large one.

    Args:
        width: d.
        high_width: c.
    """

    def __init__(self, width: int, high_width: int) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.key = nn.Sequential(nn.LayerNorm(high_width), nn.Linear(high_width, width))
        self.value = nn.Sequential(nn.LayerNorm(high_width), nn.Linear(high_width, width))

    def forward(self, low_features: Tensor, high_features: Tensor) -> Tensor:
        """Mine the patches of the small picture.

        Args:
            low_features: float[B, N, d]: patches in raster order, without CLS.
            high_features: float[B, c, S, S].

        Returns:
            float[B, N, d].

        Raises:
            UserError: N is no square, or S no multiple of its root.
        """
        high_features = high_features.to(low_features.dtype)
        regions = cut_regions(high_features, low_features.shape[1])

        # One query for each patch, M keys and values in its region.
        queries = self.query(low_features).unsqueeze(2)
        keys = self.key(regions)
        scores = queries @ (keys.transpose(2, 3) / keys.shape[-1] ** 0.5)
        # The released code's guard: scores overflow in half precision.
        weights = scores.nan_to_num().softmax(dim=-1)

        # Keys and values are the largest tensors here, so they are not held at the same time.
        del keys
        mined: Tensor = (weights @ self.value(regions)).squeeze(2)
        return low_features + mined


def cut_regions(high_features: Tensor, num_patches: int) -> Tensor:
    """Cut float[B, c, S, S] into the regions of N patches, float[B, N, M, c].

    Raises:
        UserError: N is no square, or S no multiple of its root.
    """
    # Patches form a square grid, each with a square region.
    batch, channels, height, width = high_features.shape
    grid = math.isqrt(num_patches)
    if grid * grid != num_patches or height != width or height % grid:
        raise UserError(
            f"{num_patches} patches can't share {height} x {width} high-resolution features; "
            "mining needs a square number of patches without CLS, and a square picture whose "
            "features divide by its root"
        )

    # Split both sides into (patch, place within its region), and bring the places together.
    side = height // grid
    cut = high_features.view(batch, channels, grid, side, grid, side).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(batch, num_patches, side * side, channels)


class MiniGeminiModel(LlavaModel):  # type: ignore[misc]
    """A `LlavaModel` with a `high_resolution_tower` and `mining`.

    Raises:
        UserError: a config that `check_mini_gemini_config` refuses.
    """

    config: MiniGeminiConfig

    def __init__(self, config: MiniGeminiConfig) -> None:
        check_mini_gemini_config(config)
        super().__init__(config)
        high: Any = config.high_resolution_config
        self.high_resolution_tower = HighResolutionTower(high)
        self.mining = PatchInfoMining(config.vision_config.hidden_size, sum(high.hidden_sizes))
        self.post_init()

    def low_resolution(self, pixel_values: Tensor) -> Tensor:
        """Shrink float[B, 3, height, width] to what CLIP sees, float[B, 3, side, side].

        Pictures are shrunk after normalizing, as in the released code.

        Raises:
            UserError: pictures of another size than `high_resolution_config.image_size`.
        """
        high: Any = self.config.high_resolution_config
        if tuple(pixel_values.shape[-2:]) != (high.image_size, high.image_size):
            height, width = pixel_values.shape[-2:]
            raise UserError(
                f"pixel_values of {height} x {width} pixels; this model takes "
                f"high_resolution_config.image_size={high.image_size} along both sides: "
                "use the processor that belongs to it"
            )

        side = self.config.vision_config.image_size
        return _resize(pixel_values, (side, side))

    def low_resolution_features(
        self, pixel_values: Tensor, vision_feature_layer: int | None = None
    ) -> Tensor:
        """Compute CLIP's patches float[B, N, d] from float[B, 3, height, width]."""
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        outputs = self.vision_tower(
            self.low_resolution(pixel_values), output_hidden_states=True, return_dict=True
        )
        features: Tensor = outputs.hidden_states[layer][:, 1:]
        return features

    def mine(self, low_features: Tensor, pixel_values: Tensor) -> Tensor:
        """Mine CLIP's patches float[B, N, d] in the pictures float[B, 3, height, width]."""
        mined: Tensor = self.mining(low_features, self.high_resolution_tower(pixel_values))
        return mined

    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Return the mined features and their projections.

        `last_hidden_state` holds float[B, N, d], `pooler_output` float[N, d_llm] of each image.
        `image_sizes` is ignored, because all pictures have the same size.

        Raises:
            UserError: another strategy than "default".
        """
        if vision_feature_select_strategy not in (None, "default"):
            raise UserError(
                f"vision_feature_select_strategy={vision_feature_select_strategy!r}: mining needs 'default'"
            )
        mined = self.mine(self.low_resolution_features(pixel_values, vision_feature_layer), pixel_values)
        return BaseModelOutputWithPooling(
            last_hidden_state=mined, pooler_output=list(self.multi_modal_projector(mined))
        )


class MiniGeminiForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[misc]
    """A `LlavaForConditionalGeneration` around a `MiniGeminiModel`."""

    config: MiniGeminiConfig

    def __init__(self, config: MiniGeminiConfig) -> None:
        # LLaVA's own constructor is skipped: it would build a second model.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = MiniGeminiModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


def make_processor(config: MiniGeminiConfig, tokenizer: Any, *, pad: bool = True) -> LlavaProcessor:
    """Make a model's processor.

    It makes one square picture of high resolution, and a placeholder for each patch of the small
    one.

    Args:
        config: the model's.
        tokenizer: must have an `<image>` token.
        pad: whether to pad pictures to squares with the mean colour before resizing, as all public
            models need it. Otherwise the middle is cut out.
    """
    check_mini_gemini_config(config)
    high: Any = config.high_resolution_config
    side = high.image_size

    # LlavaProcessor counts placeholders from the size of `pixel_values`. Its "patch" is the region
    # of a patch in pixels of the large picture, so that it counts grid * grid.
    return LlavaProcessor(
        LlavaImageProcessorPil(
            do_pad=pad,
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            do_resize=True,
        ),
        tokenizer,
        patch_size=side // config.grid,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    )
