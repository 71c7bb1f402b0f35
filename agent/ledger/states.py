"""The states of rounds and bundles, as tables of allowed moves.

An image has no table here: triggers of `schema` derive its state from its rows.
"""

from agent.errors import Refused

ROUND: dict[str, tuple[str, ...]] = {
    "planned": ("training", "skipped", "cancelled"),
    "training": ("paused", "trained", "stopped", "cancelled", "gave_up"),
    "paused": ("training", "cancelled"),
    "trained": ("scored", "not_evaluated", "cancelled"),
    # `scored`: alpha is spent, the verdict is due. A crash here is finished at the next start.
    "scored": ("passed", "failed", "inconclusive"),
    # `cxrloop evaluate` evaluates a candidate later, or again against another champion, golden set or set of rules.
    "not_evaluated": ("scored",),
    "passed": ("scored",),
    "failed": ("scored",),
    "inconclusive": ("scored",),
}
OPEN_ROUNDS = ("planned", "training", "paused", "trained", "scored")  # the next start resumes these
# Rounds that ended without a model: their images are new to the next round.
WITHOUT_MODEL = ("skipped", "stopped", "gave_up", "cancelled")

BUNDLE: dict[str, tuple[str, ...]] = {
    "candidate": ("requested", "rejected"),
    "requested": ("probation", "live", "refused", "rejected"),
    "probation": ("live", "withdrawn", "retired"),
    "live": ("retired", "withdrawn"),
    # A rollback goes straight to live: the bundle has served before.
    "retired": ("live",),
    "withdrawn": ("live",),
}
IN_SERVICE = ("probation", "live")

FORGOTTEN = "forgotten"  # the reason of the row of a forgotten image; the row holds nothing else of the image


def check(table: dict[str, tuple[str, ...]], what: str, old: str, new: str) -> None:
    """Raise Refused, naming both states, unless `table` allows the move from `old` to `new`."""
    if new not in table.get(old, ()):
        moves = ", ".join(table.get(old, ())) or "no state"
        raise Refused(f"{what}: {old} cannot become {new}; from {old} it can become {moves}")
