"""Video-LLaVA: a tower for images and one for the 8 frames of a video, each reduced by itself."""

from typing import Any, ClassVar

from transformers import VideoLlavaForConditionalGeneration, VideoLlavaProcessor

from vzip.checkpoints import hf
from vzip.families.base import Family
from vzip.families.features import VisualFeatures
from vzip.media import MediaInputs, check_num_frames, stack_frames
from vzip.reducers.base import Reducer


class VideoLlava(Family):
    """Adapter of `VideoLlavaForConditionalGeneration`. A budget counts the tokens of one frame."""

    model_type: ClassVar[str] = "video_llava"
    model_class: ClassVar[type] = VideoLlavaForConditionalGeneration
    frozen_names = {"image tower": "model.image_tower", "video tower": "model.video_tower"}  # noqa: RUF012
    kinds: ClassVar[tuple[str, ...]] = ("image", "video")
    stacked: ClassVar[tuple[str, ...]] = ("image", "video")

    @classmethod
    def load_processor(cls, path: str) -> Any:
        return hf.load_video_processor(VideoLlavaProcessor, path)

    def num_video_tokens(self, reducer: Reducer, num_frames: int) -> int:
        """Count the tokens of all frames. An unreduced model keeps the CLS of each frame."""
        check_num_frames(num_frames)
        return num_frames * reducer.num_tokens(self.num_patches, has_cls=self.has_cls, num_dropped=0)

    def visual_features(
        self, kind: str, inputs: MediaInputs, reducer: Reducer, **options: Any
    ) -> VisualFeatures:
        """Do the same as the base class. A video is its frames one after the other."""
        if kind == "image":
            return super().visual_features(kind, inputs, reducer, **options)

        frames = stack_frames(inputs.pixels)
        video_tower = self.frozen_parts["video tower"]
        tokens = self._run_tower(video_tower, reducer, frames, num_dropped=0, **options)
        return VisualFeatures.in_order(reducer(tokens).features, num_media=inputs.num_media)
