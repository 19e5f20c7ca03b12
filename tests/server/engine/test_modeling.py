"""What the model does with bytes before its tower: the values that training computes with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from molmo_core.pixels import normalised
from molmo_server.engine.modeling import _normalised

BYTES = np.arange(256, dtype=np.uint8)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_byte_gets_its_trained_value_in_every_number_format(dtype):
    """`Molmo2VisionBackbone.forward` casts to the format first: it must hold each byte exactly."""
    expected = torch.from_numpy(normalised(BYTES)).to(dtype)
    assert torch.equal(_normalised(torch.from_numpy(BYTES).to(dtype)), expected)
