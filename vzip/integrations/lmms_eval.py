"""vzip's models in lmms-eval 0.7, which finds `manifest` by the entry-point group `lmms_eval.models`.

    lmms_eval --model vzip --model_args pretrained=runs/X --tasks gqa --batch_size 8
    lmms_eval --model vzip --model_args pretrained=runs/X,row=free
    lmms_eval --model vzip --model_args pretrained=llava-hf/llava-1.5-7b-hf,budget=64
    lmms_eval --model vzip --model_args pretrained=llava-hf/llava-1.5-7b-hf,budget=full

Source of the interface: repository EvolvingLMMs-Lab/lmms-eval, `lmms_eval/api/model.py` and `lmms_eval/models/registry_v2.py`.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from vzip.errors import UserError
from vzip.integrations.answering import Answerer, Conversation, Generated, GenerationSettings

NAME = "vzip"


def manifest() -> ModelManifest:
    """What lmms-eval registers: a model of conversations, "vzip"."""
    return ModelManifest(model_id=NAME, chat_class_path=f"{Vzip.__module__}.{Vzip.__name__}")


class Vzip(lmms):  # type: ignore[misc]
    """A run, or a base model, in one of its rows.

    Args:
        arguments: those of `--model_args`, `--batch_size` and `--device`: see `GenerationSettings`.

    Raises:
        UserError: a mistake in them, or nothing that can be loaded.
    """

    is_simple = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.accelerator = (
            Accelerator()
        )  # of several processes, each asks its share of the questions, on its own device
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        device = arguments.get("device")
        if device and self.world_size > 1:
            raise UserError(
                f"device={device}: each of {self.world_size} processes has a device of its own; leave it out"
            )
        self.answerer = Answerer(
            GenerationSettings.of({**arguments, "device": device or str(self.accelerator.device)})
        )

    @property
    def device(self) -> torch.device:
        return self.answerer.device

    @property
    def batch_size(self) -> int:
        return self.answerer.settings.batch_size

    def _document(self, task: str, split: str, number: int) -> Any:
        return self.task_dict[task][split][number]

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """An answer to each request, in their order. Requests that are generated alike share batches."""
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[2], sort_keys=True, default=str)].append(number)
        results: dict[int, GenerationResult] = {}
        with tqdm(
            total=len(requests), desc="answers", unit="question", disable=self.rank != 0, mininterval=5
        ) as progress:
            for group in alike.values():
                for start in range(0, len(group), self.batch_size):
                    part = group[start : start + self.batch_size]
                    answers = self._ask([requests[number] for number in part])
                    results.update(zip(part, map(_result, answers), strict=True))
                    progress.update(len(part))
        return [results[number] for number in range(len(requests))]

    def _ask(self, requests: Sequence[Any]) -> list[Generated]:
        conversations = []
        for request in requests:
            _, messages_of, _, number, task, split = request.args
            conversations.append(messages_of(self._document(task, split, number)))
        return self.answerer.answers(conversations, requests[0].args[2])

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of each round of each request: a task makes the messages of a round from the answers before it."""
        return [self._rounds(request) for request in tqdm(requests, desc="rounds", disable=self.rank != 0)]

    def _rounds(self, request: Any) -> list[str]:
        _, messages_of, asked, number, task, split = request.args
        document, answers, info = self._document(task, split, number), list[str](), None
        messages: Conversation = messages_of(document)
        while True:
            (answer,) = self.answerer.answers([messages], asked)
            answers.append(answer.text)
            before = {
                "round_idx": len(answers),
                "previous_output": list(answers),
                "previous_round_info": info,
            }
            following = messages_of(document, **before)
            if (
                not isinstance(following, tuple) or following[1]
            ):  # a task of one round, or the last round's answer was given
                return answers
            messages, _, _, info = following

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """lmms-eval's tasks for models of conversations have answers generated, and never ask for likelihoods."""
        raise NotImplementedError("vzip generates answers; choose a task of output_type generate_until")


def _result(answer: Generated) -> GenerationResult:
    counts = TokenCounts(input_tokens=answer.num_prompt_tokens, output_tokens=answer.num_tokens)
    return GenerationResult(text=answer.text, token_counts=counts)
