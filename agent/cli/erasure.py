"""Commands by which images leave the site: images export (de-identified copies), forget (erase a patient)."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from agent import console
from agent.cli.images import images_app
from agent.cli.options import By, Config, Json, open_site
from agent.errors import Problem


def register(app: typer.Typer) -> None:
    """Add `forget` to the root and `export` to the commands about images."""
    images_app.command("export")(images_export)
    app.command("forget")(forget_command)


def images_export(
    uids: Annotated[
        list[str], typer.Argument(metavar="UID...", help="SOP Instance UIDs, Study Instance UIDs or image numbers")
    ],
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="a new or empty folder")],
    with_labels: Annotated[bool, typer.Option("--with-labels", help="also write labels.csv, keyed by file")] = False,
    by: By = "images export",
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Write de-identified copies of images, for use outside the site. Pixels are not inspected.

    Exit 2 when an image may not leave.
    """
    from agent.images import export

    with console.errors(), open_site(settings) as (site, ledger):
        result = export.export(site, ledger, uids, folder, with_labels, by)
        if json_out:
            console.as_json(result)
        else:
            console.people.print(
                f"{len(result['exported'])} images in {folder}; nobody has checked their pixels for burned-in names"
            )
            refused = [(image["image"], image["reason"]) for image in result["refused"]]
            if refused:
                console.table(("image", "not exported because"), refused)
    if result["refused"]:
        raise typer.Exit(2)


def forget_command(
    patient: Annotated[
        str | None,
        typer.Argument(metavar="PATIENT", help='the patient id that the hospital uses; "-" reads it from stdin'),
    ] = None,
    by: Annotated[str, typer.Option(help="who does this; kept in the audit log")] = "",
    reason: Annotated[str, typer.Option(help="reason for the audit log; must not identify the patient")] = "",
    key: Annotated[
        str | None, typer.Option(help="the pseudonym instead of the id, as images ls --json prints it")
    ] = None,
    issuer: Annotated[
        list[str] | None,
        typer.Option(help="issuer of the patient id, where images name one; may be given several times"),
    ] = None,
    and_refuse: Annotated[bool, typer.Option("--and-refuse", help="also refuse later images of this patient")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="change nothing; print what would be erased")] = False,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Erase a patient from the site folder. Models that learnt from the images are listed, not changed."""
    from agent.erasure import forget

    if (patient is None) == (key is None):
        raise typer.BadParameter("name the patient by id, or by --key", param_hint="PATIENT")
    if patient == "-":
        patient = sys.stdin.readline()
    with console.errors(), open_site(settings) as (site, ledger):
        if patient and re.search(rf"(?<!\w){re.escape(patient.strip())}(?!\w)", f"{by}\n{reason}", re.IGNORECASE):
            raise Problem("forget: --by and --reason are kept for good; don't name the patient in them")
        keys = [forget.checked_key(key)] if key else forget.pseudonyms_of(site, patient or "", issuer or ())
        if dry_run:
            result = {"state": "dry run", **forget.preview(site, ledger, keys)}
        else:
            result = forget.forget(site, ledger, keys, by, reason, and_refuse)
        console.as_json(result) if json_out else _print(result)
    if result["state"] == "pending":
        raise typer.Exit(3)


def _print(result: dict[str, Any]) -> None:
    golden = ", ".join(f"{loss['images']} of version {loss['version']}" for loss in result["golden"])
    trained_on_them = [bundle["bundle"] for bundle in result["bundles"] if bundle["directly"]]
    descendants = [bundle["bundle"] for bundle in result["bundles"] if not bundle["directly"]]
    set_aside = f"{result['originals']} originals, {result['aside']} set aside"
    console.pairs(
        [
            ("state", result["state"] + (f": {result['pending']}" if result.get("pending") else "")),
            ("images", f"{result['images']} ({set_aside}), {result['waiting']} waiting"),
            ("rows", f"{result['predictions']} scores, {result['labels']} labels"),
            ("golden sets", golden or "none"),
            ("rounds", ", ".join(result["rounds"]) or "none"),
            ("cancelled", ", ".join(result["cancels"]) or "none"),
            ("models trained on them", ", ".join(trained_on_them) or "none"),
            ("descendants of those", ", ".join(descendants) or "none"),
            ("later images", result.get("later_images")),
        ]
    )
