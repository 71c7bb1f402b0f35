"""Several processes take one step: the same step as one process, decided alike, whatever share of the images each has."""

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
from learner.objectives.correction import correction_step, distil_step
from learner.round.manifest import Sample
from learner.round.recipe import resolve
from tests.learner.engine.test_step import Endless, crowd, make_batch, make_state, parameters
from tests.support.ports import free_port

torch.set_num_threads(1)
LABELS = torch.tensor([[1.0, float("nan")], [0.0, 1.0], [float("nan")] * 2, [1.0, 1.0]]).double()


def together(world, work):
    """What `work()` gives in each of `world` forked processes (so that a mutation made here holds there), by rank."""
    port, context = str(free_port()), multiprocessing.get_context("fork")
    answers = context.Queue()

    def begin(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        try:
            with distributed.process_group():
                given = (rank, True, work())
        except (Exception, pytest.fail.Exception):
            given = (rank, False, traceback.format_exc())
        answers.put(given)

    processes = [context.Process(target=begin, args=(rank,), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    given = sorted(answers.get(timeout=30) for _ in processes)
    for process in processes:
        process.join(60)
    assert all(well for _, well, _ in given), given
    return [answer for _, _, answer in given]


def shared(samples=4, labels=None):
    """The batch of `make_batch`, of which each rank has its share, as a feed hands it out."""
    whole, mine = make_batch(samples, labels), distributed.rank_slice(samples)

    def views(part):
        return [v[mine][part] for v in whole.views(slice(0, samples))]

    return Batch(mine.stop - mine.start, views, labels if labels is None else labels[mine], None, samples, whole.known)


def after(tick, samples=4, labels=None, **overrides):
    """Numbers told, weights and centre after two steps of `tick`, as lists."""
    state = make_state(**overrides)
    told = [tick(state, shared(samples, labels)) for _ in range(2)]
    return told, parameters(state.student).tolist(), state.centres["dino"].centre.flatten().tolist()


def assert_alike(one, other):
    for mine, theirs in zip(one[0], other[0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, nan_ok=True)  # monitors are measured in float32
    np.testing.assert_allclose(one[1], other[1], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(one[2], other[2], rtol=1e-7, atol=1e-9)


def test_a_step_on_unlabelled_images_is_the_same_on_one_rank_two_and_three():
    alone = after(distil_step)
    for world in (2, 3):
        for given in together(world, lambda: after(distil_step)):
            assert_alike(given, alone)


def test_unknown_labels_weigh_alike_wherever_they_fall():
    alone = after(correction_step, labels=LABELS)
    for given in together(2, lambda: after(correction_step, labels=LABELS)):
        assert_alike(given, alone)


def test_a_rank_without_an_image_takes_the_same_step():
    alone = after(distil_step, samples=2)
    assert_alike(together(3, lambda: after(distil_step, samples=2))[0], alone)


def test_a_network_part_that_no_image_reached_stays_without_a_gradient():
    def untouched():
        state = make_state(correct_loss="ce")
        correction_step(state, shared(2, LABELS[:2]))
        return [name for name, p in state.student.named_parameters() if p in state.optimiser.state]

    alone = untouched()
    assert not any("last_layer" in name for name in alone)
    assert together(3, untouched) == [alone] * 3


def test_shares_are_whole_in_order_and_even(monkeypatch):
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
def test_ranks_make_the_views_of_one_process_image_by_sample(tmp_path, monkeypatch, name):
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


def test_memory_that_runs_out_on_one_rank_halves_the_pass_of_all():
    def walked():
        state = make_state()
        if distributed.rank() == 1:
            crowd(state, 2)  # two views of one image
        state.schedule.lr[:] = 1e-3
        seen = []

        def stop(losses):
            seen.append(losses)
            raise LearnerError("enough")

        with pytest.raises(LearnerError, match="enough"):
            step.run_steps(state, lambda state: distil_step(state, Endless(shared()).batch(0, 0)), stop)
        return state.micro, state.notes

    note = "out of memory: 1 images a pass instead of 2, the same batch and result"
    assert together(2, walked) == [(1, [note])] * 2


def test_a_loss_that_is_no_number_on_one_rank_stops_all_with_one_reason():
    def bad():
        state = make_state()
        before = parameters(state.student)
        batch = shared()
        if distributed.rank() == 1:
            good = batch.views
            batch.views = lambda part: [view * float("inf") for view in good(part)]
        with pytest.raises(LearnerError) as stopped:
            distil_step(state, batch)
        assert torch.equal(parameters(state.student), before)
        return str(stopped.value)

    reasons = together(2, bad)
    assert reasons[0] == reasons[1]
    assert "non-finite" in reasons[0]


def test_a_signal_to_one_rank_pauses_all(tmp_path):
    def asked():
        writer = progress.ProgressWriter(tmp_path, None, 0.0, 0)
        writer.signal_name = "SIGTERM" if distributed.rank() == 1 else None
        with pytest.raises(Paused) as paused:
            writer.raise_if_paused()
        return str(paused.value)

    assert together(2, asked) == ["SIGTERM"] * 2


def test_a_refusal_on_one_rank_is_the_last_word_of_all():
    def refuse():
        if distributed.rank() == 1:
            return distributed.announce_exit("stopped", "no plate")
        try:
            distributed.gather_values("a step's numbers")
        except OtherRankExited as other:
            return other.state, other.reason

    assert together(2, refuse) == [("stopped", "no plate")] * 2


def test_the_first_rank_works_alone_and_the_others_read_what_it_found():
    def found():
        return distributed.on_rank_zero(
            lambda: (distributed.world_size(), distributed.gather_values(7))
        ), distributed.world_size()

    assert together(2, found) == [((1, [7]), 2)] * 2


def test_the_first_rank_alone_has_whole_batches():
    def sizes():
        return distributed.on_rank_zero(lambda: shared().size), shared().size

    assert together(2, sizes) == [(4, 2)] * 2


def nothing(tensors):
    """Ranks that add nothing up."""


def local_mean(rows):
    return rows.mean(0, dtype=torch.float64)


MUTATIONS = [
    (
        "test_a_step_on_unlabelled_images_is_the_same_on_one_rank_two_and_three",
        (distributed, "sum_over_ranks"),
        nothing,
    ),
    (
        "test_a_step_on_unlabelled_images_is_the_same_on_one_rank_two_and_three",
        (distributed, "mean_over_ranks"),
        local_mean,
    ),
    ("test_a_step_on_unlabelled_images_is_the_same_on_one_rank_two_and_three", (dino, "share_of"), lambda b, p: 1.0),
    (
        "test_a_step_on_unlabelled_images_is_the_same_on_one_rank_two_and_three",
        (collapse_monitors, "max_share"),
        lambda assigned: assigned.mean(0, dtype=torch.float64).max(),
    ),
    (
        "test_unknown_labels_weigh_alike_wherever_they_fall",
        (dino, "label_loss"),
        lambda student, labels, known: step_label_loss(student, labels),
    ),
    ("test_a_rank_without_an_image_takes_the_same_step", (distributed, "mean_over_ranks"), local_mean),
    (
        "test_a_network_part_that_no_image_reached_stays_without_a_gradient",
        (distributed, "gather_values"),
        lambda value: [value] * 3,
    ),
    ("test_shares_are_whole_in_order_and_even", (distributed, "rank_slice"), lambda count: slice(0, count)),
    (
        "test_memory_that_runs_out_on_one_rank_halves_the_pass_of_all",
        (distributed, "gather_values"),
        lambda value: [value],
    ),
    (
        "test_a_loss_that_is_no_number_on_one_rank_stops_all_with_one_reason",
        (distributed, "gather_values"),
        lambda value: [value],
    ),
    ("test_a_signal_to_one_rank_pauses_all", (distributed, "gather_values"), lambda value: [value]),
    (
        "test_the_first_rank_works_alone_and_the_others_read_what_it_found",
        (distributed, "on_rank_zero"),
        lambda work: work(),
    ),
]


def step_label_loss(student, labels):
    """Each rank's own mean, in place of its part of the whole batch's."""
    from learner.objectives.class_losses import label_loss

    return label_loss(student, labels)


@pytest.mark.parametrize(("test", "where", "wrong"), MUTATIONS, ids=[f"{m[0]}-{m[1][1]}" for m in MUTATIONS])
def test_every_property_notices_its_mutation(test, where, wrong, monkeypatch, tmp_path):
    monkeypatch.setattr(*where, wrong)
    function = globals()[test]
    given = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    with pytest.raises(AssertionError):
        function(**{name: given[name] for name in function.__code__.co_varnames[: function.__code__.co_argcount]})
