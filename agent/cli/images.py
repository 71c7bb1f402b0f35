"""Commands about images: import, studies, labels, golden."""

from pathlib import Path
from typing import Annotated, Any

import typer

from agent import console
from agent.cli.options import MOST, By, Config, Json, opened
from agent.errors import Problem
from agent.images import labels, listing
from agent.images.importer import import_folder
from agent.results.rerun import rerun
from agent.rounds import golden_set, power

studies_app = typer.Typer(no_args_is_help=True, help="Images and their states.")
labels_app = typer.Typer(no_args_is_help=True, help="Labels.")
golden_app = typer.Typer(no_args_is_help=True, help="The golden set: judged on, never learnt from.")


def register(app: typer.Typer) -> None:
    """Hang these commands on the root."""
    app.command("import")(import_command)
    app.add_typer(studies_app, name="studies")
    app.add_typer(labels_app, name="labels")
    app.add_typer(golden_app, name="golden")


def import_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="DICOM files, or PNG/JPEG + labels.csv")],
    view: Annotated[str, typer.Option(help="view of pictures whose labels.csv has no `view`: PA or AP")] = "PA",
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Take in every image under a folder, through the same intake as the node."""
    if view not in ("PA", "AP"):
        raise typer.BadParameter("PA or AP", param_hint="--view")
    with console.errors(), opened(settings) as (site, ledger):
        with console.logs.status("importing") as line:
            counts = import_folder(site, ledger, folder, view, lambda done: line.update(f"importing: {done} files"))
        if json_out:
            return console.as_json(counts)
        console.people.print(", ".join(f"{n} {what}" for what, n in counts.items()))


@studies_app.command("ls")
def studies_ls(
    state: Annotated[str | None, typer.Option(help=f"one of {', '.join(listing.STATES)}")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=MOST)] = 100,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Images, newest first, with state, reason and scores."""
    with console.errors(), opened(settings) as (site, ledger):
        if state and state not in listing.STATES:
            raise Problem(f"--state {state}: must be one of {', '.join(listing.STATES)}")
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


@studies_app.command("rerun")
def studies_rerun(
    uid: Annotated[str | None, typer.Argument(metavar="UID", help="SOP Instance UID or image number")] = None,
    state: Annotated[str | None, typer.Option(help=f"all images in one of {', '.join(listing.SCORABLE)}")] = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="results that the PACS refused, sent again as they are")
    ] = False,
    by: By = "studies rerun",
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Score images again with the model in service and send their results (if [results] says so)."""
    with console.errors(), opened(settings) as (_, ledger):
        said = rerun(ledger, uid, state, failed, by)
        if json_out:
            return console.as_json(said)
        console.people.print(
            f"{said['images']} images to be scored again, {said['results']} refused results to be sent again"
        )


@labels_app.command("import")
def labels_import(
    file: Annotated[Path, typer.Argument(metavar="FILE.csv", help="columns sop_uid or file, finding, value")],
    by: By = "labels import",
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Add labels from a CSV: all of it, or nothing."""
    with console.errors(), opened(settings) as (site, ledger):
        said = labels.import_csv(site, ledger, file, by)
        if json_out:
            return console.as_json(said)
        console.people.print(", ".join(f"{n} {what.replace('_', ' ')}" for what, n in said.items()))


@golden_app.command("freeze")
def golden_freeze(by: By = "golden freeze", settings: Config = None, json_out: Json = False) -> None:
    """Freeze the labelled images of the golden patients as a new version."""
    with console.errors(), opened(settings) as (site, ledger):
        _print_golden(golden_set.freeze(site, ledger, by), json_out)


@golden_app.command("show")
def golden_show(settings: Config = None, json_out: Json = False) -> None:
    """Size and hash of the frozen set."""
    with console.errors(), opened(settings) as (site, ledger):
        _print_golden(golden_set.show(site, ledger), json_out)


def _print_golden(said: dict[str, Any], json_out: bool) -> None:
    if json_out:
        return console.as_json(said)
    console.people.print(
        f"golden set version {said['version']}: {said['images']} images of {said['patients']} patients, {said['sha256'][:12]}"
    )
    console.table(
        ("finding", "positives", "negatives"),
        [(f, said["positives"][f], said["negatives"][f]) for f in said["positives"]],
    )


@golden_app.command("power")
def golden_power(settings: Config = None, json_out: Json = False) -> None:
    """How likely a look is to decide, per finding, at the correlation measured on this site's scores."""
    with console.errors(), opened(settings) as (site, ledger):
        said = power.power(site, ledger)
        if json_out:
            return console.as_json(said)
        columns = ("positives", "negatives", "correlation", "power_per_look", "looks_left")
        console.table(("finding", *columns), [(f, *(_short(row[c]) for c in columns)) for f, row in said.items()])


def _short(value: float | int | None) -> str:
    return "not measured" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
