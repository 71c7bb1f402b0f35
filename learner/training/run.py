"""One learner process at work on a round: where phases begin, go on after a crash, and leave their results.

A recipe is a straight line of `train` and `export` calls; each returns at once when an earlier process finished it, so
starting the recipe again *is* resuming it. Knows no loss: what a step does is the recipe's.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from learner.data.feed import ImageFeed
from learner.data.packed_plates import PackedPlates, open_packed_plates
from learner.data.token_bank import TokenBank, TokenFeed, open_token_bank
from learner.engine import distributed
from learner.engine.checkpoint import (
    load_network,
    load_state,
    load_weights,
    read_file,
    read_header,
    save_state,
    save_weights,
    write_file,
)
from learner.engine.device import prepare_device
from learner.engine.init_weights import copy_frozen_weights, from_weights, keep_parent_shapes
from learner.engine.optim import Schedule, make_optimiser, make_schedule
from learner.engine.progress import ProgressWriter
from learner.engine.step import Losses, State, StepFunction, require_finite, run_steps
from learner.errors import LearnerError, ManifestError, Paused
from learner.networks.backbone import Backbone, Plan, build, fit_sizes, open_backbone
from learner.networks.heads import Network, make_network
from learner.objectives.centring import make_centres
from learner.round.manifest import RoundManifest, Sample
from learner.round.recipe import Recipe
from learner.training.export import write_parts

SCORING_BATCH = 64  # images in one pass when only looked at


class Run:
    """What a recipe works with: the round, its recipe at sizes that fit the network, and the phases."""

    def __init__(self, manifest: RoundManifest) -> None:
        """Open the checkpoint, else the parent, else a backbone; raises a refusal (see `__main__`)."""
        self.manifest, self.checkpoint = manifest, manifest.folder / "checkpoint"
        if distributed.is_rank_zero():
            self.checkpoint.mkdir(exist_ok=True)
        self.device, self.dtype = prepare_device(manifest.recipe)
        self.weights: dict[str, Tensor] | None = None
        self.token_banks: dict[bool, TokenBank] = {}
        self.notes: list[str] = []  # of the phases so far
        self.header = self._open_checkpoint()
        if self.header:
            self.plan = self.header["plan"]
        elif manifest.parent_state:
            self.plan = read_header(manifest.parent_state, "plan")["plan"]
        else:
            self.plan, self.weights = open_backbone(manifest.recipe)
        recipe = manifest.recipe
        if manifest.parent_state:
            recipe = keep_parent_shapes(recipe, read_header(manifest.parent_state, "recipe")["recipe"])
        self.recipe = fit_sizes(recipe, build(self.plan))
        spent, kept = (self.header["seconds"], self.header["metrics_bytes"]) if self.header else (0.0, 0)
        self.progress = ProgressWriter(manifest.folder, manifest.until, spent, kept)

    @property
    def is_first_round(self) -> bool:
        """No parent: the round begins with T=0."""
        return self.manifest.parent is None

    def _open_checkpoint(self) -> dict | None:
        saved = self.checkpoint / "state.safetensors"
        if not saved.exists():
            return None
        header = read_header(saved, "fingerprint", "plan", "cursor")
        if header["fingerprint"] != self.manifest.fingerprint:
            raise LearnerError(f"{saved} belongs to another manifest; remove it, or plan a new round")
        return header

    # -- phases

    def train_phase(
        self,
        phase: str,
        schedule: Schedule,
        start: Callable[[State], None],
        tick: StepFunction,
        plan: Plan | None = None,
    ) -> State:
        """The state at the end of a phase: trained now, from where a crash or pause left it, or read when it is over."""
        over, saved = self.checkpoint / f"{phase}.safetensors", self.checkpoint / "state.safetensors"
        state = self.new_state(phase, schedule, plan)
        if distributed.on_rank_zero(over.exists):
            load_weights(over, state)
            state.step, self.notes = schedule.steps, state.notes
            return state
        if self.header and self.header["cursor"]["phase"] == phase:
            load_state(saved, state)
        else:
            start(state)
            state.notes = [*self.notes]
        distributed.broadcast(
            value for part in (state.student, state.teacher, state.centres) for value in part.state_dict().values()
        )
        self._run_phase(state, tick)
        require_finite(f"weights of the student after {phase}", state.student.parameters())
        if distributed.is_rank_zero():
            save_weights(over, state, plan or self.plan, self.manifest.findings)
        self.notes = state.notes
        return state

    def new_state(self, phase: str, schedule: Schedule, plan: Plan | None = None) -> State:
        """Fresh networks, of another plan than the round's if one is given, and optimiser; random weights from the seed."""
        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        student = self.new_network(recipe.drop_path, plan)
        teacher = self.new_network(plan=plan).requires_grad_(False)
        centres = make_centres(recipe, len(self.manifest.findings))
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        optimiser = make_optimiser(student)
        return State(
            student, teacher, optimiser, schedule, recipe, scaler, centres.to(self.device),
            dtype=self.dtype, phase=phase, micro=recipe.micro_batch,
        )  # fmt: skip

    def new_network(self, drop_path: float = 0.0, plan: Plan | None = None) -> Network:
        """One network of this round's plan or another, on its device; random weights from torch's generator."""
        return make_network(plan or self.plan, self.recipe, len(self.manifest.findings), drop_path).to(self.device)

    def _run_phase(self, state: State, tick: StepFunction) -> None:
        """Walk to the end of the phase, telling every step, saving at intervals and before a pause."""
        saved_at = time.monotonic()

        def after(losses: Losses) -> None:
            nonlocal saved_at
            self.progress.write_step(state, losses)
            self.progress.raise_if_paused()
            if time.monotonic() - saved_at >= state.recipe.checkpoint_seconds:
                self._save_checkpoint(state)
                saved_at = time.monotonic()

        try:
            self.progress.raise_if_paused()
            run_steps(state, tick, after)
        except Paused:  # raised between two steps only: the state is whole
            self._save_checkpoint(state)
            raise
        self._save_checkpoint(state)

    def _save_checkpoint(self, state: State) -> None:
        """The checkpoint: every rank stands where rank 0 does, and reads this file to go on."""
        if not distributed.is_rank_zero():
            return
        header = {"plan": self.plan, "recipe": state.recipe.to_dict(), "fingerprint": self.manifest.fingerprint}
        header |= {"metrics_bytes": self.progress.flush(), "seconds": self.progress.seconds}
        save_state(self.checkpoint / "state.safetensors", state, header)

    def compute_once(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that are computed once a round, on rank 0, and then read: `checkpoint/NAME.safetensors`."""
        path = self.checkpoint / f"{name}.safetensors"

        def write() -> None:
            if not path.exists():
                self.progress.write_progress(name, 0, 1)
                write_file(path, compute(), {})
                self.progress.write_progress(name, 1, 1)

        distributed.on_rank_zero(write)
        return {key: value.to(self.device) for key, value in read_file(path)[0].items()}

    def export(self, name: str, state: State, serve: str, chosen: str | None = None, plan: Plan | None = None) -> None:
        """Measure and write a bundle's parts as a folder, unless an earlier process did; `chosen` names a candidate."""
        target = self.manifest.folder / name

        def write() -> None:
            if not target.exists():
                self.progress.write_progress(f"export {name}", 0, 1)
                write_parts(target, state, plan or self.plan, self.manifest, datetime.now(UTC), serve, chosen)
                self.progress.write_progress(f"export {name}", 1, 1)

        distributed.on_rank_zero(write)

    # -- where networks begin

    from_weights = staticmethod(from_weights)

    def from_backbone(self, state: State) -> None:
        """Student := the pretrained backbone, else shaped or plain random weights; the teacher copies it.

        Raises LearnerError when a parent's network is another than the backbone of the recipe.
        """
        if self.weights is None and (self.header or self.manifest.parent):  # opened are a checkpoint or a parent
            plan, self.weights = open_backbone(self.manifest.recipe)
            if plan != self.plan:
                raise LearnerError(
                    f"the parent is {self.plan}, the backbone {plan}; give the one the parent began with"
                )
        self.from_weights(self.weights)(state)

    def from_parent(self, state: State) -> None:
        """Student := what the parent serves, in `distl` its student; teacher := its teacher; raises LearnerError."""
        state.teacher.load_state_dict(state.student.state_dict())  # a head that the parent hasn't begins alike
        tensors, served = self._parent()
        load_network(state.student, tensors, "student." if self.recipe.method == "distl" else served)
        load_network(state.teacher, tensors, "teacher.")
        copy_frozen_weights(state)

    def champion(self) -> Network:
        """The network that the parent serves; raises LearnerError."""
        tensors, served = self._parent()
        network = self.new_network()
        load_network(network, tensors, served)
        return network

    def _parent(self) -> tuple[dict[str, Tensor], str]:
        assert self.manifest.parent_state
        tensors, header = read_file(self.manifest.parent_state)
        known, findings = header.get("findings"), list(self.manifest.findings)
        if known != findings:
            raise LearnerError(f"parent {self.manifest.parent} knows {known}, this round {findings}; start from null")
        return tensors, header["recipe"]["serve"] + "."

    def from_student(self, earlier: State) -> Callable[[State], None]:
        """Both networks := an earlier phase's student; optimiser, schedules and centres start anew."""

        def start(state: State) -> None:
            state.student.load_state_dict(earlier.student.state_dict())
            state.teacher.load_state_dict(earlier.student.state_dict())
            state.micro = earlier.micro

        return start

    # -- images

    def labelled_feed(
        self, name: str, local_views: int = 0, fixed_order: bool = False, labels: Tensor | None = None
    ) -> ImageFeed | TokenFeed:
        """The labelled train images, every one in each pass; by default the two global views only."""
        if not self.manifest.labelled:
            raise ManifestError("manifest: no labelled train image and no parent: a first round needs labels")
        return self.feed(self.manifest.labelled, name, local_views, fixed_order, labels)

    def unlabelled_feed(self, labels: Tensor | None = None) -> ImageFeed | TokenFeed:
        """All train images with all views; `labels` are targets of a recipe's own."""
        return self.feed(self.manifest.unlabelled, "unlabelled", self.recipe.local_views, False, labels)

    def feed(
        self, samples: Sequence[Sample], name: str, local_views: int, fixed_order: bool, labels: Tensor | None = None
    ) -> ImageFeed | TokenFeed:
        recipe = replace(self.recipe, local_views=local_views)
        if self.recipe.frozen_blocks:
            return TokenFeed(ImageFeed(samples, recipe, self.device, name, fixed_order, labels), self.token_bank)
        train, size = self.manifest.of("train"), recipe.image_size
        fits = all(f.range == "train" for f in samples) and distributed.on_rank_zero(
            lambda: open_packed_plates(self.manifest.folder, train, size) is not None
        )
        packed = PackedPlates(self.manifest.folder / "shard", train, size) if fits else None
        return ImageFeed(samples, recipe, self.device, name, fixed_order, labels, packed)

    @property
    def token_bank(self) -> TokenBank:
        """Tokens of all images after the frozen blocks, which no phase changes."""
        alone = distributed.world_size() == 1  # opened so, by rank 0 within `by_first`, it isn't yet open for all
        if alone not in self.token_banks:
            distributed.on_rank_zero(self._fill_token_bank)
            self.token_banks[alone] = TokenBank(self.manifest.folder / "tokens", self.manifest.samples)
        return self.token_banks[alone]

    def _fill_token_bank(self) -> None:
        state = self.new_state("tokens", make_schedule(self.recipe, 1, 1, self.recipe.lr, 1))
        self.from_backbone(state) if self.is_first_round else self.from_parent(state)
        samples = self.manifest.samples

        def feed(recipe: Recipe, name: str) -> ImageFeed:
            return ImageFeed(samples, recipe, self.device, name, fixed_order=True)

        lower, said = cast(Backbone, state.student.backbone), partial(self.progress.write_progress_or_pause, "tokens")
        open_token_bank(
            self.manifest.folder, samples, self.recipe, lower, feed, self.dtype, str(self.manifest.parent), said
        )

    @torch.no_grad()
    def embeddings(self, network: Network, samples: Sequence[Sample]) -> Tensor:
        """Embeddings (N, D) of images without noise, float32 on the host, by a network in eval mode."""
        feed, rows = self.feed(samples, "plain", 0, True), []
        was = network.training
        network.eval()
        for low in range(0, len(samples), SCORING_BATCH):
            images = feed.unaugmented(np.arange(low, min(low + SCORING_BATCH, len(samples))))
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                rows.append(network.backbone(images).float().cpu())
            self.progress.raise_if_paused()
        network.train(was)
        require_finite("embeddings of the images", rows)
        return torch.cat(rows)

    def schedule(self, feed: ImageFeed | TokenFeed, epochs: int, peak: float, least_steps: int = 0) -> Schedule:
        """Whole passes over a feed, at least `epochs` and `least_steps`."""
        return make_schedule(self.recipe, max(epochs, -(-least_steps // feed.batches)), feed.batches, peak, feed.size)
