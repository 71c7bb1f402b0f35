"""The run of a round: phases that resume from the checkpoint, their initial weights, feeds, and exports.

A recipe is a sequence of `train_phase` and `export` calls. Each returns at once where an earlier process has finished it,
so running the recipe again resumes the round. The recipe passes the function that makes a step.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import cast

import numpy as np
import torch
from torch import Tensor

from learner.data.feed import ImageFeed
from learner.data.packed_plates import PackedPlates, open_packed_plates
from learner.data.token_bank import TokenBank, TokenFeed, open_token_bank
from learner.engine import checkpoint, distributed
from learner.engine.device import prepare_device
from learner.engine.init_weights import copy_frozen_weights, from_weights
from learner.engine.optim import Schedule, make_optimiser, make_schedule
from learner.engine.progress import ProgressWriter
from learner.engine.step import Losses, State, StepFunction, require_finite, run_steps
from learner.errors import LearnerError, ManifestError, Paused
from learner.networks.architecture import Plan
from learner.networks.backbone import Backbone, build, fit_sizes
from learner.networks.blend import Blend, read_blend
from learner.networks.heads import Network, make_network
from learner.objectives.centring import make_centres
from learner.round.manifest import RoundManifest, Sample
from learner.round.recipe import Recipe
from learner.training.export import write_parts
from learner.training.start import find_start, open_same_backbone

Start = Callable[[State], None]  # sets the initial weights of a phase
SCORING_BATCH = 64  # images in one forward pass without gradients


class Run:
    """One learner process on a round: manifest, recipe with sizes that fit the network, and the phases."""

    def __init__(self, manifest: RoundManifest) -> None:
        """Read the plan from the checkpoint, else from the parent, else from the backbone. Raises LearnerError."""
        self.manifest, self.checkpoint_folder = manifest, manifest.folder / "checkpoint"
        if distributed.is_rank_zero():
            self.checkpoint_folder.mkdir(exist_ok=True)
        self.device, self.dtype = prepare_device(manifest.recipe)
        self.token_banks: dict[bool, TokenBank] = {}
        self.notes = list(manifest.notes)  # and those of the phases so far
        self.header = self._open_checkpoint()
        start = find_start(manifest, self.header)
        self.plan, self.weights = start.plan, start.weights
        self.recipe = fit_sizes(start.recipe, build(self.plan))
        spent, kept = (self.header["seconds"], self.header["metrics_bytes"]) if self.header else (0.0, 0)
        self.progress = ProgressWriter(manifest.folder, manifest.until, spent, kept)

    @property
    def is_first_round(self) -> bool:
        """Whether the round has no parent; it then starts with T=0."""
        return self.manifest.parent is None

    def _open_checkpoint(self) -> dict | None:
        """Return the header of the checkpoint, None without one. Raises LearnerError for that of another manifest."""
        saved = self.checkpoint_folder / "state.safetensors"
        if not saved.exists():
            return None
        header = checkpoint.read_header(saved, "fingerprint", "plan", "cursor")
        if header["fingerprint"] != self.manifest.fingerprint:
            raise LearnerError(f"{saved} belongs to another manifest; remove it, or plan a new round")
        return header

    # -- phases

    def train_phase(
        self, phase: str, schedule: Schedule, start: Start, step: StepFunction, plan: Plan | None = None
    ) -> State:
        """Return the state at the end of a phase: read if it is finished, resumed from a checkpoint, or started.

        `start` sets the initial weights; `plan` is that of another network than the round's.
        """
        finished, saved = self.checkpoint_folder / f"{phase}.safetensors", self.checkpoint_folder / "state.safetensors"
        state = self.new_state(phase, schedule, plan)
        if distributed.on_rank_zero(finished.exists):
            checkpoint.load_weights(finished, state)
            state.step, self.notes = schedule.steps, state.notes
            return state
        if self.header and self.header["cursor"]["phase"] == phase:
            checkpoint.load_state(saved, state)
        else:
            start(state)
            state.notes = [*self.notes]
        distributed.broadcast(
            value for part in (state.student, state.teacher, state.centres) for value in part.state_dict().values()
        )
        self._run_phase(state, step)
        require_finite(f"weights of the student after {phase}", state.student.parameters())
        if distributed.is_rank_zero():
            checkpoint.save_weights(finished, state, plan or self.plan, self.manifest.findings)
        self.notes = state.notes
        return state

    def new_state(self, phase: str, schedule: Schedule, plan: Plan | None = None) -> State:
        """Return a state with new networks, random weights from the seed, of `plan` or the round's plan."""
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
        """Return a network of `plan` or the round's plan on the device, random weights from torch's generator."""
        return make_network(plan or self.plan, self.recipe, len(self.manifest.findings), drop_path).to(self.device)

    def _run_phase(self, state: State, step: StepFunction) -> None:
        """Run the steps to the end of the phase; write progress, and checkpoints at intervals and before a pause."""
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
            run_steps(state, step, after)
        except Paused:  # raised only between two steps: the state is complete
            self._save_checkpoint(state)
            raise
        self._save_checkpoint(state)

    def _save_checkpoint(self, state: State) -> None:
        """Write the checkpoint on rank 0; all ranks have the same state and resume from this file."""
        if not distributed.is_rank_zero():
            return
        header = {"plan": self.plan, "recipe": state.recipe.to_dict(), "fingerprint": self.manifest.fingerprint}
        header |= {"metrics_bytes": self.progress.flush(), "seconds": self.progress.seconds}
        checkpoint.save_state(self.checkpoint_folder / "state.safetensors", state, header)

    def compute_once(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return tensors that rank 0 computes once in a round and saves as `checkpoint/NAME.safetensors`."""
        path = self.checkpoint_folder / f"{name}.safetensors"

        def write() -> None:
            if not path.exists():
                self.progress.write_progress(name, 0, 1)
                checkpoint.write_file(path, compute(), {})
                self.progress.write_progress(name, 1, 1)

        distributed.on_rank_zero(write)
        return {key: value.to(self.device) for key, value in checkpoint.read_file(path)[0].items()}

    def export(self, name: str, state: State, serve: str, chosen: str | None = None, plan: Plan | None = None) -> None:
        """Write the parts of a bundle to the folder `name`, unless it exists; `chosen`: name of the candidate, for the card."""
        target = self.manifest.folder / name

        def write() -> None:
            if not target.exists():
                self.progress.write_progress(f"export {name}", 0, 1)
                write_parts(target, state, plan or self.plan, self.manifest, datetime.now(UTC), serve, chosen)
                self.progress.write_progress(f"export {name}", 1, 1)

        distributed.on_rank_zero(write)

    # -- initial weights

    from_weights = staticmethod(from_weights)

    def from_backbone(self, state: State) -> None:
        """Load the recipe's backbone into both networks. Raises LearnerError where the parent has another network."""
        if self.weights is None and (self.header or self.manifest.parent):  # the plan came from one of them
            self.weights = open_same_backbone(self.manifest, self.plan)
        self.from_weights(self.weights)(state)

    def from_parent(self, state: State) -> None:
        """Load the parent's served network (for `distl` its student) and its teacher. Raises LearnerError."""
        state.teacher.load_state_dict(state.student.state_dict())  # heads that the parent lacks are then equal in both
        tensors, served = self._parent()
        checkpoint.load_network(state.student, tensors, "student." if self.recipe.method == "distl" else served)
        checkpoint.load_network(state.teacher, tensors, "teacher.")
        copy_frozen_weights(state)

    def champion(self) -> Network:
        """Return the network that the parent serves. Raises LearnerError."""
        tensors, served = self._parent()
        network = self.new_network()
        checkpoint.load_network(network, tensors, served)
        return network

    def parent_blend(self) -> Blend | None:
        """Return the blend that the parent serves, None where it serves its network alone. Raises LearnerError."""
        extra = {k.removeprefix("extra."): v for k, v in self._parent()[0].items() if k.startswith("extra.")}
        return read_blend(extra)

    def _parent(self) -> tuple[dict[str, Tensor], str]:
        """Return the parent's tensors and the prefix of its served network. Raises LearnerError for other findings."""
        assert self.manifest.parent_state
        tensors, header = checkpoint.read_file(self.manifest.parent_state)
        known, findings = header.get("findings"), list(self.manifest.findings)
        if known != findings:
            raise LearnerError(
                f"parent {self.manifest.parent} has findings {known}, this round {findings}; start without parent"
            )
        return tensors, header["recipe"]["serve"] + "."

    def from_student(self, earlier: State) -> Start:
        """Return a function that loads an earlier phase's student into both networks."""

        def start(state: State) -> None:
            state.student.load_state_dict(earlier.student.state_dict())
            state.teacher.load_state_dict(earlier.student.state_dict())
            state.micro = earlier.micro

        return start

    # -- feeds

    def labelled_feed(
        self, name: str, local_views: int = 0, fixed_order: bool = False, labels: Tensor | None = None
    ) -> ImageFeed | TokenFeed:
        """Return a feed of the labelled train images, all in each epoch; by default with the two global views only."""
        if not self.manifest.labelled:
            raise ManifestError("manifest: no labelled train image and no parent: a first round needs labels")
        return self.feed(self.manifest.labelled, name, local_views, fixed_order, labels)

    def unlabelled_feed(self, labels: Tensor | None = None) -> ImageFeed | TokenFeed:
        """Return a feed of all train images with all views; `labels`: targets (N, F) in place of the samples' labels."""
        return self.feed(self.manifest.unlabelled, "unlabelled", self.recipe.local_views, False, labels)

    def feed(
        self, samples: Sequence[Sample], name: str, local_views: int, fixed_order: bool, labels: Tensor | None = None
    ) -> ImageFeed | TokenFeed:
        """Return a feed of samples; see `ImageFeed`."""
        recipe = replace(self.recipe, local_views=local_views)
        if self.recipe.frozen_blocks:
            return TokenFeed(ImageFeed(samples, recipe, self.device, name, fixed_order, labels), self.token_bank)
        train, size = self.manifest.of("train"), recipe.image_size
        fits = all(sample.range == "train" for sample in samples) and distributed.on_rank_zero(
            lambda: open_packed_plates(self.manifest.folder, train, size, self.progress.reporter("plates")) is not None
        )
        packed = PackedPlates(self.manifest.folder / "shard", train, size) if fits else None
        return ImageFeed(samples, recipe, self.device, name, fixed_order, labels, packed)

    @property
    def token_bank(self) -> TokenBank:
        """The tokens of all images behind the frozen blocks, which no phase changes."""
        alone = distributed.world_size() == 1  # True within `on_rank_zero`: then the other ranks do not have it yet
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

        lower = cast(Backbone, state.student.backbone)
        folder, parent = self.manifest.folder, str(self.manifest.parent)
        open_token_bank(folder, samples, self.recipe, lower, feed, self.dtype, parent, self.progress.reporter("tokens"))

    @torch.no_grad()
    def embeddings(self, network: Network, samples: Sequence[Sample]) -> Tensor:
        """Return the network's embeddings (N, D) of unaugmented images in eval mode, float32 in host memory."""
        feed, rows = self.feed(samples, "plain", 0, True), []
        was_training = network.training
        network.eval()
        for low in range(0, len(samples), SCORING_BATCH):
            images = feed.unaugmented(np.arange(low, min(low + SCORING_BATCH, len(samples))))
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                rows.append(network.backbone(images).float().cpu())
            self.progress.raise_if_paused()
        network.train(was_training)
        require_finite("embeddings of the images", rows)
        return torch.cat(rows)

    def schedule(self, feed: ImageFeed | TokenFeed, epochs: int, peak: float, least_steps: int = 0) -> Schedule:
        """Return the schedules for whole epochs of a feed: at least `epochs`, and at least `least_steps` steps."""
        return make_schedule(self.recipe, max(epochs, -(-least_steps // feed.batches)), feed.batches, peak, feed.size)
