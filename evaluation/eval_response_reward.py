"""A response reward model on held-out prompts: which pairs of ranked answers it tells apart, and how well it picks the best of n.

Ranked answers (CSV; where rows have a split, those of `test`), or pairs in RewardBench's shape (`prompt, chosen, rejected,
subset`), which are reported by subset. Then n samples of a policy for every problem: has the one with the highest score the right
answer, against a majority vote and against the policy's own log-prob?
"""

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_input, check_output, parse_args, run
from common.errors import RecordError, UserError
from common.files import at_root, read_records
from evaluation.metrics import (
    Metric,
    best_of_n,
    calibration_metric,
    clustered_mean_metric,
    mean_metric,
    print_table,
    reliability,
    write_result,
)
from lm.registry import PolicyArgs, check_policy, open_policy
from reasoning.datasets.files import load_rows
from reasoning.datasets.ranking import RankedGroup, check_groups, groups, read_answers
from reasoning.records import Problem
from reward_model.registry import ScorerArgs, check_scorer, open_scorer

NAME = "response_reward"
CHUNK = 64  # problems that are sampled together
ALIKE = (
    0.05  # texts of equal length: as many lines, and characters that differ by this share at most
)
NEVER = -math.inf  # the log-prob of an empty answer
MAKES_ANSWERS = "python utils/build_ranked_responses.py --rank_by exact"


@dataclass
class RewardEvalArgs(ScorerArgs, PolicyArgs):
    data: str = field(
        default=at_root("data/answers.csv"),
        metadata={
            "help": "ranked answers (.csv), or pairs with prompt, chosen, rejected and, if you like, subset: a file, a hub name"
        },
    )
    data_split: str | None = field(
        default=None,
        metadata={
            "help": "of a table: its rows of this split (default: test, if it has splits); of a hub data set: its split"
        },
    )
    problems: str = field(
        default=at_root("data/problems_test.jsonl"),
        metadata={"help": "JSONL of problems for best of n, with their answers"},
    )
    n: int = field(default=8, metadata={"help": "samples of the policy a problem; 0: no best of n"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest sample, in tokens"})
    output_dir: str = field(
        default=at_root("evaluation/results"),
        metadata={"help": f"folder of {NAME}.json; the picture is in ../plots"},
    )
    limit: int | None = field(
        default=None, metadata={"help": "use the first LIMIT groups and problems"}
    )
    seed: int = field(default=0, metadata={"help": "seed of samples and bootstrap"})

    def __post_init__(self):
        for name, least in (("limit", 1), ("n", 0), ("max_new_tokens", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"argument --{name}: expected {least} or more, got {value}")
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
    """Two answers to one prompt, the better one first; gap: its score minus the other's; cluster: which prompt it is."""

    cluster: int
    better: RankedAnswer
    worse: RankedAnswer
    gap: float

    @property
    def told_apart(self) -> float:
        """1 or 0; .5 for equal scores."""
        return 0.5 if self.gap == 0 else float(self.gap > 0)

    @property
    def equal_length(self) -> bool:
        a, b = self.better.text, self.worse.text
        return a.count("\n") == b.count("\n") and abs(len(a) - len(b)) <= ALIKE * max(
            len(a), len(b)
        )

    @property
    def longer(self) -> float:
        """As told_apart, if length were the score."""
        a, b = len(self.better.text), len(self.worse.text)
        return 0.5 if a == b else float(a > b)


# --- data


def read_groups(args: RewardEvalArgs) -> tuple[list[Group], bool]:
    """The groups, and whether they are pairs that go by subset. Raises RecordError or UserError."""
    if args.data.endswith(".csv"):
        check_input(args.data, MAKES_ANSWERS if args.data == RewardEvalArgs.data else None)
        rows = read_answers(args.data)
        check_groups(rows, args.data)
        wanted = args.data_split or ("test" if any(row.split for row in rows) else "")
        kept = [row for row in rows if row.split == wanted]
        found = [
            (prompt, [RankedAnswer(row.answer, row.rank, row.category) for row in ranked])
            for (prompt, _), ranked in groups(kept).items()
            if len({row.rank for row in ranked}) > 1
        ]
        if not found:
            raise UserError(
                f"{args.data}: no ranked group of the split {wanted or '(none)'} has a better and a worse answer"
            )
        return found[: args.limit], False
    found = []
    for where, row in islice(load_rows(args.data, split=args.data_split), args.limit):
        try:
            pair, subset = RankedGroup.from_row(row), str(row.get("subset") or "")
        except RecordError as error:
            raise RecordError(f"{where}: {error}") from None
        found.append(
            (
                pair.prompt,
                [
                    RankedAnswer(*of_pair, subset)
                    for of_pair in zip(pair.answers, pair.ranks, strict=True)
                ],
            )
        )
    return found, True


def pairs_of(found: Sequence[Group], scores: Sequence[Sequence[float]]) -> list[Pair]:
    """All pairs of a group that do not share a rank; those of one prompt are a cluster."""
    prompts = {
        prompt: place for place, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in found))
    }
    pairs = []
    for (prompt, answers), of_group in zip(found, scores, strict=True):
        for (a, r_a), (b, r_b) in combinations(zip(answers, of_group, strict=True), 2):
            if a.rank != b.rank:
                better, worse, gap = (a, b, r_a - r_b) if a.rank < b.rank else (b, a, r_b - r_a)
                pairs.append(Pair(prompts[prompt], better, worse, gap))
    return pairs


# --- metrics


def accuracy(pairs: Sequence[Pair], seed: int) -> Metric:
    return clustered_mean_metric(
        [pair.told_apart for pair in pairs], [pair.cluster for pair in pairs], seed
    )


def accuracies(pairs: Sequence[Pair], by_subset: bool, seed: int) -> dict[str, Metric]:
    """pairwise_accuracy of all pairs, of each kind of pair (`<better>_over_<worse>/`, or `<subset>/`), and of those of equal length
    among them."""
    parts: dict[str, list[Pair]] = {"": list(pairs)}
    for pair in sorted(pairs, key=lambda pair: (pair.better.category, pair.worse.category)):
        a, b = pair.better.category, pair.worse.category
        name = a if by_subset else f"{a}_over_{b}" if a or b else ""
        if name:
            parts.setdefault(f"{name}/", []).append(pair)
    for name, of_part in list(parts.items()):
        if not by_subset or not name:
            parts[f"{name}equal_length/"] = [pair for pair in of_part if pair.equal_length]
    return {
        f"{name}pairwise_accuracy": accuracy(of_part, seed)
        for name, of_part in parts.items()
        if of_part
    }


def rank_correlations(
    found: Sequence[Group], scores: Sequence[Sequence[float]], seed: int
) -> dict[str, Metric]:
    """Means over groups, -1 to 1: of Spearman's and Kendall's (tau-b) correlation of score and rank (1: the order is the ranker's),
    and Spearman's of score and length, and of rank and length, which says what length there is to be biased by. A group in which
    one of the two is the same for all answers is left out."""
    from scipy.stats import kendalltau, spearmanr

    ranks = [[-answer.rank for answer in answers] for _, answers in found]
    lengths = [[len(answer.text) for answer in answers] for _, answers in found]
    wanted = {
        "spearman": (spearmanr, scores, ranks),
        "kendall": (kendalltau, scores, ranks),
        "length_spearman": (spearmanr, scores, lengths),
        "rank_length_spearman": (spearmanr, ranks, lengths),
    }
    metrics = {}
    for name, (correlation, first, second) in wanted.items():
        defined = [
            (k, a, b)
            for k, (a, b) in enumerate(zip(first, second, strict=True))
            if len({*a}) > 1 and len({*b}) > 1
        ]
        if defined:
            values = [correlation(a, b).statistic for _, a, b in defined]
            metrics[name] = clustered_mean_metric(
                values, [found[k][0] for k, _, _ in defined], seed
            )
    return metrics


def calibration(pairs: Sequence[Pair], seed: int) -> tuple[Metric, list[dict]]:
    """Is sigmoid(r - r') the share of pairs in which the first is better? The first is drawn by chance."""
    rng = random.Random(seed)
    first_is_better = [rng.random() < 0.5 for _ in pairs]
    gaps = [
        pair.gap if first else -pair.gap for pair, first in zip(pairs, first_is_better, strict=True)
    ]
    probabilities = [1 / (1 + math.exp(-max(-700.0, min(700.0, gap)))) for gap in gaps]
    labels, clusters = [float(first) for first in first_is_better], [pair.cluster for pair in pairs]
    return calibration_metric(labels, probabilities, clusters, seed), reliability(
        labels, probabilities, clusters, seed
    )


def pick_best(
    args: RewardEvalArgs, problems: Sequence[Problem], policy, scorer
) -> dict[str, list[float]]:
    """Who picks -> exact accuracy for every problem: `chance` (the mean of the samples), the policy's own `log-prob` (mean of a
    token), `majority` (ties by what came first), the `scorer`, and the `oracle`."""
    from tqdm import tqdm

    from reasoning.grading import is_correct
    from search.strategies import SearchBudget, draw, pick_majority

    budget = SearchBudget(n=args.n, max_new_tokens=args.max_new_tokens)
    found: dict[str, list[float]] = {
        name: [] for name in ("chance", "log-prob", "majority", "scorer", "oracle")
    }
    with tqdm(total=len(problems), desc=f"best of {args.n}", unit="problem") as bar:
        for start in range(0, len(problems), CHUNK):
            chunk = problems[start : start + CHUNK]
            _, pools = draw([problem.prompt for problem in chunk], policy, None, budget, args.seed)
            texts = [
                (problem.prompt, list(sample.state.steps))
                for problem, pool in zip(chunk, pools, strict=True)
                for sample in pool
            ]
            scores = scorer.score([(prompt, "\n".join(steps)) for prompt, steps in texts])
            written = policy.step_logps([(prompt, [], steps) for prompt, steps in texts if steps])
            logps = iter(
                [
                    sum(step.logp for step in steps) / max(1, sum(step.tokens for step in steps))
                    for steps in written
                ]
            )
            logps = [next(logps) if steps else NEVER for _, steps in texts]
            correct = [
                [float(is_correct(list(sample.state.steps), problem)) for sample in pool]
                for problem, pool in zip(chunk, pools, strict=True)
            ]
            of_problems = [slice(k * args.n, (k + 1) * args.n) for k in range(len(chunk))]
            by = {
                "chance": [[0.0] * args.n] * len(chunk),
                "log-prob": [logps[places] for places in of_problems],
                "scorer": [scores[places] for places in of_problems],
                "oracle": correct,
            }
            for name, values in by.items():
                found[name] += best_of_n(values, correct)
            for pool, right in zip(pools, correct, strict=True):
                found["majority"].append(right[pool.index(pick_majority(pool, "min"))])
            bar.update(len(chunk))
    return found


def best_of_n_metrics(found: dict[str, list[float]], n: int, seed: int) -> dict[str, Metric]:
    """best_of_<n>/<who>/accuracy, and the scorer's minus that of the others that know no answer (paired)."""
    metrics = {
        f"best_of_{n}/{name}/accuracy": mean_metric(values, seed) for name, values in found.items()
    }
    for name in ("chance", "log-prob", "majority"):
        difference = [a - b for a, b in zip(found["scorer"], found[name], strict=True)]
        metrics[f"best_of_{n}/scorer/accuracy_over_{name}"] = mean_metric(difference, seed)
    return metrics


def main() -> None:
    (args,) = parse_args(RewardEvalArgs, description=__doc__.split("\n\n")[0])
    found, by_subset = read_groups(args)
    problems: list[Problem] = []
    if args.n:
        check_input(
            args.problems, "make data" if args.problems == RewardEvalArgs.problems else None
        )
        problems = list(islice(read_records(args.problems, Problem), args.limit))
        check_policy(args)
    check_scorer(args)
    result, plot = (
        Path(args.output_dir) / f"{NAME}.json",
        Path(args.output_dir).parent / "plots" / f"{NAME}.png",
    )
    for path in (result, plot):
        check_output(str(path), overwrite=True)

    from evaluation.plots import response_plot

    with open_scorer(args) as scorer:
        flat = iter(
            scorer.score(
                [(prompt, answer.text) for prompt, answers in found for answer in answers],
                progress="answers",
            )
        )
        scores = [[next(flat) for _ in answers] for _, answers in found]
        cut = scorer.cut
        picked = pick_best(args, problems, open_policy(args), scorer) if args.n else {}
    pairs = pairs_of(found, scores)
    metrics = accuracies(pairs, by_subset, args.seed)
    bars = {
        name.removesuffix("pairwise_accuracy").strip("/").replace("/", ", ") or "all": of
        for name, of in metrics.items()
    }
    in_longer = clustered_mean_metric(
        [pair.longer for pair in pairs], [pair.cluster for pair in pairs], args.seed
    )
    metrics["longer/pairwise_accuracy"] = in_longer
    metrics |= rank_correlations(found, scores, args.seed)
    metrics["calibration_error"], bins = calibration(pairs, args.seed)
    best = best_of_n_metrics(picked, args.n, args.seed) if picked else {}
    metrics |= best

    card = {
        "answers": [
            (answer.rank, len(answer.text), score, answer.category)
            for (_, answers), of_group in zip(found, scores, strict=True)
            for answer, score in zip(answers, of_group, strict=True)
        ],
        "reliability": bins,
        "accuracies": bars,
        "best_of_n": {name: best[f"best_of_{args.n}/{name}/accuracy"] for name in picked},
        "metrics": metrics,
    }
    title = f"{Path(args.scorer).name} on {len(found):,} groups of {Path(args.data).name}"
    response_plot(plot, title, card)
    extras = {
        "groups": len(found),
        "reliability": [{**row, "right": asdict(row["right"])} for row in bins],
        "cut": cut,
    }
    write_result(result, metrics, asdict(args), [args.seed], **extras)
    rows = [(name, metric, metric.n) for name, metric in metrics.items() if name not in best]
    print_table(
        f"{title} (n: pairs, or groups; 95 % intervals by prompt)", ["metric", "value", "n"], rows
    )
    if best:
        heading = f"best of {args.n}: {len(problems):,} problems of {Path(args.problems).name}, {Path(args.model_name_or_path).name}"
        print_table(
            heading,
            ["picked by", "exact accuracy"],
            [(name.split("/", 1)[1], metric) for name, metric in best.items()],
        )
    if cut:
        print(f"{cut} responses do not fit with their prompts, which lost their beginning")
    print(f"wrote {result} and {plot}")


if __name__ == "__main__":
    run(main)
