"""Shell completion: the script for a shell, and the values that commands offer at the Tab key.

Rounds and bundles are read from the ledger of the site that the command line, $CXRLOOP_CONFIG or the folder names;
without one nothing is offered. Nothing is ever written, and no error is ever shown.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Annotated

import typer

from agent.site.settings_file import settings_path

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_CXRLOOP_COMPLETE"  # the script sets it; typer then answers the Tab key instead of running the command
OFFERED = 50  # newest rounds or bundles
STATES = ("received", "stored", "predicted", "returned", "labelled", "rejected", "quarantined")
METHODS = (
    "heatmap", "gradient", "guided", "ig", "ig-blurred", "smoothgrad", "smoothgrad-ig", "attention", "rollout",
)  # fmt: skip
RERUN_STATES = ("stored", "predicted", "returned", "labelled")


def register(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command("completion")(completion)


def completion(
    shell: Annotated[str, typer.Argument(metavar="SHELL", help="bash, zsh or fish", autocompletion=lambda: SHELLS)],
) -> None:
    """Print the completion script of a shell. To install it, add one line to the shell's start-up file.

    ~/.bashrc: eval "$(cxrloop completion bash)"

    ~/.zshrc, after compinit: eval "$(cxrloop completion zsh)"

    ~/.config/fish/config.fish: cxrloop completion fish | source
    """
    from typer.completion import get_completion_script  # pyright: ignore[reportPrivateImportUsage]

    if shell not in SHELLS:
        raise typer.BadParameter(f"one of {', '.join(SHELLS)}", param_hint="SHELL")
    typer.echo(get_completion_script(prog_name="cxrloop", complete_var=VARIABLE, shell=shell))


def states() -> list[str]:
    """Return the states of an image."""
    return list(STATES)


def rerun_states() -> list[str]:
    """Return the states in which an image can be scored again."""
    return list(RERUN_STATES)


def methods() -> list[str]:
    """Return the methods of `explain`."""
    return list(METHODS)


def rounds(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names of the newest rounds that begin with `incomplete`, newest first."""
    return _names(context, "SELECT name FROM round WHERE substr(name, 1, ?) = ? ORDER BY id DESC LIMIT ?", incomplete)


def bundles(context: typer.Context, incomplete: str) -> list[str]:
    """Return the ids of the newest bundles that begin with `incomplete`, newest first."""
    query = "SELECT id FROM bundle WHERE substr(id, 1, ?) = ? ORDER BY created_at DESC LIMIT ?"
    return _names(context, query, incomplete)


def _names(context: typer.Context, query: str, incomplete: str) -> list[str]:
    ledger = settings_path(context.params.get("settings")).with_name("ledger.db")
    try:
        with closing(sqlite3.connect(f"{ledger.resolve().as_uri()}?mode=ro", uri=True, timeout=0.2)) as reader:
            return [row[0] for row in reader.execute(query, (len(incomplete), incomplete, OFFERED))]
    except (sqlite3.Error, OSError):
        return []
