"""Commands about models: verdict, evaluate, approve, reject, roll back, list, import, explain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from agent import console
from agent.cli import completion
from agent.cli.options import By, Config, Json, open_site

models_app = typer.Typer(no_args_is_help=True, help="Models (bundles).")
Reason = Annotated[str, typer.Option(help="why; kept in the audit")]
BundleName = Annotated[
    str,
    typer.Argument(
        metavar="BUNDLE|ROUND", autocompletion=completion.bundles, help="a bundle, or the round that made it"
    ),
]
RoundName = Annotated[
    str, typer.Argument(metavar="ROUND", autocompletion=completion.rounds, help="a round, such as r0007, or its bundle")
]


def register(app: typer.Typer) -> None:
    """Add these commands to the root."""
    app.add_typer(models_app, name="models")
    app.command("verdict")(verdict)
    app.command("gate", hidden=True)(gate)
    app.command("evaluate")(evaluate)
    app.command("approve")(approve)
    app.command("reject")(reject)
    app.command("rollback")(rollback)
    app.command("explain")(explain_command)


@models_app.command("ls")
def models_ls(settings: Config = None, json_out: Json = False) -> None:
    """List all models, newest first."""
    from agent.release import models

    with console.errors(), open_site(settings) as (_, ledger):
        rows = [model.to_json() for model in models.newest_first(ledger)]
        if json_out:
            return console.as_json(rows)
        columns = ("bundle", "state", "is_baseline", "round", "created_at", "approved_by")
        console.table(columns, [[row[column] for column in columns] for row in rows])


@models_app.command("show")
def models_show(bundle: BundleName, settings: Config = None, json_out: Json = False) -> None:
    """Show one model: its card, its state and its deployments."""
    from agent.release import models
    from agent.site.files import open_sealed

    with console.errors(), open_site(settings) as (site, ledger):
        model = models.get(ledger, bundle)
        sealed = open_sealed(site, model.id)
        history = [
            {"state": row.state, "by": row.by, "reason": row.reason, "at": row.at}
            for row in models.deployments(ledger, model.id)
        ]
        if json_out:
            return console.as_json(
                {**model.to_json(), "card": sealed.card, "thresholds": sealed.thresholds, "deployments": history}
            )
        findings = ", ".join(sealed.findings)
        console.pairs([*model.to_json().items(), ("findings", findings), ("metrics", sealed.card.get("metrics"))])
        columns = ("at", "state", "by", "reason")
        console.table(columns, [[row[column] for column in columns] for row in history])


@models_app.command("import")
def models_import(
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx")],
    by: By = "models import",
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="spend an evaluation on it, even when none is due")
    ] = False,
    look: Annotated[bool, typer.Option("--look", hidden=True, help="the name of --evaluate in version 0.1")] = False,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Import a model made elsewhere: as the baseline when the site has none, else as a candidate."""
    from agent.cli.rounds import evaluate_or_look
    from agent.rounds.import_model import import_file

    with console.errors(), open_site(settings) as (site, ledger):
        imported = import_file(site, ledger, file, by, evaluate_or_look(evaluate, look))
        console.as_json(imported) if json_out else console.pairs(imported.items())


def verdict(name: RoundName, settings: Config = None, json_out: Json = False) -> None:
    """Print the newest stored verdict of a round; reading it spends nothing."""
    from agent.rounds import inspection, records

    with console.errors(), open_site(settings) as (site, ledger):
        stored = inspection.verdict(site, ledger, records.get(ledger, name))
        console.as_json(stored) if json_out else _print_verdict(stored)


def gate(name: RoundName, settings: Config = None, json_out: Json = False) -> None:
    """Print the stored verdict of a round: the name of `verdict` in version 0.1."""
    console.logs.print("`gate` is now `verdict`; the old name goes away in the next version")
    verdict(name, settings, json_out)


def evaluate(
    bundle: BundleName,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Spend one evaluation on an existing candidate.

    The same comparison (champion, baseline, golden set, rules) spends alpha only once; later calls print its stored verdict.
    """
    from agent.rounds.evaluation import evaluate as spend_evaluation

    with console.errors(), open_site(settings) as (site, ledger):
        evaluated = spend_evaluation(site, ledger, bundle)
        console.as_json(evaluated) if json_out else _print_verdict(evaluated["verdict"])


def _print_verdict(stored: dict[str, Any]) -> None:
    """Print the comparisons of AUC, the other checks, the outcome in one line, and the budget."""
    compared = [check for check in stored["checks"] if check["reference"] is not None]
    others = [check for check in stored["checks"] if check["reference"] is None]
    console.table(("finding", "check", "AUC", "ref.", "diff.", "interval", "outcome"), map(_comparison_row, compared))
    required = sorted({check["required"] for check in compared})
    if required:
        console.people.print(f"diff.: AUC minus reference; required: {'; '.join(required)}")
    notes = dict.fromkeys((check["finding"], check["note"]) for check in compared if _is_noted(check))
    for finding, note in notes:
        console.people.print(f"{finding or 'macro'}: {note}")
    console.people.print("")
    console.table(("check", "finding", "measured", "required", "outcome"), map(_check_row, others))
    console.people.print(f"\n{stored['line']}")
    budget = stored["budget"]
    console.people.print(f"alpha spent in the last year {budget['spent']:.4f}, left {budget['left']:.4f}")


def _is_noted(check: dict[str, Any]) -> bool:
    return bool(check["note"]) and check["outcome"] in ("inconclusive", "fail")


def _comparison_row(check: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a comparison: two AUCs, their difference and its interval."""
    return (
        check["finding"] or "macro",
        check["name"],
        f"{check['candidate']:.3f}",
        f"{check['reference']:.3f}",
        f"{check['observed']:+.3f}",
        f"[{check['ci'][0]:+.3f}, {check['ci'][1]:+.3f}]" if check["ci"] else "",
        check["outcome"],
    )


def _check_row(check: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a check that measures one number."""
    return (
        check["name"],
        check["finding"] or "",
        "" if check["observed"] is None else f"{check['observed']:.3f}",
        check["required"],
        check["outcome"] + (f" ({check['note']})" if _is_noted(check) else ""),
    )


def approve(bundle: BundleName, by: By, reason: Reason, settings: Config = None, json_out: Json = False) -> None:
    """Put a bundle that passed its evaluation into service. Exit 2 when the verdict or the policy forbids it."""
    from agent.release import release

    with console.errors(), open_site(settings) as (site, ledger):
        approved = release.approve(site, ledger, bundle, by, reason)
        console.as_json(approved) if json_out else console.pairs(approved.items())


def reject(bundle: BundleName, by: By, reason: Reason, settings: Config = None, json_out: Json = False) -> None:
    """Reject a candidate; it can no longer be approved."""
    from agent.release import release

    with console.errors(), open_site(settings) as (_, ledger):
        rejected = release.reject(ledger, bundle, by, reason)
        console.as_json(rejected) if json_out else console.pairs(rejected.items())


def rollback(
    by: By,
    reason: Reason,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="BUNDLE",
            autocompletion=completion.bundles,
            help="a model that served before; the previous one by default",
        ),
    ] = None,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Put an earlier model straight back into service; needs no verdict."""
    from agent.release import release

    with console.errors(), open_site(settings) as (site, ledger):
        restored = release.rollback(site, ledger, to, by, reason)
        console.as_json(restored) if json_out else console.pairs(restored.items())


def explain_command(
    uid: Annotated[str, typer.Argument(metavar="UID", help="SOP Instance UID, or the number of the image")],
    finding: Annotated[str | None, typer.Option(help="the site's first finding by default")] = None,
    method: Annotated[
        str,
        typer.Option(
            autocompletion=completion.methods,
            help="heatmap, which the served model computes itself; or, from the weights of the round that made it (needs "
            f"the training install): {', '.join(completion.METHODS[1:])}",
        ),
    ] = "heatmap",
    positive: Annotated[
        bool, typer.Option("--positive", help="show only the evidence for the finding, not against it")
    ] = False,
    as_of: Annotated[
        str | None, typer.Option(metavar="TIME", help="use the model that was in service then (ISO 8601)")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", help="write the overlay here, as PNG")] = None,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Print a model's probability for an image, and draw which regions it rests on."""
    from agent.results import explain

    with console.errors(), open_site(settings) as (site, ledger):
        explained = explain.explain(site, ledger, uid, finding, method, as_of, output, positive)
        console.as_json(explained) if json_out else console.pairs(explained.items())
