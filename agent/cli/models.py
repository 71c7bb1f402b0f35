"""Commands about models: the gate, approving, rolling back, importing, explaining."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent import console
from agent.cli import completion
from agent.cli.options import By, Config, Json, open_site

if TYPE_CHECKING:
    from agent.ledger.database import Row

models_app = typer.Typer(no_args_is_help=True, help="Models (bundles).")
Reason = Annotated[str, typer.Option(help="why; kept in the audit")]


def register(app: typer.Typer) -> None:
    """Hang these commands on the root."""
    app.add_typer(models_app, name="models")
    app.command("gate")(gate)
    app.command("approve")(approve)
    app.command("reject")(reject)
    app.command("rollback")(rollback)
    app.command("explain")(explain_command)


@models_app.command("ls")
def models_ls(settings: Config = None, json_out: Json = False) -> None:
    """All models, newest first."""
    with console.errors(), open_site(settings) as (_, ledger):
        said = [_model(row) for row in ledger.rows("SELECT * FROM bundle ORDER BY created_at DESC, rowid DESC")]
        if json_out:
            return console.as_json(said)
        columns = ("bundle", "state", "is_baseline", "round", "created_at", "approved_by")
        console.table(columns, [[r[c] for c in columns] for r in said])


def _model(row: Row) -> dict[str, Any]:
    return {
        "bundle": row["id"],
        "state": row["state"],
        "is_baseline": bool(row["is_baseline"]),
        "round": row["round"],
        "created_at": row["created_at"],
        "approved_by": row["approved_by"],
    }


@models_app.command("show")
def models_show(
    bundle: Annotated[
        str,
        typer.Argument(metavar="BUNDLE", autocompletion=completion.bundles, help="a bundle, or the round that made it"),
    ],
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """One model: its card, and what became of it."""
    from agent.release import release
    from agent.site import files

    with console.errors(), open_site(settings) as (site, ledger):
        row = release.find(ledger, bundle)
        sealed = files.open_sealed(site, row["id"])
        history = ledger.rows("SELECT state, by, reason, at FROM deployment WHERE bundle = ? ORDER BY id", row["id"])
        said = {**_model(row), "card": sealed.card, "thresholds": sealed.thresholds, "deployments": history}
        if json_out:
            return console.as_json(said)
        console.pairs(
            [*_model(row).items(), ("findings", ", ".join(sealed.findings)), ("metrics", sealed.card.get("metrics"))]
        )
        console.table(("at", "state", "by", "reason"), [(h["at"], h["state"], h["by"], h["reason"]) for h in history])


@models_app.command("import")
def models_import(
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx")],
    by: By = "models import",
    with_look: Annotated[bool, typer.Option("--look", help="spend a look on it when another model serves")] = False,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Take in a model made elsewhere: the baseline when none serves, else a candidate for the gate."""
    from agent.release import import_model

    with console.errors(), open_site(settings) as (site, ledger):
        said = import_model.adopt(site, ledger, file, by, with_look)
        console.as_json(said) if json_out else console.pairs(said.items())


def gate(
    name: Annotated[
        str,
        typer.Argument(metavar="ROUND", autocompletion=completion.rounds, help="a round, such as r0007, or its bundle"),
    ],
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """The stored verdict of a round; reading it spends nothing."""
    from agent.rounds import evaluation, records

    with console.errors(), open_site(settings) as (site, ledger):
        said = evaluation.stored(site, ledger, records.get(ledger, name))
        if json_out:
            return console.as_json(said)
        columns = ("check", "finding", "reference", "candidate", "observed", "interval", "required", "answer")
        console.table(columns, [_row(check) for check in said["checks"]])
        console.people.print(f"\n{said['line']}")
        console.people.print(
            f"alpha spent in the last year {said['budget']['spent']:.4f}, left {said['budget']['left']:.4f}"
        )


def _row(check: dict[str, Any]) -> tuple[str, ...]:
    """A check for people: AUCs and their difference, or the one number that was looked at."""
    compared = check["reference"] is not None
    note = f" ({check['note']})" if check["note"] and check["outcome"] in ("not_shown", "fail") else ""
    return (
        check["name"],
        check["finding"] or "",
        f"{check['reference']:.3f}" if compared else "",
        f"{check['candidate']:.3f}" if compared else "",
        "" if check["observed"] is None else f"{check['observed']:{'+' if compared else ''}.3f}",
        f"[{check['ci'][0]:+.3f}, {check['ci'][1]:+.3f}]" if check["ci"] else "",
        check["required"],
        check["outcome"] + note,
    )


def approve(
    bundle: Annotated[
        str,
        typer.Argument(metavar="BUNDLE", autocompletion=completion.bundles, help="a bundle, or the round that made it"),
    ],
    by: By,
    reason: Reason,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Put a bundle that passed the gate into service. Exit 2 when the verdict or the policy refuses."""
    from agent.release import release

    with console.errors(), open_site(settings) as (site, ledger):
        said = release.approve(site, ledger, bundle, by, reason)
        console.as_json(said) if json_out else console.pairs(said.items())


def reject(
    bundle: Annotated[
        str,
        typer.Argument(metavar="BUNDLE", autocompletion=completion.bundles, help="a bundle, or the round that made it"),
    ],
    by: By,
    reason: Reason,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Close the door on a candidate."""
    from agent.release import release

    with console.errors(), open_site(settings) as (_, ledger):
        said = release.reject(ledger, bundle, by, reason)
        console.as_json(said) if json_out else console.pairs(said.items())


def rollback(
    by: By,
    reason: Reason,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="BUNDLE", autocompletion=completion.bundles, help="a model that served; the previous one by default"
        ),
    ] = None,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Put an earlier model straight back into service; always possible, never gated."""
    from agent.release import release

    with console.errors(), open_site(settings) as (site, ledger):
        said = release.rollback(site, ledger, to, by, reason)
        console.as_json(said) if json_out else console.pairs(said.items())


def explain_command(
    uid: Annotated[str, typer.Argument(metavar="UID", help="SOP Instance UID, or the number of the image")],
    finding: Annotated[str | None, typer.Option(help="the first of the vocabulary by default")] = None,
    method: Annotated[
        str,
        typer.Option(
            autocompletion=completion.methods,
            help="heatmap, which the served model draws itself; or, from the weights of the round that made it (needs the "
            f"training install): {', '.join(completion.METHODS[1:])}",
        ),
    ] = "heatmap",
    positive: Annotated[bool, typer.Option("--positive", help="show only what speaks for the finding")] = False,
    as_of: Annotated[
        str | None, typer.Option(metavar="TIME", help="the model that was in service then (ISO 8601)")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", help="write the overlay here, as PNG")] = None,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """What a model said of an image, and where it looked."""
    from agent.results import explain

    with console.errors(), open_site(settings) as (site, ledger):
        said = explain.explain(site, ledger, uid, finding, method, as_of, output, positive)
        console.as_json(said) if json_out else console.pairs(said.items())
