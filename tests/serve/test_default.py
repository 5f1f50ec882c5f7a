"""The embedded default with real weights, served over HTTP with its own chat template."""

import base64
import io
import json
import sys
import urllib.request
from dataclasses import asdict

import pytest
import torch
from PIL import Image, ImageDraw

import vzip
from data.paths import ROOT, data_dir
from scripts.serve.request import chat_body
from scripts.serve.server import serving
from tests.helpers.runs import attached, save_run
from vzip.runs.export import write_hf
from vzip.runs.projector import load_weights
from vzip.templates.encode import chatml

SMOL = data_dir() / "smol"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTIONS = ["what shape is in the image?", "what color is the circle?", "is there a blue shape?"]
COLOURS = ["red", "green", "blue", "yellow"]
NUM_NEW = 16


def picture(number):
    """A shape on a grey ground."""
    image = Image.new("RGB", (64, 64), (200, 200, 210))
    draw = ImageDraw.Draw(image)
    shape = draw.ellipse if number % 2 else draw.rectangle
    shape((8 + 3 * number, 12, 40 + 3 * number, 44), fill=COLOURS[number % 4])
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not (SMOL / "prepared.json").is_file():
        pytest.skip("the embedded default is not prepared; run `make data`")

    handle = attached(SMOL / "model", dominant=7, contextual=1)
    load_weights(handle.family, ROOT / "data" / "smol" / "projector.safetensors")
    run = tmp_path_factory.mktemp("smol")
    save_run(run / "run", handle, SMOL / "model", template=asdict(chatml(SYSTEM)))
    (run / "export").mkdir()
    write_hf(run / "run", run / "export")
    return run / "export"


@torch.no_grad()
def reference_text(model, processor, image, question):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False)
    ids = output[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True), inputs["input_ids"].shape[1]


def served_text(server, image, question):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = base64.b64encode(buffer.getvalue()).decode()
    body = chat_body(server.model, question, url, max_tokens=NUM_NEW, temperature=0)
    request = urllib.request.Request(
        f"{server.address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=300) as response:
        answer = json.load(response)
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


def test_its_answers_are_those_of_vzip_load(folder, tmp_path):
    asked = [(picture(number), QUESTIONS[number % 3]) for number in range(8)]
    model, processor = vzip.load(folder, dtype=torch.float32, device="cpu")
    expected = [reference_text(model, processor, *question) for question in asked]
    assert len(set(expected)) > 2
    del model

    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    log = tmp_path / "serve.log"
    with serving(sys.executable, folder, model="smol", log=log, options=options) as server:
        assert [served_text(server, *question) for question in asked] == expected
