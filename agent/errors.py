"""The errors of the agent: something is wrong (exit 1), or a policy refuses (exit 2).

A message is one line: what happened, to which object, what to do next.
"""


class AgentError(Exception):
    """Base of every error that the agent raises on purpose."""


class Problem(AgentError):
    """The input, the settings or the machine is wrong: exit 1."""


class Refused(AgentError):
    """The verdict, the state of an object or the site's policy forbids the act: exit 2."""
