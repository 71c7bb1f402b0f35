"""`cxrloop pull`: queries, retries and the reasons to end a run, with a scripted archive."""

import time
from datetime import date

import pytest

from agent.erasure import forget
from agent.errors import Problem
from agent.network import pull as pulling
from agent.network.known_images import KnownImages, patient_ids
from agent.network.pull import Order, Puller, by_day
from dicom.client.archive import Image, Query, Study
from dicom.errors import ArchiveBusy, ArchiveUnusable, ImageMissing
from dicom.node.listener import Listener, Node
from tests.conftest import make_site
from tests.support.agent.images import take_in, xray
from tests.support.agent.pull_command import inbox_uids, pull


@pytest.fixture(autouse=True)
def no_wait_for_an_intake_that_does_not_run(monkeypatch):
    monkeypatch.setattr(pulling, "SETTLE_S", 1)


# Plain values


def test_a_span_is_queried_day_by_day_newest_first():
    day = date(2026, 3, 1)
    assert by_day(date(2026, 2, 27), day, day) == [(date(2026, m, d),) * 2 for m, d in ((3, 1), (2, 28), (2, 27))]
    assert by_day(day, None, date(2026, 3, 2)) == [(date(2026, 3, 2),) * 2, (day, day)]
    assert by_day(None, day, day) == [(None, day)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "give at least one of"),
        (("--patient", "P*"), "without wildcards"),
        (("--study", "x"), "not a Study Instance UID"),
        (("--since", "20260101x"), "YYYY-MM-DD"),
        (("--since", "2026-02-01", "--until", "2026-01-01"), "before --since"),
        (("--priors", "--patient", "P1"), "excludes"),
        (("--patient", "P1", "--modality", "C R"), "names such as"),
        (("--patient", "P1", "--how", "push"), "get or move"),
    ],
)
def test_a_wrong_option_is_reported_in_one_line(site, words, says):
    answer = pull(site, "--from", "X@127.0.0.1:1", *words, code=1)
    assert says in answer and len(answer.strip().splitlines()) == 1


@pytest.mark.parametrize("source", ["PACS", "pacs:104", "PACS@host:99999"])
def test_an_invalid_peer_is_reported_with_the_setting(site, source):
    assert "node.peers" in pull(site, "--from", source, "--patient", "P1", code=1)


def test_a_peer_that_is_down_is_reported_without_retries(site):
    started = time.monotonic()
    assert "does not answer" in pull(site, "--from", "X@127.0.0.1:9", "--patient", "P1", code=1)
    assert "does not answer" in pull(site, "--from", "http://127.0.0.1:9/dicom-web", "--patient", "P1", code=1)
    assert time.monotonic() - started < 15


def test_move_without_a_running_node_names_the_command_to_start(site):
    assert "start `cxrloop serve`" in pull(site, "--from", "X@127.0.0.1:9", "--patient", "P1", "--how", "move", code=1)


def test_move_from_a_peer_that_our_node_rejects_names_the_setting(tmp_path):
    site = make_site(tmp_path / "site", node={"allow_aet": ["CR1"]})
    node = Listener(Node(port=site.config.node.port), site.inbox)
    node.start()
    assert "node.allow_aet lacks X" in pull(site, "--from", "X@127.0.0.1:9", "--patient", "P", "--how", "move", code=1)
    assert "127.0.0.1 can't be reached from" in pull(
        site, "--from", "CR1@10.1.2.3:9", "--patient", "P", "--how", "move", code=1
    )
    node.stop()


def test_a_pull_does_not_fill_a_disk_below_its_limit(tmp_path):
    site = make_site(tmp_path / "site", retention={"refuse_free_mb": 1 << 40})
    answer = pull(site, "--from", "X@127.0.0.1:9", "--patient", "P1", code=1)
    assert "retention.refuse_free_mb" in answer


# A scripted archive in memory


class Scripted:
    """An archive of a study; `script` holds the exception of each fetch, None puts the image into the inbox."""

    how = "web"

    def __init__(self, site, images, script):
        self.site, self.held, self.script, self.fetched = site, images, list(script), []

    def __str__(self):
        return "https://scripted"

    def check_connection(self):
        pass

    def studies(self, wanted):
        return [Study("1.2.3", len(self.held))], True

    def session(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def images(self, study_uid, wanted):
        return [Image(study_uid, "1.2.3.4", str(held.SOPInstanceUID), "") for held in self.held]

    def fetch(self, image):
        self.fetched.append(image.sop_uid)
        raised = self.script.pop(0) if self.script else None
        if raised:
            raise raised
        whole = next(held for held in self.held if held.SOPInstanceUID == image.sop_uid)
        path = self.site.root / "run" / "image.dcm"
        whole.save_as(path, enforce_file_format=True)
        self.site.inbox.put_file(path)


def run(site, archive, waits=None, **order):
    waits = [] if waits is None else waits
    with site.ledger() as ledger:
        return Puller(site, ledger, archive, Order((Query(patient="P"),), **order), wait=waits.append).run()


def test_a_busy_archive_is_retried_with_growing_waits(site):
    archive, waits = (
        Scripted(site, [xray(1)], [ArchiveBusy("b"), ArchiveBusy("b"), ArchiveBusy("b", after=50), None]),
        [],
    )
    answer = run(site, archive, waits)
    assert (answer["pulled"], answer["failed"]) == (1, 0)
    assert waits[:3] == [2, 4, 50]


def test_after_all_retries_an_image_is_counted_as_failed_and_the_next_is_fetched(site):
    images = [xray(1), xray(2)]
    archive = Scripted(site, images, [ArchiveBusy("tape is away")] * 6)
    answer = run(site, archive)
    assert (answer["pulled"], answer["failed"], answer["reasons"]) == (1, 1, {"tape is away": 1})
    assert inbox_uids(site) == [images[1].SOPInstanceUID]


def test_an_archive_that_stays_busy_ends_the_run(site):
    with pytest.raises(Problem, match="busy, 6 times in a row"):
        run(site, Scripted(site, [xray(n) for n in range(5)], [ArchiveBusy("busy")] * 99))


def test_an_unusable_archive_ends_the_run_and_the_message_counts_fetched_images(site):
    archive = Scripted(site, [xray(1), xray(2)], [None, ArchiveUnusable("the token ended")])
    with pytest.raises(Problem, match="the token ended; 1 images were fetched, run the same command again"):
        run(site, archive)
    assert run(site, Scripted(site, archive.held, []))["already"] == 1


def test_a_missing_image_is_counted_and_requested_again_in_the_next_run(site):
    images = [xray(1), xray(2)]
    answer = run(site, Scripted(site, images, [ImageMissing("gone"), None]))
    assert (answer["pulled"], answer["failed"], answer["reasons"]) == (1, 1, {"gone": 1})
    again = Scripted(site, images, [])
    answer = run(site, again)
    assert (answer["already"], answer["pulled"], again.fetched) == (1, 1, [images[0].SOPInstanceUID])


def test_a_finished_study_is_not_listed_until_the_archive_has_more_of_it(site):
    archive = Scripted(site, [xray(1)], [])
    run(site, archive)
    archive.images = None  # type: ignore[assignment]
    answer = run(site, archive)
    assert (answer["found"], answer["already"], answer["pulled"]) == (1, 1, 0)
    more = Scripted(site, [*archive.held, xray(2)], [])
    answer = run(site, more)
    assert (answer["found"], answer["already"], answer["pulled"]) == (2, 1, 1)


def test_the_limit_counts_fetched_images_and_the_next_run_resumes(site):
    images = [xray(n) for n in range(5)]
    assert run(site, Scripted(site, images, []), limit=2)["pulled"] == 2
    answer = run(site, Scripted(site, images, []), limit=2)
    assert (answer["already"], answer["pulled"]) == (2, 2)
    assert run(site, Scripted(site, images, []))["pulled"] == 1


@pytest.mark.parametrize("held_open", [5, 0])
def test_the_rate_is_kept_with_the_association_open_or_closed_between_images(site, monkeypatch, held_open):
    monkeypatch.setattr(pulling, "HOLD_S", held_open)
    archive = Scripted(site, [xray(n) for n in range(4)], [])
    with site.ledger() as ledger:
        answer = Puller(site, ledger, archive, Order((Query(patient="P"),), per_minute=300)).run()
    assert answer["pulled"] == 4 and answer["seconds"] >= 0.6


def test_a_pull_waits_for_a_full_inbox_and_ends_when_the_intake_is_dead(site, monkeypatch):
    monkeypatch.setattr(pulling, "MOST_WAITING", 2)
    with pytest.raises(Problem, match="2 images wait in the inbox"):
        run(site, Scripted(site, [xray(n) for n in range(4)], []))
    assert len(inbox_uids(site)) == 2
    with site.ledger() as ledger:
        take_in(site, ledger)
    with pytest.raises(Problem):
        run(site, Scripted(site, [xray(n) for n in range(5)], []))
    assert len(inbox_uids(site)) == 2


def test_the_outcome_of_the_intake_is_reported(site):
    with site.ledger() as ledger:
        archive = Scripted(site, [xray(1), xray(2, body_part="KNEE")], [])
        puller = Puller(site, ledger, archive, Order((Query(patient="P"),)), wait=lambda s: take_in(site, ledger))
        answer = puller.run()
    assert {key: answer[key] for key in ("stored", "rejected", "quarantined", "duplicate", "waiting")} == {
        "stored": 1, "rejected": 1, "quarantined": 0, "duplicate": 0, "waiting": 0
    }  # fmt: skip


def test_a_refused_patients_image_is_reported_as_rejected_and_leaves_no_uid(site):
    unwanted = xray(1, "FORGOTTEN")
    study = Study(str(unwanted.StudyInstanceUID), 1)
    archive = Scripted(site, [unwanted], [])
    archive.studies = lambda wanted: ([study], True)  # type: ignore[method-assign]
    with site.ledger() as ledger:
        forget.forget(site, ledger, forget.pseudonyms_of(site, "FORGOTTEN", ()), "a test", "asked for", refuse=True)
        order = Order((Query(patient="FORGOTTEN"),))
        answer = Puller(site, ledger, archive, order, wait=lambda s: take_in(site, ledger)).run()
        assert (answer["pulled"], answer["rejected"], answer["waiting"]) == (1, 1, 0)
        again = Puller(site, ledger, archive, order).run()
    assert (again["already"], again["pulled"]) == (1, 0)
    for path in site.root.glob("ledger.db*"):
        assert study.uid.encode() not in path.read_bytes(), path


def test_a_dry_run_fetches_and_stores_nothing(site):
    archive = Scripted(site, [xray(1)], [])
    for _ in range(2):
        answer = run(site, archive, dry_run=True)
        assert (answer["found"], answer["already"], answer["pulled"], archive.fetched) == (1, 0, 0, [])


def test_an_image_is_known_in_the_inbox_and_in_the_ledger(site):
    with site.ledger() as ledger:
        known, image = KnownImages(site, ledger), xray(1)
        assert image.SOPInstanceUID not in known
        site.inbox.put_file(_saved(site, image))
        assert image.SOPInstanceUID in known
        take_in(site, ledger)
        assert site.inbox.waiting() == [] and image.SOPInstanceUID in known


def test_patient_ids_come_from_the_originals_once_per_patient(site):
    with site.ledger() as ledger:
        for n, who in enumerate(("A", "A", "B", "UNKNOWN")):
            site.inbox.put_file(_saved(site, xray(n, patient=who)))
        take_in(site, ledger)
        assert sorted(patient_ids(site, ledger)) == ["A", "B"]  # type: ignore[type-var]
        lost = ledger.value("SELECT original FROM image WHERE id = 3")
        (site.root / "store" / lost).unlink()
        assert set(patient_ids(site, ledger)) == {"A", None}


def _saved(site, ds):
    path = site.root / "run" / "image.dcm"
    ds.save_as(path, enforce_file_format=True)
    return path
