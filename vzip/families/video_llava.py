"""Video-LLaVA: an image tower and a video tower of 16 x 16 patches, 8 frames a video, each frame reduced by itself."""

from typing import Any, ClassVar

from transformers import VideoLlavaForConditionalGeneration, VideoLlavaProcessor

from vzip.families.base import Family, run_vision_tower
from vzip.families.features import VisualFeatures
from vzip.media import check_num_frames, load_video_processor, stack_frames
from vzip.reducers.base import Reducer


class VideoLlava(Family):
    """Adapter of `VideoLlavaForConditionalGeneration`. A budget is of one image, or one frame."""

    model_type: ClassVar[str] = "video_llava"
    model_class: ClassVar[type] = VideoLlavaForConditionalGeneration
    frozen_names = {"image tower": "model.image_tower", "video tower": "model.video_tower"}  # noqa: RUF012
    kinds: ClassVar[tuple[str, ...]] = ("image", "video")
    stacked: ClassVar[tuple[str, ...]] = ("image", "video")

    @classmethod
    def load_processor(cls, path: str) -> Any:
        return load_video_processor(VideoLlavaProcessor, path)

    def num_video_tokens(self, reducer: Reducer, num_frames: int) -> int:
        """All frames; without a reducer the model keeps the CLS of each."""
        check_num_frames(num_frames)
        return num_frames * reducer.num_tokens(self.num_patches, has_cls=self.has_cls, num_dropped=0)

    @classmethod
    def reduced(cls, kind: str, inner: Any, reducer: Reducer, pixels: Any, **inputs: Any) -> VisualFeatures:
        """As the other families'; each frame of a video is reduced by itself, and a video is its frames one after the other."""
        if kind == "video":
            tokens = run_vision_tower(
                inner.video_tower, inner.config, reducer, stack_frames(pixels), num_dropped=0, **inputs
            )
            return VisualFeatures.as_it_is(reducer(tokens).features, num_media=len(pixels))
        legacy = inputs.pop("pixel_values_images", None)  # generate() passes on what the processor calls them
        return super().reduced(kind, inner, reducer, legacy if pixels is None else pixels, **inputs)
