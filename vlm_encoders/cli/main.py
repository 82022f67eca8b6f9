"""The entry point: every sub-command, and how a mistake is told."""

from __future__ import annotations

import os
import sys
import warnings

import typer

from connectors.errors import VlmError
from vlm_encoders.cli.budget import budget
from vlm_encoders.cli.check_data import check_data
from vlm_encoders.cli.compare import compare
from vlm_encoders.cli.demo import demo
from vlm_encoders.cli.encode import encode
from vlm_encoders.cli.generate import generate
from vlm_encoders.cli.info import info
from vlm_encoders.cli.list import list_names
from vlm_encoders.cli.tiles import tiles
from vlm_encoders.cli.train import train

__all__ = ["app", "main"]

app = typer.Typer(
    name="vlm-encoders",
    help="Plug any image encoder into any language model; see what it costs in tokens; train the projector.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("demo")(demo)
app.command("list")(list_names)
app.command("info")(info)
app.command("encode")(encode)
app.command("budget")(budget)
app.command("tiles")(tiles)
app.command("compare")(compare)
app.command("check-data")(check_data)
app.command("train")(train)
app.command("generate")(generate)


def main() -> None:
    """Run the command; a mistake is one sentence on stderr and exit status 1, a warning a sentence too."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        app()
    except VlmError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        # The reader, `head` for one, has seen enough; the interpreter must not complain while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        # A full disk or a lost right can show itself at any write.
        typer.echo(f"error: {error}; free some space or give another folder", err=True)
        sys.exit(1)
