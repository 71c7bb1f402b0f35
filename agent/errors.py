"""The two ways a command can fail: something is wrong (exit 1), or a policy refuses (exit 2).

Both carry one line that says what, which and what to do.
"""


class Problem(Exception):
    """Something is wrong with the input, the settings or the machine: exit 1."""


class Refused(Exception):
    """The verdict or the site's policy says no: exit 2."""
