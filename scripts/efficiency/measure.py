"""Measure a model in several settings: prefill, generation, computation and memory."""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from scripts.common.prefill import Prefill, TimingPlan, measure_prefill
from scripts.common.timing import alternating, peak_memory
from scripts.efficiency.questions import PrefillQuestion, prompts
from vzip import Comparison
from vzip.cost import weight_memory
from vzip.generate import generate_answers


class EfficiencySetting:
    """A model in one setting, ready to be measured.

    Args:
        comparison: the model.
        name: "full", "free" (training-free) or "tuned".
        budget: budget of the reducer. None for the run's first.

    Raises:
        UserError: the model has no such setting, or not with this budget.
    """

    def __init__(self, comparison: Comparison, name: str, *, budget: int | None) -> None:
        self.comparison = comparison
        self.name = name
        self.budget = budget
        self.reducer = comparison.reducer(name, budget=budget)

    def inputs(self, model: Any, processor: Any, questions: Sequence[PrefillQuestion]) -> Any:
        """Make the model's arguments for a batch of questions, padded on the left."""
        inputs = processor(
            text=prompts(processor, questions),
            images=[question.image() for question in questions],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        return inputs.to(model.device, model.dtype)

    def prefill(self, question: PrefillQuestion, *, batch: int) -> Prefill:
        """Make a batch that holds the same question `batch` times."""
        # Equal questions have equal lengths, so no time goes into padding.
        with self.comparison.row(self.name, budget=self.budget) as (model, processor):
            inputs = self.inputs(model, processor, [question] * batch)
        return Prefill(self.comparison.family, self.reducer, inputs)

    @torch.no_grad()
    def answer(self, questions: Sequence[PrefillQuestion], *, batch: int, new_tokens: int) -> list[list[int]]:
        """Answer each question, from its file, with exactly `new_tokens` tokens.

        Returns their ids.
        """
        ids = []
        with self.comparison.row(self.name, budget=self.budget) as (model, processor):
            tokenizer = processor.tokenizer
            # The minimum keeps an early end from making an answer cheaper in one setting.
            for start in range(0, len(questions), batch):
                answers = generate_answers(
                    model,
                    tokenizer,
                    self.inputs(model, processor, questions[start : start + batch]),
                    ends=[tokenizer.eos_token_id],
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    do_sample=False,
                )
                ids += [answer.token_ids for answer in answers]

        return ids


def paper_flops(config: Any, num_tokens: int) -> int:
    """Count the FLOPs of a prefill by the paper's formula: T (4 n d^2 + 2 n^2 d + 2 n d m).

    Here n is the number of tokens, T the number of layers, d their width and m the MLPs' width.
    Source: arXiv 2412.04467, section 4.
    """
    width = config.hidden_size
    mlp_width = config.intermediate_size

    projections = 4 * num_tokens * width**2
    attention = 2 * num_tokens**2 * width
    mlp = 2 * num_tokens * width * mlp_width
    return int(config.num_hidden_layers * (projections + attention + mlp))


def measure_settings(
    settings: Mapping[str, EfficiencySetting],
    questions: Sequence[PrefillQuestion],
    *,
    batch: int,
    plan: TimingPlan,
) -> dict[str, dict[str, Any]]:
    """Measure each setting.

    Returns:
        By setting: what `scripts.common.prefill.measure_prefill` returns, FLOPs by the paper's
        formula, memory, and the seconds for all questions.
    """
    # Encode the first question once for each setting, so that no round includes it.
    cases = {}
    answering = {}
    for name, setting in settings.items():
        cases[name] = setting.prefill(questions[0], batch=batch)
        answering[name] = partial(
            setting.answer,
            questions,
            batch=batch,
            new_tokens=plan.new_tokens,
        )

    # The settings take turns, so that a slow moment of the machine hits all of them.
    figures = measure_prefill(cases, plan)
    seconds = alternating(answering, rounds=plan.rounds, device=plan.device, title="all questions")

    # Memory comes last, because libraries allocate their own in the first run on a CPU.
    for name, case in cases.items():
        # The paper's formula counts all tokens alike, visual or text.
        own = figures[name]
        num_tokens = own["num_visual_tokens"] + own["num_text_tokens"]
        weights = weight_memory(case.family)
        peak = peak_memory(case.whole, plan.device)
        own |= {
            "reducer": str(case.reducer),
            "paper_flops": paper_flops(case.family.language_model.config, num_tokens),
            "weight_bytes": weights,
            "peak_bytes": peak,
            "total_bytes": None if peak is None else weights + peak,
            "questions": {
                "seconds": seconds[name],
                "median_s": statistics.median(seconds[name]),
            },
        }

    return figures
