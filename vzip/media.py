"""Images and videos as models take them, also without torchvision, which the video processors of transformers need."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, BatchFeature
from transformers.utils import is_torchvision_available
from transformers.video_utils import make_batched_videos

from vzip.errors import UserError

MEDIA_INPUTS = {
    "image": ("pixel_values", "pixel_values_images", "image_sizes", "batch_num_images"),
    "video": ("pixel_values_videos",),
}
"""Arguments of a model by kind of media, images first, the pixels foremost; Video-LLaVA has its own name for an image's."""

LOOKUP = "levels"
"""Name, among inputs of one kind, of the table `lookup_table`, which makes of their uint8 pixels what the model takes."""


def model_inputs(kind: str, processed: Mapping[str, Any]) -> dict[str, Any]:
    """The model's arguments of one kind, pixels first, of what an image or video processor returned."""
    return {name: processed[name] for name in MEDIA_INPUTS[kind] if name in processed}


def pixels_of(inputs: Mapping[str, Any]) -> Any:
    """The pixel values among the model's arguments of one kind."""
    return next(iter(inputs.values()))


def lookup_table(kind: str, processor: Any) -> Tensor:
    """float32[3, 256]: what an image or video processor makes of each value of each channel by rescaling and normalising.

    Both take each value by itself, so that a table of 256 is all of their arithmetic, whatever the backend and the settings. It
    is read off what the processor itself returns for a picture of all values that there is nothing to resize, cut or pad of.
    """
    ramp = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3).contiguous()
    square = {"height": 16, "width": 16}
    settings: dict[str, Any] = {"size": square, "crop_size": square}
    if hasattr(processor, "image_grid_pinpoints"):
        settings["image_grid_pinpoints"] = [[16, 16]]

    def made(**more: bool) -> Tensor:
        processed = processor([[Image.fromarray(ramp.numpy())]], return_tensors="pt", **settings, **more)
        tiles: Tensor = pixels_of(model_inputs(kind, processed)).reshape(-1, 3, 256)
        return tiles[0]

    untouched = made(do_rescale=False, do_normalize=False)
    assert torch.equal(untouched, ramp.view(256, 3).T), (
        f"{type(processor).__name__} changes pixels where it should not"
    )
    return made().float()


def normalised(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's arguments of one kind in its precision.

    Args:
        inputs: of `model_inputs`; with pixels that were neither rescaled nor normalised, uint8[..., 3, height, width], the
            processor's `lookup_table` is among them by the name `LOOKUP`, and is used up. The result is, to the bit, what the
            processor makes itself, but for tiles that pad a batch of images of several tiles, which no model looks at: they are
            black, where the processor's are 0.
        dtype: of what is not whole numbers.
    """
    arguments = dict(inputs)
    if (lookup := arguments.pop(LOOKUP, None)) is not None:
        name, pixels = next(iter(arguments.items()))
        channel = torch.arange(3, dtype=torch.int32, device=pixels.device).view(3, 1, 1)
        index = (pixels.int() + 256 * channel).flatten()
        arguments[name] = lookup.to(dtype).flatten().index_select(0, index).view(pixels.shape)
    return {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in arguments.items()
    }


def check_num_frames(num_frames: int) -> None:
    """Raises UserError for a video without frames."""
    if num_frames < 1:
        raise UserError(
            f"a video of {num_frames} frames can't be shown to the model; give one of at least 1 frame"
        )


def stack_frames(pixel_values_videos: Tensor) -> Tensor:
    """float[videos * frames, 3, height, width] of float[videos, frames, 3, height, width].

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


def _in_colour(videos: Any) -> Any:
    """Lists, or lists of lists, with RGB pictures: read as an array, a palette's picture would be its indices.

    Raises:
        UserError: an empty list.
    """
    if isinstance(videos, Image.Image):
        return videos.convert("RGB")
    if isinstance(videos, list | tuple):
        check_num_frames(len(videos))
        return [_in_colour(video) for video in videos]
    return videos


def _array_picture(frame: Any) -> Image.Image:
    """A frame of an array of frames. Raises UserError unless it is uint8[height, width, 3]."""
    pixels = np.asarray(frame)
    if pixels.dtype != np.uint8 or pixels.shape[2:] != (3,):
        raise UserError(
            f"a frame of {pixels.dtype}{list(pixels.shape)} is no picture; give PIL pictures, or uint8[height, width, 3]"
        )
    return Image.fromarray(pixels)


class FrameProcessor:
    """A video processor that makes of each frame what the model's image processor makes of a picture's base tile.

    Args:
        image_processor: of the model.
    """

    _auto_class = None  # saving a processor asks its parts

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor
        self.settings = image_processor.to_dict()
        self.has_tiles = "image_grid_pinpoints" in self.settings

    def __call__(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """`pixel_values_videos`: float[videos, frames, 3, height, width] of videos as lists of pictures, or as arrays.

        Settings of the image processor may be given; others are those of transformers' own video processors, and ignored.

        Raises:
            UserError: a video without frames, videos of different numbers of frames, a frame that is no picture, or a wish to
                have frames chosen.
        """
        if asked := [name for name in ("num_frames", "fps", "do_sample_frames") if kwargs.get(name)]:
            raise UserError(
                f"{asked[0]}={kwargs[asked[0]]}: without torchvision, frames are not chosen here; give those to be seen"
            )
        settings = {name: value for name, value in kwargs.items() if name in self.settings}
        if self.has_tiles:
            size = settings.get("size", self.settings["size"])
            side = size.get("height") or size["shortest_edge"]
            settings["image_grid_pinpoints"] = [[side, side]]
        made = []
        for video in make_batched_videos(_in_colour(videos)):
            frames = [_array_picture(frame) for frame in video]
            check_num_frames(len(frames))
            made_of_frames = self.image_processor(frames, return_tensors="pt", **settings)
            pixel_values = pixels_of(model_inputs("image", made_of_frames))
            made.append(pixel_values[:, 0] if self.has_tiles else pixel_values)
        if len({len(video) for video in made}) > 1:
            counts = [len(video) for video in made]
            raise UserError(
                f"videos of {counts} frames can't share a batch; take the same number of frames of each"
            )
        return BatchFeature({"pixel_values_videos": torch.stack(made)})


def build_processor(
    processor_class: Any, image_processor: Any, tokenizer: Any, settings: dict[str, Any]
) -> Any:
    """A processor of images and videos without torchvision: frames go through a `FrameProcessor`."""

    class WithoutTorchvision(processor_class):  # type: ignore[misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return type(argument)
            return super().check_argument_for_proper_class(argument_name, argument)

        def to_dict(self) -> dict[str, Any]:
            """As transformers' own processor, whose video processor has the image processor's settings."""
            saved: dict[str, Any] = super().to_dict()
            name = processor_class.__name__
            kind = {"video_processor_type": name.replace("Processor", "VideoProcessor")}
            return saved | {"video_processor": self.image_processor.to_dict() | kind}

    WithoutTorchvision.__name__ = processor_class.__name__  # which saved tokenizers record
    video_processor = FrameProcessor(image_processor)
    return WithoutTorchvision(
        image_processor=image_processor, tokenizer=tokenizer, video_processor=video_processor, **settings
    )


def load_video_processor(processor_class: Any, path: str) -> Any:
    """The processor of a folder or hub id of a model that takes videos, with or without torchvision."""
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(path)
    settings, _ = processor_class.get_processor_dict(path)
    parts = {"processor_class", *processor_class.get_attributes()}
    kept = {name: value for name, value in settings.items() if name not in parts}
    return build_processor(
        processor_class, AutoImageProcessor.from_pretrained(path), AutoTokenizer.from_pretrained(path), kept
    )
