"""What a new round starts from, and how its manifest is changed later."""

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from agent.ledger.database import utc
from agent.rounds import planning
from cxrloop.durable import write_json
from learner.round import manifest
from tests.support.agent.rounds import labelled_site


@pytest.mark.parametrize(
    ("first", "named", "new", "fresh"),
    [
        ("random", "random", [], False),
        ("random", "random", ["nodule"], True),
        ("random", "rounds/r0001/backbone.safetensors", [], True),  # what `pretrain` left
        ("other.safetensors", "mine.safetensors", [], True),
        ("vit_tiny_patch16_224", "random", [], False),
        ("/moved/since/mine.safetensors", "mine.safetensors", [], False),
    ],
)
def test_a_round_starts_fresh_with_another_backbone_or_other_findings(tmp_path, first, named, new, fresh):
    site = labelled_site(tmp_path)
    first = str(site.root / first) if first.endswith(".safetensors") else first
    for name in ("other.safetensors", "mine.safetensors"):
        (site.root / name).touch()
    parts = site.rounds / "r0001" / "t0"
    parts.mkdir(parents=True)
    write_json(parts / "card.json", {"recipe": {"backbone": first}, "findings": [*site.findings, *new]})
    learn = site.config.learn.model_copy(update={"backbone": named})
    site = replace(site, config=site.config.model_copy(update={"learn": learn}))
    with site.ledger() as ledger:
        with ledger.transaction():
            ledger.insert("bundle", id="b" * 12, state="live", is_baseline=1,
                          training_state="rounds/r0001/t0/state.safetensors", created_at=utc())  # fmt: skip
        planned = planning.plan(site, ledger, "now", datetime.now(UTC))
        written = manifest.read_manifest(site.rounds / planned.name)
    assert (planned.parent, written["parent"]) == (
        (None, None) if fresh else ("b" * 12, {"bundle": "b" * 12, "state": "../../rounds/r0001/t0/state.safetensors"})
    )


def test_a_manifest_of_version_1_is_read_with_todays_keys_and_keeps_its_own_when_the_window_changes(tmp_path):
    old = {"version": 1, "round": "r0001", "until": None, "films": [{"image": 7}]}
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    assert manifest.read_manifest(tmp_path) == {"version": 2, "round": "r0001", "until": None, "images": [{"image": 7}]}
    manifest.set_until(tmp_path, "2026-01-10T05:00:00.000Z")
    assert json.loads((tmp_path / "manifest.json").read_text()) == old | {"until": "2026-01-10T05:00:00.000Z"}
