"""The settings of a site: strict TOML, every key described once, here.

The description of a key is the comment that `cxrloop init` writes and the text that the error prints.
Knows nothing of the ledger.
"""

import difflib
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo, available_timezones

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from agent.errors import Problem

FINDING = re.compile(r"[A-Za-z][A-Za-z0-9_ -]{0,63}")
WINDOW = re.compile(r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SiteKeys(Section):
    """The hospital, and what the model is asked to find."""

    name: str = Field("my hospital", description="shown in status and reports")
    timezone: str = Field("UTC", description='time zone of every window, e.g. "Europe/Vienna"')
    findings: tuple[str, ...] = Field(
        ("abnormal",), description="the ordered label vocabulary; copied into every bundle", min_length=1
    )

    @field_validator("timezone")
    @classmethod
    def known_zone(cls, value: str) -> str:
        if value not in available_timezones():
            near = difflib.get_close_matches(value, sorted(available_timezones()), 1)
            raise ValueError(f"an IANA time zone{f', nearest: {near[0]}' if near else ''}")
        return value

    @field_validator("findings")
    @classmethod
    def plain_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [name for name in value if not FINDING.fullmatch(name)]
        if wrong:
            raise ValueError(f"names of letters, digits, blank, - and _; {wrong[0]!r} is not")
        if len(set(value)) != len(value):
            raise ValueError("each finding once")
        return value


class NodeKeys(Section):
    """The DICOM node (C-STORE, C-ECHO)."""

    aet: str = Field("CXRLOOP", description="our AE title: 1 to 16 characters", pattern=r"^[ -\[\]-~]{1,16}$")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 opens the node to the network")
    port: int = Field(11112, description="port of the node", ge=1, le=65535)
    allow_aet: tuple[str, ...] = Field((), description="calling AE titles that may send; empty = any")
    allow_ip: tuple[str, ...] = Field((), description="addresses that may connect; empty = any")
    max_associations: int = Field(16, description="associations at once", ge=1, le=256)
    min_free_mb: int = Field(512, description="refuse films (A700) when the disk has less free than this", ge=0)
    tls_cert: str = Field("", description="reserved: TLS is not in this version, keep empty")
    tls_key: str = Field("", description="reserved: TLS is not in this version, keep empty")
    tls_ca: str = Field("", description="reserved: TLS is not in this version, keep empty")

    @field_validator("tls_cert", "tls_key", "tls_ca")
    @classmethod
    def no_tls_yet(cls, value: str) -> str:
        if value:
            raise ValueError("empty in this version: put the node behind a TLS proxy (docs/operating.md)")
        return value


class AdmissionKeys(Section):
    """Which films are scored and learnt from; every other film is kept aside with its reason."""

    children: bool = Field(False, description="admit films whose header says the patient is under 18")
    min_side: int = Field(64, description="smallest side of a film in pixels", ge=32, le=4096)
    decode_seconds: int = Field(60, description="longest time one film may take to decode", ge=1, le=600)
    decode_memory_mb: int = Field(3072, description="most memory one film may take to decode", ge=512)


class InferKeys(Section):
    """The server that scores films (loopback only)."""

    host: Literal["127.0.0.1", "localhost"] = Field("127.0.0.1", description="always loopback")
    port: int = Field(11113, description="port of /predict, /healthz, /readyz and /metrics", ge=1, le=65535)
    provider: Literal["auto", "cuda", "cpu"] = Field(
        "auto", description='"cuda" makes a missing GPU an error, "auto" takes the GPU if there is one'
    )
    threads: int = Field(0, description="threads of one inference; 0 = as many as cores", ge=0)


class PatientKeys(Section):
    """The ranges of patients, fixed at the first film; a share never changes afterwards. The rest trains."""

    golden: float = Field(0.10, description="judged on, never learnt from", ge=0, le=0.9)
    golden_next: float = Field(0.10, description="untouched: the golden set after this one", ge=0, le=0.9)
    calibration: float = Field(0.10, description="temperatures and thresholds", ge=0, le=0.9)
    validation: float = Field(0.10, description="choices made while learning", ge=0, le=0.9)

    @model_validator(mode="after")
    def some_train(self) -> "PatientKeys":
        if self.golden + self.golden_next + self.calibration + self.validation > 0.95:
            raise ValueError("shares that leave at least 0.05 of the patients to train on")
        return self


class LearnKeys(Section):
    """The nightly round."""

    recipe: str = Field("distl", description='name of a recipe, or a TOML file with base = "NAME" and its keys')
    profile: Literal["gpu", "cpu", "demo"] = Field("cpu", description="sizes of the recipe: gpu, cpu or demo")
    backbone: str = Field(
        "random", description='starting weights: "random", a timm name on the hub, or a .safetensors file'
    )
    window: str = Field("22:00-05:00", description='when rounds may run, "HH:MM-HH:MM" in site time; "" = never')
    min_new: int = Field(50, description="skip the night when fewer new films than this may be learnt from", ge=0)
    max_unlabelled: int = Field(20000, description="most films a round takes, newest first", ge=1)
    launcher: str = Field(
        "", description='how the learner is started, e.g. "torchrun --nproc-per-node 4"; empty = plain'
    )

    @field_validator("window")
    @classmethod
    def hours(cls, value: str) -> str:
        if value and not WINDOW.fullmatch(value):
            raise ValueError('"HH:MM-HH:MM", 00:00 to 23:59, or "" for no nights')
        if value and value[:5] == value[6:]:
            raise ValueError("a window whose start and end differ")
        return value


class GateKeys(Section):
    """What a new model must show on the golden set before a person may approve it."""

    margin: float = Field(0.02, description="largest loss of AUC per finding that is acceptable", gt=0, lt=0.5)
    alpha: float = Field(0.05, description="one-sided error a year, spent over all looks", gt=0, lt=0.5)
    looks_per_year: int = Field(52, description="looks planned in a year; each costs alpha / looks", ge=1, le=366)
    must_show: tuple[str, ...] = Field((), description="findings that must be shown; empty = all")
    min_class: int = Field(100, description="cases of the smaller class a finding needs to be decided", ge=2)
    require_better: bool = Field(True, description="also ask for superiority somewhere (macro AUC or a finding)")


class ReleaseKeys(Section):
    """Who lets a model into service."""

    promote: Literal["manual"] = Field("manual", description="a person approves; nothing else is offered")
    approvers: int = Field(1, description="1 = solo, 2 = two different people", ge=1, le=2)
    probation_days: int = Field(7, description="days on probation before a model counts as live", ge=0, le=365)


class ResultsKeys(Section):
    """Answers to the PACS."""

    sr: bool = Field(False, description="reserved: structured reports are not in this version, keep false")
    sc: bool = Field(False, description="reserved: heatmap captures are not in this version, keep false")
    destination: str = Field("", description="reserved: AET@host:port of the PACS, keep empty")

    @field_validator("sr", "sc", "destination")
    @classmethod
    def not_yet(cls, value: bool | str) -> bool | str:
        if value:
            raise ValueError("off in this version: results are read with `cxrloop studies ls`")
        return value


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

    @model_validator(mode="after")
    def shown_are_known(self) -> "Config":
        unknown = [name for name in self.gate.must_show if name not in self.site.findings]
        if unknown:
            raise ValueError(f"gate.must_show: names of site.findings; {unknown[0]!r} is not one")
        return self


def zone(config: Config) -> ZoneInfo:
    """The site's time zone."""
    return ZoneInfo(config.site.timezone)


def config_path(given: Path | None) -> Path:
    """The settings file: the argument, else $CXRLOOP_CONFIG, else ./appliance.toml.

    Raises Problem when there is none.
    """
    path = given or Path(os.environ.get("CXRLOOP_CONFIG") or "appliance.toml")
    if path.is_dir():
        path = path / "appliance.toml"
    if not path.is_file():
        raise Problem(f"{path}: no such settings file; run `cxrloop init DIR`, then pass --config DIR/appliance.toml")
    return path.resolve()


def load(path: Path) -> Config:
    """Read and check a settings file; raises Problem naming key, value, what is allowed and the nearest name."""
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Problem(f"{path}: not TOML: {error}") from None
    return checked(raw, f"{path}: ")


def checked(raw: dict[str, Any], where: str = "") -> Config:
    """The settings of plain values; raises Problem at the first wrong key, with `where` in front."""
    try:
        return Config.model_validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        raise Problem(where + _explain(error.errors()[0])) from None


def _explain(error: Any) -> str:
    where = [str(part) for part in error["loc"]]
    key = ".".join(where) or "settings"
    if error["type"] == "extra_forbidden":
        known = list(Config.model_fields) if len(where) == 1 else list(_section(where[0]).model_fields)
        near = difflib.get_close_matches(where[-1], known, 1, cutoff=0.0)
        nearest = ".".join([*where[:-1], *near])
        return f"unknown key {key} = {_short(error['input'])}; nearest: {nearest}; allowed: {', '.join(known)}"
    said = error["msg"].removeprefix("Value error, ")
    fields = _section(where[0]).model_fields if where and where[0] in Config.model_fields else {}
    about = fields[where[1]].description if len(where) > 1 and where[1] in fields else ""
    return f"{key} = {_short(error['input'])}: {said}" + (f" ({about})" if about else "")


def _section(name: str) -> type[Section]:
    return Config.model_fields[name].annotation  # pyright: ignore[reportReturnType]


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def template(config: Config) -> str:
    """The settings file of a config, every key preceded by its description."""
    lines = ["# cxrloop: the settings of this appliance. `cxrloop config show` prints them as they are understood."]
    for name, field in Config.model_fields.items():
        section = getattr(config, name)
        about = (field.annotation.__doc__ or "").strip().splitlines()[0]  # pyright: ignore[reportOptionalMemberAccess]
        lines += ["", f"# {about}", f"[{name}]"]
        for key, spec in type(section).model_fields.items():
            value = getattr(section, key)
            shown = list(value) if isinstance(value, tuple) else value
            lines += [f"# {spec.description}", f"{key} = {json.dumps(shown, ensure_ascii=False)}"]
    return "\n".join(lines) + "\n"
