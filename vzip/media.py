"""Images and videos the way models take them.

`MediaInputs` is what a processor makes of images or videos. `FrameProcessor` and `build_processor`
process videos without torchvision, which the video processors of transformers need.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, LlavaImageProcessorPil
from transformers.video_utils import make_batched_videos

from vzip.errors import UserError, check_choice
from vzip.pictures import check_size

KINDS = ("image", "video")
"""Kinds of media that a model may take. Where both occur, images come first."""

PIXEL_NAMES = {
    "image": ("pixel_values", "pixel_values_images"),
    "video": ("pixel_values_videos",),
}
"""Names of the pixels, by kind of media. Video-LLaVA has its own name for those of images."""

EXTRA_NAMES = {
    "image": ("image_sizes", "batch_num_images", "image_grid_thw", "num_patches"),
    "video": ("video_grid_thw", "second_per_grid_ts"),
}
"""Names of what some processors return beside the pixels, by kind of media."""

NUM_TILES = "num_patches"
"""Name of the numbers of tiles, for processors that put the tiles of all images in one list."""

GRID_NAMES = ("image_grid_thw", "video_grid_thw")
"""Names of the grids of patches, for processors that cut pictures of any size into patches."""

ASPECT_RATIOS = ("pad", "square")
"""LLaVA's names for what a processor does to a picture that is not square.

"pad": it pads the picture to a square with its mean colour. "square": it cuts out the middle, or
squeezes the picture.
"""

_SQUARE_PROCESSORS = ("CLIPImageProcessor", "SiglipImageProcessor", "BitImageProcessor", "ViTImageProcessor")
_PADDING_PROCESSOR = "LlavaImageProcessor"
"""Image processors of transformers that make one square of a picture. The last one can pad it."""

LOOKUP_SIDE = 16
"""Side in pixels of the picture that holds all 256 values."""


@dataclass(frozen=True)
class MediaInputs:
    """All images, or all videos, of a micro batch: what the model's processor makes of them."""

    pixels: Tensor
    """float or uint8, in the shape that the model's processor returns. [B, 3, height, width], with an
    axis for tiles or frames behind B if there are any; or the tiles of all images one behind the other.
    A processor that cuts pictures into patches returns [patches, 3 * frames * height * width].
    """
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Other arguments: `image_sizes` int64[images, 2], as (height, width) in pixels,
    `batch_num_images` int64[examples], `image_grid_thw` and `video_grid_thw` int64[media, 3], as
    (steps in time, rows, columns) of patches, `second_per_grid_ts`, the seconds of a step, and
    `num_patches` int64[images], the tiles of each image.
    """
    lookup: Tensor | None = None
    """float32[3, 256]: the normalized value of each uint8 value, by channel; None for normalized pixels."""
    pixel_name: str = "pixel_values"
    """Name of the pixels among the model's arguments."""

    @classmethod
    def from_processed(cls, kind: str, processed: Mapping[str, Any], *, lookup: Tensor | None = None) -> Self:
        """Pick the inputs of one kind from a processor's output, or from a model's arguments."""
        pixel_names = [name for name in PIXEL_NAMES[kind] if processed.get(name) is not None]
        assert pixel_names, f"no pixels of any {kind} among {', '.join(processed)}"

        extra = {}
        for name in EXTRA_NAMES[kind]:
            if processed.get(name) is not None:
                extra[name] = torch.as_tensor(processed[name])

        return cls(processed[pixel_names[0]], extra, lookup, pixel_names[0])

    @property
    def num_media(self) -> int:
        """Number of images or videos."""
        for name in (*GRID_NAMES, NUM_TILES):
            if name in self.extra:
                return len(self.extra[name])
        return len(self.pixels)

    @property
    def arguments(self) -> dict[str, Tensor]:
        """The same as keyword arguments of the model. The pixels must be normalized."""
        assert self.lookup is None, "the pixels are not normalized"

        # The family needs the numbers of tiles, the model's own method does not take them.
        extra = {name: value for name, value in self.extra.items() if name != NUM_TILES}
        return {self.pixel_name: self.pixels, **extra}

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to each tensor, e.g. move it to a device."""
        return replace(
            self,
            pixels=change(self.pixels),
            extra={name: change(value) for name, value in self.extra.items()},
            lookup=None if self.lookup is None else change(self.lookup),
        )

    def normalized(self, dtype: torch.dtype) -> Self:
        """Rescale and normalize uint8 pixels by the lookup table, and cast float ones.

        The result is, to the bit, what the processor makes itself, with one exception. Tiles that
        pad a batch of images with different numbers of tiles are black here, and 0 in the
        processor's output. No model looks at them.
        """
        if self.lookup is None:
            return replace(self, pixels=self.pixels.to(dtype))

        # One flat table of 3 * 256 values, so that a single index_select does all channels. Rows of
        # patches have the channels one behind the other.
        shape = self.pixels.shape
        pixels = self.pixels.view(len(self.pixels), 3, 1, -1) if self.pixels.dim() == 2 else self.pixels
        channel = torch.arange(3, dtype=torch.int32, device=pixels.device).view(3, 1, 1)
        index = (pixels.int() + 256 * channel).flatten()
        values = self.lookup.to(dtype).flatten().index_select(0, index)
        return replace(self, pixels=values.view(shape), lookup=None)


def image_aspect_ratio(processor: Any) -> str | None:
    """Tell which of `ASPECT_RATIOS` a model's processor has; None if it makes no single square."""
    images = processor.image_processor
    name = images.to_dict().get("image_processor_type")
    if name == _PADDING_PROCESSOR:
        return "pad" if images.do_pad else "square"
    return "square" if name in _SQUARE_PROCESSORS else None


def set_aspect_ratio(processor: Any, ratio: str | None) -> Any:
    """Make a model's processor pad pictures to squares as LLaVA does, or not; returns it.

    Padded pictures have the pixels of LLaVA's own code, bit for bit.

    Args:
        processor: the model's processor, which is changed.
        ratio: one of `ASPECT_RATIOS`. None changes nothing.

    Raises:
        UserError: an unknown ratio, or a processor that can't have it.
    """
    if ratio is None:
        return processor

    check_choice("model.image_aspect_ratio", ratio, ASPECT_RATIOS)
    images = processor.image_processor
    present = image_aspect_ratio(processor)
    if present is None:
        raise UserError(
            f"model.image_aspect_ratio={ratio}: this model's {type(images).__name__} does not make one "
            "square of each picture; set model.image_aspect_ratio=null, which changes nothing"
        )

    # Only this class rounds like LLaVA's code, so a padding processor of another backend is replaced.
    if present != ratio or (ratio == "pad" and not isinstance(images, LlavaImageProcessorPil)):
        settings = images.to_dict() | {"do_pad": ratio == "pad"}
        del settings["image_processor_type"]
        # Processors that squeeze pictures cut nothing, and don't mention it.
        settings.setdefault("do_center_crop", False)
        processor.image_processor = LlavaImageProcessorPil.from_dict(settings)
    return processor


def lookup_table(kind: str, processor: Any) -> Tensor:
    """Compute float32[3, 256]: what a processor makes of each pixel value of each channel.

    Rescaling and normalizing treat each value separately, so a table of 256 entries holds all of
    their arithmetic, whatever the backend and the settings. It is read off what the processor
    returns for a picture of all 256 values, in whose size nothing has to be resized, cut or padded.
    """
    ramp = torch.arange(256, dtype=torch.uint8).view(LOOKUP_SIDE, LOOKUP_SIDE, 1)
    picture = Image.fromarray(ramp.expand(LOOKUP_SIDE, LOOKUP_SIDE, 3).contiguous().numpy())

    # Settings under which the processor has nothing to resize or cut.
    square = {"height": LOOKUP_SIDE, "width": LOOKUP_SIDE}
    settings: dict[str, Any] = {"size": square, "crop_size": square}
    if hasattr(processor, "image_grid_pinpoints"):
        settings["image_grid_pinpoints"] = [[LOOKUP_SIDE, LOOKUP_SIDE]]
    if hasattr(processor, "merge_size"):
        # A processor that cuts pictures into patches: the picture is a single patch.
        settings = {"do_resize": False, "patch_size": LOOKUP_SIDE, "merge_size": 1, "temporal_patch_size": 1}

    def first_tile(**more: bool) -> Tensor:
        processed = processor([[picture]], return_tensors="pt", **settings, **more)
        pixels: Tensor = MediaInputs.from_processed(kind, processed).pixels
        return pixels.reshape(-1, 3, 256)[0]

    # Without arithmetic, the values must come back in their order.
    untouched = first_tile(do_rescale=False, do_normalize=False).to(torch.uint8)
    assert torch.equal(untouched, ramp.view(1, 256).expand(3, 256)), (
        f"{type(processor).__name__} changes pixels where it should not"
    )
    return first_tile().float()


def check_num_frames(num_frames: int) -> None:
    """Raise UserError for a video without frames."""
    if num_frames < 1:
        raise UserError(
            f"a video of {num_frames} frames can't be shown to the model; give one of at least 1 frame"
        )


def stack_frames(pixel_values_videos: Tensor) -> Tensor:
    """Flatten float[videos, frames, 3, height, width] to float[videos * frames, 3, height, width].

    Raises:
        UserError: another shape, or no frames.
    """
    if pixel_values_videos.dim() != 5:
        raise UserError(
            f"pixel_values_videos of shape {list(pixel_values_videos.shape)} are no videos: give "
            f"float[videos, frames, 3, height, width], as the model's processor does"
        )
    check_num_frames(pixel_values_videos.shape[1])
    return pixel_values_videos.flatten(0, 1)


def _convert_to_rgb(videos: Any) -> Any:
    """Convert the pictures in lists, or lists of lists, to RGB.

    An array made of a picture with a palette would hold indices instead of colours.

    Raises:
        UserError: an empty list.
        ValueError: a picture exceeds the limits of `vzip.pictures`.
    """
    if isinstance(videos, Image.Image):
        check_size(*videos.size)
        return videos.convert("RGB")
    if isinstance(videos, list | tuple):
        check_num_frames(len(videos))
        return [_convert_to_rgb(video) for video in videos]
    return videos


def _frame_to_picture(frame: Any) -> Image.Image:
    """Convert a frame of an array. Raises UserError unless it is uint8[height, width, 3]."""
    pixels = np.asarray(frame)
    if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,):
        raise UserError(
            f"a frame of {pixels.dtype}{list(pixels.shape)} is no picture; "
            f"give PIL pictures, or uint8[height, width, 3]"
        )
    return Image.fromarray(pixels)


class FrameProcessor:
    """A video processor that applies the model's image processor to each frame, without tiles.

    Args:
        image_processor: the model's.
    """

    # Saving a processor reads this attribute of its parts.
    _auto_class = None

    saved_type: str | None = None
    """Name of the video processor of transformers that is saved instead; None to derive it."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor
        self.settings = image_processor.to_dict()
        self.has_tiles = "image_grid_pinpoints" in self.settings

    def __call__(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """Process videos, given as lists of pictures or as arrays.

        Settings of the image processor may be overridden. Other settings are those of the video
        processors of transformers, and are ignored.

        Returns:
            `pixel_values_videos`: float[videos, frames, 3, height, width].

        Raises:
            UserError: a video without frames, videos of different numbers of frames, a frame that
                is no picture, or a setting that asks for a choice of frames.
        """
        for name in ("num_frames", "fps", "do_sample_frames"):
            if kwargs.get(name):
                raise UserError(
                    f"{name}={kwargs[name]}: without torchvision, frames are not chosen here; "
                    f"give those to be seen"
                )

        settings = {name: value for name, value in kwargs.items() if name in self.settings}
        if self.has_tiles:
            # A grid of one cell of the tower's size: the frame is not cut.
            size = settings.get("size", self.settings["size"])
            side = size.get("height") or size["shortest_edge"]
            settings["image_grid_pinpoints"] = [[side, side]]

        processed = []
        for video in make_batched_videos(_convert_to_rgb(videos)):
            frames = [_frame_to_picture(frame) for frame in video]
            check_num_frames(len(frames))
            processed.append(self.process_frames(frames, settings))
        return self.join(processed)

    def join(self, processed: list[Any]) -> BatchFeature:
        """Put the processed videos together."""
        # Videos are stacked, so they must be of the same length.
        counts = [len(frames) for frames in processed]
        if len(set(counts)) > 1:
            raise UserError(
                f"videos of {counts} frames can't share a batch; take the same number of frames of each"
            )
        return BatchFeature({"pixel_values_videos": torch.stack(processed)})

    def process_frames(self, frames: list[Image.Image], settings: Mapping[str, Any]) -> Any:
        """Process the frames of one video: float[frames, 3, height, width]."""
        # Frames are processed like pictures. With tiles, each has its base tile alone.
        processed = self.image_processor(frames, return_tensors="pt", **settings)
        pixels = MediaInputs.from_processed("image", processed).pixels
        return pixels[:, 0] if self.has_tiles else pixels


def build_processor(
    processor_class: Any,
    image_processor: Any,
    tokenizer: Any,
    settings: dict[str, Any],
    *,
    frame_processor: type[FrameProcessor] = FrameProcessor,
) -> Any:
    """Build a processor of images and videos with a `FrameProcessor`, without torchvision."""

    class WithoutTorchvision(processor_class):  # type: ignore[misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return type(argument)
            return super().check_argument_for_proper_class(argument_name, argument)

        def to_dict(self) -> dict[str, Any]:
            """Return what transformers' own class saves, with a video processor of its own."""
            saved: dict[str, Any] = super().to_dict()
            name = processor_class.__name__.replace("Processor", "VideoProcessor")
            kind = {"video_processor_type": frame_processor.saved_type or name}
            return saved | {"video_processor": self.image_processor.to_dict() | kind}

    # Saved tokenizers record the name of the class.
    WithoutTorchvision.__name__ = processor_class.__name__
    return WithoutTorchvision(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=frame_processor(image_processor),
        **settings,
    )
