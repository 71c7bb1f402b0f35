"""`distl`: the method of Park et al. (Nature Communications 2022) as its code does it.

T=0 learns the labelled films; then a student distils itself between views, trains itself on its teacher's soft answers
and is corrected in bursts on the labelled films, while the teacher follows by moving average. Optimiser, schedules and
centre start anew each round; networks go on from round to round.
"""

from learner.correct import distil_and_correct, supervise
from learner.run import Run


def run(run: Run) -> None:
    """T=0 when there is no parent, then one round on every train film."""
    recipe = run.recipe
    start = run.from_parent
    if run.first:
        films = run.labelled("t0")
        schedule = run.schedule(films, recipe.t0_epochs, recipe.t0_lr, recipe.t0_steps)
        t0 = run.train("t0", schedule, run.from_backbone, lambda state: supervise(state, films))
        # The teacher of T=0 is discarded: whoever goes on from t0/, now or later, starts both from the student.
        t0.teacher.load_state_dict(t0.student.state_dict())
        run.export("t0", t0, "student")
        start = run.from_student(t0)
    unlabelled = run.unlabelled()
    views = recipe.local_views if recipe.correct_loss == "mix" else 0  # labels alone look at the noised view only
    labelled = run.labelled("labelled", views, fixed_order=True) if run.round.labelled else None
    schedule = run.schedule(unlabelled, recipe.epochs, recipe.lr)
    final = run.train("distil", schedule, start, lambda state: distil_and_correct(state, unlabelled, labelled))
    run.export("final", final, recipe.serve)
