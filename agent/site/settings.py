"""The sections of appliance.toml: every key with its meaning, its default and what is allowed.

The description of a key is the comment that `cxrloop init` writes and the text that the error prints.
"""

import difflib
import re
from typing import Literal
from zoneinfo import ZoneInfo, available_timezones

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from agent.site.peer_address import parse

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
        try:
            ZoneInfo(value)
        except (KeyError, ValueError, OSError):  # no such zone; a path; a folder of zones such as "Europe"
            near = difflib.get_close_matches(value, sorted(available_timezones()), 1)
            raise ValueError(f"an IANA time zone{f', nearest: {near[0]}' if near else ''}") from None
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
    min_free_mb: int = Field(512, description="refuse images (A700) when the disk has less free than this", ge=0)
    max_per_peer: int = Field(8, description="associations at once from one address", ge=1, le=256)
    tls_cert: str = Field("", description="certificate chain (PEM) of the node; with tls_key: the port speaks TLS only")
    tls_key: str = Field("", description="private key (PEM) of tls_cert, readable by the node alone")
    tls_ca: str = Field("", description="certificates (PEM) whose holders may connect: mutual TLS; empty = any peer")
    peers: tuple[str, ...] = Field(
        (),
        description='who else is there, "AET@host:port" or, over TLS, "AET@host:port/tls": '
        "gets the reports of storage commitment, is asked by `cxrloop pull`",
    )

    @field_validator("peers")
    @classmethod
    def addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(peer(one) for one in value)

    @model_validator(mode="after")
    def certificate_and_key(self) -> "NodeKeys":
        if bool(self.tls_cert) != bool(self.tls_key) or (self.tls_ca and not self.tls_cert):
            raise ValueError("tls_cert and tls_key together, tls_ca only with them")
        return self


class AdmissionKeys(Section):
    """Which images are scored and learnt from; every other image is kept aside with its reason."""

    children: bool = Field(False, description="admit images whose header says the patient is under 18")
    min_side: int = Field(64, description="smallest side of an image in pixels", ge=32, le=4096)
    quality: bool = Field(
        True, description="also ask the pixels: no chest image, inverted, rotated, saturated or empty is kept aside"
    )
    decode_seconds: int = Field(60, description="longest time one image may take to decode", ge=1, le=600)
    decode_memory_mb: int = Field(3072, description="most memory one image may take to decode", ge=512)


class InferKeys(Section):
    """The server that scores images (loopback only)."""

    host: Literal["127.0.0.1", "localhost"] = Field("127.0.0.1", description="always loopback")
    port: int = Field(11113, description="port of /predict, /healthz, /readyz and /metrics", ge=1, le=65535)
    provider: Literal["auto", "cuda", "cpu"] = Field(
        "auto", description='"cuda" makes a missing GPU an error, "auto" takes the GPU if there is one'
    )
    threads: int = Field(0, description="threads of one inference; 0 = as many as cores", ge=0)


class PatientKeys(Section):
    """The ranges of patients, fixed at the first image; a share never changes afterwards. The rest trains."""

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
    min_new: int = Field(50, description="skip the night when fewer new images than this may be learnt from", ge=0)
    max_unlabelled: int = Field(20000, description="most images a round takes, newest first", ge=1)
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
    evaluations_per_year: int = Field(
        52, description="evaluations planned in a year; each spends alpha / evaluations_per_year", ge=1, le=366
    )
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

    sr: bool = Field(False, description="send a structured report (TID 1500) for each scored image")
    sc: bool = Field(False, description="send a heatmap (Secondary Capture) for each scored image")
    destination: str = Field("", description='where they go, "AET@host:port" or "AET@host:port/tls"; empty = nowhere')

    @field_validator("destination")
    @classmethod
    def address(cls, value: str) -> str:
        return peer(value) if value else value

    @model_validator(mode="after")
    def somewhere(self) -> "ResultsKeys":
        if (self.sr or self.sc) and not self.destination:
            raise ValueError("a destination where sr or sc is on")
        return self


class RetentionKeys(Section):
    """How long files are kept; plates, scores and labels stay."""

    originals_days: int = Field(0, description="days an original is kept once it is scored; 0 = for ever", ge=0)
    aside_days: int = Field(0, description="days a rejected or quarantined file is kept; 0 = for ever", ge=0)
    refuse_free_mb: int = Field(
        1024, description="refuse new associations when the disk has less free than this; before node.min_free_mb", ge=0
    )


def peer(text: str) -> str:
    """`text` when it names a peer; raises ValueError."""
    parse(text)
    return text
