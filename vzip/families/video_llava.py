"""Video-LLaVA: an image tower and a video tower of 16 x 16 patches, 8 frames a video, each frame reduced by itself."""

from typing import Any, ClassVar

from torch import Tensor
from transformers import VideoLlavaForConditionalGeneration, VideoLlavaProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vzip.families.base import Family, encode, project
from vzip.media import load_video_processor, refuse_empty, stack_frames
from vzip.reducers.base import Reducer


class VideoLlava(Family):
    """Adapter of `VideoLlavaForConditionalGeneration`. A budget is of one image, or one frame."""

    model_type: ClassVar[str] = "video_llava"
    model_class: ClassVar[type] = VideoLlavaForConditionalGeneration
    seams: ClassVar[tuple[str, ...]] = ("get_image_features", "get_video_features")
    frozen_names = {"image tower": "model.image_tower", "video tower": "model.video_tower"}  # noqa: RUF012
    kinds: ClassVar[tuple[str, ...]] = ("image", "video")

    @classmethod
    def load_processor(cls, path: str) -> Any:
        return load_video_processor(VideoLlavaProcessor, path)

    def num_video_tokens(self, reducer: Reducer, num_frames: int) -> int:
        """All frames; without a reducer the model keeps the CLS of each."""
        refuse_empty(num_frames)
        return num_frames * reducer.num_tokens(self.num_patches, has_cls=self.has_cls, num_dropped=0)

    @classmethod
    def get_image_features(cls, inner: Any, reducer: Reducer, pixel_values: Tensor | None = None, **kwargs: Any) -> Any:
        legacy = kwargs.pop("pixel_values_images", None)  # generate() passes on what the processor calls them
        pixel_values = legacy if pixel_values is None else pixel_values
        features = reducer(cls.vision_tokens(inner, reducer, pixel_values, **kwargs)).features
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=project(inner, features))

    @classmethod
    def get_video_features(cls, inner: Any, reducer: Reducer, pixel_values_videos: Tensor, **kwargs: Any) -> Any:
        """As `get_image_features`, for each frame of each video."""
        frames = stack_frames(pixel_values_videos)
        features = reducer(encode(inner.video_tower, inner.config, reducer, frames, num_dropped=0, **kwargs)).features
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=project(inner, features))
