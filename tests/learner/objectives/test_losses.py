"""Losses and targets of evolve and kd against published code; each test has a mutation that it detects."""

from math import exp, log

import pytest
import torch
import torch.nn.functional as F

from learner.objectives import class_losses, knowledge_distillation, pseudo_targets, self_supervised
from learner.objectives.dino import DinoLoss
from tests.support.learner.golden_vectors import close, golden

torch.set_num_threads(1)  # tiny tensors: a second thread only slows them down

SINGLE = {"rtol": 2e-5, "atol": 1e-6}  # of float32
TEMPERATURES = (1, 2, 4, 20)
UNKNOWN = float("nan")


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_ibot_losses_and_centres_equal_the_published_code():
    g = golden("ibot_loss")
    dino, patches = DinoLoss(12, 0.1, 0.07, 0.9).double(), self_supervised.PatchLoss(10, 0.1, 0.07, 0.9).double()
    for step, warmup in enumerate((0.04, None, None, None)):
        mask = g["mask"][step].flatten(0, 1)
        student, teacher = g["sp"][step][mask.flatten(1)], g["tp"][step][mask.flatten(1)]
        close(dino(torch.cat([g["sc"][step], g["sl"][step]]), g["tc"][step], warmup), g["cls"][step])
        close(patches(student, teacher, mask, warmup), g["patch"][step])
        dino.move(g["tc"][step].mean(0, keepdim=True))
        patches.move(g["tp"][step].flatten(0, 1).mean(0, keepdim=True))
        close(dino.centre, g["center"][step])
        close(patches.centre, g["center2"][step][0])


def test_images_without_masked_patches_count_zero_and_parts_add_up():
    g = golden("ibot_loss")
    patches = self_supervised.PatchLoss(10, 0.1, 0.07, 0.9).double()
    mask = g["mask"][1].flatten(0, 1).flatten(1)
    assert not mask[3].any()
    student, teacher = g["sp"][1], g["tp"][1]
    whole = patches(student[mask], teacher[mask], mask)
    parts = [patches(student[i][mask[i]], teacher[i][mask[i]], mask[i]) for i in (slice(0, 2), slice(2, 6))]
    close(2 / 6 * parts[0] + 4 / 6 * parts[1], whole)
    empty = patches(student[:0, 0].requires_grad_(), teacher[:0, 0], mask[3:4])
    empty.backward()
    assert empty.item() == 0


def test_koleo_and_its_gradient_equal_the_published_code():
    g = golden("koleo")
    x = g["x"].clone().requires_grad_()
    loss = self_supervised.koleo(x)
    loss.backward()
    close(loss.detach(), g["loss"])
    close(x.grad, g["grad"])


def test_sinkhorn_equals_the_published_code():
    g = golden("sinkhorn")
    for iterations in (1, 3):
        close(self_supervised.sinkhorn(g["logits"], float(g["temp"]), iterations), g[f"q{iterations}"], **SINGLE)


def test_sinkhorn_does_not_overflow_at_low_temperature():
    rows = self_supervised.sinkhorn(golden("sinkhorn")["logits"] * 100, 0.01)
    close(rows.sum(1), torch.ones(8), **SINGLE)


def test_kappa_filter_equals_the_published_code():
    g = golden("martins_filter")
    for kappa in (0.25, 0.5, 0.75, 1.0):
        ours = pseudo_targets.kappa_filter(g["score"], float(g["truth"].double().mean()), kappa)
        assert torch.equal(ours.nan_to_num(-1.0).long(), g[f"label_k{kappa}"])


def test_distillation_loss_and_gradient_equal_the_closed_forms():
    g = golden("kd_multilabel")
    for t in TEMPERATURES:
        student = g["zs"].clone().requires_grad_()
        known = g["zt"].clone().requires_grad_()
        loss = knowledge_distillation.bernoulli_kl(student, known, t)
        loss.backward()
        assert known.grad is None
        close(loss.detach() / t**2, g[f"kl_T{t}"])
        close(student.grad, g[f"grad_T2kl_T{t}"])
        teacher = (g["zt"] / t).sigmoid()
        close(loss.detach() / t**2 + F.binary_cross_entropy(teacher, teacher), g[f"bce_T{t}"])


def test_distillation_mixes_labels_and_teacher_in_float32_too():
    g = golden("kd_multilabel")
    close(class_losses.label_loss(g["zs"], g["y"]), g["hard"])
    for t in TEMPERATURES:
        close(
            knowledge_distillation.kd_loss(g["zs"], g["zt"], g["y"], 0.3, t)[0],
            0.7 * g["hard"] + 0.3 * t**2 * g[f"kl_T{t}"],
        )
        single = knowledge_distillation.kd_loss(g["zs"].float(), g["zt"].float(), g["y"].float(), 0.3, t)[0]
        close(single.double(), 0.7 * g["hard"] + 0.3 * t**2 * g[f"kl_T{t}"], **SINGLE)


def test_the_softmax_form_in_the_paper_is_a_different_loss():
    g = golden("kd_multilabel")
    for t in TEMPERATURES:
        softmax = -((g["zt"] / t).softmax(1) * (g["zs"] / t).log_softmax(1)).sum(1).mean()
        close(softmax, g[f"softmax_ce_T{t}"])
        assert abs(knowledge_distillation.bernoulli_kl(g["zs"], g["zt"], t) / t**2 - softmax) > 1


def test_findings_unknown_to_teacher_or_labels_have_no_weight():
    g = golden("kd_multilabel")
    teacher, labels, weights = g["zt"].clone(), g["y"].clone(), torch.linspace(0.5, 2, 14).double()
    teacher[:, 3], labels[2] = torch.nan, torch.nan
    student = g["zs"].clone().requires_grad_()
    knowledge_distillation.kd_loss(student, teacher, labels, 0.4, 2.0, class_weights=weights)[0].backward()
    soft = 2.0 * ((g["zs"] / 2).sigmoid() - (g["zt"] / 2).sigmoid()) / 70
    hard = weights * (g["zs"].sigmoid() - g["y"]) / 56
    soft[:, 3], hard[2] = 0, 0
    close(student.grad, 0.6 * hard + 0.4 * soft)


def test_the_label_loss_without_weights_equals_binary_cross_entropy():
    logits, labels = normal(13, 8, 4).float(), (uniform(14, 8, 4) < 0.3).float()
    labels[uniform(15, 8, 4) < 0.2] = UNKNOWN
    known = ~labels.isnan()
    each = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0.0), reduction="none")
    assert torch.equal(class_losses.label_loss(logits, labels), (each * known).sum() / known.sum())
    assert torch.equal(class_losses.label_loss(logits, labels, torch.tensor(99)), (each * known).sum() / 99)


def test_the_weighted_label_loss_equals_a_plain_loop():
    logits, labels = normal(16, 6, 2), (uniform(17, 6, 2) < 0.5).double()
    labels[0, 0] = UNKNOWN
    of_finding, of_positive, moved, soft = [0.5, 3.0], [4.0, 0.25], [-1.0, 2.0], 0.05
    total = 0.0
    for sample in range(6):
        for c in range(2):
            if (sample, c) == (0, 0):
                continue
            p = 1 / (1 + exp(-float(logits[sample, c]) - moved[c]))
            y = float(labels[sample, c]) * (1 - soft) + soft / 2
            total -= of_finding[c] * (of_positive[c] * y * log(p) + (1 - y) * log(1 - p))
    ours = class_losses.label_loss(
        logits,
        labels,
        class_weights=double(*of_finding),
        positive_weights=double(*of_positive),
        adjustment=double(*moved),
        smoothing=soft,
    )
    close(ours, total / 11)


def test_effective_numbers_go_from_one_to_the_ratio_of_counts():
    labels = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 0.0]] * 6 + [[UNKNOWN, 0.0]] * 2).double()
    assert class_losses.effective_weights(labels, 0.0).tolist() == [1, 1]
    close(class_losses.effective_weights(labels, 1.0), double(6 / 3, 11 / 1))
    close(class_losses.effective_weights(labels, 0.9), double((1 - 0.9**6) / (1 - 0.9**3), (1 - 0.9**11) / 0.1))
    close(class_losses.effective_weights(labels, 1 - 1e-9), double(2.0, 11.0), rtol=1e-6)


def unweighted(patches, student, teacher, mask, teacher_temp=None):
    target = ((teacher - patches.centre) / (teacher_temp or patches.teacher_temp)).softmax(-1)
    return -(target * (student / patches.student_temp).log_softmax(-1)).sum(-1).mean()


def without_exclusion(x):
    unit = F.normalize(x, dim=1)
    return -(F.pairwise_distance(unit, unit[(unit @ unit.T).argsort(1)[:, 0]]) + 1e-8).log().mean()


def overflowing(logits, temperature, iterations=3):
    q = (logits / temperature).exp()
    for _ in range(iterations):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return q


def high_rule_wins(scores, low, high):
    return torch.full_like(scores, torch.nan).masked_fill(scores <= low, 0.0).masked_fill(scores >= high, 1.0)


def softmax_kl(student, teacher, t):
    seen, guess = (teacher / t).log_softmax(1), (student / t).log_softmax(1)
    return t**2 * (seen.exp() * (seen - guess)).sum(1).mean()


def softmax_cross_entropy(student, teacher, t):
    return -(t**2) * ((teacher / t).softmax(1) * (student / t).log_softmax(1)).sum(1).mean()


def all_mean(student, labels, known_in_batch=None):
    known = ~labels.isnan()
    each = F.binary_cross_entropy_with_logits(student, labels.nan_to_num(0.0), reduction="none")
    return (each * known).mean()


original_label_loss = class_losses.label_loss


def without_smoothing(student, labels, smoothing, **weights):
    return original_label_loss(student, labels, **weights)


MUTATIONS = [
    (
        "test_ibot_losses_and_centres_equal_the_published_code",
        "learner.objectives.self_supervised.PatchLoss.forward",
        unweighted,
    ),
    (
        "test_ibot_losses_and_centres_equal_the_published_code",
        "learner.objectives.self_supervised.PatchLoss.move",
        lambda patches, mean: patches.centre.mul_(0.1).add_(mean, alpha=0.9),
    ),
    (
        "test_images_without_masked_patches_count_zero_and_parts_add_up",
        "learner.objectives.self_supervised.PatchLoss.forward",
        unweighted,
    ),
    (
        "test_koleo_and_its_gradient_equal_the_published_code",
        "learner.objectives.self_supervised.koleo",
        without_exclusion,
    ),
    (
        "test_sinkhorn_equals_the_published_code",
        "learner.objectives.self_supervised.sinkhorn",
        lambda logits, temperature, iterations: (logits / temperature).softmax(1),
    ),
    (
        "test_sinkhorn_does_not_overflow_at_low_temperature",
        "learner.objectives.self_supervised.sinkhorn",
        overflowing,
    ),
    ("test_kappa_filter_equals_the_published_code", "learner.objectives.pseudo_targets.hard_labels", high_rule_wins),
    (
        "test_distillation_loss_and_gradient_equal_the_closed_forms",
        "learner.objectives.knowledge_distillation.bernoulli_kl",
        softmax_kl,
    ),
    (
        "test_distillation_mixes_labels_and_teacher_in_float32_too",
        "learner.objectives.knowledge_distillation.bernoulli_kl",
        lambda student, teacher, t: ((student - teacher) ** 2).mean() / 8,
    ),
    (
        "test_the_softmax_form_in_the_paper_is_a_different_loss",
        "learner.objectives.knowledge_distillation.bernoulli_kl",
        softmax_cross_entropy,
    ),
    (
        "test_findings_unknown_to_teacher_or_labels_have_no_weight",
        "learner.objectives.knowledge_distillation.label_loss",
        lambda student, labels, known, class_weights: class_losses.label_loss(student, labels),
    ),
    (
        "test_the_label_loss_without_weights_equals_binary_cross_entropy",
        "learner.objectives.class_losses.label_loss",
        all_mean,
    ),
    (
        "test_the_weighted_label_loss_equals_a_plain_loop",
        "learner.objectives.class_losses.label_loss",
        without_smoothing,
    ),
    (
        "test_effective_numbers_go_from_one_to_the_ratio_of_counts",
        "learner.objectives.class_losses.effective_weights",
        lambda labels, beta: (labels == 0).sum(0) / (labels == 1).sum(0).clamp(min=1),
    ),
]


@pytest.mark.parametrize(("test", "attribute", "wrong"), MUTATIONS)
def test_every_property_notices_its_mutation(monkeypatch, test, attribute, wrong):
    monkeypatch.setattr(attribute, wrong)
    with pytest.raises(AssertionError):
        globals()[test]()


def test_no_property_is_without_a_mutation():
    properties = {name for name in globals() if name.startswith("test_")}
    last = {"test_every_property_notices_its_mutation", "test_no_property_is_without_a_mutation"}
    assert properties - last == {name for name, *_ in MUTATIONS}
