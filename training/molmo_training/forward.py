"""Runs the model on a batch: which attention, which positions, which crops are this rank's.

Short rows are attended with a mask of all pairs, long ones tile by tile; with context parallelism
a rank has a part of the positions and encodes a part of the crops. What comes out is the same.

Knows: `Batch`, the model, the mesh. Does not know: losses, optimizers, where batches come from.
Shapes: B rows, S positions, N positions of this rank in all rows, D width, C crops, M visual
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molmo_hf.modeling_molmo2 import Attend, Molmo2ForConditionalGeneration, attention_mask
from molmo_training.attention.blocks import BlockAttend
from molmo_training.attention.flex import FlexAttend
from molmo_training.attention.tiles import tokens_of
from molmo_training.data.example import Batch
from molmo_training.dropout import Positions
from molmo_training.parallel.exchange import exchange
from molmo_training.parallel.mesh import ALONE, Mesh
from molmo_training.parallel.ring import Ring
from molmo_training.parallel.sharding import as_root
from molmo_training.parallel.split import places_of_ranks, vision_share
from molmo_training.parallel.ulysses import Ulysses, check_heads
from molmo_training.pixels import normalised

AttentionKind = Literal["auto", "dense", "blocks", "flex"]

DENSE_UP_TO = 2048
"""Positions of a row up to which "auto" attends with a mask of all pairs."""


class Decoded(NamedTuple):
    """What the model makes of a batch; with context parallelism of this rank's positions."""

    hidden: Tensor  # (N, D)
    targets: Tensor  # (N,)
    weights: Tensor  # (N,)
    patches: Tensor  # (C, P, tower width): of the crops that this rank encodes
    features: Tensor  # (M, D): what enters the decoder at this rank's positions


class Forward(nn.Module):
    """The model on batches; every rank of the group gets the same batch.

    `attention`: "dense" makes a mask of all pairs; "blocks" attends tile by tile in plain torch;
    "flex" does so in torch's FlexAttention, whose backward pass needs a GPU; "auto" is "dense" for
    short rows and one of the others for long ones. Context parallelism of kind "ring" has an
    attention of its own. `positions` are told which of this rank are learnt, before they are run.

    A model that is sharded has to be run through this.
    """

    def __init__(
        self,
        model: Molmo2ForConditionalGeneration,
        *,
        attention: AttentionKind = "auto",
        mesh: Mesh = ALONE,
        positions: Positions | None = None,
    ) -> None:
        """Raises TrainingError when the mesh asks for what the model's heads do not allow."""
        super().__init__()
        self.model, self.attention = model, attention
        self.mesh, self.positions = mesh, positions
        if mesh.context_kind == "ulysses":
            check_heads(model.config.text_config.num_attention_heads, mesh.cp_size)
        if mesh.is_sharded:
            as_root(self, mesh)

    def forward(self, batch: Batch) -> Decoded:
        part = _Part.of(batch, self.mesh)
        patches, features = self._see(batch, part)
        attend = self._attend(part)
        if not isinstance(attend, Tensor):
            attend = partial(_in_one_type, attend)
        own = part.own
        if self.positions is not None:
            self.positions.learnt = own.weights > 0
        model = self.model.model
        x = model.embed(own.input_ids, features)
        hidden = model.transformer(x, own.position_ids, attend)
        return Decoded(
            hidden=hidden.flatten(0, 1),
            targets=own.targets.flatten(),
            weights=own.weights.flatten(),
            patches=patches,
            features=features,
        )

    def _see(self, batch: Batch, part: _Part) -> tuple[Tensor, Tensor]:
        """Patch features of this rank's crops, and the features that its positions need."""
        pooling = batch.pooling[(batch.pooling >= 0).any(-1)]
        if part.places is None:
            return self._encode(batch.crops, pooling)
        n_patches = batch.crops.shape[1]
        share = vision_share(
            pooling.cpu(),
            n_crops=len(batch.crops),
            n_patches=n_patches,
            is_patch=(part.whole.input_ids == self.model.config.image_patch_id).cpu(),
            places=part.places,
            rank=self.mesh.cp_rank,
        )
        device = pooling.device
        mine = pooling[share.tokens.to(device)]
        mine = torch.where(mine >= 0, mine - share.crops.start * n_patches, -1)
        patches, features = self._encode(batch.crops[share.crops], mine)
        received = exchange(features, share.sent, share.received, self.mesh.cp_group)
        return patches, received[share.order.to(device)]

    def _encode(self, crops: Tensor, pooling: Tensor) -> tuple[Tensor, Tensor]:
        """Patch features of crops, features of visual tokens.

        Without any, an empty crop is encoded and thrown away: all ranks go through the tower, as
        those that hold its weights together have to.
        """
        vit = self.model.config.vit_config
        n_crops, n_tokens = len(crops), len(pooling)
        if not n_crops:
            rows, columns = vit.image_num_patch
            crops = crops.new_zeros(1, rows * columns, vit.image_patch_size**2 * 3)
        if not n_tokens:
            pooling = pooling.new_zeros(1, max(pooling.shape[1], 1))
        backbone = self.model.model.vision_backbone
        patches = backbone.encode(normalised(crops))
        features = backbone.pool(patches, pooling)
        return patches[:n_crops], features[:n_tokens]

    def _attend(self, part: _Part) -> Tensor | Attend:
        """Who sees whom, for the positions of this rank."""
        whole = part.whole
        visual = torch.zeros_like(whole.valid)
        if self.model.config.bidirectional == "all":
            ids = torch.tensor(self.model.config.visual_token_ids, device=visual.device)
            visual = torch.isin(whole.input_ids, ids)
        tokens = partial(tokens_of, whole.valid, visual, whole.subsegments)
        device, places = visual.device, part.places
        if places is not None and self.mesh.context_kind == "ring":
            return Ring([tokens(p.to(device)) for p in places], self.mesh.cp_group)
        attend: Attend
        if (kind := self._kind(whole)) == "dense":
            mask = attention_mask(whole.valid, visual, whole.subsegments)
            if places is None:
                return mask
            attend = partial(_dense, mask=mask)
        else:
            in_order = tokens(torch.arange(visual.shape[1], device=device))
            attend = FlexAttend(in_order) if kind == "flex" else BlockAttend(in_order)
        return attend if places is None else Ulysses(attend, self.mesh.cp_group)

    def _kind(self, batch: Batch) -> AttentionKind:
        if self.attention != "auto":
            return self.attention
        if batch.input_ids.shape[1] <= DENSE_UP_TO:
            return "dense"
        return "flex" if batch.input_ids.is_cuda else "blocks"


def _in_one_type(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend in the type of autocast, as torch's own attention does: normed heads are float32."""
    device_type = q.device.type
    if torch.is_autocast_enabled(device_type):
        q, k, v = (t.to(torch.get_autocast_dtype(device_type)) for t in (q, k, v))
    out: Tensor = attend(q, k, v)
    return out


def _dense(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor) -> Tensor:
    is_grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=is_grouped)


_ROW_FIELDS = ("input_ids", "targets", "weights", "position_ids", "subsegments", "valid")


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A batch as the group sees it and as this rank does; without a group they are the same.

    `whole` has as many positions as the ranks together; `places` says whose they are.
    """

    whole: Batch
    own: Batch
    places: list[Tensor] | None

    @staticmethod
    def of(batch: Batch, mesh: Mesh) -> _Part:
        if mesh.cp_size == 1:
            return _Part(whole=batch, own=batch, places=None)
        length = batch.input_ids.shape[1]
        places = places_of_ranks(length, mesh.cp_size, mesh.context_kind)
        n_missing = mesh.cp_size * len(places[0]) - length
        padded: dict[str, Any] = {
            name: F.pad(getattr(batch, name), (0, n_missing)) for name in _ROW_FIELDS
        }
        mine = places[mesh.cp_rank].to(batch.input_ids.device)
        own: dict[str, Any] = {name: value[:, mine] for name, value in padded.items()}
        return _Part(
            whole=replace(batch, **padded),
            own=replace(batch, **own),
            places=places,
        )
