"""Settings: every key commented, unknown keys named with the nearest, wrong values said with what is allowed."""

import re
import subprocess
import sys

import pytest

from agent.errors import Problem
from agent.rounds.planning import resolve_recipe
from agent.site import config
from agent.site.site import Site, init


def test_the_template_loads_back_to_what_it_was_made_of_and_comments_every_key():
    text = config.template(config.Config())
    assert config.checked(__import__("tomllib").loads(text)) == config.Config()
    lines = text.splitlines()
    keys = [n for n, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    assert len(keys) > 30
    assert all(lines[n - 1].startswith("# ") for n in keys)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"gate": {"marjin": 0.02}}, "unknown key gate.marjin = 0.02; nearest: gate.margin"),
        ({"gatt": {}}, "nearest: gate;"),
        ({"gate": {"looks_per_yaer": 4}}, "unknown key gate.looks_per_yaer = 4; nearest: gate.evaluations_per_year"),
        ({"gate": {"evaluation_per_year": 4}}, "nearest: gate.evaluations_per_year"),
        ({"gate": {"looks_per_year": 0}}, "gate.evaluations_per_year = 0"),
        ({"learn": {"window": "25:00-05:00"}}, 'learn.window = "25:00-05:00"'),
        ({"learn": {"window": "05:00-05:00"}}, "start and end differ"),
        ({"node": {"port": "11112"}}, 'node.port = "11112"'),
        ({"node": {"port": 0}}, "node.port = 0"),
        ({"site": {"timezone": "Europe/Wien"}}, "an IANA time zone, nearest: Europe/"),
        ({"site": {"findings": ["a", "a"]}}, "each finding may be named once only"),
        ({"gate": {"must_show": ["nodule"]}}, "'nodule' is not one"),
        ({"patients": {"golden": 0.9, "validation": 0.5}}, "at least 0.05 of the patients"),
        ({"release": {"promote": "auto"}}, "release.promote"),
        ({"results": {"sr": True}}, "sr and sc need a destination"),
        ({"results": {"destination": "PACS:104"}}, "AET@host:port"),
        ({"node": {"peers": ["PACS@host:0"]}}, "AET@host:port"),
        ({"node": {"tls_cert": "x.pem"}}, "tls_cert and tls_key together"),
        ({"infer": {"host": "0.0.0.0"}}, "infer.host"),
    ],
)
def test_a_wrong_setting_is_one_line_with_key_value_and_what_is_allowed(raw, said):
    with pytest.raises(Problem) as error:
        config.checked(raw)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_renamed_key_is_read_under_its_old_name_with_a_warning(caplog):
    settings = config.checked({"gate": {"looks_per_year": 4}}, "appliance.toml: ")
    assert settings.gate.evaluations_per_year == 4
    assert [record.getMessage() for record in caplog.records] == [
        "appliance.toml: gate.looks_per_year is now gate.evaluations_per_year: rename it; the next version does not read the old name"
    ]


def test_a_key_under_its_old_and_its_new_name_is_an_error():
    with pytest.raises(Problem, match=r"are the same setting: remove gate\.looks_per_year, the old name"):
        config.checked({"gate": {"looks_per_year": 4, "evaluations_per_year": 4}})


def test_every_renamed_key_has_a_successor_and_is_gone_itself():
    for old, new in config.RENAMED.items():
        section, key = new.split(".")
        keys = type(getattr(config.Config(), section)).model_fields
        assert key in keys
        assert old.split(".")[0] == section
        assert old.split(".")[1] not in keys


def test_a_command_warns_once_of_a_renamed_key_and_shows_the_new_one(tmp_path):
    init(tmp_path / "s", config.Config())
    settings = tmp_path / "s/appliance.toml"
    settings.write_text(settings.read_text().replace("evaluations_per_year = 52", "looks_per_year = 4"))
    done = cli("config", "show", "--config", str(settings))
    assert done.returncode == 0
    assert "evaluations_per_year = 4" in done.stdout
    assert "looks_per_year = " not in done.stdout
    assert done.stderr.count("\n") == 1
    assert "gate.looks_per_year is now gate.evaluations_per_year" in done.stderr


def test_init_makes_a_site_once_and_keeps_keys_private(tmp_path):
    site = init(tmp_path / "s", config.Config())
    assert site.key("pseudonym.key") != init(tmp_path / "t", config.Config()).key("pseudonym.key")
    assert (tmp_path / "s/keys/pseudonym.key").stat().st_mode & 0o077 == 0
    assert (tmp_path / "s/keys/signing.key").stat().st_mode & 0o077 == 0
    with pytest.raises(Problem, match="already holds a site"):
        init(tmp_path / "s", config.Config())
    (tmp_path / "s/keys/pseudonym.key").unlink()
    with pytest.raises(Problem, match="restore it from the backup"):
        Site.open(tmp_path / "s/appliance.toml")


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "agent.cli.main", *words], capture_output=True, text=True)


def test_the_command_line_says_a_wrong_key_in_one_line_and_exits_1(tmp_path):
    init(tmp_path / "s", config.Config())
    settings = tmp_path / "s/appliance.toml"
    settings.write_text(settings.read_text().replace("margin =", "marjin ="))
    done = cli("status", "--config", str(settings))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "gate.margin" in done.stderr


def test_a_missing_settings_file_says_how_to_make_one(tmp_path):
    done = cli("status", "--config", str(tmp_path / "none.toml"))
    assert done.returncode == 1
    assert "cxrloop init DIR" in done.stderr


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (b"base = ", "mine.toml: Invalid value"),
        ("base = 'evolve' # Tür".encode("latin-1"), "mine.toml: 'utf-8' codec can't decode"),
        (b"base = 'evolv'", 'mine.toml: base = "evolv": must be one of'),
        (b"base = 'evolve'\nepoch = 2", "unknown key 'epoch'; did you mean 'epochs'?"),
        (
            b"base = 'evolve'\ncorrect_every = 7",
            "correct_every = 7: evolve does not use this key; leave it out, or use distl",
        ),
        (
            b"base = 'kd'\nkappa = 0.5",
            "kappa = 0.5: kd does not use this key; leave it out, or use evolve or pseudo-label",
        ),
        (None, 'recipe = "mine.toml": no such file under'),
    ],
)
def test_a_recipe_file_that_can_not_be_read_is_refused_in_one_line(tmp_path, written, said):
    site = init(tmp_path / "site", config.Config())
    if written is not None:
        (site.root / "mine.toml").write_bytes(written)
    with pytest.raises(Problem, match=re.escape(said)):
        resolve_recipe(site, "mine.toml")
