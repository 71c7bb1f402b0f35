"""The arms of experiment D: each takes one division through T=0..3 and scores the test images, (N, F) each time."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.adults.images import FINDINGS, Adults, Division, as_samples
from learner.data.plates import label_table
from learner.data.token_bank import TokenBank
from learner.engine.checkpoint import save_weights
from learner.engine.step import State
from learner.evaluation.auc import auc
from learner.fits import head_refit, logistic
from learner.fits.head_refit import PENALTY
from learner.fits.label_propagation import pseudo_labels
from learner.networks.blend import read_blend
from learner.objectives.pseudo_targets import kappa_labels, shrunk_prevalence
from learner.recipes import distl, evolve
from learner.round.manifest import RoundManifest
from learner.round.recipe import Recipe
from learner.training.blend_fit import blend_logits
from learner.training.head_fit import logits_of
from learner.training.run import Run

Tell = Callable[[int, dict[str, np.ndarray]], None]
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the supervised head; validation images choose
METHODS = {"distl": distl.train, "evolve": evolve.train}


@dataclass(frozen=True)
class Place:
    """What all cells of one backbone depth share: images, token bank, the recipe's sizes and a work folder."""

    adults: Adults
    bank: TokenBank
    recipe: Recipe
    cells: Path


class CellRun(Run):
    """A round of the product that reads a shared token bank, and scores images in place of exporting ONNX."""

    def __init__(self, manifest: RoundManifest, place: Place, division: Division, tell: Callable) -> None:
        super().__init__(manifest)
        self.place, self.division, self.tell = place, division, tell

    @property
    def token_bank(self) -> TokenBank:
        """The shared token bank."""
        return self.place.bank

    def export(self, name: str, state: State, serve: str, chosen: str | None = None, plan: object = None) -> None:
        network, blend = state.teacher if serve == "teacher" else state.student, read_blend(state.extra)
        save_weights(self.manifest.folder / f"{name}.safetensors", state, self.plan, self.manifest.findings)
        answers = {"chosen": np.array(chosen or "")}
        for test, places in (("test", self.division.test), ("validation", self.division.validation)):
            samples = [self.place.adults.samples[i] for i in places]
            logits = logits_of(self, network, samples)
            answers[test] = (blend_logits(self, blend, logits, samples) if blend else logits).numpy()
        self.tell(name, answers)


def train(
    place: Place, division: Division, method: str, overrides: dict, name: str, tell: Tell,
    labelled: str = "few", stream: bool = True, rounds: int = 3,
) -> None:  # fmt: skip
    """Run T=0 and the rounds of a recipe, each from the one before; images arrive cumulatively.

    labelled: "few", or "all" = every image of the stream has its labels; stream False: only the labelled images, for as
    many steps.
    """
    folder, parent = place.cells / name, None
    shutil.rmtree(folder, ignore_errors=True)
    recipe = place.recipe.override({"method": method, **overrides})
    for number in range(1, rounds + 1):
        here = folder / f"r{number}"
        here.mkdir(parents=True)
        arrived = np.concatenate(division.rounds[:number] if labelled == "few" else division.rounds)
        samples = as_samples(place.adults, division.labelled, "train", True)
        if stream:
            samples += as_samples(place.adults, arrived, "train", labelled == "all")
        this = (
            recipe if stream else recipe.override({"epochs": same_steps(recipe, len(division.labelled), len(arrived))})
        )
        samples += as_samples(place.adults, division.validation, "validation", True)
        manifest = RoundManifest(
            here, f"r{number}", FINDINGS, this, parent and "parent", parent, None, tuple(samples), name
        )
        numbers = {"t0": 0, "final": number}
        run = CellRun(manifest, place, division, lambda phase, answers, numbers=numbers: tell(numbers[phase], answers))
        METHODS[method](run)
        run.progress.close()
        parent = here / "final.safetensors"
    shutil.rmtree(folder, ignore_errors=True)


def same_steps(recipe: Recipe, labelled: int, arrived: int) -> int:
    """Return the epochs over the labelled images that have as many steps as the recipe's over all images."""
    own = max(1, labelled // min(recipe.batch, labelled))
    return max(1, round(recipe.epochs * ((labelled + arrived) // recipe.batch) / own))


@dataclass(frozen=True)
class Frozen:
    """Embeddings (N, D) of all images by the pretrained network, with the labels of some of them."""

    place: Place
    features: Tensor

    def labels(self, places: np.ndarray, known: bool) -> Tensor:
        """Return labels (n, F) of images; nan where they are not known."""
        return label_table(as_samples(self.place.adults, places, "train", known))

    def answers(self, head: logistic.LinearHead, division: Division) -> dict[str, np.ndarray]:
        """Return the head's logits of test and validation images."""
        places = {"test": division.test, "validation": division.validation}
        return {name: head(self.features[at]).float().numpy() for name, at in places.items()}

    def fit(self, places: np.ndarray, labels: Tensor, division: Division) -> tuple[logistic.LinearHead, float]:
        """Return the head with the best macro AUC on validation over PENALTIES, and that AUC."""
        best: tuple[logistic.LinearHead, float] | None = None
        for penalty in PENALTIES:
            head = logistic.fit(self.features[places], labels, penalty)
            value = validation_auc(self.place.adults, division, self.answers(head, division)["validation"])
            if best is None or value > best[1]:
                best = head, value
        assert best
        return best


def validation_auc(adults: Adults, division: Division, logits: np.ndarray) -> float:
    """Return the mean AUC on the validation images over the findings that have both classes there."""
    truth = adults.truth[division.validation].astype(float)
    values = [auc(logits[:, i].astype(float), truth[:, i]) for i in range(len(FINDINGS)) if 0 < truth[:, i].mean() < 1]
    return float(np.mean(values))


def frozen_features(place: Place) -> Frozen:
    """Return the embeddings of every image by the pretrained backbone."""
    folder = place.cells / "frozen"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = replace(place.recipe, method="evolve")
    manifest = RoundManifest(folder, "frozen", FINDINGS, recipe, None, None, None, place.adults.samples, "frozen")
    nothing = np.array([])
    run = CellRun(manifest, place, Division(nothing, nothing, (), nothing), lambda *_: None)
    state = evolve.initial_state(run, run.from_backbone)
    features = run.embeddings(state.student, place.adults.samples)
    run.progress.close()
    return Frozen(place, features)


def supervised(frozen: Frozen, division: Division, overrides: dict, name: str, tell: Tell) -> None:
    """The better, by validation, of a head on frozen features and of fine-tuning on the labels."""
    labels = frozen.labels(division.labelled, True)
    head, value = frozen.fit(division.labelled, labels, division)
    choice = frozen.answers(head, division) | {"chosen": np.array("frozen")}
    tuned: dict[int, dict[str, np.ndarray]] = {}
    train(frozen.place, division, "evolve", overrides, name, tuned.__setitem__, stream=False, rounds=1)
    if validation_auc(frozen.place.adults, division, tuned[0]["validation"]) > value:
        choice = tuned[0] | {"chosen": np.array("fine-tuned")}
    tell(0, choice)


def frozen_graph(frozen: Frozen, division: Division, tell: Tell) -> None:
    """A head on neighbours' pseudo-labels and labels, on frozen features; no training."""
    recipe = frozen.place.recipe
    for number in (1, 2, 3):
        new = np.concatenate(division.rounds[:number])
        places = np.concatenate([division.labelled, new])
        labels = torch.cat([frozen.labels(division.labelled, True), frozen.labels(new, False)])
        head = head_refit.fit_graph_and_labels(frozen.features[places], labels, recipe.neighbours, recipe.components)
        tell(number, frozen.answers(head, division))


def pseudo_label(frozen: Frozen, division: Division, tell: Tell) -> None:
    """A student on labels and on the surest pseudo-labels that neighbours vote for, share kappa (Martins & Silva)."""
    recipe, own = frozen.place.recipe, frozen.labels(division.labelled, True)
    for number in (1, 2, 3):
        new = np.concatenate(division.rounds[:number])
        places = np.concatenate([division.labelled, new])
        labels = torch.cat([own, frozen.labels(new, False)])
        features = frozen.features[places]
        voted = pseudo_labels(features, labels, shrunk_prevalence(labels), recipe.neighbours, recipe.components)
        hard = kappa_labels(voted[len(own) :], own, recipe.kappa)
        tell(number, frozen.answers(logistic.fit(features, torch.cat([own, hard]), PENALTY), division))
