"""Which attention runs a batch; that nothing of a batch is needed to go through the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from molmo_hf.modeling_molmo2 import Attend
from molmo_training.data.example import Batch
from molmo_training.dropout import Positions
from molmo_training.forward import DENSE_UP_TO, AttentionKind, Forward
from molmo_training.recipes.tiny import CROP_PX
from tests.support.small_model import small_model
from tests.training.parallel.shared_step import batches


class _SeenMask:
    """What the decoder's first layer is given to say who sees whom."""

    def __init__(self, forward: Forward) -> None:
        self.mask: Tensor | Attend | None = None
        layer = forward.model.model.transformer.blocks[0].self_attn
        layer.register_forward_pre_hook(self._note)

    def _note(self, _: torch.nn.Module, arguments: tuple[Tensor | Attend | None, ...]) -> None:
        self.mask = arguments[2]


@pytest.mark.parametrize("attention", ["dense", "blocks", "auto"])
def test_short_rows_have_a_dense_mask_unless_told_otherwise(attention: AttentionKind) -> None:
    batch = batches()[1]
    assert batch.input_ids.shape[1] <= DENSE_UP_TO
    forward = Forward(small_model(crop_px=CROP_PX), attention=attention)
    seen = _SeenMask(forward)
    forward(batch)
    assert isinstance(seen.mask, Tensor) == (attention != "blocks")


def test_under_autocast_attention_gets_one_type() -> None:
    forward = Forward(small_model(crop_px=CROP_PX), attention="blocks")
    seen = _SeenMask(forward)
    forward(batches()[1])
    assert callable(seen.mask)
    n_positions = batches()[1].input_ids.shape[1]
    q, k, v = (torch.randn(1, 2, n_positions, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert seen.mask(q, k, v.bfloat16()).dtype == torch.bfloat16
    assert seen.mask(q, k, v).dtype == torch.float32


def test_text_alone_goes_through_the_tower_too() -> None:
    """Ranks that hold its weights together have to; gradients are zeros, not missing."""
    model = small_model(crop_px=CROP_PX)
    text = batches()[2]
    assert len(text.crops) == 0
    positions = Positions()
    decoded = Forward(model, positions=positions)(text)
    assert (len(decoded.patches), len(decoded.features)) == (0, 0)
    assert decoded.hidden.shape == (text.input_ids.numel(), 32)
    assert positions.learnt is not None
    assert torch.equal(positions.learnt, text.weights > 0)
    decoded.hidden.sum().backward()
    gradient = model.model.vision_backbone.image_vit.patch_embedding.weight.grad
    assert gradient is not None
    assert not gradient.any()


def test_positions_of_a_batch_come_in_rows() -> None:
    batch: Batch = batches()[0]
    decoded = Forward(small_model(crop_px=CROP_PX))(batch)
    assert torch.equal(decoded.targets, batch.targets.flatten())
    assert torch.equal(decoded.weights, batch.weights.flatten())
    assert len(decoded.features) == len(batch.pooling)
