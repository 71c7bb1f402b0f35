"""Every matrix product of one DISTL step, forward and backward, listed by shape and timed alone.

Their sum is the time of a step in which nothing else costs time. It needs shapes only, no weights and no images.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from learner.round.recipe import Recipe

LEAST = 0.02  # seconds for which each product is repeated at least, well above the clock's resolution


@dataclass(frozen=True)
class Product:
    """`times` products (stack, rows, inner) @ (stack, inner, columns); `turned`: which factor is stored transposed."""

    stack: int
    rows: int
    inner: int
    columns: int
    turned: str  # "", "left" or "right"
    times: int = 1

    @property
    def flop(self) -> int:
        return 2 * self.stack * self.rows * self.inner * self.columns * self.times


def products_of_a_step(plan: dict, recipe: Recipe, findings: int) -> list[Product]:
    """Return the products of a step: student on all views forward and backward, teacher on two views forward."""
    counts: Counter[Product] = Counter()
    samples, views = recipe.batch, 2 + recipe.local_views
    groups = [(2 * samples, recipe.image_size), (recipe.local_views * samples, recipe.local_size)]
    for images, side in groups:
        for product in encoder(plan, recipe, images, side, backward=True):
            counts[product] += 1
    for product in encoder(plan, recipe, 2 * samples, recipe.image_size, backward=False):
        counts[product] += 1
    wide, narrow = recipe.head_hidden, recipe.class_hidden
    prototype_head = [
        (plan["embed_dim"], wide),
        (wide, wide),
        (wide, recipe.bottleneck),
        (recipe.bottleneck, recipe.prototypes),
    ]
    class_head = [(plan["embed_dim"], narrow), (narrow, narrow), (narrow, findings)]
    rows = [(prototype_head, views * samples, True), (class_head, 2 * samples, True)]
    for layers, count, backward in [*rows, (prototype_head, 2 * samples, False), (class_head, samples, False)]:
        for inner, columns in layers:
            counts.update(linear(count, inner, columns, backward))
    return [Product(p.stack, p.rows, p.inner, p.columns, p.turned, times) for p, times in counts.items()]


def encoder(plan: dict, recipe: Recipe, images: int, side: int, backward: bool) -> Iterator[Product]:
    """Yield the products of patch embedding and blocks on `images` images of `side` pixels."""
    dim, heads, patch = plan["embed_dim"], plan["num_heads"], plan["patch_size"]
    patches, pixels = (side // patch) ** 2, 3 * patch**2
    tokens, width, stack = patches + 1, plan["embed_dim"] // plan["num_heads"], images * heads
    yield Product(1, images * patches, pixels, dim, "right")
    if backward:  # no gradient of the image is needed
        yield Product(1, dim, images * patches, pixels, "left")
    for block in range(plan["depth"]):
        # the last block computes the class token alone (learner.networks.class_token), from keys and values of all tokens
        queries = tokens if block + 1 < plan["depth"] or recipe.pool != "cls" else 1
        token_layers = ((dim, dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim))  # query, projection, MLP
        layers = ((dim, 3 * dim), *token_layers[1:]) if queries == tokens else token_layers
        for inner, columns in layers:
            yield from linear(images * queries, inner, columns, backward)
        if queries < tokens:
            yield from linear(images * tokens, dim, 2 * dim, backward)
        yield Product(stack, queries, width, tokens, "right")  # query key'
        yield Product(stack, queries, tokens, width, "")  # attention value
        if backward:
            yield Product(stack, queries, width, tokens, "right")  # of attention: gradient value'
            yield Product(stack, tokens, queries, width, "left")  # of value: attention' gradient
            yield Product(stack, queries, tokens, width, "")  # of query
            yield Product(stack, tokens, queries, width, "left")  # of key


def linear(rows: int, inner: int, columns: int, backward: bool) -> Iterator[Product]:
    """Yield x W', and for the backward pass g W and g' x."""
    yield Product(1, rows, inner, columns, "right")
    if backward:
        yield Product(1, rows, columns, inner, "")
        yield Product(1, columns, rows, inner, "left")


def seconds_of(products: list[Product], device: torch.device, dtype: torch.dtype, repetitions: int) -> dict[str, float]:
    """Return wall and CPU seconds of all products, each the median of its repetitions, alone on the device."""
    totals = {"wall": 0.0, "cpu": 0.0}
    for product in products:
        left, right, out = operands(product, device, dtype)
        wall, _ = seconds_per_call(left, right, out, device, 1)
        calls = max(1, int(LEAST / wall))
        runs = [seconds_per_call(left, right, out, device, calls) for _ in range(repetitions)]
        totals["wall"] += product.times * median(w for w, _ in runs)
        totals["cpu"] += product.times * median(c for _, c in runs)
    return totals


def operands(product: Product, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return random factors in their memory layout, and memory for the result."""
    stack = () if product.stack == 1 else (product.stack,)

    def factor(rows: int, columns: int, turned: bool) -> Tensor:
        shape = (*stack, columns, rows) if turned else (*stack, rows, columns)
        values = torch.randn(shape, device=device, dtype=dtype)
        return values.transpose(-2, -1) if turned else values

    left = factor(product.rows, product.inner, product.turned == "left")
    right = factor(product.inner, product.columns, product.turned == "right")
    return left, right, torch.empty(*stack, product.rows, product.columns, device=device, dtype=dtype)


def seconds_per_call(left: Tensor, right: Tensor, out: Tensor, device: torch.device, calls: int) -> tuple[float, float]:
    """Return wall and CPU seconds per call; `out` holds the result."""
    torch.matmul(left, right, out=out)
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        torch.matmul(left, right, out=out)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls
