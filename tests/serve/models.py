"""Exports of tiny models with tuned projectors, and the answers that `vzip.load` gives."""

import torch

import vzip
from tests.helpers import tiny
from tests.helpers.runs import attached, save_run, tune
from vzip.reducers.visionzip import VisionZip
from vzip.runs.export import write_hf

NUM_NEW = 12
"""Tokens of an answer."""

TEXT_WIDTH = 128
"""Width of the language model: vLLM's attention on a CPU takes heads of 32, and these models have 4."""


def save_export(folder, kind, *budgets):
    """Write a tiny model as an export that was tuned for some (dominant, contextual) budgets."""
    base = tiny.save_llava(folder / "base", kind, text_width=TEXT_WIDTH)
    (first, *others) = [VisionZip(dominant=d, contextual=c) for d, c in budgets]
    handle = tune(attached(base, kind, reducer=first))
    run = save_run(folder / "run", handle, base, *others)

    export = folder / "export"
    export.mkdir()
    write_hf(run, export)
    return export


def prompt(text, *, images=(), videos=(), budget=None):
    """Make a request as vLLM takes it."""
    request = {"prompt": text, "multi_modal_data": {}}
    if images:
        request["multi_modal_data"]["image"] = list(images)
    if videos:
        request["multi_modal_data"]["video"] = list(videos)
    if budget is not None:
        request["mm_processor_kwargs"] = {"budget": budget}
    return request


@torch.no_grad()
def reference(folder, request):
    """Answer a request with transformers, before any engine starts: vLLM changes transformers.

    Returns:
        the ids of the prompt, the ids of the answer, and their log-probabilities
    """
    budget = request.get("mm_processor_kwargs", {}).get("budget")
    model, processor = vzip.load(folder, budget=budget, dtype=torch.float32, device="cpu")
    media = request["multi_modal_data"]
    inputs = processor(
        text=request["prompt"],
        images=media.get("image"),
        videos=media.get("video"),
        return_tensors="pt",
    )
    output = model.generate(
        **inputs,
        max_new_tokens=NUM_NEW,
        min_new_tokens=NUM_NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    length = inputs["input_ids"].shape[1]
    answer = output.sequences[0, length:]
    logits = torch.cat(output.logits).log_softmax(-1)
    return inputs["input_ids"][0].tolist(), answer.tolist(), logits[range(NUM_NEW), answer]


def served(engine, requests):
    """Answer requests together with vLLM, as `reference` returns one."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0, max_tokens=NUM_NEW, min_tokens=NUM_NEW, ignore_eos=True, logprobs=0
    )
    answers = []
    for result in engine.generate(requests, parameters, use_tqdm=False):
        (output,) = result.outputs
        values = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
        answers.append((result.prompt_token_ids, list(output.token_ids), torch.tensor(values)))
    return answers


def assert_same_answers(engine, requests, expected):
    """Check that vLLM answers as `reference` did, and again from its caches."""
    for _ in range(2):
        for answer, right in zip(served(engine, requests), expected, strict=True):
            assert answer[:2] == right[:2]
            torch.testing.assert_close(answer[2], right[2], rtol=0, atol=1e-4)
