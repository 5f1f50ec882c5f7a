"""Conversation templates, as token ids and labels (`encode`) and as Jinja templates (`jinja`)."""

from vzip.templates.encode import chatml, mistral, plain, vicuna
from vzip.templates.internvl import internvl
from vzip.templates.qwen import qwen_vl

__all__ = ["chatml", "internvl", "mistral", "plain", "qwen_vl", "vicuna"]
