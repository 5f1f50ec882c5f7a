"""Videos for processors that cut pictures of any size into rows of patches, without torchvision."""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.video_utils import VideoMetadata

from vzip.media import FrameProcessor

FRAMES_A_SECOND = 2.0
"""Speed of a video whose frames are given. The models were trained on two frames a second."""


def picture_of(pixels: Tensor, grid: Tensor, *, merge: int, patch: int) -> Tensor:
    """Put the patches of an image together again: [3, height, width].

    Args:
        pixels: [patches, 3 * frames * patch * patch], as an image processor returns them.
        grid: int64[3], 1 and the rows and columns of patches.
        merge: patches a side of a group. The patches of a group follow each other.
        patch: pixels a side of a patch.
    """
    _, rows, columns = grid.tolist()
    groups = (rows // merge, columns // merge, merge, merge)

    # An image is repeated for all frames of its step, so the first one shows it.
    patches = pixels.view(*groups, 3, -1, patch, patch)[..., 0, :, :]
    return patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * patch, columns * patch)


class FramePatchProcessor(FrameProcessor):
    """A video processor that applies the model's image processor to each frame.

    Neighbouring frames make a step in time. The last frame is repeated until its step is full.
    """

    saved_type = "Qwen2VLVideoProcessor"

    def __init__(self, image_processor: Any) -> None:
        super().__init__(image_processor)
        self.temporal_patch_size: int = image_processor.temporal_patch_size
        self.merge_size: int = image_processor.merge_size

    def process_frames(
        self, frames: list[Image.Image], settings: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, VideoMetadata]:
        """Process the frames of one video.

        Returns:
            (patches float[steps * patches, 3 * frames * side * side], grid int64[3], and the numbers and
            the speed of the frames)
        """
        # The image processor makes a step of one frame, then the frames of a step are put together.
        in_step = settings.get("temporal_patch_size", self.temporal_patch_size)
        num_frames = len(frames)
        padded = frames + frames[-1:] * (-num_frames % in_step)
        processed = self.image_processor(
            padded, return_tensors="pt", **{**settings, "temporal_patch_size": 1}
        )
        _, rows, columns = processed["image_grid_thw"][0].tolist()
        num_steps = len(padded) // in_step

        # [frames, patches, 3 * side * side] becomes [steps, patches, 3, frames of a step, side * side].
        patches = processed["pixel_values"].view(num_steps, in_step, rows * columns, 3, -1)
        patches = patches.permute(0, 2, 3, 1, 4).reshape(num_steps * rows * columns, -1)
        about = VideoMetadata(
            total_num_frames=num_frames,
            fps=FRAMES_A_SECOND,
            frames_indices=list(range(num_frames)),
        )
        return patches, torch.tensor([num_steps, rows, columns]), about

    def join(self, processed: list[Any]) -> BatchFeature:
        """Put the patches of all videos one behind the other."""
        patches, grids, about = zip(*processed, strict=True)
        return BatchFeature(
            {
                "pixel_values_videos": torch.cat(patches),
                "video_grid_thw": torch.stack(grids),
                "video_metadata": list(about),
                "second_per_grid_ts": [self.temporal_patch_size / video.sampled_fps for video in about],
            }
        )
