"""VisionZip for LLaVA-type models of `transformers`: attach a reducer, load a tuned projector."""

from vzip.attach import Handle, attach
from vzip.errors import UserError
from vzip.io import load, load_projector

__all__ = ["Handle", "UserError", "attach", "load", "load_projector"]
