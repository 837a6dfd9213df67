"""Save and load a training run."""

from .checkpoint import load_checkpoint, save_checkpoint
from .file import CheckpointError

__all__ = ["CheckpointError", "load_checkpoint", "save_checkpoint"]
