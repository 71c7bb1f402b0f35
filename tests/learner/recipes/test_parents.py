"""Rounds of `evolve` that start from a parent: networks, heads and findings without labels."""

import pytest
import torch

from learner.engine.checkpoint import load_network, save_weights
from learner.errors import LearnerError, ManifestError
from learner.recipes import evolve
from learner.round.manifest import load
from learner.training import head_fit
from learner.training.run import Run
from tests.support.learner.round_folders import make, read_manifest, write_manifest

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


@pytest.fixture
def opened(tmp_path):
    """Return a function that opens a round with a parent whose networks differ; `edit` changes the manifest."""
    runs = []

    def open_round(edit=lambda manifest: None, parent=None, **overrides):
        first = Run(load(make(tmp_path / f"first {len(runs)}", **{"lam": 0.0, **(parent or {})})))
        state, generator = (
            first.new_state("evolve", first.schedule(first.unlabelled_feed(), 1, 1e-3)),
            torch.Generator(),
        )
        for number, network in enumerate((state.student, state.teacher)):
            for value in network.parameters():
                torch.nn.init.normal_(value, 0, 0.1, generator=generator.manual_seed(number))
        state_file = tmp_path / f"{len(runs)}.safetensors"
        save_weights(state_file, state, first.plan, first.manifest.findings)
        parent = {"bundle": "abc", "state": str(state_file)}
        folder = make(tmp_path / f"r {len(runs)}", samples={"parent": parent}, **{"lam": 0.0, **overrides})
        manifest = read_manifest(folder)
        edit(manifest)
        write_manifest(folder, manifest)
        runs.extend([first, Run(load(folder))])
        return runs[-1]

    yield open_round
    for run in runs:
        run.progress.close()


def without_labels(manifest):
    for sample in manifest["images"]:
        sample["labels"] = None if sample["range"] == "train" else sample["labels"]


def without_a_positive_mass(manifest):
    for sample in manifest["images"]:
        sample["labels"][1] = None if sample["labels"][1] is None else 0


@pytest.mark.parametrize("refit", ["graph", "linear"])
@pytest.mark.parametrize(("edit", "kept"), [(without_labels, [True, True]), (without_a_positive_mass, [False, True])])
def test_a_finding_without_labels_keeps_the_parents_head(opened, edit, kept, refit):
    run = opened(edit, refit=refit)
    state = evolve.initial_state(run, run.from_parent)
    before = head_fit.head_of(state.student)
    evolve.refit_first_teacher(run, state)
    for network in (state.student, state.teacher):
        after = head_fit.head_of(network)
        same = (after.weight == before.weight).all(1) & (after.bias == before.bias)
        assert same.tolist() == kept


def test_replay_distils_from_the_network_that_the_parent_serves(opened):
    run = opened(replay=0.25)
    table = evolve.pseudo_label_table(run, evolve.initial_state(run, run.from_parent))
    samples = run.manifest.unlabelled
    torch.testing.assert_close(table["champion"], head_fit.logits_of(run, run.champion(), samples))


def test_a_round_after_a_served_teacher_starts_from_it(opened):
    run = opened(parent={"method": "distl", "lam": 0.5, "serve": "teacher"})
    state, served = evolve.initial_state(run, run.from_parent), run.champion().state_dict()
    assert all(torch.equal(value, served[key]) for key, value in state.student.state_dict().items())


def test_frozen_blocks_that_a_parent_trained_are_the_same_in_both_networks(opened):
    run = opened(parent={"arch": "vit_tiny_patch8_depth2"}, frozen_blocks=1)
    state = evolve.initial_state(run, run.from_parent)
    images = torch.randn(2, 1, 32, 32)
    lower = [network.backbone.lower(images) for network in (state.student, state.teacher)]
    assert torch.equal(*lower)


@pytest.mark.parametrize("targets", ["graph", "none"])
def test_other_targets_than_teacher_without_labels_are_rejected(opened, targets):
    run = opened(without_labels, targets=targets)
    with pytest.raises(ManifestError, match='or set targets = "teacher"'):
        evolve.train(run)


CLASS_LOSS_ONLY = {"prototypes": 0, "local_views": 0, "freeze_last": 0}  # a network of `kd` or `pseudo-label`


@pytest.mark.parametrize(
    ("parent", "child", "new_parts"),
    [
        (CLASS_LOSS_ONLY, {"lam": 1.0}, ["head."]),
        ({}, {"lam": 1.0, "ibot": 1.0}, ["mask", "patch_head."]),
        (CLASS_LOSS_ONLY, {"lam": 1.0, "ibot": 1.0}, ["head.", "mask", "patch_head."]),
    ],
)
def test_a_head_that_the_parent_lacks_is_new_and_equal_in_both_networks(opened, parent, child, new_parts):
    run = opened(parent=parent, **child)
    state = run.new_state("evolve", run.schedule(run.unlabelled_feed(), 1, 1e-3))
    fresh = {name: value.clone() for name, value in state.student.state_dict().items()}
    run.from_parent(state)
    student, teacher = state.student.state_dict(), state.teacher.state_dict()
    for name, value in student.items():
        is_new = name.startswith(tuple(new_parts))
        assert torch.equal(value, fresh[name]) is is_new, name
        assert not is_new or torch.equal(value, teacher[name]), name


def test_a_parent_without_class_head_is_rejected(opened):
    run = opened()
    tensors = {name: value for name, value in run._parent()[0].items() if "cls_head" not in name}
    with pytest.raises(LearnerError, match=r"student\.cls_head\.mlp\.0\.weight is missing"):
        load_network(run.new_network(), tensors, "student.")
