"""What a new round starts from, and how its manifest is changed later."""

import json
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from safetensors.numpy import save_file

from agent.errors import Problem
from agent.ledger.database import utc
from agent.rounds import inspection, planning, training
from cxrloop.durable import write_json
from learner.round import manifest
from learner.round.backbone_file import content_hash
from tests.support.agent.models import passed
from tests.support.agent.rounds import labelled_site


def backbone_file(path, value: float, **metadata: str) -> str:
    """Write a file with one tensor of this value; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"cls_token": np.full((1, 1, 4), value, np.float32)}, path, metadata or None)
    return str(path)


def planned_parent(site, first: dict, named: str, findings: list[str]) -> tuple:
    """Plan a round of a site whose model in service was trained with the recipe keys `first`; return its parent twice."""
    parts = site.rounds / "r0001" / "t0"
    parts.mkdir(parents=True)
    write_json(parts / "card.json", {"recipe": first, "findings": findings})
    (parts / "state.safetensors").touch()
    learn = site.config.learn.model_copy(update={"backbone": named})
    site = replace(site, config=site.config.model_copy(update={"learn": learn}))
    with site.ledger() as ledger:
        with ledger.transaction():
            ledger.insert("bundle", id="b" * 12, state="live", is_baseline=1,
                          training_state="rounds/r0001/t0/state.safetensors", created_at=utc())  # fmt: skip
        planned = planning.plan(site, ledger, "now", datetime.now(UTC))
        return planned.parent, manifest.read_manifest(site.rounds / planned.name)


KEPT = ("b" * 12, {"bundle": "b" * 12, "state": "../../rounds/r0001/t0/state.safetensors"})


@pytest.mark.parametrize(
    ("first", "named", "new", "fresh"),
    [
        ("random", "random", [], False),
        ("random", "random", ["nodule"], True),
        ("random", "rounds/r0001/backbone.safetensors", [], True),  # what `pretrain` left
        ("other.safetensors", "mine.safetensors", [], True),  # other tensors
        ("copy.safetensors", "mine.safetensors", [], False),  # the same tensors under another name
        ("vit_tiny_patch16_224", "random", [], False),
        ("vit_tiny_patch16_224", "vit_small_patch16_224", [], True),
        ("/moved/since/mine.safetensors", "mine.safetensors", [], False),
    ],
)
def test_a_round_starts_fresh_with_another_backbone_or_other_findings(tmp_path, first, named, new, fresh):
    site = labelled_site(tmp_path)
    for name, value in (("other", 1.0), ("mine", 2.0), ("copy", 2.0)):
        backbone_file(site.root / f"{name}.safetensors", value)
    first = str(site.root / first) if first.endswith(".safetensors") else first
    parent, written = planned_parent(site, {"backbone": first}, named, [*site.findings, *new])
    assert (parent, written["parent"]) == ((None, None) if fresh else KEPT)


@pytest.mark.parametrize(("now", "fresh"), [(1.0, False), (2.0, True)])
def test_the_content_of_a_backbone_file_decides_not_its_name(tmp_path, now, fresh):
    """The file was replaced, or written anew with other metadata, since the parent's round was planned."""
    site = labelled_site(tmp_path)
    path = site.root / "mine.safetensors"
    first = {"backbone": backbone_file(path, 1.0), "backbone_sha256": content_hash(path)}
    backbone_file(path, now, licence="mit")
    parent, written = planned_parent(site, first, "mine.safetensors", [*site.findings])
    assert (parent is None) == fresh
    assert written["recipe"]["backbone"] == str(path)
    assert (written["recipe"]["backbone_sha256"] == first["backbone_sha256"]) == (not fresh)


def test_a_damaged_backbone_file_is_named_and_nothing_is_planned(tmp_path):
    site = labelled_site(tmp_path)
    (site.root / "mine.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(Problem, match=r"mine\.safetensors: not a safetensors file"):
        planned_parent(site, {"backbone": "random"}, "mine.safetensors", [*site.findings])
    assert not (site.rounds / "r0002").exists()


def test_a_round_whose_parent_lost_its_training_state_starts_fresh_and_says_so(tmp_path):
    site = labelled_site(tmp_path)
    with site.ledger() as ledger:
        first = training.carry_on(site, ledger, planning.plan(site, ledger, "now", datetime.now(UTC)))
        passed(ledger, first.name)
        (site.rounds / "r0001" / "final" / "state.safetensors").unlink()
        second = training.carry_on(site, ledger, planning.plan(site, ledger, "now", datetime.now(UTC)))
        note = "the parent's training state rounds/r0001/final/state.safetensors is missing, so the round starts fresh"
        assert (second.state, second.parent) == ("not_evaluated", None)
        assert second.reason.startswith(f"{note}; no evaluation is due")
        assert json.loads((site.rounds / "r0002" / "result.json").read_text())["notes"] == [note]
        assert note in inspection.learning(site.rounds / "r0002")["notes"]


def test_a_manifest_of_version_1_is_read_with_todays_keys_and_keeps_its_own_when_the_window_changes(tmp_path):
    old = {"version": 1, "round": "r0001", "until": None, "films": [{"image": 7}]}
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    assert manifest.read_manifest(tmp_path) == {
        "version": 3, "round": "r0001", "until": None, "notes": [], "images": [{"why": None, "image": 7}]
    }  # fmt: skip
    manifest.set_until(tmp_path, "2026-01-10T05:00:00.000Z")
    assert json.loads((tmp_path / "manifest.json").read_text()) == old | {"until": "2026-01-10T05:00:00.000Z"}


def test_the_manifest_names_view_and_scanner_of_each_image_as_the_ledger_has_them(tmp_path):
    site = labelled_site(tmp_path)
    with site.ledger() as ledger:
        with ledger.transaction():
            ledger.run("UPDATE image SET scanner = 'Acme DX 1' WHERE id % 2")
        planned = planning.plan(site, ledger, "now", datetime.now(UTC))
        kept = {row["id"]: (row["view"], row["scanner"]) for row in ledger.rows("SELECT id, view, scanner FROM image")}
    images = manifest.load(site.rounds / planned.name).samples
    assert {image.image: (image.view, image.scanner) for image in images}.items() <= kept.items()
    assert {image.view for image in images} == {"PA"} and "Acme DX 1" in {image.scanner for image in images}
