"""The settings of a site: strict TOML, read whole or rejected with the key that is wrong.

`agent.site.settings` says what each key means. Must not import the ledger.
"""

import difflib
import json
import logging
import tomllib
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from pydantic import ValidationError, model_validator

from agent.errors import Problem
from agent.site.settings import (
    AdmissionKeys,
    GateKeys,
    InferKeys,
    LearnKeys,
    NodeKeys,
    PatientKeys,
    ReleaseKeys,
    ResultsKeys,
    RetentionKeys,
    Section,
    SiteKeys,
)
from agent.site.settings_file import config_path

log = logging.getLogger("cxrloop")

# Keys of an earlier version and their names now: still read for one version, with a warning.
RENAMED = {"gate.looks_per_year": "gate.evaluations_per_year"}

__all__ = ["Config", "checked", "config_path", "load", "template", "zone"]


class Config(Section):
    """The whole appliance.toml."""

    site: SiteKeys = SiteKeys()  # pyright: ignore[reportCallIssue]
    node: NodeKeys = NodeKeys()  # pyright: ignore[reportCallIssue]
    admission: AdmissionKeys = AdmissionKeys()  # pyright: ignore[reportCallIssue]
    infer: InferKeys = InferKeys()  # pyright: ignore[reportCallIssue]
    patients: PatientKeys = PatientKeys()  # pyright: ignore[reportCallIssue]
    learn: LearnKeys = LearnKeys()  # pyright: ignore[reportCallIssue]
    gate: GateKeys = GateKeys()  # pyright: ignore[reportCallIssue]
    release: ReleaseKeys = ReleaseKeys()  # pyright: ignore[reportCallIssue]
    results: ResultsKeys = ResultsKeys()  # pyright: ignore[reportCallIssue]
    retention: RetentionKeys = RetentionKeys()  # pyright: ignore[reportCallIssue]

    @model_validator(mode="after")
    def must_show_are_findings(self) -> "Config":
        unknown = [name for name in self.gate.must_show if name not in self.site.findings]
        if unknown:
            raise ValueError(f"gate.must_show: only names of site.findings; {unknown[0]!r} is not one")
        return self


def zone(config: Config) -> ZoneInfo:
    """Return the site's time zone."""
    return ZoneInfo(config.site.timezone)


def load(path: Path) -> Config:
    """Read and check a settings file; raises Problem naming key, value, what is allowed and the nearest name."""
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Problem(f"{path}: not TOML: {error}") from None
    return checked(raw, f"{path}: ")


def checked(raw: dict[str, Any], where: str = "") -> Config:
    """Return the settings of plain values; raises Problem at the first wrong key, with `where` in front."""
    try:
        return Config.model_validate_json(json.dumps(_renamed(raw, where), default=str), strict=True)
    except ValidationError as error:
        raise Problem(where + _explain(error.errors()[0])) from None


def _renamed(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the values under the names of this version; raises Problem when a key is there under both names."""
    values = {name: dict(keys) if isinstance(keys, dict) else keys for name, keys in raw.items()}
    for old, new in RENAMED.items():
        (section, old_key), (_, new_key) = old.split("."), new.split(".")
        keys = values.get(section)
        if not isinstance(keys, dict) or old_key not in keys:
            continue
        if new_key in keys:
            raise Problem(f"{where}{old} and {new} are the same setting: remove {old}, the old name")
        log.warning("%s%s is now %s: rename it; the next version does not read the old name", where, old, new)
        keys[new_key] = keys.pop(old_key)
    return values


def _explain(error: Any) -> str:
    where = [str(part) for part in error["loc"]]
    key = ".".join(where) or "settings"
    if error["type"] == "extra_forbidden":
        known = list(Config.model_fields) if len(where) == 1 else list(_section(where[0]).model_fields)
        old = [name.split(".")[1] for name in RENAMED if name.split(".")[0] == where[0]] if len(where) > 1 else []
        near = difflib.get_close_matches(where[-1], [*known, *old], 1, cutoff=0.0)
        nearest = ".".join([*where[:-1], *near])
        nearest = RENAMED.get(nearest, nearest)
        return f"unknown key {key} = {_short(error['input'])}; nearest: {nearest}; allowed: {', '.join(known)}"
    message = error["msg"].removeprefix("Value error, ")
    fields = _section(where[0]).model_fields if where and where[0] in Config.model_fields else {}
    about = fields[where[1]].description if len(where) > 1 and where[1] in fields else ""
    return f"{key} = {_short(error['input'])}: {message}" + (f" ({about})" if about else "")


def _section(name: str) -> type[Section]:
    return Config.model_fields[name].annotation  # pyright: ignore[reportReturnType]


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def template(config: Config) -> str:
    """Return the text of a settings file, every key preceded by its description."""
    lines = ["# cxrloop: the settings of this appliance. `cxrloop config show` prints them as they are read."]
    for name, field in Config.model_fields.items():
        section = getattr(config, name)
        about = (field.annotation.__doc__ or "").strip().splitlines()[0]  # pyright: ignore[reportOptionalMemberAccess]
        lines += ["", f"# {about}", f"[{name}]"]
        for key, spec in type(section).model_fields.items():
            value = getattr(section, key)
            shown = list(value) if isinstance(value, tuple) else value
            lines += [f"# {spec.description}", f"{key} = {json.dumps(shown, ensure_ascii=False)}"]
    return "\n".join(lines) + "\n"
