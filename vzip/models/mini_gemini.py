"""Mini-Gemini (arXiv 2403.18814) on top of `transformers`' LLaVA: a second tower and patch info mining before the projector.

One picture of high resolution goes to a ConvNeXt; made small it goes to CLIP. Each CLIP patch then looks, by attention, at
the ConvNeXt features of its own region of the picture, and what it finds there is added to it. The number of tokens stays.
Formulas are those of the released code (repository dvlab-research/MGM, `mgm/model/mgm_arch.py`), for `image_grid` = 1.

Legend of shapes: B images, N patches of the small picture, d width of CLIP, c channels of all ConvNeXt stages together,
S side of the ConvNeXt's first map.
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

CONVNEXT_LARGE = {"depths": [3, 3, 27, 3], "hidden_sizes": [192, 384, 768, 1536], "image_size": 768}
"""`ConvNextConfig`'s arguments for OpenCLIP's `convnext_large_d_320`, the tower of all public models, at 768 pixels."""


class MiniGeminiConfig(LlavaConfig):  # type: ignore[misc]
    """`LlavaConfig` with `high_resolution_config`, the ConvNeXt's; its `image_size` is the side of `pixel_values`.

    `vision_config.image_size` is the side of the small picture. Without a `high_resolution_config`: `CONVNEXT_LARGE`.
    """

    model_type = "mini_gemini"
    sub_configs: ClassVar[dict[str, Any]] = {
        "text_config": AutoConfig,
        "vision_config": AutoConfig,
        "high_resolution_config": ConvNextConfig,
    }

    high_resolution_config: dict[str, Any] | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.high_resolution_config
        if not isinstance(given, PreTrainedConfig):
            self.high_resolution_config = ConvNextConfig(**(CONVNEXT_LARGE if given is None else given))
        super().__post_init__(**kwargs)

    @property
    def grid(self) -> int:
        """Patches along one side of the small picture."""
        side: int = self.vision_config.image_size // self.vision_config.patch_size
        return side


def check_mini_gemini_config(config: MiniGeminiConfig) -> None:
    """Raises UserError for a config that mining can't serve: regions that are not whole, or tokens that are not patches."""
    high: Any = config.high_resolution_config
    stride = high.patch_size * config.grid
    if high.image_size % stride:
        raise UserError(
            f"high_resolution_config.image_size={high.image_size} can't be cut into {config.grid} x {config.grid} regions of "
            f"whole features; give a multiple of {stride}"
        )
    if config.vision_feature_select_strategy != "default":
        raise UserError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} would give mining the CLS token, which "
            "has no region of the picture; set it to 'default'"
        )
    if not isinstance(config.vision_feature_layer, int):
        raise UserError(
            f"vision_feature_layer={config.vision_feature_layer!r} names several layers; give one, e.g. -2"
        )


AutoConfig.register(MiniGeminiConfig.model_type, MiniGeminiConfig, exist_ok=True)


class HighResolutionTower(ConvNextPreTrainedModel):  # type: ignore[misc]
    """ConvNeXt without its pooling head: the maps of all stages, brought to the size of the first one.

    Blocks are `transformers`' own. The released code runs OpenCLIP's, which is `timm`'s; both compute
    the same (`timm`'s LayerNorm has eps 1e-6 but in `convnext_xxlarge`), and `vzip.checkpoints.original.mini_gemini` renames.
    """

    # There is no attention in it, so it is content with whatever implementation the rest of the model is given.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config: ConvNextConfig) -> None:
        super().__init__(config)
        self.embeddings = ConvNextEmbeddings(config)
        widths = [config.hidden_sizes[0], *config.hidden_sizes]
        self.stages = nn.ModuleList(
            ConvNextStage(config, widths[index], widths[index + 1], stride=2 if index else 1, depth=depth)
            for index, depth in enumerate(config.depths)
        )
        self.post_init()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float[B, c, S, S] of float[B, 3, height, width]; S is height / 4, and c the sum of the stages' widths."""
        features = self.embeddings(pixel_values.to(self.dtype))
        maps: list[Tensor] = []
        for stage in self.stages:
            features = stage(features)
            maps.append(features)
        return torch.cat([maps[0], *(_resized(small, maps[0].shape[-2:]) for small in maps[1:])], dim=1)


def _resized(images: Tensor, size: Any) -> Tensor:
    """Bilinear interpolation in float32 at least, as the released code does it in training in half precision too."""
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=False).to(images.dtype)


class PatchInfoMining(nn.Module):
    """Attention of each patch of the small picture to the high-resolution features of its region, added to the patch.

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
        """float[B, N, d] of float[B, N, d], patches in raster order without CLS, and float[B, c, S, S].

        Raises UserError unless N is a square and S a multiple of its root.
        """
        high_features = high_features.to(low_features.dtype)
        regions = cut_regions(high_features, low_features.shape[1])
        queries = self.query(low_features).unsqueeze(2)
        keys = self.key(regions)
        scores = queries @ (keys.transpose(2, 3) / keys.shape[-1] ** 0.5)
        weights = scores.nan_to_num().softmax(
            dim=-1
        )  # the released code's guard: in half precision scores overflow
        del keys  # the largest tensors here are per region feature; don't hold keys and values at once
        found: Tensor = (weights @ self.value(regions)).squeeze(2)
        return low_features + found


def cut_regions(high_features: Tensor, num_patches: int) -> Tensor:
    """float[B, N, M, c] of float[B, c, S, S]: the M features of each patch's region. Raises UserError if they are not whole."""
    batch, channels, height, width = high_features.shape
    grid = math.isqrt(num_patches)
    if grid * grid != num_patches or height != width or height % grid:
        raise UserError(
            f"{num_patches} patches can't share {height} x {width} high-resolution features; mining needs a square number of "
            "patches without CLS, and a square picture whose features divide by its root"
        )
    side = height // grid
    cut = high_features.view(batch, channels, grid, side, grid, side).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(batch, num_patches, side * side, channels)


class MiniGeminiModel(LlavaModel):  # type: ignore[misc]
    """`LlavaModel` with `high_resolution_tower` and `mining`. Raises UserError for a config that `check_mini_gemini_config` refuses."""

    config: MiniGeminiConfig

    def __init__(self, config: MiniGeminiConfig) -> None:
        check_mini_gemini_config(config)
        super().__init__(config)
        high: Any = config.high_resolution_config
        self.high_resolution_tower = HighResolutionTower(high)
        self.mining = PatchInfoMining(config.vision_config.hidden_size, sum(high.hidden_sizes))
        self.post_init()

    def low_resolution(self, pixel_values: Tensor) -> Tensor:
        """float[B, 3, side, side], what CLIP sees of float[B, 3, height, width]: made small after normalising, as released.

        Raises UserError for pictures of another size than `high_resolution_config.image_size`.
        """
        high: Any = self.config.high_resolution_config
        if tuple(pixel_values.shape[-2:]) != (high.image_size, high.image_size):
            height, width = pixel_values.shape[-2:]
            raise UserError(
                f"pixel_values of {height} x {width} pixels; this model takes high_resolution_config.image_size="
                f"{high.image_size} along both sides: use the processor that belongs to it"
            )
        side = self.config.vision_config.image_size
        return _resized(pixel_values, (side, side))

    def low_resolution_features(
        self, pixel_values: Tensor, vision_feature_layer: int | None = None
    ) -> Tensor:
        """float[B, N, d]: patches of CLIP's selected layer, without CLS, of float[B, 3, height, width]."""
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        outputs = self.vision_tower(
            self.low_resolution(pixel_values), output_hidden_states=True, return_dict=True
        )
        features: Tensor = outputs.hidden_states[layer][:, 1:]
        return features

    def mine(self, low_features: Tensor, pixel_values: Tensor) -> Tensor:
        """float[B, N, d]: patches of CLIP with what mining finds for them in float[B, 3, height, width]."""
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
        """Mined features float[B, N, d] as `last_hidden_state`, and their projections, one float[N, d_llm] an image.

        `image_sizes` is of no use here: all pictures have one size. Raises UserError for another strategy than "default".
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
    """`LlavaForConditionalGeneration` around a `MiniGeminiModel`: forward, loss and generate are LLaVA's."""

    config: MiniGeminiConfig

    def __init__(self, config: MiniGeminiConfig) -> None:
        super(LlavaForConditionalGeneration, self).__init__(
            config
        )  # not LLaVA's own: it would build a second model
        self.model = MiniGeminiModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


def make_processor(config: MiniGeminiConfig, tokenizer: Any, *, pad: bool = True) -> LlavaProcessor:
    """The processor of a model: one square picture of high resolution, and a placeholder for each patch of the small one.

    Args:
        config: the model's.
        tokenizer: one that has an `<image>` token.
        pad: whether to pad pictures to squares with the mean colour before resizing, as all public models want it;
            otherwise the middle is cut out.
    """
    check_mini_gemini_config(config)
    high: Any = config.high_resolution_config
    side = high.image_size
    # LlavaProcessor counts placeholders from the size of `pixel_values`: with the region of a patch in pixels of the
    # large picture as its "patch" it finds grid * grid of them.
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
