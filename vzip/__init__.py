"""VisionZip for LLaVA-type models of `transformers`: attach a reducer, load a tuned projector."""

from vzip.attach import Handle, attach
from vzip.errors import UserError
from vzip.runs.compare import Comparison, load
from vzip.runs.projector import load_projector

__all__ = ["Comparison", "Handle", "UserError", "attach", "load", "load_projector"]
