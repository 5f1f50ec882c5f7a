"""Qwen2.5-VL: pictures of any size, groups of 2 x 2 patches that become one token, and videos.

The part that learns is the merger, which turns a group of patches into a token of the language
model. The reducer comes before it: it selects and merges groups. A group's score is the mean of the
attention that its patches receive in the last layer of full attention (most layers attend within
windows), and its key is the mean of its patches' keys.

Each step in time of a video (2 frames) is reduced by itself, like a picture. A picture with fewer
tokens than the budget keeps all of them.

Legend of shapes: G groups of all pictures, d width of the tower, H heads.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from vzip.checkpoints import hf
from vzip.errors import UserError
from vzip.families.base import HANDLED_OPTIONS
from vzip.families.encoded import GridPositions
from vzip.families.features import VisualFeatures
from vzip.families.grids import (
    PixelLimits,
    ReducedGrids,
    attention_in_pictures,
    check_grids,
    fitting,
    num_reduced,
    pictures_of,
    window_order,
)
from vzip.families.patches import FramePatchProcessor, picture_of
from vzip.media import MediaInputs, check_num_frames
from vzip.patch import replaced_forwards
from vzip.reducers.base import Reducer, VisionTokens, received_layers
from vzip.reducers.identity import Identity
from vzip.tap import captured, captured_keywords, layer_index

USUAL_SIDE = 24
"""Groups a side of the square picture that is assumed if no size is known: 576 tokens."""


class Qwen25VL(GridPositions):
    """Adapter of `Qwen2_5_VLForConditionalGeneration`. A budget counts the tokens of a picture."""

    model_type: ClassVar[str] = "qwen2_5_vl"
    model_class: ClassVar[type] = Qwen2_5_VLForConditionalGeneration
    processor_class: ClassVar[type] = Qwen2_5_VLProcessor
    frame_processor: ClassVar[type[FramePatchProcessor]] = FramePatchProcessor
    projector_name: ClassVar[str] = "model.visual.merger"
    frozen_names = {  # noqa: RUF012
        "vision tower": "model.visual.blocks",
        "patch embedding": "model.visual.patch_embed",
    }
    kinds: ClassVar[tuple[str, ...]] = ("image", "video")
    config_of_features: ClassVar[tuple[str, ...]] = ()

    rotate: ClassVar[Any] = staticmethod(modeling_qwen2_5_vl.apply_rotary_pos_emb_vision)
    """The tower's function that rotates queries and keys by their positions."""

    def __init__(self, model: Any, *, anyres: str = "released") -> None:
        super().__init__(model, anyres=anyres)
        # The limits of the released processors, until `read_processor` is called.
        self.limits = PixelLimits(least=56 * 56, most=16384 * 28 * 28)

    # ---- Loading ----

    @classmethod
    def load_processor(cls, path: str) -> Any:
        return hf.load_video_processor(cls.processor_class, path, frame_processor=cls.frame_processor)

    def read_processor(self, processor: Any) -> None:
        self.limits = PixelLimits.of(processor.image_processor)

    # ---- The parts of the model ----

    @property
    def tower(self) -> nn.Module:
        return self._module("model.visual")

    @property
    def tower_layers(self) -> nn.Module:
        return self._module("model.visual.blocks")

    # ---- Sizes and counts ----

    @property
    def has_cls(self) -> bool:
        return False

    @property
    def merge(self) -> int:
        """Patches a side of a group."""
        return int(self.model.config.vision_config.spatial_merge_size)

    @property
    def group_side(self) -> int:
        """Pixels a side of a group."""
        return self.merge * int(self.model.config.vision_config.patch_size)

    @property
    def group_width(self) -> int:
        """Numbers of a group in one layer of the tower."""
        return super().feature_width * self.merge**2

    @property
    def feature_width(self) -> int:
        return self.group_width * len(self.feature_layers)

    @property
    def feature_layers(self) -> Sequence[int]:
        """Indices of the layers whose outputs are merged, in the order of `projector_modules`."""
        return (self.model.config.vision_config.depth - 1,)

    @property
    def tile_side(self) -> int:
        return USUAL_SIDE * self.group_side

    @property
    def num_patches(self) -> int:
        rows, columns = self.grid_of((self.tile_side, self.tile_side))
        return rows * columns * self.merge**2

    @property
    def num_groups(self) -> int:
        # A group's features may come from several layers, so their width says nothing of its size.
        return self.num_patches // self.merge**2

    def grid_of(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Count the rows and columns of tokens that the model itself has of an image."""
        return self.limits.grid(image_size, side=self.group_side)

    @property
    def patches_seen(self) -> list[int]:
        config = self.model.config.vision_config
        window: int = getattr(config, "window_size", 0)
        seen = [min(self.num_patches, (window // config.patch_size) ** 2)] * config.depth
        for layer in self.full_layers:
            seen[layer] = self.num_patches
        return seen

    def num_layers_run(self, reducer: Reducer) -> int:
        depth: int = self.model.config.vision_config.depth
        return depth

    def num_tile_tokens(self, reducer: Reducer) -> int:
        return num_reduced(reducer, self.num_groups)

    def num_image_tokens(self, reducer: Reducer, image_size: tuple[int, int] | None = None) -> int:
        """Count the placeholders of one image. Raises UserError for a size that can't be shown."""
        self.check_image_size(image_size)
        if image_size is None:
            return self.num_tile_tokens(reducer)
        rows, columns = self.grid_of(image_size)
        return num_reduced(reducer, rows * columns)

    def num_video_tokens(self, reducer: Reducer, num_frames: int) -> int:
        """Count the placeholders of one video, whose frames are taken to be of the usual size."""
        check_num_frames(num_frames)
        num_steps: int = math.ceil(num_frames / self.model.config.vision_config.temporal_patch_size)
        return num_steps * self.num_tile_tokens(reducer)

    def num_processed_tokens(self, reducer: Reducer, kind: str, inputs: MediaInputs, index: int) -> int:
        steps, rows, columns = inputs.extra[f"{kind}_grid_thw"][index].tolist()
        return int(steps * num_reduced(reducer, rows * columns // self.merge**2))

    # ---- Checks before any work ----

    def attention_layer(self, layer: int | None, *, setting: str = "reducer.layer") -> int:
        """Return the index of a layer whose attention is read.

        Args:
            layer: hidden state that the layer computes; None for the last layer that can be read.
            setting: the name that an error message uses.

        Raises:
            UserError: it is no layer of the tower, or attends within windows.
        """
        config = self.model.config.vision_config
        full = sorted(self.full_layers)
        if layer is None:
            return full[-1]

        index = layer_index(layer, config.depth, setting=setting)
        if index not in full:
            choices = ", ".join(str(layer + 1) for layer in full)
            raise UserError(
                f"{setting}={layer} attends within windows, so its attention does not rank "
                f"all patches; choose one of {choices}, or null"
            )
        return index

    def layers_received(self, reducer: Reducer) -> list[int]:
        """Return the indices of the layers whose `VisionTokens.received` the reducer reads."""
        hidden_states = [layer + 1 for layer in sorted(self.full_layers)]
        layers = received_layers(reducer, hidden_states)
        return [self.attention_layer(layer, setting="reducer.object_layer") for layer in layers]

    @property
    def full_layers(self) -> Sequence[int]:
        """Indices of the layers in which all patches of a picture see each other."""
        return tuple(self.model.config.vision_config.fullatt_block_indexes)

    def check_reducer(self, reducer: Reducer) -> None:
        """Raise UserError if the reducer's layer can't be read."""
        self.num_tile_tokens(reducer)
        if reducer.uses_attention:
            self.attention_layer(reducer.layer)
        self.layers_received(reducer)

    # ---- The two computations ----

    def group_order(self, grids: Tensor) -> Tensor:
        """Return int64[G]: the group, in raster order, at each place of the tower's own order."""
        # The layers that attend within windows keep the groups of a window together.
        window = self.model.config.vision_config.window_size // self.group_side
        return window_order(grids, merge=self.merge, window=window)

    def visual_features(
        self, kind: str, inputs: MediaInputs, reducer: Reducer, **options: Any
    ) -> VisualFeatures:
        """Run the tower on all images, or all videos, and reduce each picture by itself."""
        grids = inputs.extra[f"{kind}_grid_thw"]
        check_grids(grids, len(inputs.pixels), merge=self.merge, kind=kind)
        tokens = self.run_groups(reducer, inputs.pixels, grids, **options)
        if isinstance(reducer, Identity):
            return self._all_tokens(kind, inputs, tokens)

        # Neighbours of equal size, such as the steps of a video, are reduced together.
        reduced = ReducedGrids(tokens, reducer)
        for num_pictures, (rows, columns) in pictures_of(grids):
            reduced.add(num_pictures, (rows // self.merge, columns // self.merge))
        return reduced.features(grids[:, 0], self.grids_of_tokens(kind, inputs))

    def _all_tokens(self, kind: str, inputs: MediaInputs, tokens: VisionTokens) -> VisualFeatures:
        """Keep all tokens, in the tower's own order, so that not a bit of the merger differs."""
        grids = inputs.extra[f"{kind}_grid_thw"]
        order = self.group_order(grids).to(tokens.features.device)
        counts = grids.prod(dim=1).cpu() // self.merge**2
        kept = torch.cat([torch.arange(count) for count in counts.tolist()])
        return VisualFeatures(
            tokens.features[0, order],
            order.argsort(),
            counts,
            kept=kept.to(order.device),
            grids=self.grids_of_tokens(kind, inputs),
        )

    def grids_of_tokens(self, kind: str, inputs: MediaInputs) -> Tensor:
        """Return float64[media, 4], see `VisualFeatures.grids`."""
        grids = inputs.extra[f"{kind}_grid_thw"].double()
        interval = torch.ones_like(grids[:, :1])

        # A second of a video moves the position in time by some numbers.
        if kind == "video":
            interval *= self.model.config.vision_config.tokens_per_second
            if "second_per_grid_ts" in inputs.extra:
                interval *= inputs.extra["second_per_grid_ts"].to(interval).view(-1, 1)
        return torch.cat([grids[:, :1], grids[:, 1:] / self.merge, interval], dim=1)

    def run_groups(self, reducer: Reducer, pixels: Tensor, grids: Tensor, **options: Any) -> VisionTokens:
        """Run the tower without its merger, and return the groups of all pictures in raster order.

        Returns:
            Tokens float[1, G, L * 4 d] of the L layers in `feature_layers`. A group's patches lie side by
            side, one layer after the other.
        """
        # Attention is computed only for reducers that read it.
        tower: Any = self.tower
        received = self.layers_received(reducer)
        layer = self.attention_layer(reducer.layer) if reducer.uses_attention else None
        read = set(received) if layer is None else {*received, layer}
        attention = {str(index): tower.blocks[index].attn for index in read}
        hooked = {name: each.qkv for name, each in attention.items()}
        for index in self.feature_layers:
            hooked[f"features {index}"] = tower.blocks[index]

        # The mergers run later, and only for the groups that stay.
        tower_options = {name: value for name, value in options.items() if name not in HANDLED_OPTIONS}
        with (
            replaced_forwards(dict.fromkeys(self.projector_modules, lambda hidden: hidden)),
            captured(hooked) as outputs,
            captured_keywords(attention) as keywords,
        ):
            tower(pixels.to(next(tower.parameters()).dtype), grid_thw=grids, **tower_options)

        in_raster = self.group_order(grids).to(pixels.device).argsort()
        features = []
        for index in self.feature_layers:
            features.append(self.by_group(outputs[f"features {index}"])[in_raster].flatten(1))
        tokens = VisionTokens(features=torch.cat(features, dim=1)[None], has_cls=False)

        # What patches receive is their saliency too, as there is no CLS.
        scores = {}
        for index in read:
            rotation = keywords[str(index)]["position_embeddings"]
            scores[index] = self._scores(outputs[str(index)], rotation, grids, in_raster)
        tokens = replace(tokens, received=tuple(scores[index][0] for index in received))
        if layer is not None:
            tokens = replace(tokens, saliency=scores[layer][0], keys=scores[layer][1])
        return tokens

    def look(self, reducer: Reducer, inputs: MediaInputs) -> tuple[VisionTokens, tuple[int, int]]:
        grids = inputs.extra["image_grid_thw"]
        _, rows, columns = (grids[0] // self.merge).tolist()
        tokens = self.run_groups(reducer, inputs.pixels, grids)
        return replace(tokens, grid=(rows, columns)), (rows, columns)

    def fitting(self, reducer: Reducer, tokens: VisionTokens) -> Reducer:
        """Return the reducer, or the identity for a picture of fewer tokens than its budget."""
        return fitting(reducer, tokens.features.shape[1])

    def seen_picture(self, inputs: MediaInputs) -> Tensor:
        grid = inputs.extra["image_grid_thw"][0]
        return picture_of(inputs.pixels, grid, merge=self.merge, patch=self.group_side // self.merge)

    def by_group(self, patches: Tensor) -> Tensor:
        """Put the patches of a group together: float[patches, ...] to float[G, 4, ...]."""
        return patches.view(-1, self.merge**2, *patches.shape[1:])

    @torch.no_grad()
    def _scores(
        self, qkv: Tensor, rotation: tuple[Tensor, Tensor], grids: Tensor, in_raster: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the saliency and the keys of groups from the attention of one layer.

        Args:
            qkv: float[patches, 3 d], the layer's queries, keys and values, in the tower's order.
            rotation: cosines and sines of the patches' positions, float[patches, head_dim] each.
            grids: int64[media, 3].
            in_raster: int64[G], the place in the tower's order of each group in raster order.

        Returns:
            The attention that each group receives, float[1, G], and its key, float[1, G, head_dim].
        """
        # Queries and keys are compared after they are rotated by their positions.
        num_heads = self.model.config.vision_config.num_heads
        heads = qkv.view(len(qkv), 3, num_heads, -1)
        queries, keys = self.rotate(heads[:, 0], heads[:, 1], *rotation)

        # Windows have mixed up the groups, so put them in raster order.
        accurate = torch.promote_types(queries.dtype, torch.float32)
        queries = self.by_group(queries)[in_raster].flatten(0, 1).to(accurate)
        keys = self.by_group(keys)[in_raster].flatten(0, 1).to(accurate)

        # The patches of a picture see each other, and no other picture.
        received = attention_in_pictures(queries, keys, grids)

        # A group has the mean of its patches.
        saliency = self.by_group(received).mean(dim=1)
        group_keys = self.by_group(keys.mean(dim=1)).mean(dim=1)
        return saliency[None], group_keys[None]

    def project(self, features: VisualFeatures) -> Tensor:
        return self.merge_groups(features, 0)

    def run_projector(self, features: Tensor) -> Tensor:
        """Run the first merger on float[..., 4 d], and return float[m, d_llm]."""
        return self.run_merger(self.projector_modules[0], features)

    def run_merger(self, merger: nn.Module, groups: Tensor) -> Tensor:
        """Run a merger in its own precision on float[..., 4 d], and return float[m, d_llm]."""
        # Mergers take patches, because most of them norm the patches of a group one by one.
        dtype = next(merger.parameters()).dtype
        patches = groups.reshape(-1, self.group_width // self.merge**2)
        merged: Tensor = merger(patches.to(dtype))
        return merged

    def merge_groups(self, features: VisualFeatures, number: int) -> Tensor:
        """Merge the groups of layer `number` in `feature_layers`: float[n, d_llm]."""
        first = number * self.group_width
        groups = features.features[..., first : first + self.group_width]
        return self.run_merger(self.projector_modules[number], groups)[features.order]
