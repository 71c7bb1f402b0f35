"""Recipes: every number that decides what a round learns, frozen, named and printable.

A recipe knows no file of the site and no torch; the agent resolves it, writes it into the manifest and the card,
and the learner refuses a manifest whose recipe has a key too many or too few.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from learner.errors import RecipeError
from learner.round.recipe_checks import check


@dataclass(frozen=True)
class Recipe:
    """All settings of one round; the defaults are the published ones of DISTL (`distl`, profile `gpu`)."""

    name: str = "distl"
    method: str = "distl"  # the file of `recipes/` that runs: distl, evolve, pseudo-label, kd or pretrain
    profile: str = "gpu"
    # -- the network
    arch: str = "vit_small_patch16"  # vit_{tiny,small,base}_patchN, optionally _depthM; used when backbone = "random"
    backbone: str = "random"  # "random", a timm hub name, or the path of a .safetensors file (its shape is inferred)
    pos_embed: str = "dino"  # how position embeddings are resampled to other sizes: "dino" or "timm"
    pool: str = "cls"  # the embedding: "cls" = class token (as published), "mean" = mean of the patches, or "both"
    init: str = "timm"  # of a random backbone: "timm", or "mimetic" (imitates trained attention; for few images)
    image_size: int = 256
    local_size: int = 128
    local_views: int = 8
    mean: float = 0.0  # grey level subtracted / divided after scaling to [0, 1]; DISTL does neither
    std: float = 1.0
    prototypes: int = 65536
    head_hidden: int = 2048
    bottleneck: int = 256
    class_hidden: int = 256  # 0 = the class head is linear
    drop_path: float = 0.1  # of the student only
    # lower blocks that stay as they are; their outputs are computed once a round and kept. -1 = all but the last of a
    # pretrained transformer, none of another network
    frozen_blocks: int = 0
    cached_views: int = 4  # noised global views (and as many times local_views) an image has in that cache
    # -- optimisation
    epochs: int = 5
    t0_epochs: int = 5
    t0_steps: int = 0  # at least this many at T=0: few labelled images get more epochs
    batch: int = 16
    lr: float = 5e-5  # for a batch of 16; scaled linearly
    t0_lr: float = 5e-5
    lr_min: float = 1e-6
    warmup_epochs: int = 1
    weight_decay: float = 0.01
    clip: float = 3.0  # per parameter tensor; 0 = none
    freeze_last: int = 1  # epochs during which the prototype layer stays still
    # -- the three signals
    lam: float = 0.5  # share of self-supervision; 1 - lam is self-training or labels
    alpha: bool = True  # ramp of the self-training term, 2 (e + 1) / E
    teacher_temp: float = 0.04
    student_temp: float = 0.1
    centre_momentum: float = 0.9
    centring: str = "centre"  # of the teacher's answers: a running "centre", or "sinkhorn" (each batch used evenly)
    ema_base: float = 0.9995
    correct_every: int = 500  # unlabelled steps between two passes over the labelled images; 0 = never
    correct_first: bool = True  # also after step 0, whose learning rate is 0 (as published)
    correct_loss: str = "mix"  # "mix" = self-supervision and labels, "ce" = labels only
    # -- evolve: more self-supervision, pseudo-labels from neighbours, labels in every step
    ibot: float = 0.0  # weight of masked-patch distillation
    koleo: float = 0.0  # weight of the spread of embeddings
    targets: str = "teacher"  # whose pseudo-labels: "teacher" (soft answers as they come), "graph", or "none"
    pseudo_weight: float = 1.0  # of the pseudo-label term once ramped up
    align: bool = False  # pseudo-labels' prevalence aligned to the labelled one
    # pseudo-labels weighted by agreement, of graph and "teacher" or of two "heads" on half the labels, or by how far
    # beyond the prevalence's cut they are ("soft", SoftMatch)
    agree: str = "none"
    thresholds: bool = False  # class-wise: only the surest share `kappa` of images has a pseudo-label
    neighbours: int = 10  # of an image in the graph
    components: int = 64  # of the whitened features under it
    label_weight: float = 1.0
    replay: float = 0.0  # weight of distillation from the champion (the parent's model)
    refit: str = "none"  # the last correction: "none", "linear" (class head refitted on frozen features) or "graph"
    # candidates: "ema" = teacher, student; "wise" = half-way from the champion; "trained" = the teacher, half-way, the
    # champion with its head refitted; "least" = the same, the champion first; "all" adds other shares, the soup and the
    # mean of late steps ("swa")
    average: str = "ema"
    # -- pseudo-label (Martins & Silva) and kd (Ho & Gwak)
    kappa: float = 0.75  # share of images that get a pseudo-label, surest first
    finetune_epochs: int = 15
    kd_teacher: str = "densenet121"  # timm name or arch of the other network
    kd_strategy: str = "standard"  # "base", "standard", "reversed", "defective" or "self"
    kd_temperature: float = 2.0
    kd_alpha: float = 0.5  # share of the teacher's answer; 1 - alpha is labels
    # -- labels
    balance: str = (
        "none"  # "effective": a finding's rare class weighs more (Cui et al. 2019), the finding as a whole not
    )
    # -- views
    global_scale: tuple[float, float] = (0.75, 1.0)
    local_scale: tuple[float, float] = (0.2, 0.6)
    flip: bool = False  # a mirrored chest is a finding (dextrocardia): off unless a site asks
    rotate: float = 15.0  # degrees either way
    global_noise: float = 0.3  # chance of each of autocontrast, equalise and blur
    local_noise: float = 0.5
    # -- what is exported, and how it runs
    serve: str = "student"  # whose weights become the model: "student" (as published) or "teacher"
    poison_teacher: bool = False  # inverts the teacher's class logits: a bad night on purpose, recorded in the card
    seed: int = 0
    threads: int = 0  # CPU threads; 0 = all cores (then a resumed round equals to 1e-6, not bitwise, on other machines)
    device: str = "auto"  # "auto", "cpu" or "cuda"
    precision: str = (
        "auto"  # "auto" = bf16, else fp16, on CUDA and fp32 on the CPU; "bf16" also where the CPU is fast at it
    )
    micro_batch: int = 0  # images in one pass; 0 = the whole batch (halved when memory runs out)
    checkpoint_seconds: int = 60

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every key present."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """The recipe of a manifest; raises RecipeError for an unknown or wrong key.

        A key that is missing is younger than the manifest, and its default is what was done before it existed.
        """
        return cls().override(values)

    def override(self, values: Mapping[str, Any]) -> "Recipe":
        """The same recipe with some keys changed; raises RecipeError."""
        clean = {key: _typed(key, value, getattr(Recipe(), _known(key))) for key, value in values.items()}
        made = replace(self, **clean)
        check(made)
        return made


LARGEST = 1e15  # of any number: a file's slip, not a setting (and nan, which is not below it)

# labels and answers alone: no prototype head, no crops, and the grey levels that ImageNet networks know
_ALONE = {"prototypes": 0, "local_views": 0, "freeze_last": 0, "init": "mimetic"}  # that also wakes the class head
_GREY = {"mean": 0.449, "std": 0.226}

RECIPES: dict[str, Recipe] = {
    "distl": Recipe(),
    "evolve": Recipe(**{
        **_GREY, "name": "evolve", "method": "evolve", "pool": "both", "class_hidden": 0, "prototypes": 8192,
        "batch": 32, "lr": 5e-5, "t0_lr": 2e-5, "lam": 0.0, "ema_base": 0.99, "components": 32, "refit": "graph",
        "average": "trained", "rotate": 10.0, "pos_embed": "timm",
    }),
    "pretrain": Recipe(**{
        **_GREY, "name": "pretrain", "method": "pretrain", "prototypes": 8192, "batch": 32, "lam": 1.0, "ibot": 1.0,
        "koleo": 0.1, "targets": "none", "epochs": 20, "lr": 5e-4, "ema_base": 0.996,
    }),
    "pseudo-label": Recipe(**{  # Martins & Silva, but no mirroring
        **_ALONE, **_GREY, "name": "pseudo-label", "method": "pseudo-label", "arch": "densenet121", "epochs": 10,
        "t0_epochs": 25, "lr": 1e-4, "t0_lr": 1e-4, "weight_decay": 1e-5, "clip": 0.0, "warmup_epochs": 0,
        "rotate": 25.0, "balance": "effective",
    }),
    "kd": Recipe(**{  # Ho & Gwak's pair; AdamW needs fewer epochs than their SGD's 200
        **_ALONE, **_GREY, "name": "kd", "method": "kd", "arch": "mobilenetv3_large_100", "image_size": 224,
        "epochs": 30, "t0_epochs": 30, "lr": 3e-4, "t0_lr": 3e-4, "balance": "effective",
    }),
}  # fmt: skip

# What a profile changes in any recipe: sizes, and the settings that only make sense at that size.
PROFILES: dict[str, dict[str, Any]] = {
    "gpu": {},
    "cpu": {  # 500 images, all labelled or few, on two cores: under ten minutes, both phases
        "arch": "vit_tiny_patch16", "image_size": 96, "local_size": 48, "local_views": 4, "prototypes": 4096,
        "head_hidden": 512, "bottleneck": 128, "epochs": 3, "t0_epochs": 5, "t0_steps": 150, "correct_every": 10,
        "correct_first": False, "correct_loss": "ce", "lr": 2e-4, "t0_lr": 5e-4, "ema_base": 0.99, "mean": 0.5,
        "std": 0.25, "init": "mimetic", "pool": "mean", "threads": 2, "device": "cpu",
    },
    "demo": {  # two layers on 48 px: what 80 labels and a minute on two cores can teach from random weights
        "arch": "vit_tiny_patch8_depth2", "image_size": 48, "local_size": 24, "local_views": 2, "prototypes": 1024,
        "head_hidden": 256, "bottleneck": 64, "t0_epochs": 20, "correct_every": 1, "correct_loss": "ce", "lam": 0.3,
        "lr": 5e-4, "t0_lr": 5e-4, "ema_base": 0.95, "clip": 1.0, "weight_decay": 0.05, "drop_path": 0.0,
        "rotate": 5.0, "global_noise": 0.1, "global_scale": (0.8, 1.0), "mean": 0.5, "std": 0.25, "init": "mimetic",
        "pool": "mean", "threads": 1, "device": "cpu", "checkpoint_seconds": 20,
    },
}  # fmt: skip

# What a recipe takes back or sets at a profile.
SIZED: dict[tuple[str, str], dict[str, Any]] = {
    ("pseudo-label", "cpu"): {**_ALONE, "finetune_epochs": 5},
    ("pseudo-label", "demo"): {**_ALONE, "epochs": 10, "finetune_epochs": 10},
    ("evolve", "demo"): {"lam": 0.0},
    ("kd", "cpu"): {**_ALONE, "arch": "resnet10t", "kd_teacher": "resnet18", "epochs": 5, "lr": 5e-4},
    ("kd", "demo"): {**_ALONE, "kd_teacher": "resnet10t", "epochs": 20},
}  # fmt: skip

# What a recipe sets at a profile when the backbone is pretrained: two cores then train one block, which keeps the bar;
# and `evolve` hears the labels in the fit of its class head alone, as having them in every step too showed no gain.
PRETRAINED: dict[tuple[str, str], dict[str, Any]] = {
    ("distl", "cpu"): {"frozen_blocks": -1},
    ("evolve", "gpu"): {"label_weight": 0.0},
    ("evolve", "cpu"): {"label_weight": 0.0, "frozen_blocks": -1},
    ("kd", "cpu"): {"t0_steps": 75},  # these two train all blocks, for half as many steps
    ("pretrain", "cpu"): {"t0_steps": 75},
}


def resolve(name: str, profile: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe `name` at the sizes of `profile`, with the site's own keys on top; raises RecipeError."""
    if name not in RECIPES:
        raise RecipeError(f'recipe = "{name}": no such recipe; there is {", ".join(sorted(RECIPES))}')
    if profile not in PROFILES:
        raise RecipeError(f'profile = "{profile}": no such profile; there is {", ".join(PROFILES)}')
    sized = RECIPES[name].override({**PROFILES[profile], **SIZED.get((name, profile), {}), "profile": profile})
    whole = sized.override(overrides or {})
    pretrained = PRETRAINED.get((name, profile), {}) if whole.backbone != "random" else {}
    return whole.override({key: value for key, value in pretrained.items() if key not in (overrides or {})})


def _known(key: str) -> str:
    names = [f.name for f in fields(Recipe)]
    if key not in names:
        near = difflib.get_close_matches(key, names, n=1)
        raise RecipeError(f"recipe: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return key


def _typed(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, bool) or isinstance(value, bool):
        fits = isinstance(default, bool) and isinstance(value, bool)
    elif isinstance(default, tuple):
        fits = isinstance(value, (list, tuple)) and len(value) == 2 and all(type(v) in (int, float) for v in value)
        value = tuple(float(v) for v in value) if fits else value
    elif isinstance(default, float):
        fits = isinstance(value, (int, float)) and abs(value) <= LARGEST
        value = float(value) if fits else value
    else:
        fits = isinstance(value, type(default)) and (isinstance(value, str) or abs(value) <= LARGEST)
    if not fits:
        raise RecipeError(f"recipe: {key} = {value!r}: expected {type(default).__name__}")
    return value
