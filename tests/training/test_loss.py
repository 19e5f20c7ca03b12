"""The token loss: by hand, in chunks, and what its penalty does."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from molmo_training.loss import LossConfig, token_loss

PLAIN = LossConfig(z_weight=0.0)


def drawn(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (n, 8), head (13, 8), targets, weights of which some are 0."""
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, 8, generator=generator)
    head = torch.randn(13, 8, generator=generator)
    targets = torch.randint(0, 13, (n,), generator=generator)
    weights = torch.rand(n, generator=generator)
    return hidden, head, targets, weights * (weights > 0.4)


def test_sums_by_hand() -> None:
    hidden, head = torch.tensor([[2.0, 0.0], [0.0, 0.0], [9.0, 9.0]]), torch.eye(2)
    sums = token_loss(
        hidden, head, torch.tensor([0, 1, 1]), torch.tensor([3.0, 1.0, 0.0]), LossConfig()
    )
    first, second = math.log(1 + math.exp(-2)), math.log(2)
    assert sums.cross_entropy.item() == pytest.approx(3 * first + second, rel=1e-6)
    assert sums.z.item() == pytest.approx(1e-4 * (3 * (2 + first) ** 2 + second**2), rel=1e-6)
    assert (sums.right.item(), sums.weight.item()) == (3, 4)
    assert sums.total.item() == pytest.approx((sums.cross_entropy + sums.z).item())


@pytest.mark.parametrize("chunk_size", [1, 7, 40, 64])
def test_chunks_change_neither_values_nor_gradients(chunk_size: int) -> None:
    hidden, head, targets, weights = drawn(40)
    leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    config = LossConfig(z_weight=0.01, chunk_size=chunk_size)
    sums = token_loss(leaves[0], leaves[1], targets, weights, config)
    sums.total.backward()

    plain = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    logits = plain[0] @ plain[1].T
    losses = F.cross_entropy(logits, targets, reduction="none")
    z = 0.01 * logits.logsumexp(-1).square()
    ((losses + z) * weights).sum().backward()

    assert sums.cross_entropy.item() == pytest.approx((losses * weights).sum().item(), rel=1e-6)
    right = ((logits.argmax(-1) == targets) * weights).sum().item()
    assert sums.right.item() == pytest.approx(right, rel=1e-6)
    for mine, wanted in zip(leaves, plain, strict=True):
        assert mine.grad is not None
        assert wanted.grad is not None
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-5, atol=1e-6)


def test_a_tied_head_gets_the_gradients_of_both_uses() -> None:
    _, head, targets, weights = drawn(20)
    tables = [head.clone().requires_grad_() for _ in range(2)]
    token_loss(tables[0][targets], tables[0], targets, weights, PLAIN).total.backward()
    logits = tables[1][targets] @ tables[1].T
    (F.cross_entropy(logits, targets, reduction="none") * weights).sum().backward()
    torch.testing.assert_close(tables[0].grad, tables[1].grad, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_gets_none() -> None:
    hidden, head, targets, weights = drawn(5)
    hidden.requires_grad_()
    token_loss(hidden, head, targets, weights, PLAIN).total.backward()
    assert hidden.grad is not None
    assert head.grad is None


def test_nothing_to_learn_is_a_loss_of_zero_with_gradients() -> None:
    hidden, head, targets, weights = drawn(6)
    hidden.requires_grad_()
    head.requires_grad_()
    sums = token_loss(hidden, head, targets, weights * 0, LossConfig())
    sums.total.backward()
    assert (sums.total.item(), sums.weight.item()) == (0, 0)
    assert hidden.grad is not None
    assert head.grad is not None
    assert not hidden.grad.any()
    assert not head.grad.any()


def test_logits_of_all_positions_never_exist_at_once() -> None:
    """The largest tensor that is saved or made is that of a chunk."""
    hidden, head, targets = torch.randn(512, 8), torch.randn(4096, 8), torch.zeros(512).long()
    hidden.requires_grad_()
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            nonlocal largest
            out = function(*arguments, **(named or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    with Sizes():
        config = LossConfig(chunk_size=16)
        token_loss(hidden, head, targets, torch.ones(512), config).total.backward()
    assert largest == 16 * 4096
