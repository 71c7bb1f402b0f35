"""Properties of losses, averages, targets and distillation for any input; each test has a mutation that it detects."""

from math import log, sqrt

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from learner.engine import weight_averaging
from learner.objectives import class_losses, knowledge_distillation, pseudo_targets, self_supervised
from learner.objectives.dino import DinoLoss
from tests.support.learner.golden_vectors import close

torch.set_num_threads(1)  # tiny tensors: a second thread only slows them down

# no shrinking: each mutation is detected at its first example
few = settings(max_examples=20, derandomize=True, deadline=None, database=None, phases=(Phase.generate,))
small, numbers, share, seeds = st.integers(2, 9), st.floats(-5, 5), st.floats(0.01, 0.99), st.integers(0, 2**31)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shuffled(seed, samples):
    """Return scores without ties."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).double()


def dino_of(prototypes):
    return DinoLoss(prototypes, 0.1, 0.04, 0.9).double()


def linear(seed):
    """Return a network with a buffer."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).double()
    for i, tensor in enumerate([*network.parameters(), network[1].running_mean]):
        tensor.detach().copy_(normal(seed + i, *tensor.shape))
    return network


@few
@given(small, small, small, numbers, numbers)
def test_constant_logits_have_loss_ln_k(samples, views, prototypes, student, teacher):
    flat = torch.ones(views * samples, prototypes).double()
    close(dino_of(prototypes)(student * flat, teacher * flat[: 2 * samples]), log(prototypes))


@few
@given(seeds, small, small)
def test_shifting_teacher_and_centre_does_not_change_the_loss(seed, samples, prototypes):
    student, teacher = normal(seed, 3 * samples, prototypes), normal(seed + 1, 2 * samples, prototypes)
    shift, plain, moved = 5 * normal(seed + 2, 1, prototypes), dino_of(prototypes), dino_of(prototypes)
    moved.centre += shift
    close(moved(student, teacher + shift), plain(student, teacher))


@few
@given(seeds, st.permutations(range(2, 6)))
def test_all_pairs_of_different_views_have_equal_weight(seed, order):
    student, teacher = normal(seed, 6, 3, 8), normal(seed + 1, 2, 3, 8)
    loss = dino_of(8)(student.flatten(0, 1), teacher.flatten(0, 1))
    pairs = [(g, v) for g in range(2) for v in range(6) if g != v]
    assert len(pairs) == 2 * 6 - 2
    each = [((teacher[g] / 0.04).softmax(1) * (student[v] / 0.1).log_softmax(1)).sum(1).mean() for g, v in pairs]
    close(loss, -sum(each) / len(pairs))
    close(dino_of(8)(student[[0, 1, *order]].flatten(0, 1), teacher.flatten(0, 1)), loss)


@few
@given(seeds, st.integers(1, 30))
def test_centres_approach_a_constant_mean_geometrically(seed, steps):
    dino, mean = dino_of(7), normal(seed, 1, 7)
    patches = self_supervised.PatchLoss(7, 0.1, 0.04, 0.9).double()
    for _ in range(steps):
        dino.move(mean)
        patches.move(mean)
    close(dino.centre, (1 - 0.9**steps) * mean)
    close(patches.centre, (1 - 0.9**steps) * mean)


@few
@given(seeds, small, small)
def test_self_training_has_a_gradient_only_for_the_augmented_view(seed, samples, findings):
    student, teacher = normal(seed, 2 * samples, findings).requires_grad_(), normal(seed + 1, samples, findings)
    class_losses.self_training_loss(student[samples:], teacher).backward()
    close(student.grad[samples:], (student[samples:].detach().sigmoid() - teacher.sigmoid()) / (samples * findings))
    assert not student.grad[:samples].any()


@few
@given(seeds, share)
def test_ema_keeps_copies_or_blends(seed, momentum):
    for m in (0.0, momentum, 1.0):
        teacher, student = linear(seed), linear(seed + 10)
        weight_averaging.ema_update_with_buffers(teacher, student, m)
        for ours, old, new in zip(
            teacher.parameters(), linear(seed).parameters(), linear(seed + 10).parameters(), strict=True
        ):
            close(ours.detach(), (m * old + (1 - m) * new).detach())
        assert all(torch.equal(a, b) for a, b in zip(teacher.buffers(), student.buffers(), strict=True))


@few
@given(seeds, small, small)
def test_distillation_at_high_temperature_is_an_eighth_of_the_squared_difference(seed, samples, findings):
    student, teacher = normal(seed, samples, findings), normal(seed + 1, samples, findings)
    close(knowledge_distillation.bernoulli_kl(student, teacher, 1e4), ((student - teacher) ** 2).mean() / 8, rtol=1e-4)
    assert knowledge_distillation.bernoulli_kl(student, student, 2.0) == 0
    assert knowledge_distillation.bernoulli_kl(student, teacher, 2.0) > 0


@few
@given(seeds, small, small)
def test_only_the_softmax_gradient_sums_to_zero_over_findings(seed, samples, findings):
    bernoulli, softmax = (
        normal(seed, samples, findings).requires_grad_(),
        normal(seed, samples, findings).requires_grad_(),
    )
    teacher = bernoulli.detach() + 1  # higher for all findings at once, which a softmax cannot express
    (-(teacher.softmax(1) * softmax.log_softmax(1)).sum(1).mean()).backward()
    close(softmax.grad.sum(1), torch.zeros(samples).double())
    knowledge_distillation.bernoulli_kl(bernoulli, teacher, 2.0).backward()
    assert (bernoulli.grad.sum(1) < 0).all()


@few
@given(seeds, st.integers(2, 300), share, share)
def test_the_kappa_filter_keeps_its_share_for_scores_of_any_scale(seed, samples, ratio, kappa):
    scores = shuffled(seed, samples)
    labels = pseudo_targets.kappa_filter(scores, ratio, kappa)
    kept = int(kappa * ratio * samples) + int(kappa * (1 - ratio) * samples)
    assert abs(int((~labels.isnan()).sum()) - kept) <= 1
    assert abs(int((labels == 1).sum()) - int(kappa * ratio * samples)) <= 1
    stretched = pseudo_targets.kappa_filter((scores / samples) ** 3 - 7, ratio, kappa)
    torch.testing.assert_close(stretched, labels, equal_nan=True)


@few
@given(seeds, small, small)
def test_alignment_to_the_own_mean_is_the_identity(seed, samples, findings):
    logits, mean, prevalence = (
        normal(seed, samples, findings),
        normal(seed, findings).sigmoid(),
        torch.full((findings,), 0.2),
    )
    assert torch.equal(pseudo_targets.align(logits, mean, mean), logits)
    moved = pseudo_targets.align(mean.logit().expand(samples, -1), mean, prevalence.double())
    close(moved.sigmoid(), prevalence.double().expand(samples, -1), rtol=1e-6)


@few
@given(seeds, st.integers(2, 300), share)
def test_kappa_one_labels_every_image_at_the_prevalence(seed, samples, part):
    positives = min(max(1, round(part * samples)), samples - 1)
    scores = torch.stack([shuffled(seed, samples), shuffled(seed + 1, samples)], 1)
    prevalence = torch.tensor([positives, samples - positives]).double() / samples
    labels = pseudo_targets.hard_labels(scores, *pseudo_targets.class_thresholds(scores, prevalence, 1.0))
    assert not labels.isnan().any()
    assert labels.sum(0).tolist() == [positives, samples - positives]


@few
@given(seeds, small, small, share)
def test_sinkhorn_rows_sum_to_one(seed, samples, prototypes, temperature):
    rows = self_supervised.sinkhorn(normal(seed, samples, prototypes), temperature)
    close(rows.sum(1), torch.ones(samples).double())
    columns = self_supervised.sinkhorn(normal(seed, samples, prototypes), 1.0, iterations=200).sum(0)
    close(columns, torch.full((prototypes,), samples / prototypes, dtype=torch.float64), rtol=1e-3)
    flat = self_supervised.sinkhorn(torch.full((samples, prototypes), temperature).double(), temperature)
    close(flat, torch.full((samples, prototypes), 1 / prototypes, dtype=torch.float64))


@few
@given(seeds, small, small)
def test_koleo_of_equal_and_of_orthonormal_rows(seed, samples, width):
    row = normal(seed, 1, width)
    close(self_supervised.koleo(row.expand(2, -1)), -log(1e-8 * sqrt(width) + 1e-8), rtol=1e-3)
    close(self_supervised.koleo(torch.linalg.qr(normal(seed, samples, samples))[0]), -log(sqrt(2)), atol=1e-7)
    assert self_supervised.koleo(row) == 0


@few
@given(seeds, share)
def test_wise_with_share_0_and_1_is_champion_and_candidate(seed, a):
    champion, candidate = linear(seed).state_dict(), linear(seed + 10).state_dict()
    candidate["1.num_batches_tracked"] += 3
    for name in champion:
        assert torch.equal(weight_averaging.wise(champion, candidate, 0.0)[name], champion[name])
        assert torch.equal(weight_averaging.wise(champion, candidate, 1.0)[name], candidate[name])
        if champion[name].is_floating_point():
            close(weight_averaging.wise(champion, candidate, a)[name], torch.lerp(champion[name], candidate[name], a))


def all_pairs(dino, student, teacher, teacher_temp=None):
    seen, views = ((teacher - dino.centre) / dino.teacher_temp).softmax(-1).chunk(2), student.split(len(teacher) // 2)
    terms = [-(t * (v / dino.student_temp).log_softmax(-1)).sum(-1).mean() for t in seen for v in views]
    return torch.stack(terms).mean()


def summed(dino, student, teacher, teacher_temp=None):
    seen, views = ((teacher - dino.centre) / dino.teacher_temp).softmax(-1).chunk(2), student.split(len(teacher) // 2)
    terms = [-(t * (v / dino.student_temp).log_softmax(-1)).sum() for t in seen for v in views]
    return torch.stack(terms).mean()


def without_centre(dino, student, teacher, teacher_temp=None):
    dino.centre.zero_()
    return all_pairs(dino, student, teacher)


def swallow(loss, mean):
    loss.centre.mul_(loss.momentum).add_(mean)


def buffers_forgotten(teacher, student, momentum):
    weight_averaging.ema_update(teacher, student, momentum)


def fixed_cut(scores, ratio, kappa):
    return pseudo_targets.hard_labels(scores, torch.tensor(3.0), torch.tensor(8.0))


def squared(student, teacher, t):
    return ((student - teacher) ** 2).mean()


def centred(student, teacher, t):
    difference = student - teacher
    return ((difference - difference.mean(1, keepdim=True)) ** 2).mean() / 8


def quartiles(scores, prevalence, kappa):
    return scores.quantile(0.25, dim=0), scores.quantile(0.75, dim=0)


def only_columns(logits, temperature, iterations=3):
    return (logits / temperature).softmax(0)


def no_floor(x):
    unit = torch.nn.functional.normalize(x, dim=1)
    return -torch.cdist(unit, unit).fill_diagonal_(9.0).amin(1).log().mean()


MUTATIONS = [
    ("test_constant_logits_have_loss_ln_k", "learner.objectives.dino.DinoLoss.forward", summed),
    ("test_shifting_teacher_and_centre_does_not_change_the_loss", "learner.objectives.dino.DinoLoss.forward", without_centre),
    ("test_all_pairs_of_different_views_have_equal_weight", "learner.objectives.dino.DinoLoss.forward", all_pairs),
    ("test_centres_approach_a_constant_mean_geometrically", "learner.objectives.dino.DinoLoss.move", swallow),
    ("test_centres_approach_a_constant_mean_geometrically", "learner.objectives.self_supervised.PatchLoss.move", swallow),
    ("test_self_training_has_a_gradient_only_for_the_augmented_view", "learner.objectives.class_losses.self_training_loss", lambda student, teacher: (student.sigmoid() - teacher.sigmoid()).square().mean()),
    ("test_ema_keeps_copies_or_blends", "learner.engine.weight_averaging.ema_update_with_buffers", buffers_forgotten),
    ("test_ema_keeps_copies_or_blends", "learner.engine.weight_averaging.ema_update", lambda teacher, student, m: teacher.load_state_dict(student.state_dict())),
    ("test_distillation_at_high_temperature_is_an_eighth_of_the_squared_difference", "learner.objectives.knowledge_distillation.bernoulli_kl", squared),
    ("test_only_the_softmax_gradient_sums_to_zero_over_findings", "learner.objectives.knowledge_distillation.bernoulli_kl", centred),
    ("test_the_kappa_filter_keeps_its_share_for_scores_of_any_scale", "learner.objectives.pseudo_targets.kappa_filter", fixed_cut),
    ("test_alignment_to_the_own_mean_is_the_identity", "learner.objectives.pseudo_targets.align", lambda logits, mean, prevalence: logits - mean.logit() - prevalence.logit()),
    ("test_kappa_one_labels_every_image_at_the_prevalence", "learner.objectives.pseudo_targets.class_thresholds", quartiles),
    ("test_sinkhorn_rows_sum_to_one", "learner.objectives.self_supervised.sinkhorn", only_columns),
    ("test_sinkhorn_rows_sum_to_one", "learner.objectives.self_supervised.sinkhorn", lambda logits, temperature, iterations=3: (logits / temperature).softmax(1)),
    ("test_koleo_of_equal_and_of_orthonormal_rows", "learner.objectives.self_supervised.koleo", no_floor),
    ("test_wise_with_share_0_and_1_is_champion_and_candidate", "learner.engine.weight_averaging.wise", lambda champion, candidate, a: weight_averaging.running_mean(champion, candidate, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("test", "attribute", "wrong"), MUTATIONS)
def test_every_property_notices_its_mutation(monkeypatch, test, attribute, wrong):
    monkeypatch.setattr(attribute, wrong)
    with pytest.raises(AssertionError):
        globals()[test]()


def test_no_property_is_without_a_mutation():
    properties = {name for name in globals() if name.startswith("test_")}
    last = {"test_every_property_notices_its_mutation", "test_no_property_is_without_a_mutation"}
    assert properties - last == {name for name, *_ in MUTATIONS}
