"""Models and deployments as the ledger holds them: typed records, how to find them, and their moves between states."""

from dataclasses import dataclass, replace
from typing import Any

from agent.errors import Problem
from agent.ledger import states
from agent.ledger.database import Ledger, Row, utc


@dataclass(frozen=True)
class Model:
    """A sealed bundle and its state.

    `round`: the round that made it, or as which it was imported; None for an imported baseline. `training_state`: the
    weights that a next round can start from, as a path below the site folder.
    """

    id: str
    round: str | None
    state: str
    is_baseline: bool
    training_state: str | None
    created_at: str
    approved_by: str | None

    def to_json(self) -> dict[str, Any]:
        """Return what `models ls` lists."""
        return {
            "bundle": self.id,
            "state": self.state,
            "is_baseline": self.is_baseline,
            "round": self.round,
            "created_at": self.created_at,
            "approved_by": self.approved_by,
        }


@dataclass(frozen=True)
class Deployment:
    """One row of the history of a deployment: requested, then probation, live or refused. `previous` is the bundle before."""

    id: int
    bundle: str
    state: str
    previous: str | None
    by: str
    reason: str
    at: str


def in_service(ledger: Ledger) -> Model | None:
    """Return the model that serves, or None."""
    return _model(ledger.row("SELECT * FROM bundle WHERE state IN ('probation', 'live')"))


def baseline(ledger: Ledger) -> Model | None:
    """Return the baseline, or None before there is one."""
    return _model(ledger.row("SELECT * FROM bundle WHERE is_baseline = 1"))


def newest_first(ledger: Ledger) -> list[Model]:
    """Return all models."""
    return [Model(**_typed(row)) for row in ledger.rows("SELECT * FROM bundle ORDER BY created_at DESC, rowid DESC")]


def get(ledger: Ledger, name: str) -> Model:
    """Return a model by its bundle or by its round; raises Problem."""
    model = _model(
        ledger.row("SELECT * FROM bundle WHERE id = ? OR id = (SELECT bundle FROM round WHERE name = ?)", name, name)
    )
    if model:
        return model
    if state := ledger.value("SELECT state FROM round WHERE name = ?", name):
        raise Problem(f"round {name} is {state} and has made no bundle; see `cxrloop round show {name}`")
    newest = ", ".join(row["id"] for row in ledger.rows("SELECT id FROM bundle ORDER BY created_at DESC LIMIT 5"))
    raise Problem(f"bundle {name!r}: no such bundle; the newest are: {newest or '(none yet)'}")


def add(
    ledger: Ledger, bundle: str, made_by: str | None, is_baseline: bool, training_state: str | None = None
) -> Model:
    """Add a sealed bundle as a candidate, inside the caller's transaction, and return it; adding it again changes nothing."""
    ledger.run(
        "INSERT OR IGNORE INTO bundle (id, round, state, is_baseline, training_state, created_at) "
        "VALUES (?, ?, 'candidate', ?, ?, ?)",
        bundle, made_by, int(is_baseline), training_state, utc(),
    )  # fmt: skip
    return get(ledger, bundle)


def advance(ledger: Ledger, model: Model, state: str, approved_by: str | None = None) -> Model:
    """Move a model to its next state, inside the caller's transaction; raises Refused where states.BUNDLE forbids it."""
    current = get(ledger, model.id)  # another process may have moved it before this transaction began
    states.check(states.BUNDLE, f"bundle {current.id}", current.state, state)
    moved = replace(current, state=state, approved_by=approved_by or current.approved_by)
    ledger.run("UPDATE bundle SET state = ?, approved_by = ? WHERE id = ?", moved.state, moved.approved_by, moved.id)
    return moved


def add_deployment(ledger: Ledger, bundle: str, state: str, previous: str | None, by: str, reason: str) -> Deployment:
    """Add a row to the history of deployments, inside the caller's transaction."""
    row = {"bundle": bundle, "state": state, "previous": previous, "by": by, "reason": reason, "at": utc()}
    return Deployment(id=ledger.insert("deployment", **row), **row)


def newest_deployment(ledger: Ledger) -> Deployment | None:
    """Return the newest row of the history of deployments, or None."""
    row = ledger.row("SELECT * FROM deployment ORDER BY id DESC LIMIT 1")
    return Deployment(**row) if row else None


def deployments(ledger: Ledger, bundle: str) -> list[Deployment]:
    """Return the history of a bundle's deployments, oldest first."""
    return [Deployment(**row) for row in ledger.rows("SELECT * FROM deployment WHERE bundle = ? ORDER BY id", bundle)]


def _model(row: Row | None) -> Model | None:
    return Model(**_typed(row)) if row else None


def _typed(row: Row) -> dict[str, Any]:
    return row | {"is_baseline": bool(row["is_baseline"])}
