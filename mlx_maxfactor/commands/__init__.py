"""The command ``mlx-maxfactor``: does a run fit, does the library work here, fine-tune."""

from .main import main

__all__ = ["main"]
