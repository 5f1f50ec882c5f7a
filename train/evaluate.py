"""Answers generated for held-out questions, with all tokens, reduced, and tuned; one table."""

import string
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from data.batches.collate import Collator
from data.conversations import Conversation
from data.examples.tokens import Example, example_of, kinds_of
from data.progress import progress
from train.checkpoint import RunFolder
from train.config import asks_questions
from train.engine import Engine, to_device
from train.examples import held_out_conversations
from train.losses import media_inputs
from train.memory import fitting_questions
from train.ranks import all_gather_list, print_rank0
from train.tables import score_kinds, score_table
from vzip import attach
from vzip.reducers import Reducer
from vzip.reducers.identity import Identity
from vzip.runs.projector import budget_of
from vzip.templates.encode import Template, encode

NUM_SAMPLES = 4
"""Answers and pictures that the tracker shows of each row."""


@dataclass(frozen=True)
class HeldOutQuestion:
    """A held-out question, with the turns before it, ready for the model."""

    example: Example
    text: str
    expected: str
    kind: str
    image: str


def held_out_questions(
    rows: Sequence[Conversation], template: Template, tokenizer: Any, folder: Path, *, limit: int
) -> list[HeldOutQuestion]:
    """The first `limit` questions of the rows, each with the turns before it and their true answers."""
    questions = []
    for row in rows:
        for turn, (text, expected) in enumerate(row.turns):
            ids, labels = encode(template, tokenizer, [*row.turns[:turn], (text, None)])
            example = example_of(ids, labels, row, tokenizer, folder)  # with the pictures of the turns so far
            questions.append(
                HeldOutQuestion(example, text, expected, row.kind, ", ".join(row.images + row.videos))
            )
        if len(questions) >= limit:
            break
    return questions[:limit]


def _normal(answer: str) -> str:
    return answer.strip().strip(string.punctuation).strip().lower()


class Evaluator:
    """Asks the held-out questions under one reducer after another.

    Args:
        cfg: the run's settings.
        engine: around the model, which must have no reducer attached when a method is called.
        run: keeps the answers, so that a resumed run does not ask again.
        processor: of the model.
        template: the model's training format.
    """

    def __init__(
        self, cfg: DictConfig, engine: Engine, run: RunFolder, processor: Any, template: Template
    ) -> None:
        self.cfg, self.engine, self.run, self.processor, self.template = cfg, engine, run, processor, template
        self.questions: list[HeldOutQuestion] = []
        self.samples: list[dict[str, Any]] = []
        if asks_questions(cfg):
            folder, limit = Path(cfg.data.image_folder).expanduser(), cfg.evaluate.questions
            self.questions = held_out_questions(
                held_out_conversations(cfg), template, processor.tokenizer, folder, limit=limit
            )
        else:
            print_rank0("no evaluation: data.held_out is not set, or evaluate.questions is 0")

    @property
    def pictures(self) -> list[Path]:
        """The pictures of the first questions."""
        paths = (path for question in self.questions for path in question.example.media.get("image", ()))
        return list(dict.fromkeys(paths))[:NUM_SAMPLES]

    def baselines(self, reducers: Sequence[Reducer]) -> list[dict[str, Any]]:
        """The rows `full` and `free`, of the model as it is before tuning."""
        if not self.cfg.evaluate.baselines:
            return []
        full = self.rows("full", [Identity()])
        return full if isinstance(reducers[0], Identity) else full + self.rows("free", reducers)

    def rows(self, name: str, reducers: Sequence[Reducer]) -> list[dict[str, Any]]:
        """The row `name` under a reducer, or under each of several a row `name-BUDGET`; none without questions."""
        if not self.questions:
            return []
        budgets = [budget_of(self.engine.family, reducer) for reducer in reducers]
        names = [name] if len(reducers) == 1 else [f"{name}-{budget}" for budget in budgets]
        return [self._row(name, reducer) for name, reducer in zip(names, reducers, strict=True)]

    def _row(self, name: str, reducer: Reducer) -> dict[str, Any]:
        answers = self.run.answers(name)
        if answers is None:
            with attach(self.engine.family.model, reducer=reducer):
                kinds = kinds_of([question.example for question in self.questions])
                num_frames = self.cfg.model.get("num_frames", 1)
                collate = Collator(
                    self.processor, self.engine.family, reducer, kinds=kinds, num_frames=num_frames
                )
                answers = self._ask(collate, title=f"evaluate {name}")
            self.run.save_answers(name, answers)
        self.samples += [{"row": name, **given} for given in answers[:NUM_SAMPLES]]
        return score(name, answers)

    @torch.no_grad()
    def _ask(self, collate: Collator, *, title: str) -> list[dict[str, Any]]:
        """Greedy answers to all questions, in order, on every rank."""
        torch.manual_seed(self.cfg.seed)
        rank, world_size = self.engine.rank, self.engine.world_size
        longest = int(collate.lengths([question.example for question in self.questions]).max())
        held = {"num_trainable": self.engine.trainable.num_parameters, "world_size": world_size}
        size = fitting_questions(
            self.cfg, self.engine.family, longest=longest + self.cfg.evaluate.max_new_tokens, **held
        )
        mine = list(range(rank, len(self.questions), world_size)) or [0]
        mine += mine[-1:] * (
            -(-len(self.questions) // world_size) - len(mine)
        )  # as many calls on every rank, for ZeRO 3
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        found = []
        for part in progress(parts, total=len(parts), title=title, unit="batch", shown=rank == 0):
            with self.engine.gathered_parameters():
                answers = self._generate([self.questions[index].example for index in part], collate)
            found += list(zip(part, answers, strict=True))
        by_index = dict(all_gather_list(found))
        return [_graded(question, *by_index[index]) for index, question in enumerate(self.questions)]

    def _end(self) -> dict[str, Any]:
        """What an answer ends at: the template's end token, or the text behind an answer where it has none."""
        tokenizer = self.processor.tokenizer
        if self.template.end:
            return {"eos_token_id": tokenizer.convert_tokens_to_ids(self.template.end)}
        return {
            "eos_token_id": tokenizer.eos_token_id,
            "stop_strings": [self.template.answer_suffix],
            "tokenizer": tokenizer,
        }

    def _generate(self, examples: Sequence[Example], collate: Collator) -> list[tuple[str, int]]:
        """The answers, each with the visual tokens that its question had."""
        model, tokenizer, sharded = self.engine.family.model, self.processor.tokenizer, self.engine.stage == 3
        batch = to_device(collate(examples, left=True), self.engine.device)
        media: dict[str, Any] = {}
        for kind, count in batch.num_placeholders.items():
            inputs = media_inputs(batch, kind, model.dtype)
            if count:
                media |= inputs
            elif sharded:
                self.engine.family.media_features(
                    collate.reducer, kind, inputs
                )  # every rank runs the same modules
        output = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            **media,
            max_new_tokens=self.cfg.evaluate.max_new_tokens,
            do_sample=False,
            **self._end(),
            pad_token_id=collate.pad_id,
            synced_gpus=sharded,
        )
        texts: list[str] = tokenizer.batch_decode(
            output[:, batch.input_ids.shape[1] :], skip_special_tokens=True
        )
        placeholders = torch.tensor([self.engine.family.placeholder_id(kind) for kind in batch.media])
        counts: list[int] = torch.isin(batch.input_ids.cpu(), placeholders).sum(dim=1).tolist()
        return list(zip(texts, counts, strict=True))


def _graded(question: HeldOutQuestion, answer: str, num_visual_tokens: int) -> dict[str, Any]:
    return {
        "num_visual_tokens": num_visual_tokens,
        "image": question.image,
        "question": question.text,
        "expected": question.expected,
        "answer": answer.strip(),
        "kind": question.kind,
        "correct": _normal(answer) == _normal(question.expected),
    }


def score(name: str, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row of result.json: the visual tokens a question had on average, the share of correct answers by kind, and of all."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for given in answers:
        by_kind[given["kind"]].append(given["correct"])
        if given["kind"] != "all":
            by_kind["all"].append(given["correct"])
    metrics = {
        kind: sum(correct) / len(correct)
        for kind, correct in sorted(by_kind.items(), key=lambda item: item[0] == "all")
    }
    mean = round(sum(given["num_visual_tokens"] for given in answers) / len(answers), 1)
    return {
        "name": name,
        "num_visual_tokens": int(mean) if mean == int(mean) else mean,
        "num_questions": len(answers),
        "metrics": metrics,
    }


def gap_closed(rows: Sequence[dict[str, Any]], kind: str, *, suffix: str = "") -> float | None:
    """Share of the gap between `free` and `full` that `tuned` closes; None where there is no gap.

    `suffix` is what the names of both rows have behind them where there are several budgets, e.g. "-64".
    """
    value = {row["name"]: row["metrics"].get(kind) for row in rows}
    full, free, tuned = (value.get(name) for name in ("full", f"free{suffix}", f"tuned{suffix}"))
    if full is None or free is None or tuned is None or full <= free:
        return None
    return float((tuned - free) / (full - free))


def print_results(rows: Sequence[dict[str, Any]], *, title: str) -> None:
    """Print the table of scores, and how much of the gap between training-free and full tuning closes."""
    if not rows:
        print(f"{title}: tuned; no question was asked, `make eval RUN={title}` asks lmms-eval's")
        return
    console = Console()
    console.print(title, soft_wrap=True, highlight=False)
    console.print(score_table(rows).rich())
    suffixes = [row["name"].removeprefix("tuned") for row in rows if row["name"].startswith("tuned")]
    for kind, suffix in product(score_kinds(rows), suffixes):
        if (share := gap_closed(rows, kind, suffix=suffix)) is not None:
            console.print(f"{kind}: tuning closes {share:.0%} of the gap between free{suffix} and full")
