"""Losses of the trainers: pure functions of tensors, without a model and without a config.

The step-level preference losses come first, the losses of step PPO after them.

Shapes: B pairs; K steps of the longest response of the batch, padded; L tokens. A boolean mask
(B, K) is False for padding and for steps that truncation removed; these steps count nowhere.
Symbols: a, b are the judge's scores (0 wrong .. 1 right) of the steps of chosen and rejected;
u, v are the weights computed from them; D is the log-ratio log pi - log pi_ref of a step, in nats,
summed over the tokens of the step.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def sum_per_step(per_token: Tensor, step_ids: Tensor, steps: int) -> Tensor:
    """Sum token values over each step: (N, steps), 0 for a step without tokens.

    per_token (N, L) floats; step_ids (N, L), 0 .. steps - 1, or -1 for a token outside all
    steps."""
    # an extra column collects the tokens outside all steps
    sums = per_token.new_zeros(per_token.size(0), steps + 1)
    return sums.scatter_add(1, step_ids.masked_fill(step_ids < 0, steps), per_token)[:, :steps]


def fork_logratios(
    logratios: Tensor, ref_logps: Tensor, step_ids: Tensor, candidates: Tensor, steps: int
) -> Tensor:
    """The log-ratio of every step of rejected at its fork alone, (B, steps), for credit `fork`.

        t_k = argmin_t log pi_ref(t) over the candidates t in step k
        D_k = log pi(t_k) - log pi_ref(t_k), 0 for a step without a candidate

    The fork is the token in which a wrong step leaves the right one. `candidates` says where it may
    be: where chosen has a sibling of the step, in the first token that differs and in no other;
    elsewhere, in the token of the step that the reference found least likely, because there it had
    most probability left for other tokens (the first one on a tie).

    A critical token is one after which hardly any rollout ends right (Lin et al. 2024, arXiv
    2411.19943). Their cDPO weights every token of rejected by how much more likely a model of wrong
    solutions finds it than a model of right ones, and leaves chosen as it is. Here the sibling or
    the reference takes the place of these two models, and one token of a step has all its weight.

    All inputs (B, L), a value for each token: log-ratios and log-probs in nats; step_ids, -1
    outside all steps; candidates, bools."""
    of_step = step_ids[:, None] == torch.arange(steps, device=step_ids.device)[:, None]
    possible = of_step & candidates[:, None]  # (B, steps, L)
    forks = ref_logps[:, None].masked_fill(~possible, torch.inf).argmin(2)
    return logratios.gather(1, forks) * possible.any(2)


def _first_error(a: Tensor, b: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    """u_k = prod_{j<=k} a_j and v_k = (1 - b_k) prod_{j<k} b_j.

    u_k is the probability that all steps up to k are right, v_k that step k is the first error.
    Steps after an error get no weight on either side."""
    right_before = F.pad(b.cumprod(1), (1, -1), value=1.0)
    return a.cumprod(1), (1 - b) * right_before


def _fork(a: Tensor, b: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of `first_error`, for log-ratios of rejected at the forks (`fork_logratios`).

    This is `first_error` token by token. A token of chosen has the probability that all is right
    up to its step, u_k. A token of rejected has the probability that the first error is made in it:
    v_k at the fork of step k, 0 elsewhere. What follows the fork is right arithmetic on a wrong
    number. What precedes it is no error either: it is part of a right step, too, and if both sides
    share it, blame would only take away the u_k of the same tokens on the side of chosen."""
    return _first_error(a, b)


def _normalized(a: Tensor, b: Tensor, a_mask: Tensor, b_mask: Tensor) -> tuple[Tensor, Tensor]:
    """u_k = K (a_k + .1) / sum(a + .1), v_k alike from 1 - b: the weights have mean 1."""

    def normalize(scores: Tensor, mask: Tensor) -> Tensor:
        total = ((scores + 0.1) * mask).sum(1, keepdim=True).clamp(min=0.1)
        return (scores + 0.1) * (mask.sum(1, keepdim=True) / total)

    return normalize(a, a_mask), normalize(1 - b, b_mask)


# credit -> function of (a, b, a_mask, b_mask) that returns the weights (u, v); all are (B, K)
CREDITS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "first_error": _first_error,
    "fork": _fork,
    "score": lambda a, b, *_: (a, 1 - b),
    "normalized": _normalized,
    "uniform": lambda a, b, *_: (torch.ones_like(a), torch.ones_like(b)),
}

# combines the weighted steps of a response into one number: (values, mask), each (B, K) -> (B,)
AGGREGATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda values, mask: (values * mask).sum(1),
    "mean": lambda values, mask: (values * mask).sum(1) / mask.sum(1).clamp(min=1),
}


def step_weights(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    credit: str,
    chosen_mask: Tensor | None = None,
    rejected_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(u, v), each (B, K): the weights of the steps of chosen and of rejected.

    Scores (B, K) in 0..1; masks (B, K), by default all True; `credit` is a key of CREDITS, which
    holds the equations."""
    if chosen_mask is None:
        chosen_mask = torch.ones_like(chosen_scores, dtype=torch.bool)
    if rejected_mask is None:
        rejected_mask = torch.ones_like(rejected_scores, dtype=torch.bool)
    u, v = CREDITS[credit](chosen_scores, rejected_scores, chosen_mask, rejected_mask)
    return u * chosen_mask, v * rejected_mask


def good_step_losses(
    chosen_logratios: Tensor, chosen_scores: Tensor, mask: Tensor, agg: str = "sum"
) -> Tensor:
    """agg_k(a_k relu(-D_k)), (B,): the log-prob that good steps of chosen lost. Inputs (B, K)."""
    return AGGREGATIONS[agg](chosen_scores * F.relu(-chosen_logratios), mask)


class StepLoss(NamedTuple):
    """The result of a step loss."""

    loss: Tensor  # (B,)
    chosen_rewards: Tensor  # (B,) R_w, without the anchor
    rejected_rewards: Tensor  # (B,) R_l
    anchor: Tensor  # (B,) what the anchor subtracts from R_w
    chosen_weights: Tensor  # (B, K) u, the weights of the log-ratios in the loss
    rejected_weights: Tensor  # (B, K) v


def stepwise_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    credit: str = "first_error",
    beta: float = 0.1,
    agg: str = "sum",
    margin_gamma: float = 0.0,
    anchor_lambda: float = 0.0,
) -> StepLoss:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) on steps weighted by their scores.

        R_w = beta agg_k(u_k D_k) - lambda beta agg_k(a_k relu(-D_k))
        R_l = beta agg_k(v_k D_k)
        m = gamma (mean(a) - mean(b))
        loss = -log sigmoid(R_w - R_l - m)

    All inputs (B, K). agg is the sum or the mean over the steps in the mask. The second term of R_w
    is the anchor of DPO-Positive (Pal et al. 2024, arXiv 2402.13228), here per step: it pulls a
    good step back when the step becomes less likely than under the reference. With `uniform`, sum,
    gamma 0 and lambda 0 this is DPO; at pi = pi_ref it is -log sigmoid(-m). With `fork`,
    rejected_logratios are those of `fork_logratios`.

    With `uniform`, sum, gamma 0, scores of 1 and one step for each response it is the whole loss of
    DPO-Positive, whose penalty is lambda relu(-D) of the whole response. With several steps the
    penalty is larger, because a step that gained does not make up for one that lost."""
    aggregate, mean = AGGREGATIONS[agg], AGGREGATIONS["mean"]
    u, v = step_weights(chosen_scores, rejected_scores, credit, chosen_mask, rejected_mask)
    chosen_rewards = beta * aggregate(u * chosen_logratios, chosen_mask)
    rejected_rewards = beta * aggregate(v * rejected_logratios, rejected_mask)
    drift = good_step_losses(chosen_logratios, chosen_scores, chosen_mask, agg)
    anchor = anchor_lambda * beta * drift
    gap = mean(chosen_scores, chosen_mask) - mean(rejected_scores, rejected_mask)
    margin = margin_gamma * gap
    loss = -F.logsigmoid(chosen_rewards - anchor - rejected_rewards - margin)
    return StepLoss(loss, chosen_rewards, rejected_rewards, anchor, u, v)


def step_sft_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    chosen_logps: Tensor,
    credit: str = "first_error",
    beta: float = 0.1,
    agg: str = "sum",
) -> StepLoss:
    """The positive side of stepwise_loss on its own: SFT on chosen, weighted step by step.

        loss = -beta/2 agg_k(u_k log pi_k)

    All inputs (B, K); chosen_logps are log pi_k, the log-probs of the steps of chosen, in nats.
    u are the weights of stepwise_loss with the same credit. With scores of 0 and 1 and
    `first_error` this is SFT on the steps before the first wrong one; with `uniform`, SFT on
    chosen.

    The scale is that of stepwise_loss: -log sigmoid(R_w - R_l) has the derivative -1/2 with respect
    to R_w at pi = pi_ref. So at the start of a training both losses push chosen equally hard (gamma
    0), and while the push of stepwise_loss fades as the margin grows, this one does not. Weights
    1 and w of the two losses thus mean: w times the first push, for the whole training.

    Iterative RPO (Pang et al. 2024, arXiv 2404.19733) and TRL's `sft` add the mean over the tokens
    instead, -log pi(y_w) / |y_w|, to a DPO loss that sums over them. The ratio of the two pushes
    then depends on beta and on the length of the responses. The returned rewards are R_w and R_l of
    stepwise_loss, for the log."""
    aggregate = AGGREGATIONS[agg]
    u, v = step_weights(chosen_scores, rejected_scores, credit, chosen_mask, rejected_mask)
    loss = -beta / 2 * aggregate(u * chosen_logps, chosen_mask)
    chosen_rewards = beta * aggregate(u * chosen_logratios, chosen_mask)
    rejected_rewards = beta * aggregate(v * rejected_logratios, rejected_mask)
    return StepLoss(loss, chosen_rewards, rejected_rewards, torch.zeros_like(loss), u, v)


def step_dpo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    beta: float = 0.1,
    anchor_lambda: float = 0.0,
) -> StepLoss:
    """Step-DPO (Lai et al. 2024, arXiv 2406.18629, eq. 3): DPO on the first step after the prefix.

        loss = -log sigmoid(beta D_1(chosen) - beta D_1(rejected))

    All inputs (B, K). Only the anchor uses the scores. It is the anchor of stepwise_loss with agg
    sum; the paper has none."""
    first = torch.zeros_like(chosen_logratios)
    first[:, 0] = 1
    u, v = first * chosen_mask, first * rejected_mask
    chosen_rewards = beta * (u * chosen_logratios).sum(1)
    rejected_rewards = beta * (v * rejected_logratios).sum(1)
    anchor = anchor_lambda * beta * good_step_losses(chosen_logratios, chosen_scores, chosen_mask)
    loss = -F.logsigmoid(chosen_rewards - anchor - rejected_rewards)
    return StepLoss(loss, chosen_rewards, rejected_rewards, anchor, u, v)


def full_step_dpo_loss(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    beta: float = 0.1,
    anchor_lambda: float = 0.0,
    tau: float = 0.5,
) -> StepLoss:
    """Full-Step-DPO (Xu et al. 2025, arXiv 2502.14356; weights as in the authors' code).

        u_k = sigmoid(-D_k) softmax_k(tau a_k)        v_k = sigmoid(D_k) softmax_k(-tau b_k)
        R = beta sum_k D_k
        loss = -sigmoid(-(R_w - R_l)) (sum_k u_k D_k - sum_k v_k D_k)

    All inputs (B, K). No gradient flows through u, v and the first factor: the gradient is that of
    DPO with both sides weighted step by step, and the value of the loss has no meaning (it is 0 at
    pi = pi_ref). The authors write log pi instead of D in the second factor, which gives the same
    gradient. beta occurs in the first factor only. The anchor is that of stepwise_loss with agg
    sum; it is subtracted from R_w (with beta) and from sum u D (without beta). The paper has
    none."""

    def softmax(values: Tensor, mask: Tensor) -> Tensor:
        """Over the steps in the mask; 0 for a response without any."""
        return torch.softmax(values.masked_fill(~mask, torch.finfo(values.dtype).min), 1) * mask

    with torch.no_grad():
        u = torch.sigmoid(-chosen_logratios) * softmax(tau * chosen_scores, chosen_mask)
        v = torch.sigmoid(rejected_logratios) * softmax(-tau * rejected_scores, rejected_mask)
    total = AGGREGATIONS["sum"]
    chosen_rewards = beta * total(chosen_logratios, chosen_mask)
    rejected_rewards = beta * total(rejected_logratios, rejected_mask)
    pull = anchor_lambda * good_step_losses(chosen_logratios, chosen_scores, chosen_mask)
    gate = torch.sigmoid(rejected_rewards - chosen_rewards + beta * pull).detach()
    weighted_chosen = total(u * chosen_logratios, chosen_mask)
    weighted_rejected = total(v * rejected_logratios, rejected_mask)
    loss = -gate * (weighted_chosen - weighted_rejected - pull)
    return StepLoss(loss, chosen_rewards, rejected_rewards, beta * pull, u, v)


# --- step PPO. Shapes: B trajectories; T tokens of the longest one; a mask is False for padding ---


def gae(
    rewards: Tensor, values: Tensor, last: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16) per step.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t = delta_t + gamma lam A_{t+1}
        return_t = A_t + V_t

    An episode is one step: at its last token V_{t+1} and A_{t+1} are 0, so later steps do not
    change its advantages. rewards, values (B, T): r_t of token t, and V_t of the text before token
    t; last (B, T) bools: True at the last token of each step (a trajectory may hold several steps).
    Returns (advantages, returns), each (B, T); the numbers at padding have no meaning."""
    advantages, later = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.size(1))):
        inside = (~last[:, t]).to(values.dtype)  # 0 at the end of a step
        next_value = values[:, t + 1] if t + 1 < values.size(1) else torch.zeros_like(later)
        delta = rewards[:, t] + gamma * inside * next_value - values[:, t]
        advantages[:, t] = later = delta + gamma * lam * inside * later
    return advantages, advantages + values


def whiten(advantages: Tensor, mask: Tensor, least_std: float = 0.1) -> Tensor:
    """(A - mean) / max(std, least_std) over all tokens in the mask, (B, T).

    Rewards are in 0..1: differences far below least_std are noise, and the floor keeps them
    small."""
    known = advantages[mask]
    return (advantages - known.mean()) / known.std(correction=0).clamp(min=least_std)


def ppo_policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, cliprange: float = 0.2
) -> tuple[Tensor, Tensor]:
    """The clipped objective of PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7), minimized.

        ratio = exp(log pi - log pi_old)
        loss = max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps))

    All (B, T), log-probs in nats. Returns (loss of every token, whether it is clipped); a clipped
    token has no gradient."""
    ratio = torch.exp(logps - old_logps)
    free, bound = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(free, bound), bound > free


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float = 0.2
) -> tuple[Tensor, Tensor]:
    """The clipped value loss in the code of PPO's authors (openai/baselines, ppo2).

        loss = 1/2 max((V - return)^2, (clip(V, V_old - eps, V_old + eps) - return)^2)

    All (B, T), in units of reward. Returns (loss of every token, whether it is clipped); a clipped
    token has no gradient."""
    near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    free, bound = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(free, bound), bound > free


def approximate_kl(logps: Tensor, old_logps: Tensor) -> Tensor:
    """KL(pi_old || pi) of every sampled token, (B, T), in nats: ratio - 1 - log ratio.

    Unbiased and never negative (Schulman 2020, joschu.net/blog/kl-approx.html)."""
    log_ratio = logps - old_logps
    return torch.expm1(log_ratio) - log_ratio
