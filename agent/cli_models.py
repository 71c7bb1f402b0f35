"""Commands about models: rounds, the gate, approving, rolling back."""

import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from agent import adopt, explain, look, out, release, rounds, training
from agent.cli_films import By, Config, Json, opened
from agent.clockwork import next_window
from agent.config import zone
from agent.errors import Problem
from agent.ledger import Ledger, Row
from agent.site import Site

round_app = typer.Typer(no_args_is_help=True, help="Rounds of learning.")
models_app = typer.Typer(no_args_is_help=True, help="Models (bundles).")
Reason = Annotated[str, typer.Option(help="why; kept in the audit")]


def register(app: typer.Typer) -> None:
    """Hang these commands on the root."""
    app.add_typer(round_app, name="round")
    app.add_typer(models_app, name="models")
    app.command("gate")(gate)
    app.command("approve")(approve)
    app.command("reject")(reject)
    app.command("rollback")(rollback)
    app.command("explain")(explain_command)


@round_app.command("run")
def round_run(
    now: Annotated[bool, typer.Option("--now", help="start at once, whatever the window")] = False,
    with_look: Annotated[
        bool, typer.Option("--look", help="spend a look on the result, also when none is due")
    ] = False,
    recipe: Annotated[str | None, typer.Option(help="a recipe, or a TOML file in the site folder")] = None,
    until: Annotated[str | None, typer.Option(help="pause at HH:MM, site time")] = None,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Run a round; an unfinished one goes on, and one that runs elsewhere is waited for."""
    with out.errors(), opened(settings) as (site, ledger):
        if not now:
            raise Problem("round run: say --now; at night rounds start by themselves in learn.window")
        end = _clock(site, until) if until else None
        _finish(site, ledger, json_out, lambda: _next_round(site, ledger, recipe, with_look), end)


@round_app.command("resume")
def round_resume(
    until: Annotated[str | None, typer.Option(help="pause at HH:MM, site time")] = None,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Go on with the unfinished round."""
    with out.errors(), opened(settings) as (site, ledger):
        row = rounds.open_round(ledger)
        if not row:
            raise Problem("round resume: no round is unfinished")
        _finish(site, ledger, json_out, lambda: row, _clock(site, until) if until else None)


def _next_round(site: Site, ledger: Ledger, recipe: str | None, with_look: bool) -> Row:
    now = datetime.now(UTC)
    row = rounds.open_round(ledger)
    if not row:
        return rounds.plan(site, ledger, "now", now, recipe, with_look or rounds.look_due(site, ledger, now))
    if with_look and not row["look"]:
        with ledger.transaction():
            ledger.run("UPDATE round SET look = 1 WHERE name = ?", row["name"])
    out.logs.print(f"{row['name']} is unfinished ({row['state']}); going on with it")
    return rounds.get(ledger, row["name"])


def _finish(site: Site, ledger: Ledger, json_out: bool, start: Any, until: datetime | None) -> None:
    """Run a round to its next resting place and print it; Ctrl-C pauses it in good order."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with training.the_lock(site), out.logs.status("round") as line:
            row = training.carry_on(site, ledger, start(), until, lambda p: line.update(_progress(p)))
    except training.Busy:
        row = training.wait_for_other(site, ledger)
    said = rounds.summary(ledger, row)
    if json_out:
        out.as_json(said)
    else:
        _print_round(said)
    if row["state"] in ("stopped", "gave_up"):
        raise Problem(f"{row['name']} {row['state']}: {row['reason']}; see {site.rounds / row['name'] / 'learner.log'}")


def _progress(p: dict[str, Any]) -> str:
    left = f", {p['eta_s']:.0f} s left" if p.get("eta_s") is not None else ""
    loss = f", loss {p['loss']:.4f}" if p.get("loss") is not None else ""
    return f"{p.get('phase')}: step {p.get('step')} of {p.get('steps')}{loss}{left}"


def _clock(site: Site, text: str) -> datetime:
    """The next HH:MM of the site's clock."""
    try:
        datetime.strptime(text, "%H:%M")
    except ValueError:
        raise Problem(f"--until {text}: not a time; use HH:MM") from None
    minute = (datetime.strptime(text, "%H:%M") + timedelta(minutes=1)).strftime("%H:%M")
    found = next_window(datetime.now(UTC), f"{text}-{minute}", zone(site.config))
    assert found
    return found


def _print_round(said: dict[str, Any]) -> None:
    line = said["verdict"]["line"] if said["verdict"] else said["reason"]
    out.pairs(
        [
            ("round", f"{said['round']} {said['state']}" + (f": {line}" if line else "")),
            ("bundle", said["bundle"]),
            ("learnt from", f"{said['unlabelled']} films, {said['labelled']} of them labelled"),
            ("seconds", said["seconds"]),
        ]
    )


@round_app.command("ls")
def round_ls(settings: Config = None, json_out: Json = False) -> None:
    """All rounds, newest first."""
    with out.errors(), opened(settings) as (_, ledger):
        said = [rounds.summary(ledger, row) for row in ledger.rows("SELECT * FROM round ORDER BY id DESC")]
        if json_out:
            return out.as_json(said)
        columns = ("round", "state", "bundle", "recipe", "unlabelled", "labelled", "seconds", "reason")
        out.table(columns, [[r[c] for c in columns] for r in said])


@round_app.command("show")
def round_show(
    name: Annotated[str, typer.Argument(metavar="ROUND")], settings: Config = None, json_out: Json = False
) -> None:
    """One round."""
    with out.errors(), opened(settings) as (site, ledger):
        row = rounds.get(ledger, name)
        said = {**rounds.summary(ledger, row), "progress": rounds.progress(site, row["name"])}
        out.as_json(said) if json_out else _print_round(said)


@round_app.command("cancel")
def round_cancel(
    name: Annotated[str | None, typer.Argument(metavar="ROUND")] = None,
    by: By = "round cancel",
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Stop a round for good (the unfinished one by default)."""
    with out.errors(), opened(settings) as (site, ledger):
        row = rounds.get(ledger, name) if name else rounds.open_round(ledger)
        if not row:
            raise Problem("round cancel: no round is unfinished")
        said = rounds.summary(ledger, rounds.cancel(site, ledger, row["name"], by))
        out.as_json(said) if json_out else _print_round(said)


@models_app.command("ls")
def models_ls(settings: Config = None, json_out: Json = False) -> None:
    """All models, newest first."""
    with out.errors(), opened(settings) as (_, ledger):
        said = [_model(row) for row in ledger.rows("SELECT * FROM bundle ORDER BY created_at DESC, rowid DESC")]
        if json_out:
            return out.as_json(said)
        columns = ("bundle", "state", "is_baseline", "round", "created_at", "approved_by")
        out.table(columns, [[r[c] for c in columns] for r in said])


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
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE")], settings: Config = None, json_out: Json = False
) -> None:
    """One model: its card, and what became of it."""
    with out.errors(), opened(settings) as (site, ledger):
        row = release.find(ledger, bundle)
        sealed = look.opened(site, row["id"])
        history = ledger.rows("SELECT state, by, reason, at FROM deployment WHERE bundle = ? ORDER BY id", row["id"])
        said = {**_model(row), "card": sealed.card, "thresholds": sealed.thresholds, "deployments": history}
        if json_out:
            return out.as_json(said)
        out.pairs(
            [*_model(row).items(), ("findings", ", ".join(sealed.findings)), ("metrics", sealed.card.get("metrics"))]
        )
        out.table(("at", "state", "by", "reason"), [(h["at"], h["state"], h["by"], h["reason"]) for h in history])


@models_app.command("import")
def models_import(
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx")],
    by: By = "models import",
    with_look: Annotated[bool, typer.Option("--look", help="spend a look on it when another model serves")] = False,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Take in a model made elsewhere: the baseline when none serves, else a candidate for the gate."""
    with out.errors(), opened(settings) as (site, ledger):
        said = adopt.adopt(site, ledger, file, by, with_look)
        out.as_json(said) if json_out else out.pairs(said.items())


def gate(
    name: Annotated[str, typer.Argument(metavar="ROUND")], settings: Config = None, json_out: Json = False
) -> None:
    """The stored verdict of a round; reading it spends nothing."""
    with out.errors(), opened(settings) as (site, ledger):
        said = look.stored(site, ledger, rounds.get(ledger, name))
        if json_out:
            return out.as_json(said)
        out.table(
            ("check", "finding", "observed", "interval", "required", "answer"),
            [
                (c["name"], c["finding"], _number(c["observed"]), _interval(c["ci"]), c["required"], c["outcome"])
                for c in said["checks"]
            ],
        )
        out.people.print(f"\n{said['line']}")
        out.people.print(
            f"alpha spent in the last year {said['budget']['spent']:.4f}, left {said['budget']['left']:.4f}"
        )


def _number(value: Any) -> str:
    return f"{value:+.4f}" if isinstance(value, float) else str(value)


def _interval(ci: Any) -> str:
    return f"[{ci[0]:+.4f}, {ci[1]:+.4f}]" if ci else ""


def approve(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE")],
    by: By,
    reason: Reason,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Put a bundle that passed the gate into service. Exit 2 when the verdict or the policy refuses."""
    with out.errors(), opened(settings) as (site, ledger):
        said = release.approve(site, ledger, bundle, by, reason)
        out.as_json(said) if json_out else out.pairs(said.items())


def reject(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE")],
    by: By,
    reason: Reason,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Close the door on a candidate."""
    with out.errors(), opened(settings) as (_, ledger):
        said = release.reject(ledger, bundle, by, reason)
        out.as_json(said) if json_out else out.pairs(said.items())


def rollback(
    by: By,
    reason: Reason,
    to: Annotated[
        str | None, typer.Option(metavar="BUNDLE", help="a model that served; the previous one by default")
    ] = None,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """Put an earlier model straight back into service; always possible, never gated."""
    with out.errors(), opened(settings) as (site, ledger):
        said = release.rollback(site, ledger, to, by, reason)
        out.as_json(said) if json_out else out.pairs(said.items())


def explain_command(
    uid: Annotated[str, typer.Argument(metavar="UID", help="SOP Instance UID, or the number of the image")],
    finding: Annotated[str | None, typer.Option(help="the first of the vocabulary by default")] = None,
    method: Annotated[str, typer.Option(help="heatmap: the map that the served model draws")] = "heatmap",
    as_of: Annotated[
        str | None, typer.Option(metavar="TIME", help="the model that was in service then (ISO 8601)")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", help="write the overlay here, as PNG")] = None,
    settings: Config = None,
    json_out: Json = False,
) -> None:
    """What a model said of a film, and where it looked."""
    with out.errors(), opened(settings) as (site, ledger):
        said = explain.explain(site, ledger, uid, finding, method, as_of, output)
        out.as_json(said) if json_out else out.pairs(said.items())
