"""The command line: `attnlab list`, `run` and `check`; also `python -m attnlab`."""

from .commands import main

__all__ = ["main"]
