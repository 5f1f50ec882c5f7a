"""Conversation templates: token ids and labels (`run_vision_tower`), and the same text as a Jinja chat template (`jinja`)."""

from vzip.templates.encode import chatml, mistral, plain, vicuna

__all__ = ["chatml", "mistral", "plain", "vicuna"]
