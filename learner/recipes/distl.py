"""`distl`: DISTL (Park et al., Nature Communications 2022), as its published code does it.

T=0 trains on the labelled images; with a pretrained backbone and a linear class head, it first fits that head to the
frozen features, so that the first steps do not spoil them. Then each step combines self-distillation (DINO) with self-training on the EMA teacher's
class probabilities; corrections on the labelled images follow at intervals. A later round starts from the networks of its
parent, with new optimiser, schedules and centre.
"""

from functools import partial

from learner.objectives.distl_steps import distl_step
from learner.training.head_fit import start_with_fitted_head
from learner.training.run import Run
from learner.training.supervised import train_on_labels


def train(run: Run) -> None:
    """Train T=0 if there is no parent, then the student on all train images; export both."""
    recipe = run.recipe
    pretrained = recipe.backbone != "random" and recipe.class_hidden == 0
    before = partial(start_with_fitted_head, run) if pretrained else run.from_backbone
    start = run.from_student(train_on_labels(run, before)) if run.is_first_round else run.from_parent
    unlabelled = run.unlabelled_feed()
    views = recipe.local_views if recipe.correct_loss == "mix" else 0  # the label loss uses no local views
    labelled = run.labelled_feed("labelled", views, fixed_order=True) if run.manifest.labelled else None
    schedule = run.schedule(unlabelled, recipe.epochs, recipe.lr)
    final = run.train_phase("distil", schedule, start, lambda state: distl_step(state, unlabelled, labelled))
    run.export("final", final, recipe.serve)
