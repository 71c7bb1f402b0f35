"""`distl`: the method of Park et al. (Nature Communications 2022) as its code does it.

T=0 learns the labelled images; then a student distils itself between views, trains itself on its teacher's soft answers
and is corrected in bursts on the labelled images, while the teacher follows by moving average. Optimiser, schedules and
centre start anew each round; networks go on from round to round.
"""

from learner.objectives.correction import distil_and_correct
from learner.round.run import Run
from learner.round.supervised import learn_labels


def run(run: Run) -> None:
    """T=0 when there is no parent, then one round on every train image."""
    recipe = run.recipe
    start = run.from_student(learn_labels(run, run.from_backbone)) if run.first else run.from_parent
    unlabelled = run.unlabelled()
    views = recipe.local_views if recipe.correct_loss == "mix" else 0  # labels alone look at the noised view only
    labelled = run.labelled("labelled", views, fixed_order=True) if run.round.labelled else None
    schedule = run.schedule(unlabelled, recipe.epochs, recipe.lr)
    final = run.train("distil", schedule, start, lambda state: distil_and_correct(state, unlabelled, labelled))
    run.export("final", final, recipe.serve)
