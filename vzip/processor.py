"""Make a model's processor count the tokens that remain after a reduction."""

import copy
from typing import Any

from vzip.families import Family
from vzip.media import MediaInputs
from vzip.reducers.base import Reducer


def reduced_processor(processor: Any, family: Family, reducer: Reducer) -> Any:
    """Copy a processor; the copy writes a placeholder for each token that remains.

    Args:
        processor: the model's processor, which counts all tokens.
        family: the adapter around the model, or around its config alone.
        reducer: decides how many tokens remain.
    """
    # Some processors have settings that decide how many tokens a picture has.
    family.read_processor(processor)

    # A shallow copy shares its parts with the original, but has methods of its own.
    reduced = copy.copy(processor)

    # Processors of transformers count placeholders in three methods. These two write those of one
    # image, or of one video, into the text.
    def replace_image_token(image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        inputs = MediaInputs.from_processed("image", image_inputs)
        return family.written(processor, reducer, "image", inputs, image_idx)

    def replace_video_token(video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        inputs = MediaInputs.from_processed("video", video_inputs)
        return family.written(processor, reducer, "video", inputs, video_idx)

    def get_num_multimodal_tokens(image_sizes: Any = None, video_sizes: Any = None, **kwargs: Any) -> Any:
        # Processors of models without videos do not take `video_sizes`.
        sizes = {"image_sizes": image_sizes}
        if video_sizes is not None:
            sizes["video_sizes"] = video_sizes
        counts = processor._get_num_multimodal_tokens(**sizes, **kwargs)

        # Replace the numbers of all tokens by those that remain.
        if image_sizes is not None:
            kept = [family.num_image_tokens(reducer, tuple(size)) for size in image_sizes]
            counts.num_image_tokens = [number + family.num_around_image for number in kept]
        if video_sizes is not None:
            counts.num_video_tokens = [family.num_video_tokens(reducer, size[0]) for size in video_sizes]
        return counts

    reduced.replace_image_token = replace_image_token
    reduced.replace_video_token = replace_video_token
    reduced._get_num_multimodal_tokens = get_num_multimodal_tokens
    return reduced
