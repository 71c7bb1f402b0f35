"""The pool of unlabelled images: a sample that no patient, device or copied image can fill."""

import hashlib
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, shift

from agent.erasure import forget
from agent.images import pool
from agent.ledger.database import utc
from agent.rounds import planning
from agent.service.scheduler import housekeeping
from agent.site import splits
from dicom.phantom import phantom
from dicom.pixels import near_duplicate
from dicom.pixels.letterbox import letterbox
from learner.round.manifest import read_manifest
from tests.conftest import make_site
from tests.support.agent.images import pixels, put, take_in, xray
from tests.support.agent.rounds import labelled_site
from tests.support.agent.scans import full_scans

NOW = datetime.now(UTC)
HOSTILE = 10_000


def with_learn(site, **keys):
    learn = site.config.learn.model_copy(update=keys)
    return replace(site, config=site.config.model_copy(update={"learn": learn}))


def pattern(seed):
    return letterbox(pixels(seed).astype(np.float32))


def chest(one):
    return letterbox(one.pixels().astype(np.float32) / phantom.TOP * 255)


def add(site, ledger, plates, patient, scanner, at=NOW):
    """Add an image of the train range for each plate or place of a plate, as the intake does; return their ids."""
    images = []
    with ledger.transaction():
        for plate in plates:
            number = ledger.value("SELECT count(*) FROM image")
            sha256 = hashlib.sha256(f"{number}".encode()).hexdigest()
            place = plate if isinstance(plate, str) else site.store.keep_plate(plate, sha256)
            images.append(ledger.insert(
                "image", sha256=sha256, state="stored", sop_uid=f"1.2.{number}", study_uid=f"1.3.{number}",
                patient_key=patient or f"p{number:016x}", range="train", view="PA", received_at=utc(at),
                stored_at=utc(at), scanner=scanner, plate=place, plate_version=1, original=f"originals/{sha256[:2]}/{sha256}.dcm",
            ))  # fmt: skip
    return images


def drawn(site, ledger):
    return pool.draw(site, ledger, NOW, {})


def test_ten_thousand_copies_from_one_sender_change_less_than_a_hundredth_of_the_pool(site):
    """Each copy has a patient of its own, and is noised, brightened, blurred or shifted."""
    site = with_learn(site, max_unlabelled=200)
    rng = np.random.default_rng(0)
    people = [chest(one) for one in phantom.draw(240, 3, repeat=0)]
    copies = []
    for number in range(100):
        copy = shift(people[0].astype(float), rng.uniform(-3, 3, 2), order=1, mode="nearest")
        copy = gaussian_filter(copy, rng.uniform(0, 2)) * rng.uniform(0.8, 1.2) + rng.normal(0, 6, copy.shape)
        copies.append(site.store.keep_plate(np.clip(copy, 0, 255).astype(np.uint8), f"{number:064x}"))
    with site.ledger() as ledger:
        for place, plate in enumerate(people):
            add(site, ledger, [plate], None, f"scanner {place % 3}")
        before = drawn(site, ledger)
        hostile = set(add(site, ledger, copies * (HOSTILE // len(copies)), None, "scanner 0"))
        after = drawn(site, ledger)
    assert len(before) == len(after) == 200
    assert len(set(before) - set(after)) < 0.01 * len(before)
    assert len(hostile & set(after)) < 0.01 * len(before)


def test_a_patient_with_forty_images_has_four_in_the_pool(site):
    with site.ledger() as ledger:
        others = add(site, ledger, map(pattern, range(5)), None, "A")
        forty = add(site, ledger, map(pattern, range(100, 140)), "p" + "f" * 16, "A")
        chosen = drawn(site, ledger)
        assert set(others) <= set(chosen)
        assert len(set(forty) & set(chosen)) == 4
        assert pool.draw(site, ledger, NOW, {"p" + "f" * 16: 3}).keys() - set(others) <= set(
            forty
        )  # three are labelled
        assert len(pool.draw(site, ledger, NOW, {"p" + "f" * 16: 3})) == len(others) + 1


def test_a_busy_device_gets_its_share_and_the_places_that_the_others_leave_free(site):
    with site.ledger() as ledger:
        busy = add(site, ledger, map(pattern, range(90)), None, "busy")
        quiet = add(site, ledger, map(pattern, range(90, 100)), None, "quiet")
        few = Counter(drawn(with_learn(site, max_unlabelled=16), ledger).values())
        assert few == {"pool: device busy": 8, "pool: device quiet": 8}
        more = drawn(with_learn(site, max_unlabelled=40), ledger)
        assert set(quiet) <= set(more)
        why = Counter(more[image] for image in busy if image in more)
        assert why == {"pool: device busy": 20, "pool: device busy, in a place that other devices left free": 10}


def test_the_draw_is_the_same_each_time_and_another_with_another_key(site):
    small = with_learn(site, max_unlabelled=20)
    with site.ledger() as ledger:
        images = add(site, ledger, map(pattern, range(60)), None, "A")
        first = drawn(small, ledger)
        assert drawn(small, ledger) == first
        assert set(first) != set(images[-20:])  # not the newest
        with ledger.transaction():  # as a site with another key would hold them
            ledger.run("INSERT INTO pool_waiting SELECT id FROM image")
            ledger.run("DELETE FROM pool_image")
        (site.root / "keys" / "pseudonym.key").write_bytes(bytes(32))
        assert set(drawn(small, ledger)) != set(first)


@pytest.mark.parametrize(("half_life", "least", "most"), [(0, 30, 70), (30, 0, 28)])
def test_old_images_are_rarer_by_the_half_life(site, half_life, least, most):
    """Half of the images are 90 days old: three half-lives make an odds ratio of eight."""
    chosen_site = with_learn(site, max_unlabelled=100, pool_half_life_days=half_life)
    place = site.store.keep_plate(pattern(1), "0" * 64)
    with site.ledger() as ledger:
        old = add(site, ledger, [place] * 500, None, "A", NOW - timedelta(days=90))
        add(site, ledger, [place] * 500, None, "B")
        while pool.step(site, ledger):
            pass
        with ledger.transaction():  # the plates are one: this test is about age
            ledger.run("UPDATE pool_image SET copy_of = NULL")
        chosen_site = with_learn(chosen_site, pool_device_share=1.0)
        assert least <= len(set(old) & set(drawn(chosen_site, ledger))) <= most


def test_a_forgotten_image_leaves_the_pool_and_its_copy_takes_its_place(site):
    with site.ledger() as ledger:
        first, other = pattern(1), pattern(2)
        (mine,) = add(site, ledger, [first], "p" + "a" * 16, "A")
        copy, unlike = add(site, ledger, [first, other], None, "A")
        assert set(drawn(site, ledger)) == {mine, unlike}
        forget.forget(site, ledger, ["p" + "a" * 16], "Dr Osei", "asked", refuse=False)
        for table in ("pool_image", "pool_band", "pool_waiting"):
            assert ledger.value(f"SELECT count(*) FROM {table} WHERE image = ?", mine) == 0
        assert set(drawn(site, ledger)) == {copy, unlike}


def test_an_image_with_a_corrected_header_takes_the_place_of_the_first(tmp_path):
    site = make_site(tmp_path / "site", patients=dict.fromkeys(splits.RESERVED, 0.0))
    with site.ledger() as ledger:
        wrong = xray(1, view="AP")
        put(site, wrong, "wrong.dcm")
        take_in(site, ledger)
        first = ledger.value("SELECT id FROM image")
        assert set(drawn(site, ledger)) == {first}
        wrong.ViewPosition = "PA"
        put(site, wrong, "right.dcm")
        take_in(site, ledger)
        assert ledger.value("SELECT superseded_by FROM image WHERE id = ?", first)
        assert set(drawn(site, ledger)) == {ledger.value("SELECT max(id) FROM image")}


def test_housekeeping_keeps_the_pool_up_to_date(site):
    with site.ledger() as ledger:
        add(site, ledger, map(pattern, range(3)), None, "A")
        assert housekeeping(site, NOW) == "done"
        assert ledger.value("SELECT count(*) FROM pool_image") == 3
        assert ledger.value("SELECT count(*) FROM pool_waiting") == 0


def test_an_image_costs_no_scan_of_the_pool(site):
    with site.ledger() as ledger:
        add(site, ledger, map(pattern, range(4)), None, "A")
        assert full_scans(ledger, lambda: pool.step(site, ledger)) == []


def test_an_image_whose_plate_is_lost_is_drawn_without_a_code(site):
    with site.ledger() as ledger:
        (image,) = add(site, ledger, [pattern(1)], None, "A")
        site.store.path(ledger.value("SELECT plate FROM image")).unlink()
        assert set(drawn(site, ledger)) == {image}
        assert ledger.value("SELECT code FROM pool_image") is None


def test_the_manifest_says_why_each_image_is_in(tmp_path):
    site = labelled_site(tmp_path)
    with site.ledger() as ledger:
        (new,) = add(site, ledger, [pattern(500)], None, "Siemens Ysio")
        planned = planning.plan(site, ledger, "now", NOW)
        written = read_manifest(site.rounds / planned.name)
    why = {row["image"]: row["why"] for row in written["images"]}
    assert why.pop(new) == "pool: device Siemens Ysio"
    assert set(why.values()) == {"labelled"}


def test_near_duplicates_are_near_and_other_patients_are_not():
    key, rng = bytes(32), np.random.default_rng(1)
    plates = [chest(one) for one in phantom.draw(20, 5, repeat=0)]
    codes = [near_duplicate.code(plate, key) for plate in plates]
    for plate, code in zip(plates, codes, strict=True):
        noised = np.clip(plate * 0.8 + rng.normal(0, 10, plate.shape), 0, 255).astype(np.uint8)
        assert near_duplicate.distance(code, near_duplicate.code(noised, key)) <= near_duplicate.LIMIT
    apart = [near_duplicate.distance(a, b) for n, a in enumerate(codes) for b in codes[:n]]
    assert np.median(apart) > 1.5 * near_duplicate.LIMIT


def test_codes_of_two_keys_have_nothing_in_common():
    plate = chest(phantom.draw(1, 5)[0])
    apart = near_duplicate.distance(near_duplicate.code(plate, bytes(32)), near_duplicate.code(plate, bytes([1] * 32)))
    assert 200 < apart < 312  # 256 of 512 independent bits, with five standard deviations
