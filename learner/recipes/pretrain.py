"""`pretrain`: self-supervision on the site's own images, no label needed, for a backbone that others can start from.

DINO, masked patches and spread on every train image; the teacher's backbone is left in the round as
`backbone.safetensors` (timm's key names: `--backbone FILE`). Then the labelled images teach a class head, as in T=0 of
`evolve`, so that the round has a model to judge.
"""

from functools import partial

from safetensors.torch import save

from cxrloop.durable import write_atomic
from learner.engine.step import State
from learner.errors import ManifestError
from learner.networks.backbone import weights_of
from learner.objectives.teacher_student import teacher_student_step
from learner.recipes.evolve import fit_head
from learner.training.run import Run
from learner.training.supervised import train_on_labels

BACKBONE = "backbone.safetensors"


def train(run: Run) -> None:
    """Self-supervision, the backbone file, then the labels; raises ManifestError after the backbone when there is none."""
    recipe = run.recipe
    samples = run.unlabelled_feed()
    schedule = run.schedule(samples, recipe.epochs, recipe.lr)
    start = run.from_backbone if run.is_first_round else run.from_parent
    seen = run.train_phase("pretrain", schedule, start, lambda state: teacher_student_step(state, samples, None, {}))
    keep_backbone(run, seen)
    if not run.manifest.labelled:
        raise ManifestError(
            "manifest: no labelled train image, so no model to judge; the backbone is made, and a round with labels can "
            f"start from it: --backbone {run.manifest.folder / BACKBONE}"
        )
    final = train_on_labels(run, partial(from_teacher, run, seen))
    run.export("final", final, "student")


def from_teacher(run: Run, seen: State, state: State) -> None:
    """Both networks := the pre-trained teacher, the class head fitted on what it sees."""
    state.student.load_state_dict(seen.teacher.state_dict())
    fit_head(run, state.student)
    state.teacher.load_state_dict(state.student.state_dict())


def keep_backbone(run: Run, seen: State) -> None:
    """ROUND/backbone.safetensors, whole or not at all."""
    weights, note = weights_of(seen.teacher.backbone, run.plan)
    write_atomic(run.manifest.folder / BACKBONE, save(weights, metadata=note))
