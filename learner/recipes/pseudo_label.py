"""`pseudo-label`: the method of Martins & Silva, for findings that don't exclude one another and without their leaks.

A teacher learns the labelled images (T=0, else the parent). Its surest answers on the others become labels; a student
from learner.errors import ManifestError
from learner.errors import ManifestError
from the starting backbone learns those alone, then the labelled images. Each time the best epoch on validation
patients is kept. Prevalence comes from labelled images, and a network that is asked is in eval mode.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cxrloop.plate import PLATE_SHAPE
from learner.data.augment import normalise, resize_matrix, to_image
from learner.data.plates import label_table, read_plates
from learner.engine import distributed
from learner.engine.optim import Schedule
from learner.engine.step import Losses, State
from learner.errors import ManifestError
from learner.evaluation.calibrate import auc
from learner.networks.backbone import Backbone
from learner.networks.heads import Network
from learner.objectives.correction import Feed, supervised_step
from learner.objectives.pseudo_targets import kappa_labels, ten_crop
from learner.round.manifest import Sample
from learner.training.run import Run
from learner.training.supervised import label_balance

CROP = 7 / 8  # of the side: the published 224 of 256 px
AT_ONCE = 16  # images in one pass when only looked at


def train(run: Run) -> None:
    """Teacher, pseudo-labels, student, fine-tuning; without an image to pseudo-label, the teacher is fine-tuned."""
    recipe = run.recipe
    if not run.manifest.labelled:
        raise ManifestError(
            "manifest: no labelled train image: pseudo-labels take their prevalence from labels, and the student ends on "
            "labels; label some train images, or use recipe distl with a parent"
        )
    labelled = run.labelled_feed("t0")
    if run.is_first_round:
        schedule = run.schedule(labelled, recipe.t0_epochs, recipe.t0_lr, recipe.t0_steps)
        t0 = train_keeping_best(run, "t0", labelled, schedule, run.from_backbone)
        run.export("t0", t0, "student")
        teacher, start = t0.student, run.from_student(t0)
    else:
        teacher, start = run.champion(), run.from_parent
    samples = [sample for sample in run.manifest.unlabelled if not sample.labelled]
    if samples:
        made = run.compute_once("pseudo-labels", lambda: {"labels": pseudo_labels(run, teacher, samples)})[
            "labels"
        ].cpu()
        feed = run.feed([samples[i] for i in labelled_rows(made)], "pseudo", 0, False, made[labelled_rows(made)])

        def begin(state: State) -> None:
            run.from_backbone(state)
            # a site's manifest holds no hidden labels to measure the pseudo-labels with
            run.progress.write_note(
                state, "pseudo", {"pseudo_rate": 1 - made.isnan().float().mean().item(), "pseudo_auc": None}
            )

        student = train_keeping_best(run, "pseudo", feed, run.schedule(feed, recipe.epochs, recipe.lr), begin)
        start = run.from_student(student)
    schedule = run.schedule(labelled, recipe.finetune_epochs, recipe.t0_lr)
    final = train_keeping_best(run, "finetune", run.labelled_feed("finetune"), schedule, start)
    run.export("final", final, "student")


def train_keeping_best(run: Run, phase: str, feed: Feed, schedule: Schedule, start: Callable[[State], None]) -> State:
    """A phase on labels, ending with the weights of its best epoch: macro AUC on validation patients, else the last."""
    samples = [sample for sample in run.manifest.of("validation") if sample.labelled]
    labels, balance = label_table(samples).numpy(), label_balance(run)

    def tick(state: State) -> Losses:
        losses = supervised_step(state, feed, balance)
        if samples and state.step % schedule.steps_per_epoch == 0:
            value = distributed.on_rank_zero(lambda: macro_auc(predict(run, state.student, samples).numpy(), labels))
            if value is not None:
                keep_best(run, state, value)
        return losses

    state = run.train_phase(phase, schedule, start, tick)
    best = {key.removeprefix("best."): value for key, value in state.extra.items() if key.startswith("best.")}
    state.student.load_state_dict(best or state.student.state_dict())
    state.teacher.load_state_dict(state.student.state_dict())
    state.extra = {}
    return state


def macro_auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Mean AUC over the findings of (N, F) that have images of both classes; None without any."""
    known = [value for i in range(labels.shape[1]) if (value := auc(scores[:, i], labels[:, i])) is not None]
    return sum(known) / len(known) if known else None


def keep_best(run: Run, state: State, value: float) -> None:
    """Carry this epoch's weights along when no earlier epoch had as high an AUC; told as a note."""
    run.progress.write_note(state, "validation", {"auc": value})
    if "auc" not in state.extra or value > state.extra["auc"].item():
        weights = {f"best.{key}": tensor.clone() for key, tensor in state.student.state_dict().items()}
        state.extra = {"auc": torch.tensor(value, dtype=torch.float64), **weights}


def labelled_rows(labels: Tensor) -> list[int]:
    """Places of the images that got a pseudo-label for one finding at least, of labels (N, F)."""
    return (~labels.isnan()).any(1).nonzero()[:, 0].tolist()


def pseudo_labels(run: Run, teacher: Network, samples: Sequence[Sample]) -> Tensor:
    """1, 0 or nan (N, F): the kappa filter on the teacher's answers over crops, prevalence from the labelled images."""
    scores = predict(run, teacher, samples, crop_side(teacher, run.recipe.image_size))
    return kappa_labels(scores, label_table(run.manifest.labelled), run.recipe.kappa)


def crop_side(network: Network, size: int) -> int:
    """Side of a crop from images of this size: 7/8 of it, in whole patches of a transformer."""
    patch = network.backbone.patch if isinstance(network.backbone, Backbone) else 1
    return max(1, int(CROP * size) // patch) * patch


@torch.no_grad()
def predict(run: Run, network: Network, samples: Sequence[Sample], crop: int | None = None) -> Tensor:
    """Probabilities (N, F) of a network in eval mode, on the host: of the whole images, or the mean over their crops.

    Ten crops an image as published where the recipe mirrors images, else the five that aren't mirrored.
    """
    matrix, rows, was = resize_matrix(PLATE_SHAPE[0], run.recipe.image_size).to(run.device), [], network.training
    network.to(run.device).eval()  # an export may have left it on the CPU
    for low in range(0, len(samples), AT_ONCE):
        plates = read_plates(samples[low : low + AT_ONCE]).to(run.device)
        images = normalise(to_image(plates, matrix), run.recipe)
        views = images[None] if crop is None else ten_crop(images, crop)[: 10 if run.recipe.flip else 5]
        with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype is not None):
            logits = network.classify(views.flatten(0, 1))
        rows.append(logits.float().sigmoid().unflatten(0, views.shape[:2]).mean(0).cpu())
    network.train(was)
    return torch.cat(rows)
