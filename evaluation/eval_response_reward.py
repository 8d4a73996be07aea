"""A response reward model on held-out prompts: pairwise accuracy, and best of n.

The data are ranked answers (CSV; if the rows have splits, those of `test`), or pairs in the format
of RewardBench (`prompt, chosen, rejected, subset`), which are reported by subset. For best of n, a
policy is sampled n times for every problem. The exact accuracy of the sample with the highest score
is compared with a majority vote and with the policy's own log-prob.
"""

import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, check_input, check_least, parse_args, run
from common.errors import UserError
from common.files import at_root, file_type
from common.outputs import together
from common.progress import progress_bar, taking_long
from evaluation.metrics import (
    Bin,
    Metric,
    best_of_n,
    calibration_metric,
    clustered_mean_metric,
    mean_metric,
    paired_difference,
    reliability,
)
from evaluation.results import output_paths, print_metrics, print_table, write_result
from lm.registry import PolicyArgs, check_policy, open_policy
from reasoning.datasets.files import Dropped, load_rows
from reasoning.datasets.loading import convert_rows, problems_of
from reasoning.datasets.preference_shapes import group_of
from reasoning.datasets.ranking import check_groups, groups, read_answers
from reasoning.grading import is_correct
from reasoning.records import Problem
from reasoning.splits import MAKES_HELD_OUT
from reward_model.protocols import ResponseScorer
from reward_model.registry import ScorerArgs, check_scorer, open_scorer, warn_of_foreign_responses
from search.candidates import SearchBudget
from search.strategies import draw, pick_majority

if TYPE_CHECKING:
    from lm.policy import Policy

NAME = "response_reward"
CHUNK = 64  # problems that are sampled together
ALIKE = 0.05  # largest difference of characters, as a share, of answers of equal length
NEVER = -math.inf  # log-prob of an empty answer: it must never be picked
MAKES_ANSWERS = "python utils/build_ranked_responses.py --rank_by exact"


@dataclass
class RewardEvalArgs(ScorerArgs, PolicyArgs):
    data: str = arg(
        at_root("data/answers.csv.gz"),
        "ranked answers (.csv), or pairs with prompt, chosen, rejected and optionally "
        "subset: a file or a hub name",
    )
    data_split: str | None = arg(
        None,
        "split of --data: of the rows of a table (default: test, if it has splits), or "
        "of a hub data set",
    )
    problems: str = arg(at_root("data/problems_test.jsonl"), "problems with answers, for best of n")
    n: int = arg(8, "samples a problem; 0: no best of n")
    max_new_tokens: int = arg(256, "longest sample, in tokens")
    output_dir: str = arg(at_root("evaluation/results"), f"folder of {NAME}.json and its plot")
    limit: int | None = arg(None, "use the first LIMIT groups and problems")
    seed: int = arg(0, "seed of samples and bootstrap")
    overwrite: bool = arg(False, "replace an existing result")

    def __post_init__(self) -> None:
        check_least(self, limit=1, n=0, max_new_tokens=1, seed=0)
        if self.n == 1:
            raise ValueError(
                "argument --n: expected 2 or more to choose from, or 0 for no best of n"
            )


@dataclass(frozen=True)
class RankedAnswer:
    text: str
    rank: int
    category: str


Group = tuple[str, list[RankedAnswer]]  # prompt and answers


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt. gap: score of the better minus the worse. cluster: the prompt."""

    cluster: int
    better: RankedAnswer
    worse: RankedAnswer
    gap: float

    @property
    def in_order(self) -> float:
        """1 if the better answer has the higher score, 0 if the lower, 0.5 for equal scores."""
        return 0.5 if self.gap == 0 else float(self.gap > 0)

    @property
    def longer_is_better(self) -> float:
        """As `in_order`, with the length as the score."""
        a, b = len(self.better.text), len(self.worse.text)
        return 0.5 if a == b else float(a > b)

    @property
    def equal_length(self) -> bool:
        """Whether both have the same number of lines and about the same number of characters."""
        a, b = self.better.text, self.worse.text
        longest = max(len(a), len(b))
        return a.count("\n") == b.count("\n") and abs(len(a) - len(b)) <= ALIKE * longest


# --- data ---


def read_groups(args: RewardEvalArgs) -> tuple[list[Group], bool]:
    """The groups, and whether they are pairs with subsets. Raises RecordError or UserError."""
    found: list[Group] = []
    if file_type(args.data) == ".csv":
        check_input(args.data, MAKES_ANSWERS if args.data == RewardEvalArgs.data else None)
        rows = read_answers(args.data)
        check_groups(rows, args.data)
        split = args.data_split or ("test" if any(row.split for row in rows) else "")
        kept = [row for row in rows if row.split == split]
        for (prompt, _), ranked in groups(kept).items():
            answers = [RankedAnswer(row.answer, row.rank or 0, row.category) for row in ranked]
            if len({answer.rank for answer in answers}) > 1:
                found.append((prompt, answers))
        if not found:
            raise UserError(
                f"{args.data}: no ranked group of the split {split or '(none)'} has a better and a "
                "worse answer"
            )
        return found[: args.limit], False
    dropped = Dropped()

    def convert(row: dict, dropped: Dropped) -> Iterator[Group]:
        subset = str(row.get("subset") or "")
        for group in group_of(row, dropped):
            ranked_texts = zip(group.answers, group.ranks, strict=True)
            yield group.prompt, [RankedAnswer(*pair, category=subset) for pair in ranked_texts]

    source = load_rows(args.data, split=args.data_split, dropped=dropped)
    converted = convert_rows(args.data, source, convert, dropped)
    found = [group for _, group in islice(converted, args.limit)]
    dropped.print(args.data)
    return found, True


def pairs_of(found: Sequence[Group], scores: Sequence[Sequence[float]]) -> list[Pair]:
    """All pairs of answers of a group with different ranks; each prompt is a cluster."""
    clusters = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in found))}
    pairs = []
    for (prompt, answers), group_scores in zip(found, scores, strict=True):
        for (a, score_a), (b, score_b) in combinations(zip(answers, group_scores, strict=True), 2):
            if a.rank < b.rank:
                pairs.append(Pair(clusters[prompt], a, b, score_a - score_b))
            elif b.rank < a.rank:
                pairs.append(Pair(clusters[prompt], b, a, score_b - score_a))
    return pairs


# --- metrics ---


def _mean_over(pairs: Sequence[Pair], values: Sequence[float], seed: int) -> Metric:
    return clustered_mean_metric(values, [pair.cluster for pair in pairs], seed)


def accuracies(pairs: Sequence[Pair], by_subset: bool, seed: int) -> dict[str, Metric]:
    """pairwise_accuracy of all pairs, of each kind of pair, and of pairs of equal length.

    The kinds are `<better>_over_<worse>/` by the categories of the answers, or `<subset>/`."""
    parts: dict[str, list[Pair]] = {"": list(pairs)}
    for pair in sorted(pairs, key=lambda pair: (pair.better.category, pair.worse.category)):
        a, b = pair.better.category, pair.worse.category
        name = a if by_subset else f"{a}_over_{b}" if a or b else ""
        if name:
            parts.setdefault(f"{name}/", []).append(pair)
    for name, part in list(parts.items()):
        if not by_subset or not name:
            parts[f"{name}equal_length/"] = [pair for pair in part if pair.equal_length]
    return {
        f"{name}pairwise_accuracy": _mean_over(part, [pair.in_order for pair in part], seed)
        for name, part in parts.items()
        if part
    }


def rank_correlations(
    found: Sequence[Group], scores: Sequence[Sequence[float]], seed: int
) -> dict[str, Metric]:
    """Mean correlations within groups, -1 to 1.

    `spearman` and `kendall` (tau-b): of score and rank (1: the same order). `length_spearman`: of
    score and length. `rank_length_spearman`: of rank and length, the length bias of the ranks
    themselves. A group in which one of the two is constant does not count."""
    from scipy.stats import kendalltau, spearmanr  # slow to import

    ranks = [[-answer.rank for answer in answers] for _, answers in found]
    lengths = [[len(answer.text) for answer in answers] for _, answers in found]
    kinds = {
        "spearman": (spearmanr, scores, ranks),
        "kendall": (kendalltau, scores, ranks),
        "length_spearman": (spearmanr, scores, lengths),
        "rank_length_spearman": (spearmanr, ranks, lengths),
    }
    prompts = {prompt: k for k, prompt in enumerate(sorted({prompt for prompt, _ in found}))}
    metrics = {}
    for name, (correlation, first, second) in kinds.items():
        values, clusters = [], []
        for (prompt, _), a, b in zip(found, first, second, strict=True):
            if len({*a}) > 1 and len({*b}) > 1:
                values.append(correlation(a, b).statistic)
                clusters.append(prompts[prompt])
        if values:
            metrics[name] = clustered_mean_metric(values, clusters, seed)
    return metrics


def calibration(pairs: Sequence[Pair], seed: int) -> tuple[Metric, list[Bin]]:
    """Calibration of sigmoid(r - r') as the probability that the first answer is better.

    Which of the two answers is first is random."""
    rng = random.Random(seed)
    first_is_better = [float(rng.random() < 0.5) for _ in pairs]
    gaps = [
        pair.gap if first else -pair.gap for pair, first in zip(pairs, first_is_better, strict=True)
    ]
    probabilities = [1 / (1 + math.exp(-max(-700.0, min(700.0, gap)))) for gap in gaps]
    clusters = [pair.cluster for pair in pairs]
    error = calibration_metric(first_is_better, probabilities, clusters, seed)
    return error, reliability(first_is_better, probabilities, clusters, seed)


# --- best of n ---


def pick_best(
    args: RewardEvalArgs, problems: Sequence[Problem], policy: "Policy", scorer: ResponseScorer
) -> dict[str, list[float]]:
    """How the sample is picked -> its exact accuracy for every problem.

    `chance`: the mean of the samples. `log-prob`: the policy's mean token log-prob. `majority`: a
    majority vote, ties to the first answer. `scorer`. `oracle`: a right sample if there is one."""
    budget = SearchBudget(n=args.n, max_new_tokens=args.max_new_tokens)
    names = ("chance", "log-prob", "majority", "scorer", "oracle")
    found: dict[str, list[float]] = {name: [] for name in names}
    with progress_bar(total=len(problems), desc=f"best of {args.n}", unit="problem") as bar:
        for start in range(0, len(problems), CHUNK):
            chunk = problems[start : start + CHUNK]
            _, pools = draw([problem.prompt for problem in chunk], policy, None, budget, args.seed)
            texts = [
                (problem.prompt, list(sample.state.steps))
                for problem, pool in zip(chunk, pools, strict=True)
                for sample in pool
            ]
            scores = scorer.score([(prompt, "\n".join(steps)) for prompt, steps in texts])
            logps = _mean_token_logps(policy, texts)
            correct = [
                [float(is_correct(list(sample.state.steps), problem)) for sample in pool]
                for problem, pool in zip(chunk, pools, strict=True)
            ]
            places = [slice(k * args.n, (k + 1) * args.n) for k in range(len(chunk))]
            found["chance"] += best_of_n([[0.0] * args.n] * len(chunk), correct)
            found["log-prob"] += best_of_n([logps[place] for place in places], correct)
            found["scorer"] += best_of_n([scores[place] for place in places], correct)
            found["oracle"] += best_of_n(correct, correct)
            for pool, right in zip(pools, correct, strict=True):
                found["majority"].append(right[pool.index(pick_majority(pool, "min"))])
            bar.update(len(chunk))
    return found


def _mean_token_logps(policy: "Policy", texts: Sequence[tuple[str, list[str]]]) -> list[float]:
    """The mean token log-prob of each (prompt, steps)."""
    written = policy.step_logps([(prompt, [], steps) for prompt, steps in texts if steps])
    means = iter(
        sum(step.logp for step in steps) / max(1, sum(step.tokens for step in steps))
        for steps in written
    )
    return [next(means) if steps else NEVER for _, steps in texts]


def best_of_n_metrics(found: dict[str, list[float]], n: int, seed: int) -> dict[str, Metric]:
    """best_of_N/NAME/accuracy, and the paired differences of the scorer to the first three."""
    metrics = {
        f"best_of_{n}/{name}/accuracy": mean_metric(values, seed) for name, values in found.items()
    }
    for name in ("chance", "log-prob", "majority"):
        difference = paired_difference(found[name], found["scorer"], seed)
        metrics[f"best_of_{n}/scorer/accuracy_over_{name}"] = difference
    return metrics


def main() -> None:
    (args,) = parse_args(RewardEvalArgs, description=__doc__.split("\n\n")[0])
    found, by_subset = read_groups(args)
    problems: list[Problem] = []
    if args.n:
        is_default = args.problems == RewardEvalArgs.problems
        check_input(args.problems, MAKES_HELD_OUT if is_default else None)
        problems = problems_of(args.problems, args.limit)
        check_policy(args)
    check_scorer(args)
    read = [args.data, args.problems, args.scorer, args.model_name_or_path]
    plot, _, result = output_paths(args.output_dir, NAME, read, args.overwrite)

    with open_scorer(args) as scorer:
        texts = [(prompt, answer.text) for prompt, answers in found for answer in answers]
        warn_of_foreign_responses(scorer, texts)
        flat = iter(scorer.score(texts, progress="answers"))
        scores = [[next(flat) for _ in answers] for _, answers in found]
        cut = scorer.cut
        picked = {}
        if args.n:
            policy = open_policy(args, [problem.prompt for problem in problems])
            picked = pick_best(args, problems, policy, scorer)
    with taking_long("computing intervals"):
        pairs = pairs_of(found, scores)
        by_kind = accuracies(pairs, by_subset, args.seed)
        error, bins = calibration(pairs, args.seed)
        longer = _mean_over(pairs, [pair.longer_is_better for pair in pairs], args.seed)
        metrics = by_kind | {"longer/pairwise_accuracy": longer}
        metrics |= rank_correlations(found, scores, args.seed)
    metrics["calibration_error"] = error
    best = best_of_n_metrics(picked, args.n, args.seed) if picked else {}

    title = f"{Path(args.scorer).name} on {len(found):,} groups of {Path(args.data).name}"
    extras = {"groups": len(found), "reliability": [asdict(row) for row in bins], "cut": cut}
    with together(), taking_long("drawing"):
        from evaluation.plots import response_plot  # slow to import (matplotlib)

        response_plot(
            plot,
            title,
            [
                (answer.rank, len(answer.text), score, answer.category)
                for (_, answers), group_scores in zip(found, scores, strict=True)
                for answer, score in zip(answers, group_scores, strict=True)
            ],
            bins,
            {
                name.removesuffix("pairwise_accuracy").strip("/").replace("/", ", ")
                or "all": metric
                for name, metric in by_kind.items()
            },
            {name: best[f"best_of_{args.n}/{name}/accuracy"] for name in picked},
            metrics,
        )
        write_result(result, metrics | best, asdict(args), [args.seed], **extras)
    print_metrics(f"{title} (n: pairs, or groups; 95 % intervals by prompt)", metrics)
    if best:
        heading = f"best of {args.n}: {len(problems):,} problems of {Path(args.problems).name}"
        print_table(
            f"{heading}, {Path(args.model_name_or_path).name}",
            ["picked by", "exact accuracy"],
            [(name.split("/", 1)[1], metric) for name, metric in best.items()],
        )
    if cut:
        print(f"{cut} responses are too long: the start of the prompt was cut off")
    print(f"wrote {result} and {plot}")


if __name__ == "__main__":
    run(main)
