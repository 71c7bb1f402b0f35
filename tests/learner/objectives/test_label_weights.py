"""Weights of labels: unknown labels have none, rare classes more; from train labels only."""

import pytest
import torch

from learner.data.plates import label_table
from learner.errors import RecipeError
from learner.fits import logistic
from learner.objectives.class_losses import class_balance, label_loss, weight_table
from learner.objectives.dino import correction
from learner.objectives.distl_steps import supervised_step
from learner.objectives.teacher_student import label_objective
from learner.recipes.kd import kd_objective
from learner.round.manifest import load
from learner.round.recipe import resolve
from learner.training import head_fit
from learner.training.run import Run
from learner.training.supervised import label_balance
from tests.support.learner.recipe_rounds import opened
from tests.support.learner.round_folders import read_manifest, write_manifest
from tests.support.learner.tiny_states import make_batch, make_state

torch.set_num_threads(1)

UNKNOWN = float("nan")
RARE = torch.tensor([[1.0, 0.0, 1.0, UNKNOWN]] + [[0.0, 0.0, 1.0, UNKNOWN]] * 8 + [[UNKNOWN, 0.0, 1.0, UNKNOWN]] * 3)
SOME = torch.tensor([[1.0, UNKNOWN], [0.0, 1.0], [UNKNOWN, UNKNOWN], [1.0, 1.0]]).double()
BALANCE = {"class_weights": torch.tensor([0.5, 2.0]).double(), "positive_weights": torch.tensor([3.0, 0.1]).double()}
OBJECTIVES = {
    "t0, pseudo-label": lambda state, balance: correction(0.0, 1.0, balance),
    "distl": lambda state, balance: correction(0.5, 0.5, balance),
    "evolve, pretrain": lambda state, balance: label_objective(balance),
    "kd": lambda state, balance: kd_objective(state.teacher, 1.0, balance),
}


@pytest.mark.parametrize("balance", [{}, BALANCE], ids=["alike", "weighed"])
@pytest.mark.parametrize("recipe", OBJECTIVES)
def test_the_gradient_of_an_unknown_label_is_exactly_zero_in_every_recipe(recipe, balance):
    """At the class logits; kd without its distillation loss, which has a gradient for unknown labels too."""
    state, seen = make_state(kd_alpha=0.0), []

    def watch(_, __, logits):
        logits.retain_grad()
        seen.append(logits)

    state.student.cls_head.register_forward_hook(watch)
    batch = make_batch(labels=SOME)
    OBJECTIVES[recipe](state, balance)(state, batch, slice(0, 4)).loss.backward()
    (logits,) = seen
    slope = logits.grad[-4:]  # of the augmented view, the last that is classified
    assert not slope[SOME.isnan()].any()
    assert slope[~SOME.isnan()].all()
    assert not logits.grad[:-4].any()


def test_gradients_of_known_labels_do_not_depend_on_other_labels():
    logits = torch.randn(4, 2).double().requires_grad_()
    label_loss(logits, SOME).backward()
    torch.testing.assert_close(logits.grad, ((logits.sigmoid() - SOME) / 5).nan_to_num(0.0).detach())


def test_a_rare_positive_weighs_more_and_its_finding_as_before():
    balance = class_balance(RARE)
    rare = (1 - 0.999**8) / (1 - 0.999)  # over 1 positive
    torch.testing.assert_close(balance["positive_weights"][0], torch.tensor(rare).float())
    weights = weight_table(RARE, balance)
    assert weights[0, 0] == pytest.approx(rare * float(weights[1, 0]))
    torch.testing.assert_close((weights * ~RARE.isnan()).sum(0), (~RARE.isnan()).sum(0).float())


@pytest.mark.parametrize("finding", [1, 2, 3], ids=["no positive", "no negative", "nobody labelled it"])
def test_a_finding_with_one_class_keeps_equal_weights(finding):
    labels, logits = RARE[:, [finding]], torch.linspace(-2, 2, 12)[:, None]
    plain, weighed = label_loss(logits, labels), label_loss(logits, labels, **class_balance(labels))
    torch.testing.assert_close(weighed, plain)


def test_the_loss_equals_that_of_the_weight_table():
    logits, balance = torch.randn(12, 4), class_balance(RARE)
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, RARE.nan_to_num(0), reduction="none")
    known = ~RARE.isnan()
    expected = (each * weight_table(RARE, balance) * known).sum() / known.sum()
    torch.testing.assert_close(label_loss(logits, RARE, **balance), expected)
    assert weight_table(RARE, {}) is None


def test_weights_come_from_train_labels_only(tmp_path):
    first = opened(tmp_path / "one", balance="effective", method="evolve")
    mine = label_balance(first)
    manifest = read_manifest(first.manifest.folder)
    for sample in manifest["images"]:
        if sample["range"] != "train":
            sample["labels"] = [1, 1]
    opened(tmp_path / "other").progress.close()
    write_manifest(tmp_path / "other", manifest | {"seed": 4})
    second = Run(load(tmp_path / "other"))
    assert any(sample.labels == (1, 1) for sample in second.manifest.of("validation"))
    for name, value in label_balance(second).items():
        assert torch.equal(value, mine[name])
    assert {name: value.tolist() for name, value in mine.items()} == {
        name: value.tolist() for name, value in class_balance(label_table(first.manifest.labelled)).items()
    }


def test_a_balanced_step_uses_the_weights(tmp_path):
    run = opened(tmp_path / "r", method="pseudo-label", balance="effective", train=(7, 0))
    feed, losses = run.labelled_feed("t0"), {}
    for kind, balance in {"plain": {}, "balanced": label_balance(run)}.items():
        state = run.new_state("t0", run.schedule(feed, 2, 1e-3))
        state.student.eval()
        losses[kind] = supervised_step(state, feed, balance)["classes"]
        batch = feed.batch(0, 0)
        with torch.no_grad():
            fresh = run.new_state("t0", run.schedule(feed, 2, 1e-3)).student.eval()
            expected = label_loss(fresh.classify(batch.views(slice(0, batch.size))[1]), batch.labels, **balance)
        assert losses[kind] == pytest.approx(expected.item(), rel=1e-5)
    assert losses["plain"] != pytest.approx(losses["balanced"], rel=1e-6)
    run.progress.close()


def test_the_first_class_head_of_evolve_is_fitted_with_the_weights(tmp_path, monkeypatch):
    run = opened(tmp_path / "r", method="evolve", class_hidden=0, balance="effective")
    fit, calls = logistic.fit, []
    monkeypatch.setattr(head_fit.logistic, "fit", lambda *arguments: calls.append(arguments) or fit(*arguments))
    head_fit.fit_head(run, run.new_network())
    labels = label_table(run.manifest.labelled)
    torch.testing.assert_close(calls[0][3], weight_table(labels, class_balance(labels)))
    run.progress.close()


def test_each_recipe_has_its_balance():
    balances = {name: resolve(name, "cpu").balance for name in ("distl", "evolve", "pseudo-label", "kd", "pretrain")}
    assert balances == {name: "effective" if name in ("pseudo-label", "kd") else "none" for name in balances}
    with pytest.raises(RecipeError, match="as published"):
        resolve("distl", "cpu", {"balance": "effective"})
