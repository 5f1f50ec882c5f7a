"""The template of Qwen-VL models, which write tokens around each picture."""

from dataclasses import replace

from vzip.templates.encode import Template, chatml


def qwen_vl(system: str = "You are a helpful assistant.") -> Template:
    """ChatML of Qwen2.5-VL and Qwen3-VL: each picture stands between two tokens, without a newline.

    The ids are those of the models' own chat template, if the pictures come before the text. Qwen3-VL
    has no system prompt: set `system` to "".
    """
    opening = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return replace(
        chatml(system),
        name="qwen_vl",
        system=opening,
        image=("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
        video=("<|vision_start|>", "<|video_pad|>", "<|vision_end|>"),
        media_end="",
    )
