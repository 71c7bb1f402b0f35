"""The learner's exceptions. Must not import torch: the agent imports this module."""


class LearnerError(Exception):
    """A known reason why the learner cannot go on; its text says what happened and what to do next."""


class ManifestError(LearnerError):
    """A manifest that cannot be trained on."""


class RecipeError(LearnerError):
    """A recipe with an unknown key or a value that is not allowed."""


class RoundBusy(LearnerError):
    """Another learner process holds the round folder."""


class Paused(LearnerError):
    """The round must pause now; its state is consistent and not yet saved. The text is the reason."""


class OtherRankExited(LearnerError):
    """Another rank has ended the round; `state` and `reason` are the result of this rank too."""

    def __init__(self, state: str, reason: str) -> None:
        super().__init__(reason)
        self.state, self.reason = state, reason
