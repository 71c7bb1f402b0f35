"""The states of rounds and bundles as tables of legal moves.

An image has no table here: its state follows from its rows, and the triggers of `schema` keep it.
"""

ROUND: dict[str, tuple[str, ...]] = {
    "planned": ("training", "skipped", "cancelled"),
    "training": ("paused", "trained", "stopped", "cancelled", "gave_up"),
    "paused": ("training", "cancelled"),
    "trained": ("scored", "no_look", "cancelled"),
    "no_look": ("scored",),  # a person may spend a look on it later
    "scored": ("passed", "failed", "not_shown"),
}
OPEN_ROUNDS = ("planned", "training", "paused", "trained", "scored")  # reconcile takes these up again

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


class IllegalMove(Exception):
    """A state was asked to go where its table has no way."""


def check(table: dict[str, tuple[str, ...]], what: str, old: str, new: str) -> None:
    """Raise IllegalMove, naming both states, unless `table` has the move."""
    if new not in table.get(old, ()):
        ways = ", ".join(table.get(old, ())) or "nowhere"
        raise IllegalMove(f"{what}: {old} cannot become {new}; from {old} it goes to {ways}")
