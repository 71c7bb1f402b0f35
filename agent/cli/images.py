"""Commands about images, labels and the golden set: import, images, labels, golden."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from agent import console
from agent.cli import completion
from agent.cli.completion import RERUN_STATES, STATES
from agent.cli.options import MOST, By, Config, Json, open_site
from agent.errors import Problem

images_app = typer.Typer(no_args_is_help=True, help="Images and their states.")
labels_app = typer.Typer(no_args_is_help=True, help="Labels.")
golden_app = typer.Typer(no_args_is_help=True, help="The golden set: evaluates models, never trains them.")


def register(app: typer.Typer) -> None:
    """Add these commands to the root."""
    app.command("import")(import_command)
    app.add_typer(images_app, name="images")
    app.add_typer(images_app, name="studies", hidden=True, callback=_old_name)
    app.add_typer(labels_app, name="labels")
    app.add_typer(golden_app, name="golden")


def _old_name() -> None:
    """Warn that version 0.1 called `images` so."""
    console.logs.print("`studies` is now `images`; the old name goes away in the next version")


def import_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="DICOM files, or PNG/JPEG + labels.csv")],
    view: Annotated[str, typer.Option(help="view of pictures whose labels.csv has no `view`: PA or AP")] = "PA",
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Import every image under a folder, through the same intake as the node."""
    from agent.images.importer import import_folder

    if view not in ("PA", "AP"):
        raise typer.BadParameter("PA or AP", param_hint="--view")
    with console.errors(), open_site(settings) as (site, ledger):
        with console.logs.status("importing") as line:
            counts = import_folder(site, ledger, folder, view, lambda done: line.update(f"importing: {done} files"))
        if json_out:
            return console.as_json(counts)
        console.people.print(", ".join(f"{n} {what}" for what, n in counts.items()))


@images_app.command("ls")
def images_ls(
    state: Annotated[
        str | None,
        typer.Option(help=f"only images in this state: {', '.join(STATES)}", autocompletion=completion.states),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=MOST, help="at most this many")] = 100,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """List images, newest first, with state, reason and scores."""
    from agent.images import listing

    with console.errors(), open_site(settings) as (site, ledger):
        if state and state not in STATES:
            raise Problem(f"--state {state}: must be one of {', '.join(STATES)}")
        rows = listing.newest(site, ledger, state, limit)
        if json_out:
            return console.as_json(rows)
        console.table(
            ("image", "state", "view", "range", "received", "bundle", "scores", "reason"),
            [
                (
                    r["image"], r["state"], r["view"], r["range"], r["received_at"], r["bundle"],
                    " ".join(f"{name} {p:.2f}" for name, p in (r["predictions"] or {}).items()), r["reason"],
                )
                for r in rows
            ],
        )  # fmt: skip


@images_app.command("rerun")
def images_rerun(
    uid: Annotated[str | None, typer.Argument(metavar="UID", help="SOP Instance UID or image number")] = None,
    state: Annotated[
        str | None,
        typer.Option(
            help=f"all images in this state: {', '.join(RERUN_STATES)}", autocompletion=completion.rerun_states
        ),
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="resend refused results without scoring again")] = False,
    by: By = "images rerun",
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Score images again with the model in service, and send their results where the settings ask for it."""
    from agent.results.rerun import rerun

    with console.errors(), open_site(settings) as (_, ledger):
        counts = rerun(ledger, uid, state, failed, by)
        if json_out:
            return console.as_json(counts)
        console.people.print(
            f"{counts['images']} images to be scored again, {counts['results']} refused results to be sent again"
        )


@labels_app.command("import")
def labels_import(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.csv", help="columns: (sop_uid or file), finding, value (1, 0 or empty); optional source, by"
        ),
    ],
    by: By = "labels import",
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Add labels from a CSV file: all rows, or none when one is wrong."""
    from agent.images import labels

    with console.errors(), open_site(settings) as (site, ledger):
        counts = labels.import_csv(site, ledger, file, by)
        if json_out:
            return console.as_json(counts)
        console.people.print(", ".join(f"{n} {what.replace('_', ' ')}" for what, n in counts.items()))


@golden_app.command("freeze")
def golden_freeze(by: By = "golden freeze", settings: Config = None, json_out: Json = False) -> None:
    """Freeze the labelled images of the golden patients as a new version."""
    from agent.rounds import golden_set

    with console.errors(), open_site(settings) as (site, ledger):
        _print_golden(golden_set.freeze(site, ledger, by), json_out)


@golden_app.command("show")
def golden_show(settings: Config = None, json_out: Json = False) -> None:
    """Show the size and the hash of the frozen set."""
    from agent.rounds import golden_set

    with console.errors(), open_site(settings) as (site, ledger):
        _print_golden(golden_set.show(site, ledger), json_out)


def _print_golden(golden: dict[str, Any], json_out: bool) -> None:
    if json_out:
        return console.as_json(golden)
    size = f"{golden['images']} images of {golden['patients']} patients"
    console.people.print(f"golden set version {golden['version']}: {size}, {golden['sha256'][:12]}")
    console.table(
        ("finding", "positives", "negatives"),
        [(finding, golden["positives"][finding], golden["negatives"][finding]) for finding in golden["positives"]],
    )


@golden_app.command("power")
def golden_power(settings: Config = None, json_out: Json = False) -> None:
    """Show the statistical power of the next evaluation, per finding.

    Computed using how strongly the scores of two models agree here.
    """
    from agent.rounds import power

    with console.errors(), open_site(settings) as (site, ledger):
        findings = power.power(site, ledger)
        if json_out:
            return console.as_json(findings)
        keys = ("positives", "negatives", "correlation", "power_per_look", "looks_left")
        console.table(
            ("finding", "positives", "negatives", "correlation", "power", "evaluations left"),
            [(finding, *(_short(row[key]) for key in keys)) for finding, row in findings.items()],
        )


def _short(value: float | int | None) -> str:
    return "not measured" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
