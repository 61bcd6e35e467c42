"""The command line: every verb in the order of --help. Heavy imports happen inside the verbs, so that it is quick."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated

import typer

from latticode.cli.evaluate import evaluate, predict, probe
from latticode.cli.options import err, out
from latticode.cli.sample import edit, sample
from latticode.cli.study import compare, diagnose, levels, study
from latticode.cli.tokens import decode, encode
from latticode.cli.train import demo, recipes, report, train
from latticode.core.plugins import PluginWarning, Table, address
from latticode.version import __version__

app = typer.Typer(
    help="Images, video and audio to discrete tokens and back, and generators over the tokens.",
    epilog="Begin with: latticode demo. Then: latticode recipes, latticode train fsq-tokenizer data.source=photos/",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        out.print(f"latticode {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Images, video and audio to discrete tokens and back, and generators over the tokens."""


OWN = (
    *(train, recipes, encode, decode, sample, edit, evaluate, predict, probe),
    *(study, compare, diagnose, levels, report, demo),
)
VERBS: Table[Callable[..., None]] = Table("verb", {verb.__name__: verb for verb in OWN})
for verb in OWN:
    app.command()(verb)


def add_verbs() -> None:
    """Add the verbs that plug-ins register; one that Typer cannot read is left out."""
    there = {command.callback for command in app.registered_commands}
    for name, verb in VERBS.items():
        if verb not in there:
            trial = typer.Typer()
            trial.command(name)(verb)
            try:
                typer.main.get_command(trial)
            except Exception as error:
                warnings.warn(f"the verb {name!r} of {address(verb)} is left out: {error}", PluginWarning, stacklevel=2)
            else:
                app.command(name)(verb)


def main() -> None:
    """Run the command line, with the verbs of installed plug-ins; bad input, or an extra that is missing, ends with one
    message and exit code 2."""
    with warnings.catch_warnings(record=True) as left_out:
        warnings.simplefilter("always", PluginWarning)
        add_verbs()
    for warning in left_out:
        err.print("warning:", style="bold yellow", end=" ")
        err.print(str(warning.message), markup=False, highlight=False, soft_wrap=True)
    try:
        app(prog_name="latticode")
    except Exception as error:
        from latticode.core.extras import explained
        from latticode.engine import TrainingError

        expected = ValueError | OSError | ImportError | TrainingError
        if not isinstance(error, expected) or "LATTICODE_TRACEBACK" in os.environ:
            raise
        err.print("error:", style="bold red", end=" ")
        verb = " ".join(["latticode", *sys.argv[1:2]])
        told = explained(error, f"{verb} needs") if isinstance(error, ImportError) else str(error)
        err.print(told, markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
