"""DISTL as published, written from its description, for the speed comparison with the learner.

PIL opens and augments images one by one in the loading path, attention is materialised, batches hold 8 images, and
AdamW, clipping and averaging run parameter by parameter. For speed comparisons only: the golden tests check the
learner's results, and nothing here is used to train.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.transforms.functional import to_tensor

from learner.round.recipe import Recipe

BATCH = 8  # images per GPU, as published


class PngFiles(Dataset):
    """PNG files -> the list of views (3, s, s) of one image."""

    def __init__(self, files: Sequence[Path], recipe: Recipe) -> None:
        self.files, self.recipe = list(files), recipe
        self.whole = self._augment(recipe.image_size, recipe.global_scale, recipe.global_noise)
        self.part = self._augment(recipe.local_size, recipe.local_scale, recipe.local_noise)

    def _augment(self, size: int, scale: tuple[float, float], chance: float) -> T.Compose:
        bicubic = T.InterpolationMode.BICUBIC
        return T.Compose(
            [
                T.RandomResizedCrop(size, scale, interpolation=bicubic),
                T.RandomHorizontalFlip(0.5 if self.recipe.flip else 0.0),
                T.RandomRotation(self.recipe.rotate, T.InterpolationMode.BILINEAR),
                T.RandomApply([T.Lambda(ImageOps.autocontrast)], chance),
                T.RandomApply([T.Lambda(ImageOps.equalize)], chance),
                T.RandomApply([T.Lambda(blurred)], chance),
                T.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> list[Tensor]:
        size = (self.recipe.image_size, self.recipe.image_size)
        sample = Image.open(self.files[index]).convert("RGB").resize(size, Image.Resampling.BILINEAR)
        return [to_tensor(sample), self.whole(sample), *(self.part(sample) for _ in range(self.recipe.local_views))]


def blurred(image: Image.Image) -> Image.Image:
    """Return the image with a random Gaussian blur."""
    return image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * float(torch.rand(()))))


def loader(files: Sequence[Path], recipe: Recipe, workers: int, pinned: bool) -> DataLoader:
    """Return batches of 8, in a new order each pass; a last short batch is dropped."""
    return DataLoader(PngFiles(files, recipe), BATCH, True, num_workers=workers, drop_last=True, pin_memory=pinned)


class Block(nn.Module):
    """A transformer block that materialises its attention matrix."""

    def __init__(self, dim: int, heads: int, drop: float) -> None:
        super().__init__()
        self.heads, self.drop = heads, drop
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        packed = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = packed[0], packed[1], packed[2]
        attention = (query @ key.transpose(-2, -1) * (dim // self.heads) ** -0.5).softmax(-1)
        x = x + self._drop_path(self.proj((attention @ value).transpose(1, 2).reshape(batch, tokens, dim)))
        return x + self._drop_path(self.mlp(self.norm2(x)))

    def _drop_path(self, x: Tensor) -> Tensor:
        if not self.drop or not self.training:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.drop
        return x / (1 - self.drop) * kept


class Encoder(nn.Module):
    """A plain vision transformer on colour images; returns the class token."""

    def __init__(self, size: int, patch: int, dim: int, depth: int, heads: int, drop: float) -> None:
        super().__init__()
        self.side = size // patch
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.token, self.places = (
            nn.Parameter(torch.zeros(1, 1, dim)),
            nn.Parameter(torch.zeros(1, self.side**2 + 1, dim)),
        )
        self.blocks = nn.ModuleList(Block(dim, heads, drop * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images)
        places, side = self.places, x.shape[-1]
        if side != self.side:
            grid = places[:, 1:].reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, size=(side, side), mode="bicubic").permute(0, 2, 3, 1).reshape(1, side**2, -1)
            places = torch.cat([places[:, :1], grid], 1)
        x = torch.cat([self.token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + places
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class FullNetwork(nn.Module):
    """Encoder, prototype head and class head; views of one resolution are one batch."""

    def __init__(self, plan: dict, recipe: Recipe, findings: int, drop: float) -> None:
        super().__init__()
        dim = plan["embed_dim"]
        self.encoder = Encoder(plan["img_size"], plan["patch_size"], dim, plan["depth"], plan["num_heads"], drop)
        hidden, width = recipe.head_hidden, recipe.class_hidden
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, recipe.bottleneck),
        )
        self.last = weight_norm(nn.Linear(recipe.bottleneck, recipe.prototypes, bias=False))
        dict(self.last.named_parameters())["parametrizations.weight.original0"].requires_grad_(False)
        self.classes = nn.Sequential(
            nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, findings)
        )

    def forward(self, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        groups: dict[int, list[Tensor]] = {}
        for view in views:
            groups.setdefault(view.shape[-1], []).append(view)
        cls = torch.cat([self.encoder(torch.cat(group)) for group in groups.values()])
        prototypes = self.last(F.normalize(self.mlp(cls), dim=-1))
        return prototypes, self.classes(cls[: 2 * len(views[0])])


class Trainer:
    """Student, teacher and optimiser, and one published step on unlabelled images."""

    def __init__(self, plan: dict, recipe: Recipe, findings: int, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.student = FullNetwork(plan, recipe, findings, recipe.drop_path).to(device)
        self.teacher = FullNetwork(plan, recipe, findings, 0.0).to(device).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.centre = torch.zeros(1, recipe.prototypes, device=device)
        decayed = [p for p in self.student.parameters() if p.requires_grad and p.ndim > 1]
        free = [p for p in self.student.parameters() if p.requires_grad and p.ndim == 1]
        groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
        # torch's default: a loop over the tensors on the CPU, lists of tensors on CUDA
        self.optimiser = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")

    def step(self, views: list[Tensor]) -> float:
        """Take one optimiser step on views (8, 3, s, s) in host memory; return the loss."""
        views = [view.to(self.device, non_blocking=True) for view in views]
        samples, recipe = len(views[0]), self.recipe
        half = torch.float16 if self.device.type == "cuda" else None
        with torch.autocast(self.device.type, dtype=half, enabled=half is not None):
            with torch.no_grad():
                teacher, teacher_class = self.teacher(views[:2])
            student, student_class = self.student(views)
            dino = self._dino(student, teacher, samples)
            target = teacher_class[:samples].sigmoid()
            mine = F.binary_cross_entropy_with_logits(student_class[samples:], target)
            loss = recipe.lam * dino + (1 - recipe.lam) * mine
        value = loss.item()
        self.optimiser.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimiser)
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                norm = parameter.grad.norm(2)
                shrink = recipe.clip / (norm + 1e-6)
                if shrink < 1:
                    parameter.grad.mul_(shrink)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.mul_(recipe.ema_base).add_((1 - recipe.ema_base) * new)
        return value

    def _dino(self, student: Tensor, teacher: Tensor, samples: int) -> Tensor:
        guesses = (student / self.recipe.student_temp).chunk(len(student) // samples)
        targets = ((teacher - self.centre) / self.recipe.teacher_temp).softmax(-1).chunk(2)
        total, terms = torch.zeros((), device=student.device), 0
        for i, target in enumerate(targets):
            for j, guess in enumerate(guesses):
                if i != j:
                    total = total + (-target * guess.log_softmax(-1)).sum(-1).mean()
                    terms += 1
        keep = self.recipe.centre_momentum
        self.centre = self.centre * keep + teacher.mean(0, keepdim=True) * (1 - keep)
        return total / terms
