"""The command line: `attnlab list`, `run` and `check`."""

from .commands import main

__all__ = ["main"]
