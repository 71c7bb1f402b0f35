"""`pseudo-label`: the method of Martins & Silva, for multi-label findings and without its data leaks.

The teacher is trained on labels (T=0, or the parent). Its most confident predictions on unlabelled images become labels;
a student from the initial backbone trains on these only, then on the labelled images. Each phase keeps its best epoch on
validation patients. The prevalence comes from labelled images, and predictions are made in eval mode.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cxrloop.plate import PLATE_SHAPE
from learner.data.augment import normalise, to_image
from learner.data.plates import label_table, read_plates
from learner.engine import distributed
from learner.engine.optim import Schedule
from learner.engine.step import Losses, State
from learner.errors import ManifestError
from learner.evaluation.calibrate import auc
from learner.networks.backbone import Backbone
from learner.networks.heads import Network
from learner.networks.pooling import resize_matrix
from learner.objectives.distl_steps import Feed, supervised_step
from learner.objectives.pseudo_targets import kappa_labels, ten_crop
from learner.round.manifest import Sample
from learner.training.run import Run
from learner.training.supervised import label_balance

CROP = 7 / 8  # side of a crop, as a share of the image's: the published 224 of 256 pixels
AT_ONCE = 16  # images in one forward pass without gradients


def train(run: Run) -> None:
    """Train the teacher, label the unlabelled images, train and fine-tune the student.

    Without unlabelled images, fine-tunes the teacher. Raises ManifestError without labelled images.
    """
    recipe = run.recipe
    if not run.manifest.labelled:
        raise ManifestError(
            "manifest: no labelled train image: pseudo-labels need the labels' prevalence, and fine-tuning needs labels; "
            "label some train images, or use recipe distl with a parent"
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
        table = run.compute_once("pseudo-labels", lambda: {"labels": pseudo_labels(run, teacher, samples)})
        made = table["labels"].cpu()
        rows = labelled_rows(made)
        feed = run.feed([samples[i] for i in rows], "pseudo", 0, False, made[rows])

        def start_student(state: State) -> None:
            run.from_backbone(state)
            # no pseudo_auc: a manifest has no true labels of unlabelled images
            run.progress.write_note(
                state, "pseudo", {"pseudo_rate": 1 - made.isnan().float().mean().item(), "pseudo_auc": None}
            )

        student = train_keeping_best(run, "pseudo", feed, run.schedule(feed, recipe.epochs, recipe.lr), start_student)
        start = run.from_student(student)
    schedule = run.schedule(labelled, recipe.finetune_epochs, recipe.t0_lr)
    final = train_keeping_best(run, "finetune", run.labelled_feed("finetune"), schedule, start)
    run.export("final", final, "student")


def train_keeping_best(run: Run, phase: str, feed: Feed, schedule: Schedule, start: Callable[[State], None]) -> State:
    """Train a phase on labels; return it with the weights of its best epoch by macro AUC on validation, else the last."""
    samples = [sample for sample in run.manifest.of("validation") if sample.labelled]
    labels, balance = label_table(samples).numpy(), label_balance(run)

    def step(state: State) -> Losses:
        losses = supervised_step(state, feed, balance)
        if samples and state.step % schedule.steps_per_epoch == 0:
            value = distributed.on_rank_zero(lambda: macro_auc(predict(run, state.student, samples).numpy(), labels))
            if value is not None:
                keep_best(run, state, value)
        return losses

    state = run.train_phase(phase, schedule, start, step)
    best = {key.removeprefix("best."): value for key, value in state.extra.items() if key.startswith("best.")}
    state.student.load_state_dict(best or state.student.state_dict())
    state.teacher.load_state_dict(state.student.state_dict())
    state.extra = {}
    return state


def macro_auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the mean AUC over the findings of scores and labels (N, F) with images of both classes; None without any."""
    known = [value for i in range(labels.shape[1]) if (value := auc(scores[:, i], labels[:, i])) is not None]
    return sum(known) / len(known) if known else None


def keep_best(run: Run, state: State, value: float) -> None:
    """Write a note of this epoch's AUC, and keep its weights in the state if the AUC is the highest so far."""
    run.progress.write_note(state, "validation", {"auc": value})
    if "auc" not in state.extra or value > state.extra["auc"].item():
        weights = {f"best.{key}": tensor.clone() for key, tensor in state.student.state_dict().items()}
        state.extra = {"auc": torch.tensor(value, dtype=torch.float64), **weights}


def labelled_rows(labels: Tensor) -> list[int]:
    """Return the rows of pseudo-labels (N, F) with a label of at least one finding."""
    return (~labels.isnan()).any(1).nonzero()[:, 0].tolist()


def pseudo_labels(run: Run, teacher: Network, samples: Sequence[Sample]) -> Tensor:
    """Return pseudo-labels (N, F), 1, 0 or nan: the kappa filter on the teacher's predictions over crops."""
    scores = predict(run, teacher, samples, crop_side(teacher, run.recipe.image_size))
    return kappa_labels(scores, label_table(run.manifest.labelled), run.recipe.kappa)


def crop_side(network: Network, size: int) -> int:
    """Return the side of a crop from images of this size: 7/8 of it, for transformers a multiple of the patch."""
    patch = network.backbone.patch if isinstance(network.backbone, Backbone) else 1
    return max(1, int(CROP * size) // patch) * patch


@torch.no_grad()
def predict(run: Run, network: Network, samples: Sequence[Sample], crop: int | None = None) -> Tensor:
    """Return probabilities (N, F) in eval mode, in host memory: of whole images, or the mean over crops of side `crop`.

    Ten crops, as published, where the recipe uses flips; else the five that are not mirrored.
    """
    matrix, rows, was_training = (
        resize_matrix(PLATE_SHAPE[0], run.recipe.image_size).to(run.device),
        [],
        network.training,
    )
    network.to(run.device).eval()  # an export leaves its network on the CPU
    for low in range(0, len(samples), AT_ONCE):
        plates = read_plates(samples[low : low + AT_ONCE]).to(run.device)
        images = normalise(to_image(plates, matrix), run.recipe)
        views = images[None] if crop is None else ten_crop(images, crop)[: 10 if run.recipe.flip else 5]
        with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype is not None):
            logits = network.classify(views.flatten(0, 1))
        rows.append(logits.float().sigmoid().unflatten(0, views.shape[:2]).mean(0).cpu())
    network.train(was_training)
    return torch.cat(rows)
