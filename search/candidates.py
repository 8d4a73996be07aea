"""Candidates of a guided search: how they are sampled, scored and ranked.

Proposals are ranked (`rank`) first by whether they have a `note`, which says why a proposal cannot
lead to a good answer; then by value, the aggregate of their step scores; then, among values that
differ by less than RESOLUTION, by their probability under the policy. Without the last rule a
search selects rare steps with overestimated scores, because the maximum of many noisy scores is
biased upwards.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import TYPE_CHECKING, cast

from common.errors import UserError
from reasoning.steps import ends_solution
from reward_model.protocols import SCORE_AGGREGATES, ResponseScorer, StepJudge, aggregate

if TYPE_CHECKING:  # this module does not need torch
    from lm.policy import State

# values that differ by less count as equal; chosen on hard validation problems (docs/LOG.md)
RESOLUTION = 0.05
AT_ONCE = 256  # samples of a state in one call; more would not be faster and need more memory
SEED_STRIDE = 1 << 32  # distance of the seeds of two calls that sample the same state


@dataclass(frozen=True)
class SearchBudget:
    """The budget for one answer.

    n: next steps that are proposed for each prefix, or number of whole solutions. beams: prefixes
    that `beam` keeps, independent searches of `dvts`, walks of `mcts`. max_steps and
    max_new_tokens: limits of a solution. aggregate: how the scores of the steps become one number.
    Raises ValueError with one line for an invalid value."""

    n: int = 16
    beams: int = 4
    max_steps: int = 40
    max_new_tokens: int = 256
    temperature: float = 1.0
    aggregate: str = "min"

    def __post_init__(self) -> None:
        for name in ("n", "beams", "max_steps", "max_new_tokens"):
            if getattr(self, name) < 1:
                got = getattr(self, name)
                raise ValueError(f"argument --{name}: expected 1 or more, got {got}")
        if not (self.temperature >= 0 and isfinite(self.temperature)):
            raise ValueError(f"argument --temperature: expected 0 or more, got {self.temperature}")
        if self.aggregate not in SCORE_AGGREGATES:
            expected = f"one of {', '.join(SCORE_AGGREGATES)}"
            raise ValueError(f"argument --aggregate: expected {expected}, got {self.aggregate}")


@dataclass(eq=False)
class Candidate:
    """A proposal: a prefix of a solution, or a whole solution.

    scores: of its steps; None if the judge cannot score it. tokens: sampled after the prompt.
    count: number of equal samples. share: its probability under the policy, estimated by the
    product of the shares of its steps among the samples. note: what is wrong with it, or empty."""

    state: "State"
    scores: list[float] | None = field(default_factory=list)
    tokens: int = 0
    count: int = 1
    share: float = 1.0
    note: str = ""

    @property
    def done(self) -> bool:
        return self.state.status != "open" or ends_solution(list(self.state.steps))

    def value(self, how: str) -> float:
        """The aggregate of its scores; -1 without scores. Rounded, so that rounding errors do not
        decide between equal candidates."""
        return -1.0 if self.scores is None else round(aggregate(self.scores, how), 5)


# the candidates of one round of a search, and whether each was kept
Round = list[tuple[Candidate, bool]]


@dataclass
class SearchResult:
    """The answer to a prompt, the search that found it, and its cost.

    scores: of the steps; None if the judge could not score the answer or there was no judge.
    finished: the answer ended before the limits. proposals: number of steps or whole solutions that
    were sampled. tokens: sampled in them. judged: number of steps that the judge scored. left_out:
    number of proposals that it could not score. seconds: the time of the call divided by the number
    of prompts."""

    prompt: str
    steps: list[str] = field(default_factory=list)
    scores: list[float] | None = None
    finished: bool = False
    proposals: int = 0
    tokens: int = 0
    judged: int = 0
    left_out: int = 0
    seconds: float = 0.0
    rounds: list[Round] = field(default_factory=list, repr=False)

    def take(self, candidate: Candidate) -> None:
        state = candidate.state
        self.steps, self.scores = list(state.steps), candidate.scores
        self.finished = state.status == "finished" or (state.status == "open" and candidate.done)


def rank(candidate: Candidate, how: str) -> tuple:
    value = candidate.value(how)
    return not candidate.note, round(value / RESOLUTION), candidate.share, value


def best(candidates: Sequence[Candidate], how: str) -> Candidate:
    """The best answer, the first of equal ones. Complete answers precede incomplete ones."""
    return max(candidates, key=lambda c: (not c.note, c.done, rank(c, how)))


# --- sampling and scoring ---


def sample_states(
    method: Callable, states: Sequence["State"], n: int, budget: SearchBudget, seed: int
) -> list[list["State"]]:
    """n samples of every state; `method` is `policy.next_steps` or `policy.rollouts`."""
    groups: list[list[State]] = [[] for _ in states]
    limits = budget.temperature, budget.max_new_tokens
    try:
        for first in range(0, n, AT_ONCE):
            count = min(AT_ONCE, n - first)
            sampled = method(states, count, *limits, seed + first * SEED_STRIDE)
            for group, more in zip(groups, sampled, strict=True):
                group += more
    # torch raises its own error on a GPU, and a plain RuntimeError on a CPU
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        raise UserError(
            f"{n} samples of each of {len(states)} prefixes do not fit into memory: lower --n or "
            "--beams"
        ) from None
    return groups


def new_candidate(parent: Candidate, state: "State", budget: SearchBudget) -> Candidate:
    """The candidate of a sampled state, with the scores of its parent (none for new steps)."""
    tokens = parent.tokens + state.sampled
    has_answer = ends_solution(list(state.steps))
    if tokens >= budget.max_new_tokens and state.status == "open" and not has_answer:
        state = replace(state, status="cut")
    new = state.steps[len(parent.state.steps) :]
    note = ""
    if state.status == "cut":
        note = "cut: too long"
    elif any(step in state.steps[:k] for k, step in enumerate(state.steps) if step in new):
        note = "repeats an earlier step"
    elif state.status == "finished" and not has_answer:
        note = "ends without an answer"
    return Candidate(state, parent.scores, tokens, note=note)


def merge(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Merge equal candidates, and count them."""
    merged: dict[tuple, Candidate] = {}
    for candidate in candidates:
        first = merged.setdefault((candidate.state.steps, candidate.state.status), candidate)
        first.count += first is not candidate
    return list(merged.values())


def score_new_steps(
    judge: StepJudge | ResponseScorer,
    answers: Sequence[SearchResult],
    groups: Sequence[Sequence[Candidate]],
) -> None:
    """Score all new steps of the candidates in one call of the judge.

    groups[i] are the candidates of answers[i]. Equal texts are scored once. A step that repeats an
    earlier step has score 0. A ResponseScorer gives a candidate one score for all its steps."""
    candidates = [(answer, c) for answer, group in zip(answers, groups, strict=True) for c in group]
    if hasattr(judge, "score_response"):
        texts = [(answer.prompt, "\n".join(c.state.steps)) for answer, c in candidates]
        different, scorer = list(dict.fromkeys(texts)), cast(ResponseScorer, judge)
        score_of = dict(zip(different, scorer.score(different), strict=True))
        for (_, candidate), text in zip(candidates, texts, strict=True):
            candidate.scores = [score_of[text]]
        return
    # (prompt, steps) -> number of steps that have a score already
    skips: dict[tuple[str, tuple[str, ...]], int] = {}
    for answer, candidate in candidates:
        steps, known = candidate.state.steps, candidate.scores
        key = (answer.prompt, steps)
        if known is not None and len(known) < len(steps) and key not in skips:
            skips[key] = len(known)
            answer.judged += len(steps) - len(known)
    solutions = [(prompt, list(steps)) for prompt, steps in skips]
    scored = judge.score_steps(solutions, list(skips.values())) if skips else []
    new_scores = dict(zip(skips, scored, strict=True))
    for answer, candidate in candidates:
        steps, known = candidate.state.steps, candidate.scores
        new = new_scores.get((answer.prompt, steps), [])
        if known is None or new is None:
            candidate.scores, candidate.note = None, judge.unscored_reason
            answer.left_out += candidate.count
        elif len(known) < len(steps):
            places = range(len(known), len(steps))
            repeats = [steps[k] in steps[:k] for k in places]
            new = [0.0 if is_repeat else s for is_repeat, s in zip(repeats, new, strict=True)]
            candidate.scores = [*known, *new]


def score_by_agreement(samples: Sequence[Candidate], shared: int) -> None:
    """Scores without a judge: the share of the samples with the same prefix that contain the step.

    The first `shared` steps keep their scores."""
    counts = Counter[tuple]()
    for sample in samples:
        steps = sample.state.steps
        counts.update({steps[:k]: sample.count for k in range(shared, len(steps) + 1)})
    for sample in samples:
        steps = sample.state.steps
        shares = [counts[steps[: k + 1]] / counts[steps[:k]] for k in range(shared, len(steps))]
        sample.scores = [*(sample.scores or []), *shares]
