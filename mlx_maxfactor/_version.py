"""The version of the package, where everything below may read it."""

__version__ = "0.3.0"
