"""vzip's models in lmms-eval 0.7, which finds `manifest` by the entry point `lmms_eval.models`.

    lmms_eval --model vzip --model_args pretrained=runs/X --tasks gqa --batch_size 8
    lmms_eval --model vzip --model_args pretrained=runs/X,row=free
    lmms_eval --model vzip --model_args pretrained=llava-hf/llava-1.5-7b-hf,budget=64
    lmms_eval --model vzip --model_args pretrained=llava-hf/llava-1.5-7b-hf,budget=full

Source of the interface: repository EvolvingLMMs-Lab/lmms-eval, `lmms_eval/api/model.py` and
`lmms_eval/models/registry_v2.py`.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from vzip.errors import UserError
from vzip.integrations.answering import Answerer, Generated, GenerationSettings, Messages

NAME = "vzip"


def manifest() -> ModelManifest:
    """Describe the model "vzip" to lmms-eval: a chat model, and the path of its class."""
    return ModelManifest(model_id=NAME, chat_class_path=f"{Vzip.__module__}.{Vzip.__name__}")


def _result(answer: Generated) -> GenerationResult:
    counts = TokenCounts(
        input_tokens=answer.num_prompt_tokens,
        output_tokens=answer.num_tokens,
    )
    return GenerationResult(text=answer.text, token_counts=counts)


class Vzip(lmms):  # type: ignore[misc]
    """A run, an export or a base model, in one of its settings.

    Args:
        arguments: what stands in `--model_args`, `--batch_size` and `--device`; see
            `GenerationSettings`.

    Raises:
        UserError: an argument is wrong, or the model can't be loaded.
    """

    # lmms-eval gives messages to such models, and text with pictures to simple ones.
    is_simple = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__()

        # With several processes, each answers its share of the questions on its own device.
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes

        # One named device for all processes would put every copy of the model on the same GPU.
        device = arguments.get("device")
        if device and self.world_size > 1:
            raise UserError(f"device={device}: {self.world_size} processes need a device each; leave it out")
        arguments["device"] = device or str(self.accelerator.device)
        self.answerer = Answerer(GenerationSettings.of(arguments))

    @property
    def device(self) -> torch.device:
        return self.answerer.device

    @property
    def batch_size(self) -> int:
        return self.answerer.settings.batch_size

    def _document(self, task: str, split: str, number: int) -> Any:
        return self.task_dict[task][split][number]

    def _batches(self, requests: Sequence[Any]) -> Iterator[list[int]]:
        """Yield the numbers of the requests in batches with equal generation arguments."""
        # Requests with different arguments, such as the longest answer, can't share a call.
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            generation_arguments = json.dumps(request.args[2], sort_keys=True, default=str)
            groups[generation_arguments].append(number)

        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answer each request; the results are in the order of the requests."""
        results: dict[int, GenerationResult] = {}
        with tqdm(
            total=len(requests),
            desc="answers",
            unit="question",
            disable=self.rank != 0,
            mininterval=5,
        ) as progress:
            for batch in self._batches(requests):
                answers = self._answer([requests[number] for number in batch])
                for number, answer in zip(batch, answers, strict=True):
                    results[number] = _result(answer)
                progress.update(len(batch))

        # Batches were grouped by their arguments, so restore the order of the requests.
        return [results[number] for number in range(len(requests))]

    def _answer(self, requests: Sequence[Any]) -> list[Generated]:
        """Answer one batch of requests."""
        # lmms-eval passes no messages, but a function that makes them from a document of the task.
        conversations = []
        for request in requests:
            _, messages_of, _, number, task, split = request.args
            conversations.append(messages_of(self._document(task, split, number)))
        return self.answerer.answers(conversations, requests[0].args[2])

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answer each request in rounds, and return the answers of all rounds.

        The task makes the messages of a round from the answers of the rounds before.
        """
        results = []
        for request in tqdm(requests, desc="rounds", disable=self.rank != 0):
            results.append(self._rounds(request))
        return results

    def _rounds(self, request: Any) -> list[str]:
        _, messages_of, asked, number, task, split = request.args
        document = self._document(task, split, number)
        messages: Messages = messages_of(document)
        answers: list[str] = []
        info = None
        while True:
            (answer,) = self.answerer.answers([messages], asked)
            answers.append(answer.text)

            # The task sees a copy of the answers, because it may change its list.
            next_round = messages_of(
                document,
                round_idx=len(answers),
                previous_output=list(answers),
                previous_round_info=info,
            )

            # A task of a single round returns messages alone; the last round sets the second value.
            if not isinstance(next_round, tuple) or next_round[1]:
                return answers
            messages, _, _, info = next_round

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse, because lmms-eval's tasks for chat models never need likelihoods."""
        raise NotImplementedError("vzip generates answers; choose a task of output_type generate_until")
