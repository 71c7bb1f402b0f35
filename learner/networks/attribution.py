"""Attribution: the contribution of each patch to a direction of a vision transformer's embedding.

In closed form from one forward pass, without autograd, so that it can be exported to ONNX.
"""

import torch
from torch import Tensor, nn

from learner.networks.pooling import patch_contributions


class Trace:
    """Tensors of the last block in one forward pass.

    `norm`: the final LayerNorm; `projection` (width, heads x head width): from the last attention's heads to the residual;
    `last`: class token (B, width) before the norm; `patches` (B, h w, width) after it, empty where the pool is the class
    token; `attention` (B, heads, tokens) of the class token; `value` (B, heads, tokens, head width); `grid` (h, w);
    `cells` of `pool_tokens`.
    """

    def __init__(
        self, pool: str, norm: nn.LayerNorm, projection: Tensor, last: Tensor, patches: Tensor, attention: Tensor,
        value: Tensor, grid: tuple[int, int], cells: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.pool, self.norm, self.projection, self.last, self.patches = pool, norm, projection, last, patches
        self.attention, self.value, self.grid, self.cells = attention, value, grid, cells

    def contributions(self, directions: Tensor) -> Tensor:
        """Return the contribution of each patch along `directions` (B, F, D) of the embedding: (B, F, h, w).

        Pools "mean" and "grid": the patch's share of the means. Pool "cls": the patch's value in the last attention, times the
        gradient of the direction through the final LayerNorm; the last MLP is left out. Pool "both": the sum of the two.
        """
        if self.pool in ("mean", "grid"):
            return self._through_patches(directions, self.pool)
        if self.pool == "cls":
            return self._through_class_token(directions)
        first, second = directions.chunk(2, -1)
        return self._through_class_token(first) + self._through_patches(second, "mean")

    def _through_patches(self, directions: Tensor, pool: str) -> Tensor:
        return patch_contributions(self.patches, directions, pool, self.cells).unflatten(-1, self.grid)

    def _through_class_token(self, directions: Tensor) -> Tensor:
        centred = self.last - self.last.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + self.norm.eps).sqrt()
        shape = (centred / spread)[:, None]
        back = directions * self.norm.weight
        back = back - back.mean(-1, keepdim=True) - shape * (back * shape).mean(-1, keepdim=True)
        through_norm = back / spread[:, None]  # (B, F, width)
        heads, width = self.value.shape[1], self.value.shape[3]
        by_head = (through_norm @ self.projection).unflatten(-1, (heads, width))  # (B, F, heads, head width)
        per_token = torch.einsum("bfhd,bhnd->bfhn", by_head, self.value)
        share = (per_token * self.attention[:, None]).sum(2)
        high, wide = self.grid
        return share[:, :, -high * wide :].unflatten(-1, self.grid)  # the patches are the last tokens
