"""The objective of step PPO against numbers worked out by hand, in float64."""

import math

import pytest
import torch
from torch import tensor

from trainer.losses import approximate_kl, gae, ppo_policy_loss, ppo_value_loss, whiten

F64 = torch.float64
REWARDS, VALUES = tensor([[-0.1, 0.2, 1.0]], dtype=F64), tensor([[0.5, 0.4, 0.6]], dtype=F64)


def last(*ends: bool) -> torch.Tensor:
    return tensor([ends])


@pytest.mark.parametrize(
    ("ends", "gamma", "lam", "expected"),
    [
        # deltas -.1 + .4 - .5 = -.2, .2 + .6 - .4 = .4, 1 - .6 = .4
        (
            last(False, False, True),
            1.0,
            0.95,
            [-0.2 + 0.95 * (0.4 + 0.95 * 0.4), 0.4 + 0.95 * 0.4, 0.4],
        ),
        # deltas -.1 + .36 - .5 = -.24, .2 + .54 - .4 = .34, .4
        (
            last(False, False, True),
            0.9,
            0.5,
            [-0.24 + 0.45 * (0.34 + 0.45 * 0.4), 0.34 + 0.45 * 0.4, 0.4],
        ),
        # two steps: the first ends at the second token, whose delta is .2 - .4 = -.2
        (last(False, True, True), 1.0, 0.95, [-0.2 - 0.95 * 0.2, -0.2, 0.4]),
        (last(False, False, True), 1.0, 0.0, [-0.2, 0.4, 0.4]),
        # all that is still to come, minus the value
        (last(False, False, True), 1.0, 1.0, [1.1 - 0.5, 1.2 - 0.4, 0.4]),
    ],
)
def test_advantages_by_hand(ends, gamma, lam, expected):
    advantages, returns = gae(REWARDS, VALUES, ends, gamma, lam)
    torch.testing.assert_close(advantages, tensor([expected], dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, advantages + VALUES)


def test_what_stands_behind_the_end_of_a_step_is_nothing_to_it():
    """Nor is padding, nor another row."""
    padded = [torch.cat([t, torch.full((1, 2), 9.0, dtype=F64)], 1) for t in (REWARDS, VALUES)]
    ends = torch.cat([last(False, False, True), last(False, False)], 1)
    both = gae(*(torch.cat([t, t + 5]) for t in padded), torch.cat([ends, ends]))[0]
    torch.testing.assert_close(both[:1, :3], gae(REWARDS, VALUES, last(False, False, True))[0])


def test_policy_objective_of_three_tokens_by_hand():
    """Ratios 1.5, .5 and 1.1, range .2: the worse of the free and the clipped objective."""
    old = tensor([[-1.0, -2.0, -0.5]], dtype=F64)
    ratios = [1.5, 0.5, 1.1]
    for advantages in ([2.0, -1.0, 0.5], [-2.0, 1.0, -0.5]):
        logps = (old + tensor([ratios], dtype=F64).log()).requires_grad_()
        loss, clipped = ppo_policy_loss(logps, old, tensor([advantages], dtype=F64), 0.2)
        by_hand = [
            -min(a * r, a * min(max(r, 0.8), 1.2)) for a, r in zip(advantages, ratios, strict=True)
        ]
        assert loss[0].tolist() == pytest.approx(by_hand, abs=1e-12)
        loss.sum().backward()
        gradient = [
            0.0 if is_clipped else -a * r
            for a, r, is_clipped in zip(advantages, ratios, clipped[0].tolist(), strict=True)
        ]
        assert logps.grad[0].tolist() == pytest.approx(gradient, abs=1e-12)
    # moved against their advantages: free to come back
    assert clipped.tolist() == [[False, False, False]]
    assert ppo_policy_loss(logps, old, tensor([[2.0, -1.0, 0.5]], dtype=F64), 0.2)[1].tolist() == [
        [True, True, False]
    ]


def test_value_loss_by_hand():
    values, old, returns = (
        tensor([row], dtype=F64) for row in ([0.9, 0.1, 0.55], [0.5, 0.5, 0.5], [1.0, 0.6, 0.0])
    )
    values.requires_grad_()
    loss, clipped = ppo_value_loss(values, old, returns, 0.2)
    # kept near to the old values: .7, .3, .55
    assert loss[0].tolist() == pytest.approx([0.5 * 0.3**2, 0.5 * 0.5**2, 0.5 * 0.55**2], abs=1e-12)
    assert clipped.tolist() == [[True, False, False]]
    loss.sum().backward()
    assert values.grad[0].tolist() == pytest.approx([0.0, 0.1 - 0.6, 0.55], abs=1e-12)


def test_kl_by_hand():
    kl = approximate_kl(tensor([-1.0, -2.0], dtype=F64), tensor([-1.0, -1.5], dtype=F64))
    assert kl.tolist() == pytest.approx([0.0, math.exp(-0.5) - 1 + 0.5], abs=1e-12)


def test_whitening_by_hand_and_its_floor():
    mask = tensor([[True, True, False], [True, True, True]])
    advantages = tensor([[1.0, 2.0, 99.0], [3.0, 4.0, 5.0]], dtype=F64)
    white = whiten(advantages, mask)
    torch.testing.assert_close(white[mask], (advantages[mask] - 3) / math.sqrt(2))
    noise = 1e-6 * advantages
    assert whiten(noise, mask)[mask].abs().max() < 1e-4  # not blown up ...
    assert whiten(noise, mask, least_std=1e-12)[mask].abs().max() > 1.4  # ... as it would be
