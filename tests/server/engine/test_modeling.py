"""What the model does with bytes before its tower: the values that training computes with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from molmo_core.pixels import normalised
from molmo_server.engine.modeling import _normalised
from molmo_training import pixels

BYTES = np.arange(256, dtype=np.uint8)[None]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_byte_gets_its_trained_value_in_every_number_format(dtype, device):
    """`Molmo2VisionBackbone.forward` casts to the format first: it must hold each byte exactly."""
    expected = torch.from_numpy(normalised(BYTES)).to(dtype)
    bytes_ = torch.from_numpy(BYTES).to(device)
    found = _normalised(bytes_.to(dtype))
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(found, pixels.normalised(bytes_).to(dtype))
