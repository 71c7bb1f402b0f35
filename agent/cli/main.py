"""The command line. Each command opens the site, calls one function and prints the result.

Modules of commands import typer and their options only; everything else is imported inside the command that needs it,
so that `--help` and short commands answer at once.
"""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from agent import console
from agent.cli import backbone, completion, erasure, images, models, pull, rounds, site
from agent.cli.options import Config
from agent.errors import Problem
from cxrloop import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help is plain text, which needs no rich
    help="The closed loop for a hospital's chest X-ray model. Research software, not a medical device.",
)


def serve(
    only: Annotated[str, typer.Option(help="run only these parts, comma-separated: listen, infer, learn")] = "",
    child: Annotated[int, typer.Option(hidden=True)] = 0,
    settings: Config = None,
) -> None:
    """Run the appliance: the DICOM node, the model server, and the agent."""
    from agent.network import node
    from agent.service import supervisor
    from agent.site.site import Site

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=node.LOG_FORMAT, force=True)
    for library in ("apscheduler", "httpx", "httpcore"):
        logging.getLogger(library).setLevel(logging.WARNING)
    with console.errors():
        parts = tuple(name.strip() for name in only.split(",") if name.strip())
        for name in parts:
            supervisor.check_part(name)
        supervisor.serve(Site.open(settings), settings, parts, child or None)


def demo(
    source: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="your own images: DICOM, or PNG + labels.csv")
    ] = None,
    folder: Annotated[
        Path, typer.Option("--dir", help="folder of the demo's site; an earlier demo there is replaced")
    ] = Path("demo"),
) -> None:
    """Run three nights on this machine in minutes: send, score, learn, judge, approve, roll back. Nothing is staged."""
    from importlib.util import find_spec

    with console.errors():
        missing = [name for name in ("torch", "matplotlib", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise Problem(f"demo: {missing[0]} is not installed; run: pip install 'cxrloop[cpu,train]'")
        from agent.demo.story import tell

        tell(folder, source)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cxrloop {__version__}")
        raise typer.Exit


@app.callback()
def common(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """The closed loop for a hospital's chest X-ray model. Research software, not a medical device."""


class _Warnings(logging.Handler):
    """Prints warnings of commands that set up no log, broken to the width of the terminal."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        console.logs.print(record.getMessage())


site.register(app)
app.command("serve")(serve)
app.command("demo")(demo)
images.register(app)
erasure.register(app)
pull.register(app)
rounds.register(app)
models.register(app)
backbone.register(app)
completion.register(app)


def main() -> None:
    """Run the `cxrloop` command."""
    usage = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
    usage.exit_code = 1  # a wrong option is an error; 2 is kept for "refused by policy"
    logging.lastResort = _Warnings()
    for library in ("pynetdicom", "pydicom", "highdicom"):  # their messages print UIDs and values; ours don't
        logging.getLogger(library).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=UserWarning, module="pydicom")
    if completion.VARIABLE in os.environ:  # the shell asks for the words that may follow
        from typer.completion import completion_init  # pyright: ignore[reportPrivateImportUsage]

        completion_init()
    app(prog_name="cxrloop")


if __name__ == "__main__":
    main()
