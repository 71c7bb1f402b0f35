"""Recipes: every setting that changes what a round learns, with the shipped recipes and profiles.

The agent resolves a recipe and writes it into the manifest; the learner copies it into the card. Must not import torch.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from learner.errors import RecipeError
from learner.round.recipe_checks import check


@dataclass(frozen=True)
class Recipe:
    """All settings of one round; the defaults are those of DISTL's published code (`distl`, profile `gpu`)."""

    name: str = "distl"
    method: str = "distl"  # training method: distl, evolve, pseudo-label, kd or pretrain
    profile: str = "gpu"
    # -- the network
    arch: str = "vit_small_patch16"  # vit_{tiny,small,base}_patchN, optionally _depthM; used when backbone = "random"
    backbone: str = "random"  # "random", a timm hub name, or the path of a .safetensors file (its shape is inferred)
    backbone_sha256: str = ""  # of the tensors of a backbone file, written when the round is planned; "" = not known
    pos_embed: str = "dino"  # interpolation of position embeddings to another image size: "dino" or "timm"
    # the embedding: "cls" = class token (as published), "mean" = mean of the patches, "both", or "grid" = means over eight
    # cells, each with its mirror image
    pool: str = "cls"
    blocks: int = 0  # lower blocks of a pretrained transformer that are used; 0 = all, -1 = two thirds of them
    blend: bool = False  # add linear heads on simple features of the site's own images to the network's answer
    init: str = "timm"  # of a random backbone: "timm", or "mimetic" (like trained attention weights; for few images)
    image_size: int = 256  # pixels a side
    local_size: int = 128  # pixels a side of a local crop
    local_views: int = 8  # local crops of an image in a step
    # "recipe" = mean and std below; "backbone" = those that the backbone was trained with, where its file or timm states
    # them. A pretrained backbone sets "backbone", unless the site's recipe file sets mean or std
    normalise: str = "recipe"
    mean: float = 0.0  # subtracted from grey levels in [0, 1]; DISTL subtracts nothing
    std: float = 1.0  # grey levels are then divided by it; DISTL does not divide
    prototypes: int = 65536  # outputs of the DINO head; 0 = no DINO head
    head_hidden: int = 2048  # width of the hidden layers of the DINO head
    bottleneck: int = 256  # width of the last layer before the prototypes
    class_hidden: int = 256  # width of the hidden layers of the class head; 0 = a linear class head
    drop_path: float = 0.1  # stochastic depth of the student
    # lower blocks that are not trained; their outputs are computed once a round and cached. -1 = all blocks but the last
    # of a pretrained transformer, no block of another network
    frozen_blocks: int = 0
    cached_views: int = 4  # augmented global views of an image in that cache
    # -- optimisation
    epochs: int = 5  # of the main phase
    t0_epochs: int = 5  # of T=0, the first training on labelled images only
    t0_steps: int = 0  # least number of steps of T=0: with few labelled images it gets more epochs
    batch: int = 16  # images
    lr: float = 5e-5  # peak learning rate for a batch of 16; scaled linearly with the batch
    t0_lr: float = 5e-5  # peak learning rate of T=0, for a batch of 16
    lr_min: float = 1e-6  # learning rate at the end of the cosine schedule
    warmup_epochs: int = 1  # of linear warm-up
    weight_decay: float = 0.01  # of AdamW
    clip: float = 3.0  # largest L2 norm of the gradient of each parameter tensor; 0 = no clipping
    freeze_last: int = 1  # first epochs in which the prototype layer is not trained
    # -- the three signals
    lam: float = 0.5  # weight of the self-supervised loss (DINO); 1 - lam weighs the class loss
    alpha: bool = True  # multiply the self-training loss of epoch e (from 0) of E by 2 (e + 1) / E
    teacher_temp: float = 0.04  # softmax temperature of the teacher's prototype logits
    student_temp: float = 0.1  # softmax temperature of the student's prototype logits
    centre_momentum: float = 0.9  # of the moving average of the teacher's prototype logits
    # how the teacher's prototype probabilities are balanced: subtract the moving average ("centre"), or make each batch
    # use all prototypes evenly ("sinkhorn")
    centring: str = "centre"
    ema_base: float = 0.9995  # first momentum of the EMA teacher; a cosine schedule raises it to 1
    correct_every: int = 500  # steps between two corrections, each one epoch over the labelled images; 0 = none
    correct_first: bool = True  # also correct after step 0, whose learning rate is 0 (as published)
    correct_loss: str = "mix"  # loss of a correction: "mix" = self-supervised and label loss, "ce" = label loss only
    # -- evolve: more self-supervision, pseudo-labels from neighbours, labels in every step
    ibot: float = 0.0  # weight of the masked-patch loss of iBOT
    koleo: float = 0.0  # weight of the KoLeo loss, which spreads the embeddings of a batch
    # source of pseudo-labels: "teacher" (its probabilities), "graph" (neighbours), "blend" (the answers before the round)
    # or "none"
    targets: str = "teacher"
    pseudo_weight: float = 1.0  # weight of the pseudo-label loss after its ramp-up
    align: bool = False  # shift the teacher's logits so that their mean matches the labelled prevalence
    # weight of each pseudo-label: "none" = 1; "teacher" = agreement of graph and teacher; "heads" = agreement of two
    # class heads fitted to half of the labels each; "soft" = distance from the threshold at the prevalence (SoftMatch)
    agree: str = "none"
    thresholds: bool = False  # use pseudo-labels of the most confident share `kappa` of images only, for each finding
    neighbours: int = 10  # nearest neighbours of an image in the graph
    components: int = 64  # principal components of the features in the graph
    label_weight: float = 1.0  # weight of the label loss in every step
    replay: float = 0.0  # weight of distillation from the champion (the parent's model)
    # refit of the class head at the end of the round: "none", "linear" (to the labels), "graph" (to graph and labels) or
    # "pseudo" (to labels and pseudo-labels)
    refit: str = "none"
    # models to choose from on validation images, the first one by default: "ema" = teacher, student; "wise" = mean of
    # champion and teacher; "trained" = teacher, mean of champion and teacher, champion with a refitted head; "least" =
    # the same from the last to the first; "all" = more means of champion and teacher, teacher and student, and steps
    average: str = "ema"
    # -- pseudo-label (Martins & Silva) and kd (Ho & Gwak)
    kappa: float = 0.75  # share of images that get a pseudo-label, the most confident first
    finetune_epochs: int = 15  # on the labelled images, after the pseudo-labels
    kd_teacher: str = "densenet121"  # timm name, arch or .safetensors file of the second network
    kd_strategy: str = "standard"  # "base", "standard", "reversed", "defective" or "self": see docs/learning.md
    kd_temperature: float = 2.0  # of the distillation loss
    kd_alpha: float = 0.5  # weight of the distillation loss; 1 - alpha weighs the label loss
    # -- labels
    # "none", or "effective" = more weight for the rarer class of a finding (Cui et al. 2019), the finding's sum unchanged
    balance: str = "none"
    # -- views
    global_scale: tuple[float, float] = (
        0.75,
        1.0,
    )  # smallest and largest area of a global crop, as a share of the image
    local_scale: tuple[float, float] = (0.2, 0.6)  # the same of a local crop
    flip: bool = False  # mirror half of the views; off, as a mirrored chest is a finding (dextrocardia)
    rotate: float = 15.0  # largest rotation, in degrees
    global_noise: float = 0.3  # probability of each of autocontrast, equalise and blur in a global view
    local_noise: float = 0.5  # the same in a local view
    # -- what is exported, and how it runs
    serve: str = "student"  # the exported network: "student" (as published) or "teacher"
    poison_teacher: bool = False  # invert the teacher's class logits, to test the gate with a bad round; in the card
    seed: int = 0
    # CPU threads; 0 = all cores. A round resumed with another number of threads differs by up to 1e-6
    threads: int = 0
    device: str = "auto"  # "auto", "cpu" or "cuda"
    # "auto" = bf16 on CUDA (fp16 where bf16 is missing), fp32 on the CPU; or "fp32", "bf16"
    precision: str = "auto"
    micro_batch: int = 0  # images in one forward pass; 0 = the whole batch. Halved when memory runs out
    checkpoint_seconds: int = 60  # least time between two checkpoints

    def to_dict(self) -> dict[str, Any]:
        """Return all keys as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Return the recipe of a manifest; raises RecipeError for an unknown key or a wrong value.

        A missing key was added after the manifest was written; its default is the behaviour from before.
        """
        return cls().override(values)

    def override(self, values: Mapping[str, Any]) -> "Recipe":
        """Return this recipe with some keys changed; raises RecipeError."""
        typed = {key: _typed(key, value, getattr(Recipe(), _known(key))) for key, value in values.items()}
        recipe = replace(self, **typed)
        check(recipe)
        return recipe


LARGEST = 1e15  # of any number; a larger one, or nan, is a typing error

# Class losses only: no DINO head, no local crops. "mimetic" also initialises the class head with larger weights.
_CLASS_LOSS_ONLY = {"prototypes": 0, "local_views": 0, "freeze_last": 0, "init": "mimetic"}
_IMAGENET_GREY = {"mean": 0.449, "std": 0.226}

RECIPES: dict[str, Recipe] = {
    "distl": Recipe(),
    "evolve": Recipe(**{
        **_IMAGENET_GREY, "name": "evolve", "method": "evolve", "pool": "both", "class_hidden": 0, "prototypes": 8192,
        "batch": 32, "lr": 5e-5, "t0_lr": 1e-6, "t0_epochs": 1, "lam": 0.1, "ema_base": 0.99, "components": 32,
        "blend": True, "targets": "blend", "refit": "pseudo", "average": "trained", "rotate": 10.0, "pos_embed": "timm",
        "label_weight": 0.5,
    }),
    "pretrain": Recipe(**{
        **_IMAGENET_GREY, "name": "pretrain", "method": "pretrain", "prototypes": 8192, "batch": 32, "lam": 1.0, "ibot": 1.0,
        "koleo": 0.1, "targets": "none", "epochs": 20, "lr": 5e-4, "ema_base": 0.996,
    }),
    "pseudo-label": Recipe(**{  # Martins & Silva, but without flips
        **_CLASS_LOSS_ONLY, **_IMAGENET_GREY, "name": "pseudo-label", "method": "pseudo-label", "arch": "densenet121", "epochs": 10,
        "t0_epochs": 25, "lr": 1e-4, "t0_lr": 1e-4, "weight_decay": 1e-5, "clip": 0.0, "warmup_epochs": 0,
        "rotate": 25.0, "balance": "effective",
    }),
    "kd": Recipe(**{  # Ho & Gwak's two networks; AdamW needs fewer epochs than their SGD (200)
        **_CLASS_LOSS_ONLY, **_IMAGENET_GREY, "name": "kd", "method": "kd", "arch": "mobilenetv3_large_100", "image_size": 224,
        "epochs": 30, "t0_epochs": 30, "lr": 3e-4, "t0_lr": 3e-4, "balance": "effective",
    }),
}  # fmt: skip

# Keys that a profile changes in any recipe: sizes, and settings that depend on the size.
PROFILES: dict[str, dict[str, Any]] = {
    "gpu": {},
    "cpu": {  # 500 images, all labelled or few, on two cores: under ten minutes, both phases
        "arch": "vit_tiny_patch16", "image_size": 96, "local_size": 48, "local_views": 4, "prototypes": 4096,
        "head_hidden": 512, "bottleneck": 128, "epochs": 3, "t0_epochs": 5, "t0_steps": 150, "correct_every": 10,
        "correct_first": False, "correct_loss": "ce", "lr": 2e-4, "t0_lr": 5e-4, "ema_base": 0.99, "mean": 0.5,
        "std": 0.25, "init": "mimetic", "pool": "mean", "threads": 2, "device": "cpu",
    },
    "demo": {  # two layers at 48 px: as much as 80 labels and one minute on two cores can train from random weights
        "arch": "vit_tiny_patch8_depth2", "image_size": 48, "local_size": 24, "local_views": 2, "prototypes": 1024,
        "head_hidden": 256, "bottleneck": 64, "t0_epochs": 20, "correct_every": 1, "correct_loss": "ce", "lam": 0.3,
        "lr": 5e-4, "t0_lr": 5e-4, "ema_base": 0.95, "clip": 1.0, "weight_decay": 0.05, "drop_path": 0.0,
        "rotate": 5.0, "global_noise": 0.1, "global_scale": (0.8, 1.0), "mean": 0.5, "std": 0.25, "init": "mimetic",
        "pool": "mean", "threads": 1, "device": "cpu", "checkpoint_seconds": 20,
    },
}  # fmt: skip

# Keys that one recipe sets in one profile, after the profile's own.
SIZED: dict[tuple[str, str], dict[str, Any]] = {
    ("pseudo-label", "cpu"): {**_CLASS_LOSS_ONLY, "finetune_epochs": 5},
    ("pseudo-label", "demo"): {**_CLASS_LOSS_ONLY, "epochs": 10, "finetune_epochs": 10},
    ("evolve", "cpu"): {  # from random weights the simple features answer; a short training of the network is enough
        "epochs": 1, "t0_epochs": 1, "t0_steps": 50, "local_views": 2, "prototypes": 1024, "head_hidden": 256, "bottleneck": 64,
    },
    ("evolve", "demo"): {"lam": 0.1},
    ("kd", "cpu"): {**_CLASS_LOSS_ONLY, "arch": "resnet10t", "kd_teacher": "resnet18", "epochs": 5, "lr": 5e-4},
    ("kd", "demo"): {**_CLASS_LOSS_ONLY, "kd_teacher": "resnet10t", "epochs": 20},
}  # fmt: skip

# Keys that one recipe sets in one profile with a pretrained backbone. `cpu` then trains one block, which reaches the
# accuracy required in the benchmarks. `evolve` uses labels only to fit its class head: a label loss in every step showed
# no gain.
PRETRAINED: dict[tuple[str, str], dict[str, Any]] = {
    ("distl", "gpu"): {"class_hidden": 0, "t0_lr": 1e-5},
    ("distl", "cpu"): {"class_hidden": 0, "t0_lr": 1e-5, "frozen_blocks": -1},
    ("evolve", "gpu"): {"blocks": -1, "pool": "grid"},
    ("evolve", "cpu"): {
        "blocks": -1,
        "pool": "grid",
        "image_size": 224,
        "local_size": 112,
        "local_views": 2,
        "frozen_blocks": -1,
        "cached_views": 2,
        "epochs": 2,
        "lr": 1e-4,
        "t0_epochs": 1,
        "t0_steps": 0,
        "t0_lr": 1e-6,
        "warmup_epochs": 0,
        "drop_path": 0.0,
    },
    ("kd", "cpu"): {"t0_steps": 75},  # kd and pretrain train all blocks, for half as many steps
    ("pretrain", "cpu"): {"t0_steps": 75},
}


def resolve(name: str, profile: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Return recipe `name` with the sizes of `profile` and then the site's own keys; raises RecipeError."""
    if name not in RECIPES:
        raise RecipeError(f'recipe = "{name}": no such recipe; there is {", ".join(sorted(RECIPES))}')
    if profile not in PROFILES:
        raise RecipeError(f'profile = "{profile}": no such profile; there is {", ".join(PROFILES)}')
    sized = RECIPES[name].override({**PROFILES[profile], **SIZED.get((name, profile), {}), "profile": profile})
    whole = sized.override(overrides or {})
    if whole.backbone == "random":
        return whole
    own = {*(overrides or {})}
    scale = {} if own & {"mean", "std"} else {"normalise": "backbone"}
    pretrained = scale | PRETRAINED.get((name, profile), {})
    return whole.override({key: value for key, value in pretrained.items() if key not in own})


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
