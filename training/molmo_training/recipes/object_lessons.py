"""Lessons for a model from nothing: what stands where in a picture, and where to look for it.

Stand-ins for the pre-trained tower that larger runs start from; thrown away after training.
Knows: marked objects, features, the decoder's attention. Does not know: the token loss, steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo_hf.modeling_molmo2 import Molmo2Attention, Molmo2ForConditionalGeneration
from molmo_training.data.example import Batch
from molmo_training.forward import Decoded
from molmo_training.trainer import Lesson, Lessons


class ObjectProbe(nn.Module):
    """Reads marked objects off features: teaches a vision tower from nothing what stands where.

    A from-scratch stand-in for the pre-trained tower that larger runs start from; it is thrown
    away after training. Features (…, D); targets (…, 8) are those of `tokenize.mark_patches`, of
    which `place_columns` says how places are told: in the patch or in the picture.
    """

    def __init__(
        self,
        width: int,
        n_shapes: int,
        n_colours: int,
        *,
        place_columns: tuple[int, int],
        place_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.place_weight = place_weight
        self.sizes = (1, n_shapes, n_colours, 2)
        self.place_columns = slice(place_columns[0], place_columns[1] + 1)
        self.read = nn.Linear(width, sum(self.sizes))

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        present = targets[..., 0] > 0
        found, shape, colour, place = self.read(features).float().split(self.sizes, dim=-1)
        positive_share = 8.0  # objects stand at about one patch in twenty
        loss = F.binary_cross_entropy_with_logits(
            found.squeeze(-1), targets[..., 0], pos_weight=found.new_tensor(positive_share)
        )
        if not present.any():
            return loss
        marked = targets[present]
        loss = loss + F.cross_entropy(shape[present], marked[:, 1].long())
        loss = loss + F.cross_entropy(colour[present], marked[:, 2].long())
        missed = F.mse_loss(place[present], marked[:, self.place_columns])
        return loss + self.place_weight * missed

    def share_right(self, features: Tensor, targets: Tensor) -> dict[str, float]:
        """Shares of marked features whose shape and colour are read rightly; error of the place."""
        present = targets[..., 0] > 0
        _, shape, colour, place = self.read(features.float()).split(self.sizes, dim=-1)
        marked = targets[present]
        return {
            "shape": (shape[present].argmax(-1) == marked[:, 1]).float().mean().item(),
            "colour": (colour[present].argmax(-1) == marked[:, 2]).float().mean().item(),
            "place_error": F.mse_loss(place[present], marked[:, self.place_columns]).sqrt().item(),
        }


TOKEN_PLACE_WEIGHT = 30.0
"""Squares of a few hundredths would not be heard beside cross-entropies: with 1 the place of an
object in the picture was known to 4 % after 900 steps, and points missed by as much."""


class ObjectProbes(nn.Module):
    """One probe on the patches of the tower, one on the features that enter the decoder.

    The second keeps places readable through the connector: without it they were known to ±12 % of
    the picture after 200 steps, less than the number of a token tells.
    """

    def __init__(self, *, patch_width: int, width: int, n_shapes: int, n_colours: int) -> None:
        super().__init__()
        self.patches = ObjectProbe(patch_width, n_shapes, n_colours, place_columns=(3, 4))
        self.tokens = ObjectProbe(
            width, n_shapes, n_colours, place_columns=(6, 7), place_weight=TOKEN_PLACE_WEIGHT
        )

    def forward(
        self, patches: Tensor, patch_targets: Tensor, features: Tensor, token_targets: Tensor
    ) -> Tensor:
        loss: Tensor = self.patches(patches, patch_targets) + self.tokens(features, token_targets)
        return loss


class AttentionGuide:
    """Shows some heads of one layer of the decoder which visual tokens an answer is about.

    Which token to look at and how to read a place off it have to be learnt together: without the
    one there is no gradient for the other, and a model from nothing sees none for tens of thousands
    of pictures. Needed at the start only; nothing of it stays in the weights' layout.
    """

    def __init__(self, attention: Molmo2Attention, n_heads: int) -> None:
        if n_heads > attention.n_heads // attention.n_kv_heads:
            raise ValueError(
                f"n_heads is {n_heads}; at most {attention.n_heads // attention.n_kv_heads} heads "
                "share the first key head, which is the guided one"
            )
        self._attention, self._n_heads = attention, n_heads
        self._seen: tuple[Tensor, tuple[Tensor, Tensor], Tensor] | None = None
        attention.register_forward_pre_hook(self._note)

    def _note(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._seen = arguments[:3]  # what enters the layer, rotary embedding, mask

    def __call__(self, about: Tensor, shows: Tensor) -> Tensor:
        """Mean of −log(share of attention on the right visual tokens); 0 when none are known.

        `about`, `shows` (B, S) are bit sets of objects. Call it after the forward that it is about.
        """
        assert self._seen is not None, "the guide speaks of the last forward; there was none"
        (x, rope, mask), self._seen = self._seen, None
        # Numbers of objects are those of an example: the mask keeps packed examples apart.
        wanted = ((about[:, :, None] & shows[:, None, :]) != 0) & mask[:, 0]  # (B, queries, keys)
        rows = wanted.any(-1)
        if not rows.any():
            return x.new_zeros(())
        q, k, _ = self._attention.project(x, rope)
        q, k = q[:, : self._n_heads].float(), k[:, :1].float()
        with torch.autocast(x.device.type, enabled=False):
            scores = q @ k.transpose(-1, -2) * self._attention.head_dim**-0.5  # (B, heads, S, S)
            whole = scores.masked_fill(~mask, _HIDDEN).logsumexp(-1)
            right = scores.masked_fill(~wanted[:, None], _HIDDEN).logsumexp(-1)
            missed: Tensor = (whole - right).transpose(1, 2)[rows].mean()
        return missed


_HIDDEN = -1e9
"""Not −inf, whose gradient is no number where a query has nothing to look at."""


class ObjectLessons(Lessons):
    """What a model from nothing is taught beside tokens: probes, and the guide at first."""

    def __init__(
        self,
        model: Molmo2ForConditionalGeneration,
        *,
        n_shapes: int,
        n_colours: int,
        probe_weight: float = 1.0,
        guide_weight: float = 0.5,
        guided_layer: int = 2,
        guided_heads: int = 3,
    ) -> None:
        super().__init__()
        config = model.config
        self.probes = ObjectProbes(
            patch_width=config.vit_config.hidden_size * len(config.adapter_config.vit_layers),
            width=config.text_config.hidden_size,
            n_shapes=n_shapes,
            n_colours=n_colours,
        )
        self.probe_weight, self.guide_weight = probe_weight, guide_weight
        attention = model.model.transformer.blocks[guided_layer].self_attn
        self.guide = AttentionGuide(attention, guided_heads)

    def forward(self, decoded: Decoded, batch: Batch, progress: float) -> dict[str, Lesson]:
        """`progress` 0…1: the weight of the guide falls with it."""
        probe_loss = self.probes(
            decoded.patches, batch.patch_targets, decoded.features, batch.token_targets
        )
        guide_loss = self.guide(batch.about, batch.shows)
        return {
            "probe_loss": Lesson(self.probe_weight, probe_loss),
            "guide_loss": Lesson(self.guide_weight * (1 - min(progress, 1.0)), guide_loss),
        }
