"""`pretrain`: self-supervised training on the site's images without labels, for a backbone of later rounds.

Trains with DINO, iBOT and KoLeo on all train images and writes the EMA teacher's backbone to `backbone.safetensors` in the
round folder (timm's key names, for `--backbone FILE`). Then T=0 on the labelled images makes a model that can be evaluated.
"""

import json
from functools import partial

from safetensors.torch import save

from cxrloop.durable import write_atomic
from learner.engine.step import State
from learner.errors import ManifestError
from learner.objectives.teacher_student import teacher_student_step
from learner.pretrained.reader import weights_of
from learner.training.head_fit import fit_head
from learner.training.run import Run
from learner.training.supervised import train_on_labels

BACKBONE = "backbone.safetensors"


def train(run: Run) -> None:
    """Train self-supervised, write the backbone, train on labels. Raises ManifestError after that where there are none."""
    recipe = run.recipe
    feed = run.unlabelled_feed()
    schedule = run.schedule(feed, recipe.epochs, recipe.lr)
    start = run.from_backbone if run.is_first_round else run.from_parent
    pretrained = run.train_phase("pretrain", schedule, start, lambda state: teacher_student_step(state, feed, None, {}))
    write_backbone(run, pretrained)
    if not run.manifest.labelled:
        raise ManifestError(
            "manifest: no labelled train image, so no model to evaluate; the backbone is written, and a round with labels can "
            f"use it: --backbone {run.manifest.folder / BACKBONE}"
        )
    final = train_on_labels(run, partial(from_teacher, run, pretrained))
    run.export("final", final, "student")


def from_teacher(run: Run, pretrained: State, state: State) -> None:
    """Load the pretrained teacher into both networks and fit the class head on its embeddings."""
    state.student.load_state_dict(pretrained.teacher.state_dict())
    fit_head(run, state.student)
    state.teacher.load_state_dict(state.student.state_dict())


def write_backbone(run: Run, pretrained: State) -> None:
    """Write the teacher's backbone to ROUND/backbone.safetensors, atomically, with its image size, mean and std."""
    weights, note = weights_of(pretrained.teacher.backbone, run.plan)
    note |= {key: json.dumps(getattr(run.recipe, key)) for key in ("image_size", "mean", "std")}
    write_atomic(run.manifest.folder / BACKBONE, save(weights, metadata=note))
