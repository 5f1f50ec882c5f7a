"""A conversation about one picture that keeps its KV cache.

A later turn runs only the tokens that are new, and never the picture again. This works because a
reducer does not look at the question.
"""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from vzip.errors import UserError
from vzip.families import family_of
from vzip.generate import end_ids
from vzip.pictures import upright_rgb


@dataclass(frozen=True)
class Answer:
    """An answer, or its beginning, and what it took."""

    text: str
    num_visual_tokens: int
    """Tokens of the picture."""
    num_prompt_tokens: int
    """Tokens of the conversation up to the question, visual ones included."""
    num_cached_tokens: int
    """Tokens of these that the KV cache already held."""
    seconds_to_first_token: float
    """From the question to the first token, with the processor, and with the tower if it ran."""
    tokens_per_second: float | None
    """Speed after the first token, the end token included; None before there is a second one."""
    cache_bytes: int
    """Keys and values of the conversation so far."""


def _common_length(first: list[int], second: list[int]) -> int:
    """Count the ids that both lists begin with."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


class Chat:
    """Questions about a picture and their greedy answers, one conversation at a time.

    Several conversations may share a model (`vzip.Comparison`). Then each must find it in the
    setting that it began with, whenever it asks.

    Args:
        model: a model of a family that takes images, with or without a reducer attached.
        processor: the model's, or that of the reducer's handle, with a chat template.
        picture: what the questions are about.
        max_new_tokens: most tokens of an answer.

    Attributes:
        messages: the turns so far, as `processor.apply_chat_template` takes them.

    Raises:
        UserError: the processor has no chat template.
        ValueError: the picture exceeds the limits of `vzip.pictures`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        picture: Image.Image,
        *,
        max_new_tokens: int = 128,
    ) -> None:
        if processor.chat_template is None:
            raise UserError(
                "this model's processor has no chat template, so its prompt format is unknown; set "
                "processor.chat_template, e.g. to "
                "vzip.templates.jinja.chat_template(vzip.templates.vicuna(), processor.tokenizer)"
            )
        self.model = model
        self.processor = processor
        self.picture = upright_rgb(picture)
        self.max_new_tokens = max_new_tokens
        self.messages: list[dict[str, Any]] = []
        self._placeholder_id = family_of(model).placeholder_id("image")
        self._clear_cache()

    def _clear_cache(self) -> None:
        self._cache = DynamicCache()
        # The ids whose keys and values the cache holds.
        self._cached_ids: list[int] = []
        # What is added to the index of a token to get its position, for a model with rows and columns.
        self._rope_deltas: Tensor | None = None

    def _messages_with(self, question: str) -> list[dict[str, Any]]:
        """Return the messages with a new question. Raises UserError if it is not only text."""
        # A placeholder in a question would be counted as one more picture.
        if not question.strip():
            raise UserError("the question is empty; ask something about the picture")
        if any("\ud800" <= character <= "\udfff" for character in question):
            raise UserError("the question holds half of a surrogate pair, which is no text; type it again")
        for kind in ("image", "video"):
            token = getattr(self.processor, f"{kind}_token", None)
            if token and token in question:
                raise UserError(f"the question spells {token}, which stands for a picture; leave it out")

        # The picture is part of the first question.
        message = _message("user", question.strip())
        if not self.messages:
            message["content"].insert(0, {"type": "image"})
        return [*self.messages, message]

    def _inputs(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """Make the model's arguments for a complete conversation that ends with a question."""
        # Prepare the whole conversation again, because a template may change what it wrote before.
        # The cache saves the model's work alone.
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(text=text, images=[self.picture], return_tensors="pt")
        return dict(inputs.to(self.model.device, self.model.dtype))

    def _check_length(self, num_tokens: int) -> None:
        """Raise UserError if the prompt and an answer are longer than the model takes."""
        limit = self.model.config.get_text_config().max_position_embeddings
        if num_tokens + self.max_new_tokens > limit:
            raise UserError(
                f"the conversation has {num_tokens} tokens, and the model takes {limit} with an answer "
                f"of up to max_new_tokens={self.max_new_tokens}; start a new conversation"
            )

    def _crop_cache(self, prompt: list[int]) -> int:
        """Remove tokens from the cache that are not in the prompt, and return how many remain.

        At least one token is left to run. The cache is emptied unless it holds all tokens of the
        picture, because these are computed together.
        """
        # Run the last token even if it is cached: its output gives the first token of the answer.
        num_cached = min(_common_length(self._cached_ids, prompt), len(prompt) - 1)
        if self._placeholder_id in prompt[num_cached:]:
            self._clear_cache()
            return 0

        # The rest of the cache belongs to an answer that was broken off, or that the template
        # writes with other tokens than the model.
        num_surplus = len(self._cached_ids) - num_cached
        if num_surplus > 0:
            # A negative number removes that many from the end.
            self._cache.crop(-num_surplus)
            self._cached_ids = self._cached_ids[:num_cached]
        return num_cached

    def _next_token(self, ids: list[int], **media: Tensor) -> int:
        """Run the ids that follow those in the cache, and return the most likely next token."""
        # The model remembers `rope_deltas` of the last sequence that it ran, which may be another
        # conversation's.
        inner = self.model.model
        has_rows = hasattr(inner, "rope_deltas")
        if has_rows and self._cached_ids:
            inner.rope_deltas = self._rope_deltas

        try:
            output = self.model(
                input_ids=torch.tensor([ids], device=self.model.device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
                **media,
            )
        except BaseException:
            # E.g. out of memory: some layers have the new keys and others do not.
            self._clear_cache()
            raise

        self._cached_ids += ids
        self._rope_deltas = inner.rope_deltas if has_rows else None
        return int(output.logits[0, -1].argmax())

    def _cache_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)

    @torch.no_grad()
    def ask(self, question: str) -> Iterator[Answer]:
        """Yield the answer as it grows, token by token; the last one is complete.

        To take only the last one: `*_, answer = chat.ask("what is this?")`. A turn counts once it
        was taken to its end. If it is broken off, the conversation stays as it was.

        Raises:
            UserError: the question is empty or holds a placeholder, or the conversation is longer
                than the model takes.
        """
        start = time.perf_counter()
        messages = self._messages_with(question)
        inputs = self._inputs(messages)
        prompt: list[int] = inputs.pop("input_ids")[0].tolist()
        inputs.pop("attention_mask")
        self._check_length(len(prompt))

        # What is left of the inputs is the picture, which the cache holds already in later turns.
        num_cached = self._crop_cache(prompt)
        media = {} if num_cached else inputs
        token = self._next_token(prompt[num_cached:], **media)
        answer = Answer(
            text="",
            num_visual_tokens=prompt.count(self._placeholder_id),
            num_prompt_tokens=len(prompt),
            num_cached_tokens=num_cached,
            seconds_to_first_token=time.perf_counter() - start,
            tokens_per_second=None,
            cache_bytes=0,
        )
        answer = yield from self._continue(token, answer)

        # The turn counts only now: a caller that stops before leaves the conversation unchanged.
        self.messages = [*messages, _message("assistant", answer.text)]
        yield replace(answer, cache_bytes=self._cache_bytes())

    def _continue(self, token: int, answer: Answer) -> Generator[Answer, None, Answer]:
        """Yield `answer` with its text so far after each token, and return the complete answer.

        `token` is the first token, which was computed already.
        """
        ends = end_ids(self.model, self.processor)
        ids: list[int] = []
        seconds = 0.0
        while token not in ends:
            ids.append(token)
            # All tokens are decoded together, because a character may consist of several.
            text = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
            answer = replace(answer, text=text, cache_bytes=self._cache_bytes())
            yield answer
            if len(ids) == self.max_new_tokens:
                break

            # Start the clock after the yield, so that the caller's own work does not count.
            start = time.perf_counter()
            token = self._next_token([token])
            seconds += time.perf_counter() - start
            answer = replace(answer, tokens_per_second=len(ids) / seconds)
        return answer
