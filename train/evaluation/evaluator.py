"""Ask the held-out questions in each setting: full, training-free, tuned.

`Evaluator` also draws which tokens the reducer keeps.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import DictConfig

from data.batches.collate import Collator
from data.examples.tokens import Example, example_of, kinds_of
from data.progress import progress
from train.config import asks_questions
from train.evaluation.questions import HeldOutQuestion, SettingAnswers, held_out_questions
from train.examples import held_out_conversations
from train.memory import fitting_questions
from train.ranks import all_gather_list, get_rank, get_world_size, is_main, on_rank0, print_rank0
from train.runs import read_answers
from vzip import attach
from vzip.families import Family
from vzip.files import write_json
from vzip.generate import generate_answers
from vzip.overlay import kept_tokens, look
from vzip.pictures import open_picture
from vzip.reducers import Reducer
from vzip.reducers.identity import Identity
from vzip.runs.projector import budget_of
from vzip.templates.encode import Template, encode

NUM_PICTURES = 4
"""Pictures of kept tokens that a run draws."""


class Runner(Protocol):
    """The model on this rank's device. `train.engine.Engine` is one.

    Attributes:
        family: the adapter around the model, which has no reducer attached.
        device: where inputs go.
        num_trainable: trainable parameters, whose gradients and moments take memory.
        is_sharded: whether the ranks share the weights between them (ZeRO 3).
    """

    family: Family
    device: torch.device
    is_sharded: bool

    @property
    def num_trainable(self) -> int: ...

    def gathered_parameters(self) -> AbstractContextManager[None]:
        """Gather the parameters that belong to no submodule, around calls of the model."""
        ...


class SingleDevice:
    """A `Runner` for a model that is not being trained.

    Args:
        family: the adapter around the model, on its device.
    """

    num_trainable = 0
    is_sharded = False

    def __init__(self, family: Family) -> None:
        self.family = family
        self.device: torch.device = family.model.device

    def gathered_parameters(self) -> AbstractContextManager[None]:
        return nullcontext()


class AnswerFiles:
    """The answers of each setting as answers_SETTING.json, so that an interrupted run asks once.

    Rank 0 reads and writes.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, setting: str) -> list[dict[str, Any]] | None:
        """Return the answers of a setting, on every rank; None if it was not asked.

        Raises UserError if the file is damaged.
        """
        # Other hosts may not see the file, and all ranks must agree on whether to generate.
        path = self.folder / f"answers_{setting}.json"
        return on_rank0(lambda: read_answers(path) if path.is_file() else None)

    def save(self, setting: str, answers: Sequence[dict[str, Any]]) -> None:
        """Write the answers of a setting."""
        if is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / f"answers_{setting}.json", list(answers))


class Evaluator:
    """Asks the held-out questions with one reducer after another. All ranks call its methods.

    Args:
        cfg: the run's settings.
        runner: the model.
        answers: where answers are kept.
        processor: the model's processor.
        template: the format that the model was trained with.

    Attributes:
        questions: the questions; empty if the run asks none.
        examples: the same questions, ready for the model.
    """

    def __init__(
        self, cfg: DictConfig, runner: Runner, answers: AnswerFiles, processor: Any, template: Template
    ) -> None:
        self.cfg = cfg
        self.runner = runner
        self.answers = answers
        self.processor = processor
        self.template = template
        self.questions: list[HeldOutQuestion] = []
        self.examples: list[Example] = []

        if asks_questions(cfg):
            conversations = held_out_conversations(cfg)
            self.questions = held_out_questions(conversations, limit=cfg.evaluate.questions)
            self.examples = [self._example(question) for question in self.questions]
        else:
            print_rank0("no evaluation: data.held_out is not set, or evaluate.questions is 0")

    def _example(self, question: HeldOutQuestion) -> Example:
        """Encode a question with the turns and pictures before it. The model writes the answer."""
        # None stands for the answer that is asked for.
        tokenizer = self.processor.tokenizer
        turns = [*question.previous_turns, (question.text, None)]
        ids, labels = encode(self.template, tokenizer, turns)
        folder = Path(self.cfg.data.image_folder).expanduser()
        return example_of(ids, labels, question.conversation, self.template, tokenizer, folder)

    def baselines(self, reducers: Sequence[Reducer]) -> list[SettingAnswers]:
        """Ask with all tokens (`full`), and reduced (`free`), before tuning."""
        if not self.cfg.evaluate.baselines:
            return []

        # The identity keeps all tokens, on the same path as the reducers.
        full = self.ask("full", [Identity()])

        # For a run that keeps all tokens, `free` would be the same as `full`.
        if isinstance(reducers[0], Identity):
            return full
        return full + self.ask("free", reducers)

    def ask(self, name: str, reducers: Sequence[Reducer]) -> list[SettingAnswers]:
        """Ask all questions with each reducer, or read the answers that an earlier run has left.

        Args:
            name: the name of the setting. With several reducers it is NAME-BUDGET.
            reducers: what to attach to the model, one after the other.

        Returns:
            the answers in each setting; empty without questions
        """
        if not self.questions:
            return []

        settings = []
        for reducer in reducers:
            setting = name
            if len(reducers) > 1:
                setting = f"{name}-{budget_of(self.runner.family, reducer)}"

            # Generating is slow, so the answers of each setting are written at once.
            answers = self.answers.load(setting)
            if answers is None:
                answers = self._generate_all(reducer, title=f"evaluate {setting}")
                self.answers.save(setting, answers)
            settings.append(SettingAnswers(setting, answers))
        return settings

    @torch.no_grad()
    def _generate_all(self, reducer: Reducer, *, title: str) -> list[dict[str, Any]]:
        """Generate the answers to all questions, greedily, and grade them.

        The ranks share the work. Each of them returns all answers.
        """
        # A random reducer draws the same tokens whenever the questions are asked.
        torch.manual_seed(self.cfg.seed)
        family = self.runner.family
        num_frames = self.cfg.model.get("num_frames", 1)

        with attach(family.model, reducer=reducer, anyres=family.anyres):
            collator = Collator(
                self.processor, family, reducer, kinds=kinds_of(self.examples), num_frames=num_frames
            )
            batches = self._own_batches(collator)

            # This rank's answers: (number of the question, text, visual tokens).
            answers: list[tuple[int, str, int]] = []
            for numbers in progress(batches, total=len(batches), title=title, unit="batch", shown=is_main()):
                examples = [self.examples[number] for number in numbers]
                with self.runner.gathered_parameters():
                    texts, num_visual_tokens = self._generate(collator, examples)
                answers += zip(numbers, texts, num_visual_tokens, strict=True)

        # Join the answers of all ranks. A question that was asked twice is graded once.
        graded = {}
        for number, text, num_visual_tokens in all_gather_list(answers):
            graded[number] = self.questions[number].graded(text, num_visual_tokens=num_visual_tokens)
        return [graded[number] for number in range(len(self.questions))]

    def _own_batches(self, collator: Collator) -> list[list[int]]:
        """Choose the questions that this rank asks, in batches of their numbers.

        Every rank has the same number of batches.
        """
        num_questions = len(self.questions)
        world_size = get_world_size()

        # Deal the questions out in turn, so that each rank gets some of each kind.
        own = list(range(get_rank(), num_questions, world_size))

        # Under ZeRO 3 the ranks must generate equally often: a rank with fewer questions asks its
        # last one again.
        num_per_rank = -(-num_questions // world_size)
        last = own[-1] if own else 0
        own += [last] * (num_per_rank - len(own))

        # Choose the batch for the longest question: any batch may hold several such questions.
        longest = max(self._num_tokens(collator, example) for example in self.examples)
        size = fitting_questions(
            self.cfg,
            self.runner.family,
            longest=longest + self.cfg.evaluate.max_new_tokens,
            num_trainable=self.runner.num_trainable,
            world_size=world_size,
        )
        return [own[start : start + size] for start in range(0, len(own), size)]

    def _num_tokens(self, collator: Collator, example: Example) -> int:
        """Count a question's tokens after expansion, with images of the family's usual size."""
        # The ids have one placeholder per picture, which becomes all its visual tokens.
        num_images = len(example.media.get("image", ()))
        num_videos = len(example.media.get("video", ()))
        num_text = len(example.ids) - num_images - num_videos

        family = self.runner.family
        num_visual = family.num_example_tokens(collator.reducer, [None] * num_images)
        if num_videos:
            num_visual += num_videos * family.num_video_tokens(collator.reducer, collator.num_frames)
        return num_text + num_visual

    def _generate(self, collator: Collator, examples: Sequence[Example]) -> tuple[list[str], list[int]]:
        """Generate the answers to a batch of questions.

        Returns:
            (answers, visual tokens of each question)
        """
        family = self.runner.family

        # Pad on the left, so that the answers of all questions begin at the same position.
        batch = collator(examples, left=True).to(self.runner.device)
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            **family.text_arguments(batch.input_ids),
        }

        # A batch without a picture holds a blank one, which the model would refuse as an argument.
        for kind, num_placeholders in batch.num_placeholders.items():
            media = batch.media[kind].normalized(family.model.dtype)
            if num_placeholders:
                inputs |= media.arguments
            elif self.runner.is_sharded:
                # Questions of other ranks may have pictures, so run the same modules as they do.
                family.project(family.visual_features(kind, media, collator.reducer))

        answers = generate_answers(
            family.model,
            self.processor.tokenizer,
            inputs,
            max_new_tokens=self.cfg.evaluate.max_new_tokens,
            do_sample=False,
            synced_gpus=self.runner.is_sharded,
            **self._stop_settings(),
        )
        texts = [answer.text for answer in answers]

        # Count the visual tokens by their placeholders in the prompt: each token has one.
        placeholders = torch.tensor([family.placeholder_id(kind) for kind in batch.media])
        is_placeholder = torch.isin(batch.input_ids.cpu(), placeholders)
        return texts, is_placeholder.sum(dim=1).tolist()

    def _stop_settings(self) -> dict[str, Any]:
        """Choose what ends an answer: the template's end token, or the text behind an answer."""
        tokenizer = self.processor.tokenizer
        if self.template.end:
            return {"ends": {tokenizer.convert_tokens_to_ids(self.template.end)}}
        return {"ends": {tokenizer.eos_token_id}, "stop_strings": [self.template.answer_suffix]}

    def draw_kept_tokens(self, reducer: Reducer, folder: Path) -> list[Path]:
        """Draw which tokens the reducer keeps of the first pictures. Returns the files.

        All ranks run the tower, because they may share its weights. Rank 0 writes.
        """
        # Collect the pictures in order, each once: several questions may share one.
        pictures: list[Path] = []
        for example in self.examples:
            for path in example.media.get("image", ()):
                if path not in pictures:
                    pictures.append(path)

        # A random reducer draws the tokens that it keeps, so seed the draw.
        torch.manual_seed(self.cfg.seed)
        image_processor = self.processor.image_processor
        files = []
        for number, path in enumerate(pictures[:NUM_PICTURES]):
            tokens = look(self.runner.family, reducer, image_processor, open_picture(path))
            file = folder / f"kept_tokens_{number}.png"
            if is_main():
                kept_tokens(tokens).save(file)
            files.append(file)
        return files
