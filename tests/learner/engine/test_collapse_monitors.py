"""The collapse monitors: values in known cases, and the steps outside the limits that stop a round."""

import json
import math

import pytest
import torch

from learner.engine import collapse_monitors
from learner.engine.optim import ema_update
from learner.networks.heads import make_network
from learner.objectives.dino import DinoLoss
from learner.round import collapse_limits
from learner.round.recipe import resolve
from tests.support.learner.round_folders import TINY

torch.set_num_threads(1)  # tiny tensors: a second thread only slows them down

K = 32
EVEN = {
    "teacher_kl": 1.0,
    "cls_std": 0.5,
    "max_share": 0.2,
    "teacher_entropy": 0.6,
    "dino_gap": 0.2,
    "centre_norm": 0.1,
}


def answers(rows=6, sharp=3.0, seed=0):
    return (torch.randn(rows, K, generator=torch.Generator().manual_seed(seed)).double() * sharp).softmax(-1)


def one_hot(rows):
    return torch.nn.functional.one_hot(torch.tensor(rows), K).double()


def test_equal_logits_have_loss_ln_k_and_dino_gap_zero():
    loss = DinoLoss(K, 0.1, 0.04, 0.9)(torch.zeros(4 * 3, K), torch.zeros(2 * 3, K)).item()
    assert loss == pytest.approx(math.log(K))
    assert collapse_monitors.dino_gap(loss, K) == pytest.approx(0, abs=1e-6)
    assert collapse_monitors.dino_gap(2 * math.log(K), K) == collapse_monitors.dino_gap(0.0, K) == 1


def test_entropy_is_one_for_uniform_and_zero_for_one_hot_outputs_for_any_k():
    for prototypes in (2, K, 4096):
        uniform = torch.full((5, prototypes), 1 / prototypes)
        assert collapse_monitors.teacher_entropy(uniform).item() == pytest.approx(1, rel=1e-6)
    assert collapse_monitors.teacher_entropy(one_hot([3, 9, 30])).item() == 0


def test_kl_is_the_mean_divergence_from_the_mean_output():
    rows = answers()
    mean = [sum(row[k].item() for row in rows) / len(rows) for k in range(K)]
    plain = [sum(p * math.log(p / mean[k]) for k, p in enumerate(row.tolist())) for row in rows]
    assert collapse_monitors.teacher_kl(rows).item() == pytest.approx(sum(plain) / len(plain), rel=1e-9)


def test_kl_is_zero_in_both_kinds_of_collapse_and_ln_r_for_different_prototypes():
    for collapsed in (torch.full((6, K), 1 / K).double(), one_hot([5] * 6), answers(1).expand(6, K)):
        assert collapse_monitors.teacher_kl(collapsed).item() == pytest.approx(0, abs=1e-12)
    assert collapse_monitors.teacher_kl(one_hot([0, 1, 2, 3, 4, 5])).item() == pytest.approx(math.log(6))


def test_share_of_the_largest_prototype_is_between_1_over_k_and_1():
    assert collapse_monitors.max_share(torch.full((6, K), 1 / K)).item() == pytest.approx(1 / K)
    assert collapse_monitors.max_share(one_hot([7, 7, 7, 1])).item() == 0.75
    assert collapse_monitors.max_share(one_hot([7] * 4)).item() == 1


def test_cls_std_equals_a_plain_loop_and_ignores_the_norm_of_embeddings():
    cls = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).double()
    unit = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in cls.tolist()]
    columns = [[row[d] for row in unit] for d in range(7)]
    stds = [math.sqrt(sum((v - sum(c) / 5) ** 2 for v in c) / 5) for c in columns]
    assert collapse_monitors.cls_std(cls).item() == pytest.approx(sum(stds) / 7 * math.sqrt(7))
    lengths = torch.tensor([0.01, 1, 5, 100, 3]).double()[:, None]
    assert collapse_monitors.cls_std(cls * lengths).item() == pytest.approx(collapse_monitors.cls_std(cls).item())


def test_cls_std_is_one_on_the_whole_sphere_and_zero_for_equal_embeddings():
    poles = torch.cat([torch.eye(16), -torch.eye(16)])
    assert collapse_monitors.cls_std(poles).item() == pytest.approx(1)
    assert collapse_monitors.cls_std(poles[:1].expand(8, 16)).item() == 0


def test_centre_norm_is_one_where_all_prototypes_equal_all_images():
    assert collapse_monitors.centre_norm(torch.zeros(1, K)).item() == 0
    for prototypes in (K, 4 * K):
        assert collapse_monitors.centre_norm(torch.full((1, prototypes), -1.0)).item() == pytest.approx(1)


def test_a_shift_of_logits_and_centre_changes_only_the_centre_norm():
    logits, cls = torch.randn(6, K).double() / 5, torch.randn(3, 8)
    shift = torch.linspace(-0.5, 0.5, K).double()[None]
    plain = collapse_monitors.measure(logits, torch.zeros(1, K).double(), 0.04, cls, 3.0)
    shifted = collapse_monitors.measure(logits + shift, shift, 0.04, cls, 3.0)
    assert {**plain, "centre_norm": 0} == pytest.approx({**shifted, "centre_norm": 0}, rel=1e-5)
    assert shifted["centre_norm"] > plain["centre_norm"] == 0


def test_monitors_that_compare_images_are_nan_for_a_single_image():
    shown = collapse_monitors.measure(torch.randn(2, K), torch.zeros(1, K), 0.04, torch.randn(1, 8), 3.0)
    assert {name for name, value in shown.items() if math.isnan(value)} == {"teacher_kl", "max_share", "cls_std"}
    assert set(shown) == set(collapse_limits.LIMITS)


def test_training_has_collapsed_after_25_steps_outside_and_not_before():
    for name, bad in (("teacher_kl", 3e-5), ("max_share", 0.995), ("teacher_entropy", 1.0), ("cls_std", 1e-4)):
        watch, shown = {}, EVEN | {name: bad}
        for _ in range(collapse_limits.PATIENCE - 1):
            watch = collapse_limits.count_steps_outside(watch, shown)
            assert collapse_limits.collapse_reason(watch, shown) is None
        watch = collapse_limits.count_steps_outside(watch, shown)
        reason = collapse_limits.collapse_reason(watch, shown)
        limit = collapse_limits.LIMITS[name]
        side = f"below {limit.low:g}, {limit.below}" if bad < limit.low else f"above {limit.high:g}, {limit.above}"
        assert reason.startswith(f"collapse: {name} {bad:.3g} is {side}")


def test_one_step_inside_the_limits_resets_the_counter():
    watch, bad = {}, EVEN | {"cls_std": 0.0}
    for shown in [*[bad] * (collapse_limits.PATIENCE - 1), EVEN, *[bad] * (collapse_limits.PATIENCE - 1)]:
        watch = collapse_limits.count_steps_outside(watch, shown)
        assert collapse_limits.collapse_reason(watch, shown) is None
    assert collapse_limits.collapse_reason(collapse_limits.count_steps_outside(watch, bad), bad)


def test_nan_and_missing_monitors_keep_the_counter():
    bad, silent = EVEN | {"teacher_kl": 0.0}, EVEN | {"teacher_kl": math.nan}
    watch = {}
    for shown in [bad] * (collapse_limits.PATIENCE - 1) + [silent, {}] * 50:
        watch = collapse_limits.count_steps_outside(watch, shown)
        assert collapse_limits.collapse_reason(watch, shown) is None
    assert collapse_limits.collapse_reason(collapse_limits.count_steps_outside(watch, bad), bad)
    assert collapse_limits.count_steps_outside({}, silent) == {}


def test_the_counters_survive_a_checkpoint():
    bad = EVEN | {"teacher_kl": 0.0}
    watch = {}
    for _ in range(collapse_limits.PATIENCE):
        watch = json.loads(json.dumps(collapse_limits.count_steps_outside(watch, bad)))
    assert collapse_limits.collapse_reason(watch, bad)


def self_distil(steps, rate, centred):
    """Return the monitors of a plain DINO loop on the same eight noisy images."""
    recipe = resolve("distl", "demo", TINY)
    plan = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    torch.manual_seed(0)
    student, teacher = make_network(plan, recipe, 2), make_network(plan, recipe, 2)
    teacher.load_state_dict(student.state_dict())
    samples = torch.randn(8, 1, 16, 16)
    dino, optimiser = DinoLoss(K, 0.1, 0.04, 0.9), torch.optim.AdamW(student.parameters(), rate)
    rows = []
    for _ in range(steps):
        views = [samples + 0.5 * torch.randn_like(samples) for _ in range(3)]
        with torch.no_grad():
            cls = teacher.encode(views[:2])
            logits = teacher.head(cls)
        loss = dino(student(views)[0], logits)
        rows.append(collapse_monitors.measure(logits, dino.centre, 0.04, cls[:8], loss.item()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        ema_update(teacher, student, 0.9)
        if centred:
            dino.move(logits.mean(0, keepdim=True))
    return rows


def verdict(rows):
    watch = {}
    for shown in rows:
        watch = collapse_limits.count_steps_outside(watch, shown)
        if reason := collapse_limits.collapse_reason(watch, shown):
            return reason
    return None


def test_a_teacher_without_centring_collapses_to_one_prototype_and_is_detected():
    reason = verdict(self_distil(80, 5e-3, centred=False))
    assert reason and "max_share" in reason


def test_healthy_training_from_random_weights_is_not_called_collapsed():
    assert verdict(self_distil(80, 1e-4, centred=True)) is None


def _wrong_kl(assigned):
    return torch.special.entr(assigned.mean(0)).sum()


MUTATIONS = [
    ("test_equal_logits_have_loss_ln_k_and_dino_gap_zero", "collapse_monitors.dino_gap", lambda d, k: d / k),
    ("test_entropy_is_one_for_uniform_and_zero_for_one_hot_outputs_for_any_k", "collapse_monitors.teacher_entropy", lambda p: torch.special.entr(p).sum(-1).mean()),
    ("test_kl_is_the_mean_divergence_from_the_mean_output", "collapse_monitors.teacher_kl", _wrong_kl),
    ("test_kl_is_zero_in_both_kinds_of_collapse_and_ln_r_for_different_prototypes", "collapse_monitors.teacher_kl", _wrong_kl),
    ("test_share_of_the_largest_prototype_is_between_1_over_k_and_1", "collapse_monitors.max_share", lambda p: p.max()),
    ("test_cls_std_equals_a_plain_loop_and_ignores_the_norm_of_embeddings", "collapse_monitors.cls_std", lambda c: c.std(0).mean()),
    ("test_cls_std_is_one_on_the_whole_sphere_and_zero_for_equal_embeddings", "collapse_monitors.cls_std", lambda c: torch.nn.functional.normalize(c).std(0, correction=0).mean()),
    ("test_centre_norm_is_one_where_all_prototypes_equal_all_images", "collapse_monitors.centre_norm", lambda c: c.norm()),
    ("test_a_shift_of_logits_and_centre_changes_only_the_centre_norm", "collapse_monitors.measure", lambda t, c, temp, cls, d, right=collapse_monitors.measure: right(t + c, c, temp, cls, d)),
    ("test_monitors_that_compare_images_are_nan_for_a_single_image", "collapse_monitors.math", type("Nought", (), {"nan": 0.0, "log": math.log, "sqrt": math.sqrt})),
    ("test_training_has_collapsed_after_25_steps_outside_and_not_before", "collapse_limits.count_steps_outside", lambda w, s, right=collapse_limits.count_steps_outside: right(right(w, s), s)),
    ("test_one_step_inside_the_limits_resets_the_counter", "collapse_limits.count_steps_outside", lambda w, s, right=collapse_limits.count_steps_outside: {**w, **right(w, s)}),
    ("test_nan_and_missing_monitors_keep_the_counter", "collapse_limits.count_steps_outside", lambda w, s, right=collapse_limits.count_steps_outside: right(w, {k: 0.0 if math.isnan(v) else v for k, v in s.items()})),
    ("test_the_counters_survive_a_checkpoint", "collapse_limits.count_steps_outside", lambda w, s, right=collapse_limits.count_steps_outside: right({}, s)),
    ("test_a_teacher_without_centring_collapses_to_one_prototype_and_is_detected", "collapse_monitors.max_share", lambda p: p.mean()),
    ("test_healthy_training_from_random_weights_is_not_called_collapsed", "collapse_monitors.cls_std", lambda c: c.var(0).mean() * 0),
]  # fmt: skip


@pytest.mark.parametrize(("test", "path", "wrong"), MUTATIONS, ids=[m[0] for m in MUTATIONS])
def test_every_property_notices_its_mutation(test, path, wrong, monkeypatch):
    module, name = path.split(".")
    monkeypatch.setattr(globals()[module], name, wrong)
    with pytest.raises(AssertionError):
        globals()[test]()
