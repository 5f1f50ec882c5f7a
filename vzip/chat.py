"""A conversation about one picture, its KV cache kept: a later turn runs the tokens that are new, and never the picture again.

This is what a reducer that does not look at the question allows.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from vzip.errors import UserError
from vzip.families import family_of
from vzip.generate import end_ids


@dataclass(frozen=True)
class Answer:
    """An answer, or its beginning, and what it took."""

    text: str
    num_visual_tokens: int
    """Of the picture."""
    num_prompt_tokens: int
    """Of the whole conversation up to the question, visual ones counted."""
    num_cached_tokens: int
    """Of these, those that the KV cache already had."""
    seconds_to_first_token: float
    """From the question to the first token, with processor, and with the vision tower where the picture was encoded."""
    tokens_per_second: float | None
    """Of the tokens behind the first one, the end token counted; None before there is one."""
    cache_bytes: int
    """Keys and values of the conversation so far."""


def _common_prefix(first: list[int], second: list[int]) -> int:
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


class Chat:
    """Questions about a picture, answered greedily, one conversation at a time.

    Where several conversations share a model (`vzip.Comparison`), each has to find it, whenever it is asked, in the row that it
    began with.

    Args:
        model: of a family that takes images, with a reducer attached or not.
        processor: of the model, or of the handle of its reducer, with a chat template.
        picture: what the questions are about.
        max_new_tokens: of an answer.

    Raises:
        UserError: a processor without a chat template.
    """

    def __init__(
        self, model: Any, processor: Any, picture: Image.Image, *, max_new_tokens: int = 128
    ) -> None:
        if processor.chat_template is None:
            raise UserError(
                "this model's processor has no chat template, so that how to ask it is unknown; set processor.chat_template, "
                "e.g. to vzip.templates.jinja.chat_template(vzip.templates.vicuna(), processor.tokenizer)"
            )
        self.model, self.processor, self.picture = model, processor, picture.convert("RGB")
        self.max_new_tokens = max_new_tokens
        self.messages: list[dict[str, Any]] = []
        """The turns so far, as `processor.apply_chat_template` takes them."""
        self._placeholder = family_of(model).placeholder_id("image")
        self._forget()

    def _forget(self) -> None:
        self._cache, self._ids = (
            DynamicCache(),
            list[int](),
        )  # the cache holds the keys and values of these ids

    def _inputs(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The model's arguments for a whole conversation, the last turn of which is a question."""
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(text=text, images=[self.picture], return_tensors="pt")
        return dict(inputs.to(self.model.device, self.model.dtype))

    def _messages_with(self, question: str) -> list[dict[str, Any]]:
        """Raises UserError for a question that no model can be asked."""
        if not question.strip():
            raise UserError("the question is empty; ask something about the picture")
        for kind in ("image", "video"):
            token = getattr(self.processor, f"{kind}_token", None)
            if token and token in question:
                raise UserError(f"the question spells {token}, which stands for a picture; leave it out")
        message = _message("user", question.strip())
        if not self.messages:
            message["content"].insert(0, {"type": "image"})
        return [*self.messages, message]

    def _keep_common(self, ids: list[int]) -> int:
        """Crop the cache to what it shares with the conversation's ids, at least one of which is left to be run.

        It is emptied where not the whole picture is shared: the tokens of a picture are made together. Returns how many are
        kept.
        """
        kept = min(_common_prefix(self._ids, ids), len(ids) - 1)
        if self._placeholder in ids[kept:]:
            self._forget()
            return 0
        if kept < len(self._ids):
            self._cache.crop(kept - len(self._ids))  # negative: that many are removed
            self._ids = self._ids[:kept]
        return kept

    def _run(self, ids: list[int], **media: Tensor) -> int:
        """The token that follows after these ids, which stand behind those of the cache."""
        input_ids = torch.tensor([ids], device=self.model.device)
        settings = {"use_cache": True, "logits_to_keep": 1}
        try:
            output = self.model(input_ids=input_ids, past_key_values=self._cache, **settings, **media)
        except BaseException:  # e.g. out of memory, where some layers have the new keys and others have not
            self._forget()
            raise
        self._ids += ids
        return int(output.logits[0, -1].argmax())

    def _cache_bytes(self) -> int:
        return sum(part.nbytes for layer in self._cache.layers for part in (layer.keys, layer.values))

    def _refuse_too_long(self, num_tokens: int) -> None:
        limit = self.model.config.get_text_config().max_position_embeddings
        if num_tokens + self.max_new_tokens > limit:
            raise UserError(
                f"the conversation has {num_tokens} tokens, and the model takes {limit} with an answer of up to "
                f"max_new_tokens={self.max_new_tokens}; start a new conversation"
            )

    @torch.no_grad()
    def ask(self, question: str) -> Iterator[Answer]:
        """The answer as it grows, token by token; the last one is whole: `*_, answer = chat.ask("what is this?")`.

        A turn counts once it was taken to its end: one that is broken off leaves the conversation as it was.

        Raises:
            UserError: an empty question, one with a placeholder, or a conversation that is longer than the model takes.
        """
        start = time.perf_counter()
        messages = self._messages_with(question)
        inputs = self._inputs(messages)
        prompt: list[int] = inputs.pop("input_ids")[0].tolist()
        self._refuse_too_long(len(prompt))
        inputs.pop("attention_mask")
        kept = self._keep_common(prompt)
        token = self._run(prompt[kept:], **({} if kept else inputs))
        answer = Answer(
            text="",
            num_visual_tokens=prompt.count(self._placeholder),
            num_prompt_tokens=len(prompt),
            num_cached_tokens=kept,
            seconds_to_first_token=time.perf_counter() - start,
            tokens_per_second=None,
            cache_bytes=0,
        )
        ends, made, seconds = end_ids(self.model, self.processor), list[int](), 0.0
        while token not in ends:
            made.append(token)
            text = self.processor.tokenizer.decode(made, skip_special_tokens=True).strip()
            answer = replace(answer, text=text, cache_bytes=self._cache_bytes())
            yield answer
            if len(made) == self.max_new_tokens:
                break
            begun = (
                time.perf_counter()
            )  # not before the yield: what the caller does with a part is no time of the model's
            token = self._run([token])
            seconds += time.perf_counter() - begun
            answer = replace(answer, tokens_per_second=len(made) / seconds)
        self.messages = [*messages, _message("assistant", answer.text)]
        yield replace(answer, cache_bytes=self._cache_bytes())
