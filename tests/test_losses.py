"""trainer/losses.py against numbers worked out by hand."""

import math

import pytest
import torch
from torch import tensor

from trainer.losses import (
    AGGREGATIONS,
    CREDITS,
    fork_logratios,
    full_step_dpo_loss,
    step_dpo_loss,
    step_sft_loss,
    step_weights,
    stepwise_loss,
    sum_per_step,
)

A, B = tensor([[1.0, 0.5, 0.8]]), tensor([[0.9, 0.2, 0.4]])
D_CHOSEN, D_REJECTED = tensor([[0.5, -0.3, 0.2]]), tensor([[-0.4, 0.6, 0.1]])
ALL = torch.ones(1, 3, dtype=torch.bool)

WEIGHTS = {  # credit -> (u, v) of A, B
    "first_error": ([1.0, 0.5, 0.4], [0.1, 0.9 * 0.8, 0.9 * 0.2 * 0.6]),
    "fork": ([1.0, 0.5, 0.4], [0.1, 0.9 * 0.8, 0.9 * 0.2 * 0.6]),
    "score": ([1.0, 0.5, 0.8], [0.1, 0.8, 0.6]),
    "uniform": ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
    "normalized": ([3.3 / 2.6, 1.8 / 2.6, 2.7 / 2.6], [0.6 / 1.8, 2.7 / 1.8, 2.1 / 1.8]),
}


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def loss(*tensors, mask=(ALL, ALL), **options):
    return stepwise_loss(*(tensors or (D_CHOSEN, D_REJECTED)), A, B, *mask, **options)


@pytest.mark.parametrize("credit", CREDITS)
def test_step_weights(credit):
    u, v = step_weights(A, B, credit)
    torch.testing.assert_close(u, tensor([WEIGHTS[credit][0]]))
    torch.testing.assert_close(v, tensor([WEIGHTS[credit][1]]))


def test_three_steps_by_hand():
    # u D = .5 - .15 + .08 = .43; v D = -.04 + .432 + .0108 = .4028; a relu(-D) = .5 * .3 = .15
    got = loss(credit="first_error", beta=0.1, agg="sum", margin_gamma=0.4, anchor_lambda=5.0)
    margin = 0.4 * (2.3 / 3 - 1.5 / 3)
    assert got.chosen_rewards.item() == pytest.approx(0.043, abs=1e-6)
    assert got.rejected_rewards.item() == pytest.approx(0.04028, abs=1e-6)
    assert got.anchor.item() == pytest.approx(0.075, abs=1e-6)
    assert got.loss.item() == pytest.approx(softplus(-(0.043 - 0.075 - 0.04028 - margin)), abs=1e-6)
    mean = loss(credit="first_error", beta=0.1, agg="mean", margin_gamma=0.4, anchor_lambda=5.0)
    assert mean.loss.item() == pytest.approx(
        softplus(-((0.043 - 0.075 - 0.04028) / 3 - margin)), abs=1e-6
    )


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("credit", CREDITS)
def test_every_credit_against_float64(credit, agg):
    (u, v), count = WEIGHTS[credit], 3 if agg == "mean" else 1
    chosen = 0.3 * sum(w * d for w, d in zip(u, D_CHOSEN[0].tolist(), strict=True)) / count
    rejected = 0.3 * sum(w * d for w, d in zip(v, D_REJECTED[0].tolist(), strict=True)) / count
    got = loss(credit=credit, beta=0.3, agg=agg)
    assert got.loss.item() == pytest.approx(softplus(rejected - chosen), abs=1e-6)


def test_uniform_sum_is_dpo():
    got = loss(credit="uniform", beta=0.1)
    assert got.loss.item() == pytest.approx(softplus(-0.1 * (0.4 - 0.3)), abs=1e-6)


@pytest.mark.parametrize("credit", CREDITS)
def test_at_the_reference_only_the_margin_is_left(credit):
    zero = torch.zeros(1, 3)
    got = loss(zero, zero, credit=credit, margin_gamma=2.0, anchor_lambda=5.0)
    assert got.loss.item() == pytest.approx(softplus(2.0 * 0.8 / 3), abs=1e-6)
    assert loss(zero, zero, credit=credit).loss.item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("credit", CREDITS)
def test_padding_changes_nothing_and_lost_steps_leave_k(credit, agg):
    options = {"credit": credit, "agg": agg, "margin_gamma": 0.7, "anchor_lambda": 3.0}
    junk = tensor([[9.0, -9.0]])  # what stands in masked places must not matter

    def padded(values, length):
        return torch.cat([values[:, :length], junk.expand(1, 2)], 1)

    mask = tensor([[True, True, False, False]])
    short = [values[:, :2] for values in (D_CHOSEN, D_REJECTED, A, B)]
    two = torch.ones(1, 2, dtype=torch.bool)
    want = stepwise_loss(*short, two, two, **options)
    got = stepwise_loss(
        *(padded(values, 2) for values in (D_CHOSEN, D_REJECTED, A, B)), mask, mask, **options
    )
    for name in ("loss", "chosen_rewards", "rejected_rewards", "anchor"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), msg=name)
    nothing = torch.zeros_like(ALL)  # a response of which truncation left nothing
    gone = stepwise_loss(D_CHOSEN, D_REJECTED, A, B, nothing, ALL, **options)
    assert (
        torch.isfinite(gone.loss).all()
        and gone.chosen_rewards.item() == 0
        and gone.anchor.item() == 0
    )


def test_gradients_go_where_the_credit_is():
    chosen, rejected = D_CHOSEN.clone().requires_grad_(), D_REJECTED.clone().requires_grad_()
    hard = tensor([[1.0, 0.0, 0.0]])  # the second step is the first error
    stepwise_loss(
        chosen, rejected, torch.ones(1, 3), hard, ALL, ALL, credit="first_error"
    ).loss.sum().backward()
    assert (chosen.grad < 0).all()
    assert rejected.grad[0, 0] == 0 and rejected.grad[0, 1] > 0 and rejected.grad[0, 2] == 0


def test_fork_logratios_by_hand():
    """Step 0 has a sibling, steps 1 and 3 have none; nothing is left of step 2."""
    ratios = tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]], requires_grad=True)
    reference = tensor([[-9.0, -5.0, -2.0, -0.5, -3.0, -3.0, -9.0, -0.1]])
    ids = tensor([[-1, 0, 0, 1, 1, 1, -1, 3]])
    candidates = tensor([[True, False, True, True, True, True, True, True]])
    got = fork_logratios(ratios, reference, ids, candidates, 4)
    # the token that differs, likely or not; the least likely one, of two the first
    assert got.tolist() == [pytest.approx([0.3, 0.5, 0.0, 0.8])]
    got.sum().backward()
    assert ratios.grad.tolist() == [[0, 0, 1, 0, 1, 0, 0, 1]]


def test_a_fork_that_truncation_cut_has_no_blame():
    ratios, ids = torch.ones(1, 3, requires_grad=True), tensor([[0, 0, 1]])
    candidates = tensor([[False, False, True]])
    got = fork_logratios(ratios, -torch.ones(1, 3), ids, candidates, 2)
    assert got.tolist() == [[0.0, 1.0]]
    got.sum().backward()
    assert ratios.grad.tolist() == [[0, 0, 1]]


def test_blame_ends_at_the_fork_and_praise_does_not():
    """Two steps of three tokens: the sides share the first step and a token of the second."""
    ids, scores = tensor([[0, 0, 0, 1, 1, 1]]), tensor([[1.0, 1.0]])
    chosen, rejected = (torch.zeros(1, 6, requires_grad=True) for _ in range(2))
    candidates = tensor([[True, True, True, False, True, False]])
    two = torch.ones(1, 2, dtype=torch.bool)
    ratios = fork_logratios(rejected, -torch.ones(1, 6), ids, candidates, 2)
    got = stepwise_loss(
        sum_per_step(chosen, ids, 2), ratios, scores, tensor([[1.0, 0.0]]), two, two, credit="fork"
    )
    got.loss.sum().backward()
    torch.testing.assert_close(chosen.grad, torch.full((1, 6), -0.05))  # -beta / 2
    torch.testing.assert_close(rejected.grad, tensor([[0, 0, 0, 0, 0.05, 0]]))


LOGPS = tensor([[-1.0, -2.0, -4.0]])


@pytest.mark.parametrize("agg", AGGREGATIONS)
def test_step_sft_by_hand(agg):
    sides = (D_CHOSEN, D_REJECTED, A, B, ALL, ALL)
    got = step_sft_loss(*sides, LOGPS, credit="first_error", beta=0.3, agg=agg)
    count = 3 if agg == "mean" else 1
    assert got.loss.item() == pytest.approx(0.15 * (1 + 0.5 * 2 + 0.4 * 4) / count, abs=1e-6)
    same = stepwise_loss(*sides, credit="first_error", beta=0.3, agg=agg)
    for name in ("chosen_rewards", "rejected_rewards", "chosen_weights", "rejected_weights"):
        assert torch.equal(getattr(got, name), getattr(same, name))
    assert got.anchor.item() == 0


@pytest.mark.parametrize("agg", AGGREGATIONS)
@pytest.mark.parametrize("credit", CREDITS)
def test_step_sft_starts_as_hard_as_stepwise_and_does_not_fade(credit, agg):
    def pushes(chosen_ratio: float) -> list[torch.Tensor]:
        """The gradients of both losses with respect to the log-probs of the steps of chosen."""
        logps = torch.full((1, 3), -2.0, requires_grad=True)
        ratios = logps - logps.detach() + chosen_ratio
        sides = (ratios, torch.zeros(1, 3), A, B, ALL, ALL)
        options = {"credit": credit, "beta": 0.3, "agg": agg}
        anchored = stepwise_loss(*sides, **options, anchor_lambda=5.0)
        praise = step_sft_loss(*sides, logps, **options)
        return [torch.autograd.grad(one.loss.sum(), logps)[0] for one in (anchored, praise)]

    start, praise = pushes(0.0)
    assert (praise < 0).all()
    torch.testing.assert_close(praise, start)
    later, same = pushes(5.0)
    torch.testing.assert_close(same, praise)
    assert (later > 0.7 * start).all()  # both are negative


def test_step_sft_is_sft_on_the_steps_before_the_first_wrong_one():
    wrong_second = tensor([[1.0, 0.0, 1.0]])
    got = step_sft_loss(D_CHOSEN, D_REJECTED, wrong_second, B, ALL, ALL, LOGPS, beta=0.3)
    assert got.loss.item() == pytest.approx(0.15, abs=1e-6)


@pytest.mark.parametrize("ratio", [-0.7, 0.4])
def test_one_good_step_a_response_is_dpo_positive(ratio):
    """Pal et al. 2024, arXiv 2402.13228. Several steps have a larger penalty."""
    one, good = ALL[:, :1], torch.ones(1, 1)
    options = {"credit": "uniform", "beta": 0.3, "anchor_lambda": 50.0}
    got = stepwise_loss(tensor([[ratio]]), tensor([[0.2]]), good, good, one, one, **options)
    want = softplus(-0.3 * (ratio - 0.2 - 50 * max(0.0, -ratio)))
    assert got.loss.item() == pytest.approx(want, rel=1e-6)
    two, parts = ALL[:, :2], tensor([[ratio + 1, -1.0]])
    more = stepwise_loss(
        parts, tensor([[0.2, 0.0]]), good.expand(1, 2), good.expand(1, 2), two, two, **options
    )
    assert more.loss.item() > got.loss.item() + 1


def test_anchor_pulls_back_good_steps_that_become_less_likely():
    chosen = tensor([[-1.0, -1.0, 1.0]], requires_grad=True)
    stepwise_loss(
        chosen,
        D_REJECTED,
        tensor([[1.0, 0.0, 1.0]]),
        B,
        ALL,
        ALL,
        credit="score",
        anchor_lambda=5.0,
    ).loss.sum().backward()
    # u + lambda a against u
    assert chosen.grad[0, 0] == pytest.approx(6 * chosen.grad[0, 2].item())
    assert chosen.grad[0, 1] == 0  # a wrong step is not held


def test_step_dpo_by_hand():
    # first steps: .5 and -.4; the anchor holds step 2 of chosen: a relu(-D) = .5 * .3
    got = step_dpo_loss(D_CHOSEN, D_REJECTED, A, B, ALL, ALL, beta=0.1)
    assert got.loss.item() == pytest.approx(softplus(-0.1 * (0.5 + 0.4)), abs=1e-6)
    anchored = step_dpo_loss(D_CHOSEN, D_REJECTED, A, B, ALL, ALL, beta=0.1, anchor_lambda=5.0)
    assert anchored.anchor.item() == pytest.approx(0.075, abs=1e-6)
    assert anchored.loss.item() == pytest.approx(softplus(-0.09 + 0.075), abs=1e-6)
    assert (
        anchored.chosen_weights.tolist() == anchored.rejected_weights.tolist() == [[1.0, 0.0, 0.0]]
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("anchor_lambda", [0.0, 5.0])
def test_full_step_dpo_against_float64(anchor_lambda):
    beta, tau, wide = 0.3, 0.5, {"dtype": torch.float64}
    d, e, a, b = ([float(x) for x in values[0]] for values in (D_CHOSEN, D_REJECTED, A, B))
    u = [
        sigmoid(-x) * math.exp(tau * s) / sum(math.exp(tau * t) for t in a)
        for x, s in zip(d, a, strict=True)
    ]
    v = [
        sigmoid(x) * math.exp(-tau * s) / sum(math.exp(-tau * t) for t in b)
        for x, s in zip(e, b, strict=True)
    ]
    pull = anchor_lambda * 0.5 * 0.3
    gate = sigmoid(-beta * (sum(d) - sum(e) - pull))
    want = -gate * (
        sum(w * x for w, x in zip(u, d, strict=True))
        - sum(w * x for w, x in zip(v, e, strict=True))
        - pull
    )
    chosen, rejected = D_CHOSEN.to(**wide).requires_grad_(), D_REJECTED.to(**wide).requires_grad_()
    got = full_step_dpo_loss(
        chosen,
        rejected,
        A.to(**wide),
        B.to(**wide),
        ALL,
        ALL,
        beta=beta,
        anchor_lambda=anchor_lambda,
        tau=tau,
    )
    assert got.loss.item() == pytest.approx(want, abs=1e-7)
    got.loss.sum().backward()  # neither the gate nor the weights pass a gradient
    held = [0.0, anchor_lambda * 0.5, 0.0]
    assert chosen.grad[0].tolist() == pytest.approx(
        [-gate * (w + h) for w, h in zip(u, held, strict=True)], abs=1e-7
    )
    assert rejected.grad[0].tolist() == pytest.approx([gate * w for w in v], abs=1e-7)


def praise_alone(*sides, beta: float, anchor_lambda: float):
    return step_sft_loss(*sides, chosen_logps=sides[0], beta=beta)


@pytest.mark.parametrize("step_loss", [step_dpo_loss, full_step_dpo_loss, praise_alone])
def test_step_losses_skip_what_is_not_there(step_loss):
    junk, mask = tensor([[9.0, -9.0]]), tensor([[True, True, False, False]])
    two = torch.ones(1, 2, dtype=torch.bool)
    options = {"beta": 0.3, "anchor_lambda": 3.0}
    short = [values[:, :2] for values in (D_CHOSEN, D_REJECTED, A, B)]
    want = step_loss(*short, two, two, **options)
    got = step_loss(*(torch.cat([values, junk], 1) for values in short), mask, mask, **options)
    for name in ("loss", "chosen_rewards", "rejected_rewards", "anchor"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), msg=name)
    gone = step_loss(D_CHOSEN, D_REJECTED, A, B, torch.zeros_like(ALL), ALL, **options)
    assert torch.isfinite(gone.loss).all() and gone.chosen_rewards.item() == 0


def test_sum_per_step():
    values = tensor([[1.0, 2.0, 4.0, 8.0, 16.0], [1.0, 2.0, 4.0, 8.0, 16.0]], requires_grad=True)
    ids = tensor([[-1, 0, 0, 2, -1], [0, 1, -1, 1, 1]])
    sums = sum_per_step(values, ids, 3)
    assert sums.tolist() == [[6.0, 0.0, 8.0], [1.0, 26.0, 0.0]]
    sums.sum().backward()
    assert values.grad.tolist() == (ids >= 0).float().tolist()
