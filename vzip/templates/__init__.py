"""Conversation templates: token ids and labels (`encode`), and the same text as a Jinja chat template (`jinja`)."""

from vzip.templates.encode import chatml, mistral, plain, vicuna

__all__ = ["chatml", "mistral", "plain", "vicuna"]
