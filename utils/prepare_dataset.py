"""Public data sets, or your own files of their shapes -> this project's records, ready for train.py.

    python utils/prepare_dataset.py --dataset_name prm800k/phase1_train.jsonl --output data/prm800k.jsonl
    python train.py --dataset_name data/prm800k.jsonl

The shape is recognized from the fields (reasoning/datasets/shapes.py lists them). Labelled steps become scored pairs (a right step against
a wrong one after the same beginning) or step values. A tenth of the problems goes to a second file, NAME_test.jsonl; a folder that
has train and test files keeps its own two sides. No problem is on both.
"""

import itertools
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_output, parse_args, run
from common.errors import RecordError, UserError
from common.files import at_root, write_records
from reasoning.answers import same_answer
from reasoning.datasets import shapes as loaders
from reasoning.datasets.files import folder_files
from reasoning.records import PreferencePair, StepValue
from reasoning.steps import one_line


@dataclass
class PrepareArguments:
    dataset_name: str = field(
        metadata={
            "help": "a .jsonl, .json, .csv or .parquet file, a folder of them, or a name on the hub"
        }
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of a hub data set"}
    )
    dataset_split: str | None = field(
        default=None, metadata={"help": "split of a hub data set or a folder; default: train"}
    )
    to: str | None = field(
        default=None,
        metadata={
            "help": "what to make; default: pairs of labelled steps, else what the data set has",
            "choices": [*loaders.KINDS],
        },
    )
    output: str = field(
        default_factory=lambda: at_root("data/prepared.jsonl"),
        metadata={"help": "the records (JSONL)"},
    )
    test_size: float = field(
        default=0.1,
        metadata={"help": "share of the problems, 0 to below 1, that goes to NAME_test.jsonl"},
    )
    limit: int | None = field(
        default=None, metadata={"help": "use the first LIMIT records of the data set"}
    )
    seed: int = field(default=0, metadata={"help": "which problems go to the test file"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output"})

    def __post_init__(self):
        if not 0 <= self.test_size < 1:
            raise UserError(f"argument --test_size: expected 0 to below 1, got {self.test_size}")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"argument --limit: expected 1 or more, got {self.limit}")


# --- conversion ------------------------------------------------------------------------------------------------------------------


def records_of(args: PrepareArguments, split: str | None, counts: Counter) -> tuple[str, list]:
    """(kind, records) of one side of the data set, each record once."""
    source = (args.dataset_name, args.dataset_config, split)
    shape = loaders.find_shape(*source)
    kind = args.to or {"step_labels": "pairs"}.get(next(iter(shape.gives)), next(iter(shape.gives)))
    has_steps = {"step_labels", "step_values"} & shape.gives.keys()
    if kind not in shape.gives and not (kind in ("pairs", "step_values") and has_steps):
        raise UserError(
            f"{args.dataset_name}: {shape} gives {' or '.join(shape.gives)}, and no {kind} can be made of that"
        )
    make_pairs = kind == "pairs" and "pairs" not in shape.gives
    load = {
        "problems": loaders.load_problems,
        "pairs": loaders.load_step_values if make_pairs else loaders.load_pairs,
        "step_labels": loaders.load_step_labels,
        "step_values": loaders.load_step_values,
    }[kind]
    dropped: Counter = Counter()
    records = list(itertools.islice(load(*source, dropped=dropped), args.limit))
    counts["labelled steps read" if make_pairs else f"{kind} read"] += len(records)
    for reason, count in dropped.items():
        counts[f"  dropped, {reason}"] += count
    if make_pairs:
        return kind, pair_steps(records, counts)
    return kind, each_once(kind, records, counts)


def pair_steps(values: Iterable[StepValue], counts: Counter) -> list[PreferencePair]:
    """Scored pairs of one step each: after every beginning, each right step (score .5 or more) against a wrong one. Every step is
    used, the smaller side again and again; its score goes with it."""
    after = defaultdict(lambda: ([], []))
    for value in merge_values(values, counts, drop_conflicts=True):
        right, wrong = after[value.prompt, tuple(value.prefix)]
        (right if value.score >= 0.5 else wrong).append(value)
    pairs = []
    for (prompt, prefix), (right, wrong) in after.items():
        if not right or not wrong:
            counts[
                f"  steps without a {'wrong' if right else 'right'} one after the same beginning"
            ] += len(right) + len(wrong)
            continue
        for k in range(max(len(right), len(wrong))):
            better, worse = right[k % len(right)], wrong[k % len(wrong)]
            scores = {"chosen_scores": [better.score], "rejected_scores": [worse.score]}
            pairs.append(
                PreferencePair(prompt, [better.step], [worse.step], list(prefix), **scores)
            )
    return pairs


def _grouped(records: Iterable, key: Callable[[Any], Any]) -> list[list]:
    groups = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return list(groups.values())


def merge_values(
    values: Iterable[StepValue], counts: Counter, drop_conflicts: bool = False
) -> list[StepValue]:
    """Each step after its beginning once, with the mean of its scores. Called right here and wrong there, it is a conflict."""
    merged = []
    for same in _grouped(values, lambda value: (value.prompt, tuple(value.prefix), value.step)):
        counts["  merged, step seen before"] += len(same) - 1
        scores = [value.score for value in same]
        if min(scores) < 0.5 <= max(scores):
            counts[
                "  steps called right and wrong, "
                + ("dropped" if drop_conflicts else "their scores averaged")
            ] += 1
            if drop_conflicts:
                continue
        merged.append(
            same[0]
            if len(same) == 1
            else replace(same[0], score=fmean(scores), rollouts=None, visits=None)
        )
    return merged


# kind -> (what makes two records the same, whether two of those agree, what they are)
SAME = {
    "problems": (
        lambda p: problem_key(p.prompt),
        lambda p, q: same_answer(p.answer, q.answer),
        "problem",
    ),
    "pairs": (
        lambda p: (p.prompt, tuple(p.prefix), frozenset([tuple(p.chosen), tuple(p.rejected)])),
        lambda p, q: p.chosen == q.chosen,
        "pair",
    ),
    "step_labels": (
        lambda s: (s.prompt, tuple(s.steps)),
        lambda s, t: s.labels == t.labels,
        "solution",
    ),
}


def each_once(kind: str, records: Iterable, counts: Counter) -> list:
    """Each record once; those that contradict each other not at all (other answers, the opposite preference, other labels)."""
    if kind == "step_values":
        return merge_values(records, counts)
    key, agree, what = SAME[kind]
    kept = []
    for same in _grouped(records, key):
        if all(agree(record, same[0]) for record in same):
            kept.append(same[0])
            counts[f"  dropped, {what} seen before"] += len(same) - 1
        else:
            counts[f"  dropped, {what} that contradicts another"] += len(same)
    return kept


# --- two sides -------------------------------------------------------------------------------------------------------------------


def problem_key(prompt: str) -> str:
    """What makes two prompts the same problem: the words, whatever the case and the white space."""
    return one_line(prompt).casefold()


def split_by_problem(records: list, test_size: float, seed: int) -> tuple[list, list]:
    """(train, test): about `test_size` of the problems with all of their records; both sides get one if there are two."""
    keys = sorted({problem_key(record.prompt) for record in records})
    random.Random(seed).shuffle(keys)
    count = min(max(1, round(test_size * len(keys))), len(keys) - 1) if test_size else 0
    test = set(keys[:count])
    sides = ([], [])
    for record in records:
        sides[problem_key(record.prompt) in test].append(record)
    return sides


def own_sides(args: PrepareArguments) -> bool:
    """Whether the data set is a folder with train and with test files."""
    if args.dataset_split or not Path(args.dataset_name).is_dir():
        return False
    try:
        return bool(
            folder_files(args.dataset_name, "train") and folder_files(args.dataset_name, "test")
        )
    except RecordError:
        return False


NEXT = {
    "problems": "python utils/build_synthetic_dataset.py --input {output}",
    "pairs": "python reward_model/evaluate_steps.py --input {output}",
    "scored pairs": "python train.py --dataset_name {output}",
}


def main() -> None:
    (args,) = parse_args(PrepareArguments, description=__doc__.split("\n\n")[0])
    output = Path(args.output)
    test_output = output.with_name(f"{output.stem}_test{output.suffix}")
    for path in (output, test_output):
        check_output(str(path), args.overwrite)

    counts: Counter = Counter()
    if own_sides(args):
        (kind, train), (_, test) = (records_of(args, split, counts) for split in ("train", "test"))
        tested = {problem_key(record.prompt) for record in test}
        disjoint = [record for record in train if problem_key(record.prompt) not in tested]
        counts["  dropped from train, problem is on the test side"] += len(train) - len(disjoint)
        train = disjoint
    else:
        kind, records = records_of(args, args.dataset_split, counts)
        train, test = split_by_problem(records, args.test_size, args.seed)
    print(f"{args.dataset_name}: {kind}")
    for what, count in counts.items():
        if count:
            print(f"{what:<60}{count:>8}")
    if not train:
        raise UserError(f"{args.dataset_name}: no {kind} came out (see above), nothing was written")
    for path, side in ((output, train), (test_output, test)):
        if side:
            write_records(path, side)
            problems = len({problem_key(record.prompt) for record in side})
            print(f"wrote {len(side)} {kind} of {problems} problem{'s' * (problems > 1)} to {path}")
        else:
            path.unlink(missing_ok=True)  # an earlier one, which --overwrite gives up
    scored = kind == "pairs" and train[0].chosen_scores is not None
    if kind in NEXT:
        print(f"next: {NEXT['scored pairs' if scored else kind].format(output=args.output)}")


if __name__ == "__main__":
    run(main)
