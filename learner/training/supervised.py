"""Learning the labelled images alone: T=0 of every recipe, from wherever a recipe begins.

Knows a run and its labels; what the labels weigh is said here once for all phases, from train labels only.
"""

from collections.abc import Callable

from learner.data.plates import label_table
from learner.engine.step import State
from learner.objectives.class_losses import Balance, class_balance
from learner.objectives.correction import supervised_step
from learner.training.run import Run


def train_on_labels(run: Run, begin: Callable[[State], None]) -> State:
    """The state after phase `t0`, both networks the student: whoever goes on from it starts both from there.

    A moving average of so few steps is no teacher; the published code keeps one here too, and discards it. A first
    round exports it.
    """
    recipe, samples, balance = run.recipe, run.labelled_feed("t0"), label_balance(run)
    schedule = run.schedule(samples, recipe.t0_epochs, recipe.t0_lr, recipe.t0_steps)
    state = run.train_phase("t0", schedule, begin, lambda state: supervised_step(state, samples, balance))
    state.teacher.load_state_dict(state.student.state_dict())
    if run.is_first_round:
        run.export("t0", state, "student")
    return state


def label_balance(run: Run) -> Balance:
    """What the recipe's `balance` makes labels weigh, counted on the train labels and on no others."""
    if run.recipe.balance == "none" or not run.manifest.labelled:
        return {}
    return class_balance(label_table(run.manifest.labelled).to(run.device))
