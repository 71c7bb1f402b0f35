"""The sections of appliance.toml: every key with its meaning, its default and its allowed values.

`cxrloop init` writes the description of a key as its comment; the error about a wrong value quotes it.
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
    """A section of the settings file: unknown keys are errors, values can't be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SiteKeys(Section):
    """The hospital, and the findings that the model predicts."""

    name: str = Field("my hospital", description="name of the hospital, printed in status and reports")
    timezone: str = Field("UTC", description='time zone of the windows, e.g. "Europe/Vienna"')
    findings: tuple[str, ...] = Field(
        ("abnormal",), description="names of the findings, in order; copied into every bundle", min_length=1
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
            raise ValueError("each finding may be named once only")
        return value


class NodeKeys(Section):
    """The DICOM node (C-STORE, C-ECHO)."""

    aet: str = Field("CXRLOOP", description="AE title of the node: 1 to 16 characters", pattern=r"^[ -\[\]-~]{1,16}$")
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 opens the node to the network")
    port: int = Field(11112, description="port of the node", ge=1, le=65535)
    allow_aet: tuple[str, ...] = Field((), description="calling AE titles that may send; empty = any")
    allow_ip: tuple[str, ...] = Field((), description="addresses that may connect; empty = any")
    max_associations: int = Field(16, description="most associations at the same time", ge=1, le=256)
    min_free_mb: int = Field(512, description="refuse images (status A700) when less space is free than this", ge=0)
    max_per_peer: int = Field(8, description="most associations at the same time from one address", ge=1, le=256)
    tls_cert: str = Field("", description="certificate chain (PEM) of the node; with tls_key: the port speaks TLS only")
    tls_key: str = Field("", description="private key (PEM) of tls_cert, readable by the node alone")
    tls_ca: str = Field(
        "", description="certificates (PEM) of the peers that may connect (mutual TLS); empty = any peer"
    )
    peers: tuple[str, ...] = Field(
        (),
        description='other DICOM nodes, "AET@host:port" or, over TLS, "AET@host:port/tls": '
        "they receive storage commitment reports, and `cxrloop pull` can query them",
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
    """Which images are admitted; every other image is set aside with the reason."""

    children: bool = Field(False, description="also admit images of patients under 18")
    min_side: int = Field(64, description="smallest side of an image in pixels", ge=32, le=4096)
    quality: bool = Field(
        True, description="also set aside by the pixels: not a chest, inverted, rotated, saturated or empty"
    )
    decode_seconds: int = Field(60, description="seconds that decoding one image may take", ge=1, le=600)
    decode_memory_mb: int = Field(3072, description="memory that decoding one image may take", ge=512)


class InferKeys(Section):
    """The server that scores images (loopback only)."""

    host: Literal["127.0.0.1", "localhost"] = Field("127.0.0.1", description="always loopback")
    port: int = Field(11113, description="port of /predict, /healthz, /readyz and /metrics", ge=1, le=65535)
    provider: Literal["auto", "cuda", "cpu"] = Field(
        "auto", description='"cuda": an error without a GPU; "auto": the GPU if there is one, else the CPU; "cpu"'
    )
    threads: int = Field(0, description="threads of one inference; 0 = one per core", ge=0)


class PatientKeys(Section):
    """Shares of the patients, fixed at the first image: they can't change later. All other patients are for training."""

    golden: float = Field(0.10, description="golden set: evaluates models, never trains them", ge=0, le=0.9)
    golden_next: float = Field(0.10, description="unused until the next golden set", ge=0, le=0.9)
    calibration: float = Field(0.10, description="sets temperatures and thresholds", ge=0, le=0.9)
    validation: float = Field(0.10, description="chooses between models during a round", ge=0, le=0.9)

    @model_validator(mode="after")
    def some_train(self) -> "PatientKeys":
        if self.golden + self.golden_next + self.calibration + self.validation > 0.95:
            raise ValueError("the shares must leave at least 0.05 of the patients for training")
        return self


class LearnKeys(Section):
    """The nightly round."""

    recipe: str = Field("evolve", description='name of a recipe, or a TOML file with base = "NAME" and its keys')
    profile: Literal["gpu", "cpu", "demo"] = Field("cpu", description="sizes of the recipe: gpu, cpu or demo")
    backbone: str = Field(
        "random",
        description='starting weights: "random", a name on the hub, or a .safetensors file (docs/backbones.md)',
    )
    window: str = Field(
        "22:00-05:00", description='when rounds may run, "HH:MM-HH:MM" in the site\'s time zone; "" = never'
    )
    min_new: int = Field(50, description="skip the night with fewer new training images than this", ge=0)
    max_unlabelled: int = Field(20000, description="most unlabelled images of a round: a random sample of all", ge=1)
    pool_per_patient: int = Field(4, description="most unlabelled images of one patient in that sample", ge=1)
    pool_device_share: float = Field(
        0.5, description="largest share of one device in that sample while other devices have images left", gt=0, le=1
    )
    pool_half_life_days: int = Field(
        365,
        description="days after which an image is half as likely to be in that sample; 0 = age does not matter",
        ge=0,
    )
    launcher: str = Field(
        "", description='command that starts the learner, e.g. "torchrun --nproc-per-node 4"; empty = none'
    )

    @field_validator("window")
    @classmethod
    def hours(cls, value: str) -> str:
        if value and not WINDOW.fullmatch(value):
            raise ValueError('"HH:MM-HH:MM", 00:00 to 23:59, or "" for no nights')
        if value and value[:5] == value[6:]:
            raise ValueError("start and end differ in a window")
        return value


class GateKeys(Section):
    """What the golden set must show about a new model before a person may approve it."""

    margin: float = Field(0.02, description="largest loss of AUC per finding that is acceptable", gt=0, lt=0.5)
    alpha: float = Field(0.05, description="one-sided error a year, split over all evaluations", gt=0, lt=0.5)
    evaluations_per_year: int = Field(
        52, description="evaluations planned in a year; each spends alpha / evaluations_per_year", ge=1, le=366
    )
    must_show: tuple[str, ...] = Field((), description="findings that must be shown non-inferior; empty = all")
    min_class: int = Field(100, description="patients of the smaller class that a finding needs to be decided", ge=2)
    require_better: bool = Field(True, description="also require superiority of the macro AUC or of a finding")


class ReleaseKeys(Section):
    """How a model gets into service."""

    promote: Literal["manual"] = Field("manual", description="a person approves each model; there is no other value")
    approvers: int = Field(1, description="people who must approve a model: 1 or 2", ge=1, le=2)
    probation_days: int = Field(7, description="days on probation before a model counts as live", ge=0, le=365)


class ResultsKeys(Section):
    """Results that are sent to the PACS."""

    sr: bool = Field(False, description="send a structured report (TID 1500) for each scored image")
    sc: bool = Field(False, description="send a heatmap (Secondary Capture) for each scored image")
    destination: str = Field(
        "", description='where results are sent, "AET@host:port" or "AET@host:port/tls"; empty = nowhere'
    )

    @field_validator("destination")
    @classmethod
    def address(cls, value: str) -> str:
        return peer(value) if value else value

    @model_validator(mode="after")
    def somewhere(self) -> "ResultsKeys":
        if (self.sr or self.sc) and not self.destination:
            raise ValueError("sr and sc need a destination")
        return self


class RetentionKeys(Section):
    """How long files are kept; plates, scores, labels and the evidence of rounds are kept for ever."""

    originals_days: int = Field(0, description="days that an original is kept after it was scored; 0 = for ever", ge=0)
    aside_days: int = Field(0, description="days that a rejected or quarantined file is kept; 0 = for ever", ge=0)
    rounds: int = Field(
        30,
        description="newest rounds that keep their training state although no round can start from it; 0 = all rounds. "
        "Checkpoints and packed plates always go when a round has ended",
        ge=0,
    )
    refuse_free_mb: int = Field(
        1024,
        description="refuse new associations when less space is free than this; set it above node.min_free_mb",
        ge=0,
    )


def peer(text: str) -> str:
    """Return `text` when it names a peer; raises ValueError."""
    parse(text)
    return text
