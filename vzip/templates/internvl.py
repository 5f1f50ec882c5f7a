"""The template of InternVL, whose processor writes tokens around each picture."""

from dataclasses import replace

from vzip.templates.encode import Template, chatml


def internvl(system: str = "") -> Template:
    """ChatML of InternVL3 and InternVL3.5: each picture stands between `<img>` and `</img>`.

    The ids are those of the models' own chat template, if the pictures come before the text. It has
    no system prompt of its own.
    """
    opening = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return replace(
        chatml(system),
        name="internvl",
        system=opening,
        image=("<img>", "<IMG_CONTEXT>", "</img>"),
        image_text="<IMG_CONTEXT>",
    )
