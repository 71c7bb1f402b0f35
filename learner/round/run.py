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
from learner.data.packed_plates import Shard, open_shard
from learner.data.token_bank import Bank, TokenFeed, open_bank
from learner.engine import distributed
from learner.engine.checkpoint import (
    CheckpointError,
    load_network,
    load_state,
    load_weights,
    read_file,
    read_header,
    save_state,
    save_weights,
    write_file,
)
from learner.engine.device import prepare
from learner.engine.init_weights import freeze_alike, from_weights, shaped_like
from learner.engine.optim import Schedule, make_optimiser, make_schedule
from learner.engine.progress import Paused, Teller
from learner.engine.step import Losses, State, Tick, must_be_numbers, walk
from learner.networks.backbone import Backbone, BackboneError, Plan, build, fit_sizes, open_backbone
from learner.networks.heads import Network, make_network
from learner.objectives.centring import make_centres
from learner.round.export import write_parts
from learner.round.manifest import ManifestError, RoundManifest, Sample
from learner.round.recipe import Recipe

SCORED = 64  # images in one pass when only looked at


class Run:
    """What a recipe works with: the round, its recipe at sizes that fit the network, and the phases."""

    def __init__(self, round_: RoundManifest) -> None:
        """Open the checkpoint, else the parent, else a backbone; raises a refusal (see `__main__`)."""
        self.round, self.checkpoint = round_, round_.folder / "checkpoint"
        if distributed.is_first():
            self.checkpoint.mkdir(exist_ok=True)
        self.device, self.dtype = prepare(round_.recipe)
        self.weights: dict[str, Tensor] | None = None
        self.banks: dict[bool, Bank] = {}
        self.notes: list[str] = []  # of the phases so far
        self.header = self._open_checkpoint()
        if self.header:
            self.plan = self.header["plan"]
        elif round_.parent_state:
            self.plan = read_header(round_.parent_state, "plan")["plan"]
        else:
            self.plan, self.weights = open_backbone(round_.recipe)
        recipe = round_.recipe
        if round_.parent_state:
            recipe = shaped_like(recipe, read_header(round_.parent_state, "recipe")["recipe"])
        self.recipe = fit_sizes(recipe, build(self.plan))
        spent, kept = (self.header["seconds"], self.header["metrics_bytes"]) if self.header else (0.0, 0)
        self.teller = Teller(round_.folder, round_.until, spent, kept)

    @property
    def first(self) -> bool:
        """No parent: the round begins with T=0."""
        return self.round.parent is None

    def _open_checkpoint(self) -> dict | None:
        saved = self.checkpoint / "state.safetensors"
        if not saved.exists():
            return None
        header = read_header(saved, "fingerprint", "plan", "cursor")
        if header["fingerprint"] != self.round.fingerprint:
            raise CheckpointError(f"{saved} belongs to another manifest; remove it, or plan a new round")
        return header

    # -- phases

    def train(
        self, phase: str, schedule: Schedule, start: Callable[[State], None], tick: Tick, plan: Plan | None = None
    ) -> State:
        """The state at the end of a phase: trained now, from where a crash or pause left it, or read when it is over."""
        over, saved = self.checkpoint / f"{phase}.safetensors", self.checkpoint / "state.safetensors"
        state = self.state(phase, schedule, plan)
        if distributed.by_first(over.exists):
            load_weights(over, state)
            state.step, self.notes = schedule.steps, state.notes
            return state
        if self.header and self.header["cursor"]["phase"] == phase:
            load_state(saved, state)
        else:
            start(state)
            state.notes = [*self.notes]
        distributed.same(
            value for part in (state.student, state.teacher, state.centres) for value in part.state_dict().values()
        )
        self._follow(state, tick)
        must_be_numbers(f"weights of the student after {phase}", state.student.parameters())
        if distributed.is_first():
            save_weights(over, state, plan or self.plan, self.round.findings)
        self.notes = state.notes
        return state

    def state(self, phase: str, schedule: Schedule, plan: Plan | None = None) -> State:
        """Fresh networks, of another plan than the round's if one is given, and optimiser; random weights from the seed."""
        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        student = self.network(recipe.drop_path, plan)
        teacher = self.network(plan=plan).requires_grad_(False)
        centres = make_centres(recipe, len(self.round.findings))
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        optimiser = make_optimiser(student)
        return State(
            student, teacher, optimiser, schedule, recipe, scaler, centres.to(self.device),
            dtype=self.dtype, phase=phase, micro=recipe.micro_batch,
        )  # fmt: skip

    def network(self, drop_path: float = 0.0, plan: Plan | None = None) -> Network:
        """One network of this round's plan or another, on its device; random weights from torch's generator."""
        return make_network(plan or self.plan, self.recipe, len(self.round.findings), drop_path).to(self.device)

    def _follow(self, state: State, tick: Tick) -> None:
        """Walk to the end of the phase, telling every step, saving at intervals and before a pause."""
        saved_at = time.monotonic()

        def after(losses: Losses) -> None:
            nonlocal saved_at
            self.teller.step(state, losses)
            self.teller.check()
            if time.monotonic() - saved_at >= state.recipe.checkpoint_seconds:
                self._keep(state)
                saved_at = time.monotonic()

        try:
            self.teller.check()
            walk(state, tick, after)
        except Paused:  # raised between two steps only: the state is whole
            self._keep(state)
            raise
        self._keep(state)

    def _keep(self, state: State) -> None:
        """The checkpoint: every rank stands where rank 0 does, and reads this file to go on."""
        if not distributed.is_first():
            return
        header = {"plan": self.plan, "recipe": state.recipe.to_dict(), "fingerprint": self.round.fingerprint}
        header |= {"metrics_bytes": self.teller.flush(), "seconds": self.teller.seconds}
        save_state(self.checkpoint / "state.safetensors", state, header)

    def once(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that are computed once a round, on rank 0, and then read: `checkpoint/NAME.safetensors`."""
        path = self.checkpoint / f"{name}.safetensors"

        def write() -> None:
            if not path.exists():
                self.teller.say(name, 0, 1)
                write_file(path, compute(), {})
                self.teller.say(name, 1, 1)

        distributed.by_first(write)
        return {key: value.to(self.device) for key, value in read_file(path)[0].items()}

    def export(self, name: str, state: State, serve: str, chosen: str | None = None, plan: Plan | None = None) -> None:
        """Measure and write a bundle's parts as a folder, unless an earlier process did; `chosen` names a candidate."""
        target = self.round.folder / name

        def write() -> None:
            if not target.exists():
                self.teller.say(f"export {name}", 0, 1)
                write_parts(target, state, plan or self.plan, self.round, datetime.now(UTC), serve, chosen)
                self.teller.say(f"export {name}", 1, 1)

        distributed.by_first(write)

    # -- where networks begin

    from_weights = staticmethod(from_weights)

    def from_backbone(self, state: State) -> None:
        """Student := the pretrained backbone, else shaped or plain random weights; the teacher copies it.

        Raises BackboneError when a parent's network is another than the backbone of the recipe.
        """
        if self.weights is None and (self.header or self.round.parent):  # opened are a checkpoint or a parent
            plan, self.weights = open_backbone(self.round.recipe)
            if plan != self.plan:
                raise BackboneError(
                    f"the parent is {self.plan}, the backbone {plan}; give the one the parent began with"
                )
        self.from_weights(self.weights)(state)

    def from_parent(self, state: State) -> None:
        """Student := what the parent serves, in `distl` its student; teacher := its teacher; raises CheckpointError."""
        state.teacher.load_state_dict(state.student.state_dict())  # a head that the parent hasn't begins alike
        tensors, served = self._parent()
        load_network(state.student, tensors, "student." if self.recipe.method == "distl" else served)
        load_network(state.teacher, tensors, "teacher.")
        freeze_alike(state)

    def champion(self) -> Network:
        """The network that the parent serves; raises CheckpointError."""
        tensors, served = self._parent()
        network = self.network()
        load_network(network, tensors, served)
        return network

    def _parent(self) -> tuple[dict[str, Tensor], str]:
        assert self.round.parent_state
        tensors, header = read_file(self.round.parent_state)
        known, findings = header.get("findings"), list(self.round.findings)
        if known != findings:
            raise CheckpointError(f"parent {self.round.parent} knows {known}, this round {findings}; start from null")
        return tensors, header["recipe"]["serve"] + "."

    def from_student(self, earlier: State) -> Callable[[State], None]:
        """Both networks := an earlier phase's student; optimiser, schedules and centres start anew."""

        def start(state: State) -> None:
            state.student.load_state_dict(earlier.student.state_dict())
            state.teacher.load_state_dict(earlier.student.state_dict())
            state.micro = earlier.micro

        return start

    # -- images

    def labelled(
        self, name: str, local_views: int = 0, fixed_order: bool = False, labels: Tensor | None = None
    ) -> ImageFeed | TokenFeed:
        """The labelled train images, every one in each pass; by default the two global views only."""
        if not self.round.labelled:
            raise ManifestError("manifest: no labelled train image and no parent: a first round needs labels")
        return self.feed(self.round.labelled, name, local_views, fixed_order, labels)

    def unlabelled(self, labels: Tensor | None = None) -> ImageFeed | TokenFeed:
        """All train images with all views; `labels` are targets of a recipe's own."""
        return self.feed(self.round.unlabelled, "unlabelled", self.recipe.local_views, False, labels)

    def feed(
        self, samples: Sequence[Sample], name: str, local_views: int, fixed_order: bool, labels: Tensor | None = None
    ) -> ImageFeed | TokenFeed:
        recipe = replace(self.recipe, local_views=local_views)
        if self.recipe.frozen_blocks:
            return TokenFeed(ImageFeed(samples, recipe, self.device, name, fixed_order, labels), self.bank)
        train, size = self.round.of("train"), recipe.image_size
        packed = all(f.range == "train" for f in samples) and distributed.by_first(
            lambda: open_shard(self.round.folder, train, size) is not None
        )
        shard = Shard(self.round.folder / "shard", train, size) if packed else None
        return ImageFeed(samples, recipe, self.device, name, fixed_order, labels, shard)

    @property
    def bank(self) -> Bank:
        """Tokens of all images after the frozen blocks, which no phase changes."""
        alone = distributed.world() == 1  # opened so, by rank 0 within `by_first`, it isn't yet open for all
        if alone not in self.banks:
            distributed.by_first(self._fill_bank)
            self.banks[alone] = Bank(self.round.folder / "tokens", self.round.samples)
        return self.banks[alone]

    def _fill_bank(self) -> None:
        state = self.state("tokens", make_schedule(self.recipe, 1, 1, self.recipe.lr, 1))
        self.from_backbone(state) if self.first else self.from_parent(state)
        samples = self.round.samples

        def feed(recipe: Recipe, name: str) -> ImageFeed:
            return ImageFeed(samples, recipe, self.device, name, fixed_order=True)

        lower, said = cast(Backbone, state.student.backbone), partial(self.teller.between, "tokens")
        open_bank(self.round.folder, samples, self.recipe, lower, feed, self.dtype, str(self.round.parent), said)

    @torch.no_grad()
    def embeddings(self, network: Network, samples: Sequence[Sample]) -> Tensor:
        """Embeddings (N, D) of images without noise, float32 on the host, by a network in eval mode."""
        feed, rows = self.feed(samples, "plain", 0, True), []
        was = network.training
        network.eval()
        for low in range(0, len(samples), SCORED):
            images = feed.originals(np.arange(low, min(low + SCORED, len(samples))))
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                rows.append(network.backbone(images).float().cpu())
            self.teller.check()
        network.train(was)
        must_be_numbers("embeddings of the images", rows)
        return torch.cat(rows)

    def schedule(self, feed: ImageFeed | TokenFeed, epochs: int, peak: float, least_steps: int = 0) -> Schedule:
        """Whole passes over a feed, at least `epochs` and `least_steps`."""
        return make_schedule(self.recipe, max(epochs, -(-least_steps // feed.batches)), feed.batches, peak, feed.size)
