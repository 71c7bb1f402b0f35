"""`distl`: the method of Park et al. (Nature Communications 2022) as its code does it.

T=0 learns the labelled images; then a student distils itself between views, trains itself on its teacher's soft answers
and is corrected in bursts on the labelled images, while the teacher follows by moving average. Optimiser, schedules and
centre start anew each round; networks go on from round to round.
"""

from learner.objectives.correction import distl_step
from learner.training.run import Run
from learner.training.supervised import train_on_labels


def train(run: Run) -> None:
    """T=0 when there is no parent, then one round on every train image."""
    recipe = run.recipe
    start = run.from_student(train_on_labels(run, run.from_backbone)) if run.is_first_round else run.from_parent
    unlabelled = run.unlabelled_feed()
    views = recipe.local_views if recipe.correct_loss == "mix" else 0  # labels alone look at the noised view only
    labelled = run.labelled_feed("labelled", views, fixed_order=True) if run.manifest.labelled else None
    schedule = run.schedule(unlabelled, recipe.epochs, recipe.lr)
    final = run.train_phase("distil", schedule, start, lambda state: distl_step(state, unlabelled, labelled))
    run.export("final", final, recipe.serve)
