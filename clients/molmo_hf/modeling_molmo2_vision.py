"""Molmo2's eye: the vision tower, the pooling of patches and the projection into the decoder.

Knows: patches in, one feature a visual token out. Does not know: tokens, text, files.
Weight names are those of the released checkpoints. Self-contained, so that an export can carry it.

Shapes: N crops, P patches a crop, D tower width, M visual tokens, K patches a token pools,
H heads, L tower layers used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_molmo2 import Molmo2AdapterConfig, Molmo2VitConfig


class DotProductAttention(nn.Module):
    """Multi-head attention with separate projections, from queries (…, D) to keys (…, Dk)."""

    def __init__(
        self,
        input_dim: int,
        hidden_size: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        in_float32: bool,
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.in_float32 = in_float32
        self.wq = nn.Linear(input_dim, n_heads * head_dim)
        self.wk = nn.Linear(input_dim, n_kv_heads * head_dim)
        self.wv = nn.Linear(input_dim, n_kv_heads * head_dim)
        self.wo = nn.Linear(n_heads * head_dim, hidden_size)

    def forward(
        self, queries: Tensor, keys: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(B, Sq, D), (B, Sk, D) and a boolean mask (B, 1, Sq or 1, Sk) → (B, Sq, hidden)."""
        keys = queries if keys is None else keys
        q = self._heads(self.wq(queries), self.n_heads)
        k = self._heads(self.wk(keys), self.n_kv_heads)
        v = self._heads(self.wv(keys), self.n_kv_heads)
        dtype = q.dtype
        if self.in_float32:
            q, k, v = q.float(), k.float(), v.float()
        # SDPA is on autocast's list: without this it would cast float32 down again.
        with torch.autocast(q.device.type, enabled=self._autocasts(q)):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=self.n_heads != self.n_kv_heads
            )
        out = out.to(dtype).transpose(1, 2).flatten(2)
        return self.wo(out)

    def _autocasts(self, x: Tensor) -> bool:
        return not self.in_float32 and torch.is_autocast_enabled(x.device.type)

    def _heads(self, x: Tensor, n_heads: int) -> Tensor:
        return x.view(*x.shape[:-1], n_heads, self.head_dim).transpose(1, 2)


class VitMlp(nn.Module):
    def __init__(self, config: Molmo2VitConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)))


class Molmo2VisionBlock(nn.Module):
    def __init__(self, config: Molmo2VitConfig) -> None:
        super().__init__()
        self.attention = DotProductAttention(
            config.hidden_size,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            in_float32=config.float32_attention,
        )
        self.feed_forward = VitMlp(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Molmo2VisionTransformer(nn.Module):
    """Patches (N, P, pixels) → the outputs of the wanted layers, each (N, P, D).

    A class token, where there is one, stands in front of the patches in the layers only; its
    position is part of it.
    """

    def __init__(self, config: Molmo2VitConfig, layers: list[int]) -> None:
        super().__init__()
        self.layers = layers
        self.patch_num = config.image_num_patch
        pixels = config.image_patch_size**2 * 3
        self.patch_embedding = nn.Linear(pixels, config.hidden_size)
        self.positional_embedding = nn.Parameter(
            torch.randn(config.image_num_pos, config.hidden_size) * config.hidden_size**-0.5
        )
        self.class_embedding = self.pre_ln = None
        if config.class_token:
            self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        if config.pre_norm:
            self.pre_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.transformer = nn.Module()
        # Only the layers that are read are built: released files do not hold the others.
        self.transformer.resblocks = nn.ModuleList(
            Molmo2VisionBlock(config) for _ in range(max(layers) + 1)
        )

    def forward(self, patches: Tensor) -> list[Tensor]:
        x = self.patch_embedding(patches)
        x = x + self._positions().to(x.dtype)
        n_patches = x.shape[1]
        if self.class_embedding is not None:
            class_tokens = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
            x = torch.cat([class_tokens, x], dim=1)
        if self.pre_ln is not None:
            x = self.pre_ln(x)
        outputs: dict[int, Tensor] = {}
        for index, block in enumerate(self.transformer.resblocks):
            x = block(x)
            if index in self.layers:
                outputs[index] = x[:, -n_patches:]
        return [outputs[index] for index in self.layers]

    def _positions(self) -> Tensor:
        table = self.positional_embedding
        rows, cols = self.patch_num
        side = round(table.shape[0] ** 0.5)
        if (rows, cols) == (side, side):
            return table
        grid = table.view(1, side, side, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(
            grid, size=(rows, cols), mode="bicubic", align_corners=False, antialias=True
        )
        return resized.permute(0, 2, 3, 1).reshape(rows * cols, -1)


class ImageProjector(nn.Module):
    """SwiGLU without biases; w1 is the gate."""

    def __init__(self, config: Molmo2AdapterConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.text_hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Molmo2VisionBackbone(nn.Module):
    """Crops and pooling index → features for the decoder."""

    def __init__(self, vit: Molmo2VitConfig, adapter: Molmo2AdapterConfig) -> None:
        super().__init__()
        layers = [i if i >= 0 else i + vit.num_hidden_layers for i in adapter.vit_layers]
        self.image_vit = Molmo2VisionTransformer(vit, layers)
        self.masks_pooling = adapter.pooling_attention_mask
        self.dropout = nn.Dropout(adapter.image_feature_dropout)
        self.image_pooling_2d = DotProductAttention(
            vit.hidden_size * len(layers),
            adapter.hidden_size,
            adapter.num_attention_heads,
            adapter.num_key_value_heads,
            adapter.head_dim,
            in_float32=adapter.float32_attention,
        )
        self.image_projector = ImageProjector(adapter)

    def forward(self, crops: Tensor, pooling: Tensor) -> Tensor:
        """Encode crops (N, P, pixels) and pool them by `pooling` (M, K), see `pool`."""
        return self.pool(self.encode(crops), pooling)

    def encode(self, crops: Tensor) -> Tensor:
        """Crops (N, P, pixels) → patch features (N, P, tower width · layers used)."""
        return torch.cat(self.image_vit(crops), dim=-1)

    def pool(self, features: Tensor, pooling: Tensor) -> Tensor:
        """Pool patch features (N, P, ·) by `pooling` (M, K) into features of the decoder.

        `pooling` indexes the flattened N · P patches, −1 marks a missing one. Rows without any
        patch are left out of the result: (number of rows with a patch, decoder width).
        """
        pooling = pooling[(pooling >= 0).any(-1)]
        features = self.dropout(features).flatten(0, 1)
        present = pooling >= 0  # (M, K)
        gathered = features[pooling.clamp(min=0)] * present[..., None].to(features.dtype)
        if self.masks_pooling:
            count = present.sum(-1, keepdim=True).clamp(min=1).to(features.dtype)
            query = gathered.sum(-2, keepdim=True) / count[..., None]
            mask = present[:, None, None, :]
        else:
            query, mask = gathered.mean(-2, keepdim=True), None
        pooled = self.image_pooling_2d(query, gathered, mask)
        return self.image_projector(pooled.squeeze(1))
