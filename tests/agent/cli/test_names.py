"""Names of version 0.1 that this version still takes, each with a warning."""

import json

from tests.support.agent.appliance import Appliance


def test_studies_is_an_alias_of_images_that_warns(site):
    ask = Appliance(site).run
    old, new = ask("studies", "ls"), ask("images", "ls")
    assert json.loads(old.stdout) == json.loads(new.stdout) == []
    assert old.stderr == "`studies` is now `images`; the old name goes away in the next version\n"
    assert new.stderr == ""


def test_status_has_the_evaluations_left_under_both_names(site):
    gate = json.loads(Appliance(site).run("status").stdout)["gate"]
    assert gate["evaluations_left"] == gate["looks_left"] == site.config.gate.evaluations_per_year
