"""Serve a reduced model with vLLM: a plugin that vLLM finds by the entry point `vllm.general_plugins`.

`config.json` of an export names `ARCHITECTURE` first, so that vLLM asks this plugin for the model.
Every process of vLLM calls `register_models`, so this module imports nothing that takes time.
"""

from vzip.runs.schema import ARCHITECTURE


def register_models() -> None:
    """Tell vLLM where the model of `ARCHITECTURE` is. vLLM imports it when it serves one."""
    from transformers import AutoModel
    from vllm import ModelRegistry

    from vzip.models.mini_gemini import MiniGeminiConfig, MiniGeminiModel

    # transformers has no Mini-Gemini, and vLLM makes the model by its config.
    AutoModel.register(MiniGeminiConfig, MiniGeminiModel, exist_ok=True)

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
