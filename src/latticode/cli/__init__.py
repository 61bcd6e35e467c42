"""The command line, one file per group of verbs, as in `runs`."""

from latticode.cli.main import app, main

__all__ = ["app", "main"]
