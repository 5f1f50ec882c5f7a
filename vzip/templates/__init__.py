"""Conversation templates, as token ids and labels (`encode`) and as Jinja templates (`jinja`)."""

from vzip.templates.encode import chatml, mistral, plain, vicuna

__all__ = ["chatml", "mistral", "plain", "vicuna"]
