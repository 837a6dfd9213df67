"""Save and load a training run."""

from .file import CheckpointError
from .save_and_load import load_checkpoint, save_checkpoint

__all__ = ["CheckpointError", "load_checkpoint", "save_checkpoint"]
