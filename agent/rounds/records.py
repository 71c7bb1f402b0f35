"""Rounds as the ledger holds them: the typed record, how to find one, and its moves between states."""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from agent.errors import Problem
from agent.ledger import audit, states
from agent.ledger.database import Ledger, Row, utc


@dataclass(frozen=True)
class Round:
    """One row of the table `round`. A newer state is a new Round: see `advance`.

    `why`: "now", "night" or "import". `evaluate`: end with an evaluation. `parent`: the bundle whose weights it starts from.
    """

    name: str
    state: str
    reason: str | None
    why: str
    recipe: str
    parent: str | None
    bundle: str | None
    unlabelled: int | None
    labelled: int | None
    seconds: float
    evaluate: bool
    planned_at: str
    ended_at: str | None


def add(ledger: Ledger, now: datetime, state: str, why: str, recipe: str, **columns: str | int | None) -> Round:
    """Write the row of a new round, inside the caller's transaction; its name is the next number, such as r0007.

    `columns`: other columns of the table. `last_image` is the newest image of the site when the round was planned.
    """
    number = (ledger.value("SELECT max(id) FROM round") or 0) + 1
    name = f"r{number:04d}"
    ledger.insert("round", id=number, name=name, state=state, why=why, recipe=recipe, planned_at=utc(now), **columns)
    return get(ledger, name)


def get(ledger: Ledger, name: str) -> Round:
    """Return a round by its name or by its bundle; raises Problem."""
    row = ledger.row("SELECT * FROM round WHERE name = ? OR bundle = ? ORDER BY id DESC LIMIT 1", name, name)
    if not row:
        newest = ", ".join(row["name"] for row in ledger.rows("SELECT name FROM round ORDER BY id DESC LIMIT 5"))
        raise Problem(f"round {name!r}: no such round; the newest are: {newest or '(none yet)'}")
    return _round(row)


def open_round(ledger: Ledger) -> Round | None:
    """Return the round that has not ended, or None."""
    marks = ", ".join("?" for _ in states.OPEN_ROUNDS)
    row = ledger.row(f"SELECT * FROM round WHERE state IN ({marks}) ORDER BY id LIMIT 1", *states.OPEN_ROUNDS)
    return _round(row) if row else None


def last_image_learnt(ledger: Ledger) -> int:
    """Return the newest image that rounds have learnt from, 0 without any. Rounds that made no model do not count."""
    marks = ", ".join("?" for _ in states.WITHOUT_MODEL)
    sql = f"SELECT max(last_image) FROM round WHERE state NOT IN ({marks})"
    return ledger.value(sql, *states.WITHOUT_MODEL) or 0


def newest_first(ledger: Ledger) -> list[Round]:
    """Return all rounds."""
    return [_round(row) for row in ledger.rows("SELECT * FROM round ORDER BY id DESC")]


def newest(ledger: Ledger) -> Round | None:
    """Return the newest round, or None."""
    row = ledger.row("SELECT * FROM round ORDER BY id DESC LIMIT 1")
    return _round(row) if row else None


def advance(ledger: Ledger, learning_round: Round, state: str, because: str = "", bundle: str | None = None) -> Round:
    """Move a round to its next state, inside the caller's transaction, and return it; raises Refused.

    The present state is read here: another process may have cancelled the round.
    """
    current = get(ledger, learning_round.name)
    states.check(states.ROUND, f"round {current.name}", current.state, state)
    ended = None if state in states.OPEN_ROUNDS else utc()
    ledger.run(
        "UPDATE round SET state = ?, reason = ?, bundle = ?, ended_at = ? WHERE name = ?",
        state, because or None, bundle or current.bundle, ended, current.name,
    )  # fmt: skip
    after = {"round": current.name} | ({"bundle": bundle} if bundle else {}) | ({"ended_at": ended} if ended else {})
    audit.append(ledger, "cxrloop", f"round {state}", because, before=current.state, after=after)
    return get(ledger, current.name)


def add_seconds(ledger: Ledger, learning_round: Round, seconds: float) -> Round:
    """Add to the time that a round took, and return it as it is now."""
    with ledger.transaction():
        ledger.run("UPDATE round SET seconds = seconds + ? WHERE name = ?", seconds, learning_round.name)
        return get(ledger, learning_round.name)


def is_cancelled(ledger: Ledger, learning_round: Round) -> bool:
    """Return True when a person, in another process, has cancelled this round."""
    return ledger.value("SELECT state FROM round WHERE name = ?", learning_round.name) == "cancelled"


def request_evaluation(ledger: Ledger, learning_round: Round) -> Round:
    """Make a round that has not ended end with an evaluation; return it as it is now."""
    with ledger.transaction():
        ledger.run("UPDATE round SET evaluate = 1 WHERE name = ?", learning_round.name)
        return get(ledger, learning_round.name)


def cancel(ledger: Ledger, learning_round: Round, by: str) -> Round:
    """Stop a round for good; a running learner sees it within a second and exits."""
    with ledger.transaction():
        return advance(ledger, learning_round, "cancelled", f"by {by}")


def newest_verdict(ledger: Ledger, learning_round: Round) -> dict[str, Any] | None:
    """Return the JSON of a round's newest verdict, the one that counts, or None."""
    text = ledger.value(
        "SELECT json FROM evaluation JOIN verdict ON verdict.evaluation = evaluation.id WHERE round = ? "
        "ORDER BY evaluation.id DESC LIMIT 1",
        learning_round.name,
    )
    return json.loads(text) if text else None


def _round(row: Row) -> Round:
    fields: dict[str, Any] = {key: row[key] for key in Round.__dataclass_fields__}
    fields["evaluate"] = bool(row["evaluate"])
    return Round(**fields)
