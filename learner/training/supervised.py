"""T=0, the training on labelled images only, which all recipes share; and the weights of the labels."""

from collections.abc import Callable

from learner.data.plates import label_table
from learner.engine.step import State
from learner.objectives.class_losses import Balance, class_balance
from learner.objectives.distl_steps import supervised_step
from learner.training.run import Run


def train_on_labels(run: Run, start: Callable[[State], None], finish: Callable[[State], None] | None = None) -> State:
    """Train phase `t0` from the initial weights of `start` and return its state; a first round exports it.

    `finish` changes the trained state before the export. Both networks are the student then: the EMA of so few steps is not useful, and the published code discards it too.
    """
    recipe, samples, balance = run.recipe, run.labelled_feed("t0"), label_balance(run)
    schedule = run.schedule(samples, recipe.t0_epochs, recipe.t0_lr, recipe.t0_steps)
    state = run.train_phase("t0", schedule, start, lambda state: supervised_step(state, samples, balance))
    state.teacher.load_state_dict(state.student.state_dict())
    if finish:
        finish(state)
    if run.is_first_round:
        run.export("t0", state, "student")
    return state


def label_balance(run: Run) -> Balance:
    """Return the label weights of the recipe's `balance`, from the train labels only."""
    if run.recipe.balance == "none" or not run.manifest.labelled:
        return {}
    return class_balance(label_table(run.manifest.labelled).to(run.device))
