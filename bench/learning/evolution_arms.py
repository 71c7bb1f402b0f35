"""The arms of bench/learning/evolution.py: each takes a draw of labelled images through T=0..3 and scores the tests.

`distl` and `evolve` are the product's recipes, run by a `Run` that reads tokens from a shared bank and scores in place
of exporting ONNX. The other arms use the product's own functions on the features of the frozen network.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.learning.evolution_images import Draw, Pool, as_samples
from learner.data.plates import label_table
from learner.data.token_bank import TokenBank
from learner.engine.checkpoint import save_weights
from learner.engine.step import State
from learner.fits import head_refit, logistic
from learner.fits.head_refit import FEW_PENALTY, PENALTY
from learner.networks.heads import Network
from learner.objectives.pseudo_targets import kappa_labels
from learner.recipes import distl, evolve
from learner.round.manifest import RoundManifest, Sample
from learner.round.recipe import Recipe
from learner.training.run import Run

FULL_PENALTY = 0.01  # ridge penalty with all labels: the best of .001 to .1 on validation patients

Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class Site:
    """What all cells share: images, token bank, the recipe's sizes and a work folder."""

    pool: Pool
    bank: TokenBank
    recipe: Recipe
    cells: Path  # folder of running rounds; removed after each cell


class Banks(TokenBank):
    """Several token banks as one; each image is read from the bank that holds it."""

    def __init__(self, banks: Sequence[TokenBank]) -> None:
        self.banks = banks
        self.home = {sample: number for number, bank in enumerate(banks) for sample in bank.row}

    def unaugmented(self, samples: Sequence[Sample]) -> Tensor:
        return self._gathered(samples, lambda bank, some, at: [bank.unaugmented(some)])[0]

    def views(self, samples: Sequence[Sample], numbers: Tensor, local_views: int) -> list[Tensor]:
        return self._gathered(samples, lambda bank, some, at: bank.views(some, numbers[at], local_views))

    def _gathered(
        self, samples: Sequence[Sample], read: Callable[[TokenBank, list[Sample], Tensor], list[Tensor]]
    ) -> list[Tensor]:
        """Read each bank's own images; return the parts in the requested order."""
        bank_of = torch.tensor([self.home[sample.image] for sample in samples])
        places = [at for n in range(len(self.banks)) if len(at := (bank_of == n).nonzero()[:, 0])]
        parts_by_bank = [read(self.banks[int(bank_of[at[0]])], [samples[int(i)] for i in at], at) for at in places]
        back = torch.cat(places).argsort()
        return [torch.cat(parts)[back] for parts in zip(*parts_by_bank, strict=True)]


class CellRun(Run):
    """A round of the product that keeps its weights for the next round and scores the tests in place of exporting."""

    def __init__(self, round_: RoundManifest, site: Site, tests: dict, tell: Callable[[str, Scores], None]) -> None:
        super().__init__(round_)
        self.site, self.tests, self.tell = site, tests, tell

    @property
    def token_bank(self) -> TokenBank:
        """The shared token bank."""
        return self.site.bank

    def export(self, name: str, state: State, serve: str, chosen: str | None = None, plan: object = None) -> None:
        network = state.teacher if serve == "teacher" else state.student
        save_weights(self.manifest.folder / f"{name}.safetensors", state, self.plan, self.manifest.findings)
        self.tell(name, self.scores(network) | {"chosen": np.array(chosen or "")})

    def scores(self, network: Network) -> Scores:
        places = self.tests | {"validation": np.array([f.image for f in self.manifest.of("validation")])}
        return {name: self.answers(network, [self.site.pool.samples[i] for i in at]) for name, at in places.items()}

    def answers(self, network: Network, samples: list[Sample]) -> np.ndarray:
        seen = self.embeddings(network, samples)
        with torch.no_grad():
            return network.cls_head(seen).float()[:, 0].numpy()


def learn(
    site: Site,
    draw: Draw,
    method: str,
    overrides: dict,
    name: str,
    tell: Callable[[int, Scores], None],
    rounds: int = 3,
) -> None:
    """Run T=0 and rounds 1..`rounds` of a recipe, each from the one before; images arrive cumulatively."""
    run_of = {"distl": distl.train, "evolve": evolve.train}[method]
    folder, parent = site.cells / name, None
    shutil.rmtree(folder, ignore_errors=True)
    recipe = site.recipe.override({"method": method, **overrides})
    for number in range(1, rounds + 1):
        here = folder / f"r{number}"
        here.mkdir(parents=True)
        samples = as_samples(site.pool, draw.labelled, "train", True)
        samples += as_samples(site.pool, np.concatenate(draw.rounds[:number]), "train", False)
        samples += as_samples(site.pool, draw.validation, "validation", True)
        round_ = RoundManifest(
            here, f"r{number}", ("abnormal",), recipe, parent and "parent", parent, None, tuple(samples), name
        )
        rounds_of_weights = {"t0": 0, "final": number}
        work = CellRun(
            round_,
            site,
            draw.tests,
            lambda name, scores, rounds=rounds_of_weights: tell(rounds[name], scores),
        )
        run_of(work)
        work.progress.close()
        parent = here / "final.safetensors"
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Frozen:
    """Features of all images by the pretrained network without training, (images, D)."""

    features: Tensor

    def __getitem__(self, places: np.ndarray) -> Tensor:
        return self.features[torch.from_numpy(np.asarray(places))]


def frozen_features(site: Site) -> Frozen:
    """Return the embeddings of every image by the pretrained backbone."""
    folder = site.cells / "frozen"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    round_ = RoundManifest(
        folder,
        "frozen",
        ("abnormal",),
        replace(site.recipe, method="evolve"),
        None,
        None,
        None,
        site.pool.samples,
        "frozen",
    )
    work = CellRun(round_, site, {}, lambda *_: None)
    state = evolve.initial_state(work, work.from_backbone)
    features = work.embeddings(state.student, site.pool.samples)
    work.progress.close()
    return Frozen(features)


def score_linear(site: Site, frozen: Frozen, draw: Draw, answer: logistic.LinearHead) -> Scores:
    """Return the scores of a linear head on the tests and on the validation images."""
    places = draw.tests | {"validation": draw.validation}
    return {name: answer(frozen[at]).float()[:, 0].numpy() for name, at in places.items()}


def supervised(site: Site, frozen: Frozen, draw: Draw, tell: Callable[[int, Scores], None]) -> None:
    """Fit the class head on the frozen features of the labelled images: the result without a stream."""
    labels = label_table(as_samples(site.pool, draw.labelled, "train", True))
    tell(0, score_linear(site, frozen, draw, logistic.fit(frozen[draw.labelled], labels, FEW_PENALTY)))


def fully_labelled(site: Site, frozen: Frozen, draw: Draw, tell: Callable[[int, Scores], None]) -> None:
    """Fit with every train image labelled: the ceiling (in B the site's own half only; MedNIST has no labels)."""
    places = np.concatenate([draw.labelled, draw.ceiling])
    labels = label_table(as_samples(site.pool, places, "train", True))
    tell(3, score_linear(site, frozen, draw, logistic.fit(frozen[places], labels, FULL_PENALTY)))


def frozen_graph(site: Site, frozen: Frozen, draw: Draw, tell: Callable[[int, Scores], None]) -> None:
    """Fit a head to neighbours and labels on frozen features, as `evolve` does; no training."""
    recipe = site.recipe
    for number in (1, 2, 3):
        places = np.concatenate([draw.labelled, *draw.rounds[:number]])
        labels = label_table(
            as_samples(site.pool, draw.labelled, "train", True)
            + as_samples(site.pool, places[len(draw.labelled) :], "train", False)
        )
        head = head_refit.fit_graph_and_labels(frozen[places], labels, recipe.neighbours, recipe.components)
        tell(number, score_linear(site, frozen, draw, head))


def pseudo_label(site: Site, frozen: Frozen, draw: Draw, tell: Callable[[int, Scores], None]) -> None:
    """Train a student on labels and on the surest pseudo-labels, share kappa (Martins & Silva), on frozen features."""
    own = label_table(as_samples(site.pool, draw.labelled, "train", True))
    teacher = logistic.fit(frozen[draw.labelled], own, FEW_PENALTY)
    for number in (1, 2, 3):
        new = np.concatenate(draw.rounds[:number])
        hard = kappa_labels(teacher(frozen[new]).float(), own, site.recipe.kappa)
        places, labels = np.concatenate([draw.labelled, new]), torch.cat([own, hard])
        tell(number, score_linear(site, frozen, draw, logistic.fit(frozen[places], labels, PENALTY)))
