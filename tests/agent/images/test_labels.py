"""Labels: all rows or none, the rank of their sources, and the counts."""

import pytest

from agent.errors import Problem
from agent.images import labels
from agent.rounds import golden_set
from tests.support.agent.images import put, take_in, xray


@pytest.fixture
def stocked(site):
    """A site with 12 images; the SOP Instance UIDs in the order of their images."""
    for seed in range(12):
        put(site, xray(seed), f"{seed}.dcm")
    with site.ledger() as ledger:
        take_in(site, ledger)
        yield site, ledger, [row["sop_uid"] for row in ledger.rows("SELECT sop_uid FROM image ORDER BY id")]


def write(tmp_path, text):
    path = tmp_path / "labels.csv"
    path.write_text(text, "utf-8")
    return path


def test_labels_are_added_once_even_if_the_file_is_imported_twice(stocked, tmp_path):
    site, ledger, uids = stocked
    path = write(
        tmp_path,
        f"sop_uid,finding,value\n{uids[0]},effusion,1\n{uids[0]},opacity,0\n{uids[1]},effusion,\n9.9,effusion,1\n",
    )
    first = labels.import_csv(site, ledger, path, "test")
    assert first == {"rows": 4, "added": 2, "unknown_images": 1, "conflicts": 0}
    assert labels.import_csv(site, ledger, path, "test")["added"] == 0
    assert ledger.counters()["labelled"] == 1


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{uid},efusion,1", "2: finding 'efusion'"),
        ("{uid},effusion,yes", "2: value 'yes'"),
        (",effusion,1", "2: sop_uid is empty"),
        ("{uid},effusion", "2: more or fewer fields"),
    ],
)
def test_a_bad_row_writes_nothing_and_names_its_line(stocked, tmp_path, row, why):
    site, ledger, uids = stocked
    path = write(tmp_path, f"sop_uid,finding,value\n{row.format(uid=uids[0])}\n{uids[1]},effusion,1\n")
    with pytest.raises(Problem, match=why):
        labels.import_csv(site, ledger, path, "test")
    assert ledger.value("SELECT count(*) FROM label") == 0


def test_a_header_without_the_needed_columns_is_refused(stocked, tmp_path):
    site, ledger, _ = stocked
    with pytest.raises(Problem, match="needs `sop_uid` or `file`"):
        labels.import_csv(site, ledger, write(tmp_path, "uid,finding,value\n1,effusion,1\n"), "test")


def test_an_adjudicated_label_outranks_a_radiologist_and_a_radiologist_outranks_a_report(stocked, tmp_path):
    site, ledger, uids = stocked
    for source, value in (("adjudicated", 0), ("radiologist", 1), ("report", 1)):
        text = f"sop_uid,finding,value,source\n{uids[0]},effusion,{value},{source}\n"
        labels.import_csv(site, ledger, write(tmp_path, text), "test")
    assert ledger.row("SELECT value, source FROM label_now") == {"value": 0, "source": "adjudicated"}


def test_the_opposite_label_of_the_same_source_is_a_conflict_and_the_newer_label_counts(stocked, tmp_path):
    site, ledger, uids = stocked
    for value, conflicts in ((1, 0), (0, 1)):
        text = f"sop_uid,finding,value\n{uids[0]},effusion,{value}\n"
        assert labels.import_csv(site, ledger, write(tmp_path, text), "test")["conflicts"] == conflicts
    assert ledger.value("SELECT value FROM label_now") == 0


def test_labels_are_append_only(stocked, tmp_path):
    import sqlite3

    site, ledger, uids = stocked
    labels.import_csv(site, ledger, write(tmp_path, f"sop_uid,finding,value\n{uids[0]},effusion,1\n"), "test")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"), ledger.transaction():
        ledger.run("DELETE FROM label")


def golden_rows(ledger):
    return [row["sop_uid"] for row in ledger.rows("SELECT sop_uid FROM image WHERE range = 'golden'")]


def test_the_golden_set_is_frozen_with_its_labels_and_equal_content_has_one_version(stocked, tmp_path):
    site, ledger, _ = stocked
    uids = golden_rows(ledger)
    with pytest.raises(Problem, match="no labelled image"):
        golden_set.freeze(site, ledger, "test")
    rows = "".join(f"{uid},effusion,{n % 2}\n" for n, uid in enumerate(uids))
    labels.import_csv(site, ledger, write(tmp_path, "sop_uid,finding,value\n" + rows), "test")
    first = golden_set.freeze(site, ledger, "test")
    assert first["version"] == 1
    assert first["images"] == len(uids)
    assert first["positives"]["effusion"] + first["negatives"]["effusion"] == len(uids)
    assert golden_set.freeze(site, ledger, "test") == first
    labels.import_csv(site, ledger, write(tmp_path, f"sop_uid,finding,value\n{uids[0]},effusion,1\n"), "test")
    corrected = golden_set.freeze(site, ledger, "test")
    assert corrected["version"] == 2
    frozen, _ = golden_set.load(site, ledger, 1)
    assert (frozen.labels[:, 1] == 1).sum() == first["positives"][
        "effusion"
    ]  # a correction does not change a frozen set
