"""Commands about an image's way out: studies export (de-identified), forget (for good)."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from agent import console
from agent.cli.images import studies_app
from agent.cli.options import By, Config, Json, opened
from agent.erasure import forget as forgetting
from agent.errors import Problem
from agent.images import export


def register(app: typer.Typer) -> None:
    """Hang these commands on the root and beside the other `studies`."""
    studies_app.command("export")(studies_export)
    app.command("forget")(forget_command)


def studies_export(
    uids: Annotated[
        list[str], typer.Argument(metavar="UID...", help="SOP Instance UIDs, Study Instance UIDs or image numbers")
    ],
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="a new or empty folder")],
    with_labels: Annotated[bool, typer.Option("--with-labels", help="a labels.csv, keyed by file")] = False,
    by: By = "studies export",
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """De-identified copies of images, for use outside the site. Pixels are not inspected. Exit 2 when some must stay."""
    with console.errors(), opened(settings) as (site, ledger):
        said = export.export(site, ledger, uids, folder, with_labels, by)
        if json_out:
            console.as_json(said)
        else:
            console.people.print(
                f"{len(said['exported'])} images in {folder}; nobody has looked for names in their pixels"
            )
            console.table(("image", "stays because"), [(one["image"], one["reason"]) for one in said["refused"]])
    if said["refused"]:
        raise typer.Exit(2)


def forget_command(
    patient: Annotated[
        str | None,
        typer.Argument(metavar="PATIENT", help='the patient id as the hospital knows it; "-" reads it from stdin'),
    ] = None,
    by: Annotated[str, typer.Option(help="who does this; kept in the audit")] = "",
    reason: Annotated[str, typer.Option(help="why, without a word of the patient; kept in the audit")] = "",
    key: Annotated[str | None, typer.Option(help="the pseudonym instead, as studies ls --json prints it")] = None,
    issuer: Annotated[
        list[str] | None, typer.Option(help="issuer of the patient id, where images name one; repeat it")
    ] = None,
    and_refuse: Annotated[bool, typer.Option("--and-refuse", help="refuse this patient's images from now on")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Remove every trace of a patient from the site folder. Models that learnt from the images are named, not changed."""
    if (patient is None) == (key is None):
        raise typer.BadParameter("name the patient by id, or by --key", param_hint="PATIENT")
    if patient == "-":
        patient = sys.stdin.readline()
    with console.errors(), opened(settings) as (site, ledger):
        if patient and re.search(rf"(?<!\w){re.escape(patient.strip())}(?!\w)", f"{by}\n{reason}", re.IGNORECASE):
            raise Problem("forget: --by and --reason are kept for good; don't name the patient in them")
        keys = [forgetting.checked_key(key)] if key else forgetting.pseudonyms_of(site, patient or "", issuer or ())
        if dry_run:
            said = {"state": "dry run", **forgetting.preview(site, ledger, keys)}
        else:
            said = forgetting.forget(site, ledger, keys, by, reason, and_refuse)
        console.as_json(said) if json_out else _print(said)
    if said["state"] == "pending":
        raise typer.Exit(3)


def _print(said: dict[str, Any]) -> None:
    golden = ", ".join(f"{one['images']} of version {one['version']}" for one in said["golden"])
    direct = [one["bundle"] for one in said["bundles"] if one["directly"]]
    descend = [one["bundle"] for one in said["bundles"] if not one["directly"]]
    console.pairs(
        [
            ("state", said["state"] + (f": {said['pending']}" if said.get("pending") else "")),
            (
                "images",
                f"{said['images']} ({said['originals']} originals, {said['aside']} set aside), {said['waiting']} waiting",
            ),
            ("rows", f"{said['predictions']} scores, {said['labels']} labels"),
            ("golden sets", golden or "none"),
            ("rounds", ", ".join(said["rounds"]) or "none"),
            ("cancelled", ", ".join(said["cancels"]) or "none"),
            ("learnt from them", ", ".join(direct) or "no model"),
            ("descend from those", ", ".join(descend) or "no model"),
            ("later images", said.get("later_images")),
        ]
    )
