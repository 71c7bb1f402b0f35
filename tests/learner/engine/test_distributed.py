"""Steps on several ranks: equal to a step on one rank, and with the same decisions on all ranks."""

import multiprocessing
import os
import traceback

import numpy as np
import pytest
import torch

from learner.data import feed
from learner.engine import collapse_monitors, distributed, progress, step
from learner.engine.step import Batch
from learner.errors import LearnerError, OtherRankExited, Paused
from learner.objectives import dino
from learner.objectives.distl_steps import correction_step, unlabelled_step
from learner.round.manifest import Sample
from learner.round.recipe import resolve
from tests.support.learner.tiny_states import Endless, limit_memory, make_batch, make_state, parameters
from tests.support.ports import free_port

torch.set_num_threads(1)
LABELS = torch.tensor([[1.0, float("nan")], [0.0, 1.0], [float("nan")] * 2, [1.0, 1.0]]).double()


def together(world, work):
    """Return the results of `work()` in `world` forked processes, by rank; forked, so that mutations apply there too."""
    port, context = str(free_port()), multiprocessing.get_context("fork")
    answers = context.Queue()

    def begin(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        try:
            with distributed.process_group():
                outcome = (rank, True, work())
        except (Exception, pytest.fail.Exception):
            outcome = (rank, False, traceback.format_exc())
        answers.put(outcome)

    processes = [context.Process(target=begin, args=(rank,), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    outcome = sorted(answers.get(timeout=30) for _ in processes)
    for process in processes:
        process.join(60)
    assert all(well for _, well, _ in outcome), outcome
    return [answer for _, _, answer in outcome]


def shared(samples=4, labels=None):
    """Return this rank's share of the batch of `make_batch`, as a feed returns it."""
    whole, mine = make_batch(samples, labels), distributed.rank_slice(samples)

    def views(part):
        return [v[mine][part] for v in whole.views(slice(0, samples))]

    return Batch(mine.stop - mine.start, views, labels if labels is None else labels[mine], None, samples, whole.known)


def after(tick, samples=4, labels=None, **overrides):
    """Return losses, weights and centre after two steps, as lists."""
    state = make_state(**overrides)
    losses = [tick(state, shared(samples, labels)) for _ in range(2)]
    return losses, parameters(state.student).tolist(), state.centres["dino"].centre.flatten().tolist()


def assert_alike(numbers, expected):
    for mine, theirs in zip(numbers[0], expected[0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, nan_ok=True)  # monitors are measured in float32
    np.testing.assert_allclose(numbers[1], expected[1], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(numbers[2], expected[2], rtol=1e-7, atol=1e-9)


def test_an_unlabelled_step_is_the_same_on_1_2_and_3_ranks():
    alone = after(unlabelled_step)
    for world in (2, 3):
        for outcome in together(world, lambda: after(unlabelled_step)):
            assert_alike(outcome, alone)


def test_the_loss_does_not_depend_on_which_rank_has_the_unknown_labels():
    alone = after(correction_step, labels=LABELS)
    for outcome in together(2, lambda: after(correction_step, labels=LABELS)):
        assert_alike(outcome, alone)


def test_a_rank_without_images_makes_the_same_step():
    alone = after(unlabelled_step, samples=2)
    assert_alike(together(3, lambda: after(unlabelled_step, samples=2))[0], alone)


def test_unused_parameters_have_no_gradient_on_several_ranks():
    def untouched():
        state = make_state(correct_loss="ce")
        correction_step(state, shared(2, LABELS[:2]))
        return [name for name, p in state.student.named_parameters() if p in state.optimiser.state]

    alone = untouched()
    assert not any("last_layer" in name for name in alone)
    assert together(3, untouched) == [alone] * 3


def test_rank_slices_cover_all_items_in_order_and_evenly(monkeypatch):
    for world in (1, 2, 3, 5):
        for count in (0, 1, 2, 7):
            parts = []
            for rank in range(world):
                monkeypatch.setattr(distributed, "world_size", lambda world=world: world)
                monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
                parts.append(list(range(count))[distributed.rank_slice(count)])
            assert [i for part in parts for i in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("name", ["unlabelled", "labelled"])
def test_ranks_make_the_same_views_as_a_single_process(tmp_path, monkeypatch, name):
    samples = []
    for i in range(5):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).integers(0, 255, (512, 512)).astype(np.uint8))
        samples.append(Sample(i, f"p{i}", tmp_path / f"{i}.npy", "train", (i % 2, None if i % 3 else 1)))
    recipe = resolve("distl", "demo", {"batch": 3, "image_size": 32, "local_size": 16})

    def batches():
        images = feed.ImageFeed(samples, recipe, torch.device("cpu"), name, fixed_order=False)
        return [images.batch(epoch, i) for epoch in range(2) for i in range(images.batches)]

    whole, mine = batches(), []
    for rank in range(4):
        monkeypatch.setattr(distributed, "world_size", lambda: 4)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        mine.append(batches())
    for i, batch in enumerate(whole):
        shares = [each[i] for each in mine if each[i].size]
        assert [share.whole for share in shares] == [batch.size] * len(shares)
        assert [share.known for share in shares] == [batch.known] * len(shares)
        assert torch.equal(torch.cat([share.index for share in shares]), batch.index)
        theirs = zip(*(share.views(slice(0, share.size)) for share in shares), strict=True)
        for whole_view, parts in zip(batch.views(slice(0, batch.size)), theirs, strict=True):
            assert torch.equal(torch.cat(parts), whole_view)


def test_out_of_memory_on_one_rank_halves_the_parts_of_all():
    def walked():
        state = make_state()
        if distributed.rank() == 1:
            limit_memory(state, 2)  # two views of one image
        state.schedule.lr[:] = 1e-3
        seen = []

        def stop(losses):
            seen.append(losses)
            raise LearnerError("enough")

        with pytest.raises(LearnerError, match="enough"):
            step.run_steps(state, lambda state: unlabelled_step(state, Endless(shared()).batch(0, 0)), stop)
        return state.micro, state.notes

    note = "out of memory: 1 images in a forward pass instead of 2; same batch, same result"
    assert together(2, walked) == [(1, [note])] * 2


def test_a_loss_that_is_not_finite_on_one_rank_stops_all():
    def bad():
        state = make_state()
        before = parameters(state.student)
        batch = shared()
        if distributed.rank() == 1:
            good = batch.views
            batch.views = lambda part: [view * float("inf") for view in good(part)]
        with pytest.raises(LearnerError) as stopped:
            unlabelled_step(state, batch)
        assert torch.equal(parameters(state.student), before)
        return str(stopped.value)

    reasons = together(2, bad)
    assert reasons[0] == reasons[1]
    assert "non-finite" in reasons[0]


def test_a_signal_to_one_rank_pauses_all(tmp_path):
    def pause():
        writer = progress.ProgressWriter(tmp_path, None, 0.0, 0)
        writer.signal_name = "SIGTERM" if distributed.rank() == 1 else None
        with pytest.raises(Paused) as paused:
            writer.raise_if_paused()
        return str(paused.value)

    assert together(2, pause) == ["SIGTERM"] * 2


def test_an_error_on_one_rank_ends_all_with_its_reason():
    def refuse():
        if distributed.rank() == 1:
            return distributed.announce_exit("stopped", "no plate")
        try:
            distributed.gather_values("a step's numbers")
        except OtherRankExited as exited:
            return exited.state, exited.reason

    assert together(2, refuse) == [("stopped", "no plate")] * 2


def test_on_rank_zero_runs_alone_and_returns_its_value_on_all_ranks():
    def values():
        return distributed.on_rank_zero(
            lambda: (distributed.world_size(), distributed.gather_values(7))
        ), distributed.world_size()

    assert together(2, values) == [((1, [7]), 2)] * 2


def test_rank_zero_alone_has_whole_batches():
    def sizes():
        return distributed.on_rank_zero(lambda: shared().size), shared().size

    assert together(2, sizes) == [(4, 2)] * 2


def nothing(tensors):
    """Sum nothing over the ranks."""


def local_mean(rows):
    return rows.mean(0, dtype=torch.float64)


MUTATIONS = [
    (
        "test_an_unlabelled_step_is_the_same_on_1_2_and_3_ranks",
        (distributed, "sum_over_ranks"),
        nothing,
    ),
    (
        "test_an_unlabelled_step_is_the_same_on_1_2_and_3_ranks",
        (distributed, "mean_over_ranks"),
        local_mean,
    ),
    ("test_an_unlabelled_step_is_the_same_on_1_2_and_3_ranks", (dino, "share_of"), lambda b, p: 1.0),
    (
        "test_an_unlabelled_step_is_the_same_on_1_2_and_3_ranks",
        (collapse_monitors, "max_share"),
        lambda assigned: assigned.mean(0, dtype=torch.float64).max(),
    ),
    (
        "test_the_loss_does_not_depend_on_which_rank_has_the_unknown_labels",
        (dino, "label_loss"),
        lambda student, labels, known: step_label_loss(student, labels),
    ),
    ("test_a_rank_without_images_makes_the_same_step", (distributed, "mean_over_ranks"), local_mean),
    (
        "test_unused_parameters_have_no_gradient_on_several_ranks",
        (distributed, "gather_values"),
        lambda value: [value] * 3,
    ),
    (
        "test_rank_slices_cover_all_items_in_order_and_evenly",
        (distributed, "rank_slice"),
        lambda count: slice(0, count),
    ),
    (
        "test_out_of_memory_on_one_rank_halves_the_parts_of_all",
        (distributed, "gather_values"),
        lambda value: [value],
    ),
    (
        "test_a_loss_that_is_not_finite_on_one_rank_stops_all",
        (distributed, "gather_values"),
        lambda value: [value],
    ),
    ("test_a_signal_to_one_rank_pauses_all", (distributed, "gather_values"), lambda value: [value]),
    (
        "test_on_rank_zero_runs_alone_and_returns_its_value_on_all_ranks",
        (distributed, "on_rank_zero"),
        lambda work: work(),
    ),
]


def step_label_loss(student, labels):
    """Return each rank's own mean, not its part of the mean over the whole batch."""
    from learner.objectives.class_losses import label_loss

    return label_loss(student, labels)


@pytest.mark.parametrize(("test", "where", "wrong"), MUTATIONS, ids=[f"{m[0]}-{m[1][1]}" for m in MUTATIONS])
def test_every_property_notices_its_mutation(test, where, wrong, monkeypatch, tmp_path):
    monkeypatch.setattr(*where, wrong)
    function = globals()[test]
    outcome = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    with pytest.raises(AssertionError):
        function(**{name: outcome[name] for name in function.__code__.co_varnames[: function.__code__.co_argcount]})
