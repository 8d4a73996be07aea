"""Convert a public data set, or a file with the same fields, into this project's records.

    python utils/prepare_dataset.py --dataset_name prm800k/phase1_train.jsonl \\
        --output data/prm800k.jsonl
    python train.py --dataset_name data/prm800k.jsonl

The shape of the data set is recognized from its fields (reasoning/datasets/shapes.py lists the
shapes). Labelled steps become step values, or scored pairs of a right and a wrong step after the
same prefix. A tenth of the problems goes to a second file, NAME_test.jsonl. If the data set is a
folder with train and test files, these are the two sides. No problem is on both sides.
"""

import itertools
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, beside, check_least, check_outputs, here, parse_args, run, unused
from common.errors import RecordError, UserError
from common.files import at_root, file_stem, write_records
from common.outputs import together
from common.progress import taking_long
from reasoning.answers import same_answer
from reasoning.datasets import loading
from reasoning.datasets.files import NOT_READ, Dropped, FieldArgs, folder_files
from reasoning.datasets.shapes import KINDS
from reasoning.records import PreferencePair, StepValue
from reasoning.steps import one_line


@dataclass
class PrepareArguments(FieldArgs):
    dataset_name: str = arg(
        help="a .jsonl, .json, .csv, .xml (each also with .gz) or .parquet file, a folder of such "
        "files, or a name on the hub"
    )
    dataset_config: str | None = arg(None, "configuration of a hub data set")
    dataset_split: str | None = arg(None, "split of a hub data set or a folder; train if not given")
    to: str | None = arg(
        None,
        "kind of the records; if not given: pairs from labelled steps, otherwise the "
        "kind of the data set",
        choices=[*KINDS],
    )
    output: str = arg(at_root("data/prepared.jsonl"), "file of the records, .jsonl or .jsonl.gz")
    test_size: float = arg(0.1, "share of the problems, 0 to below 1, for NAME_test.jsonl")
    limit: int | None = arg(None, "use the first LIMIT records; all if not given")
    seed: int = arg(0, "seed of the choice of test problems")
    overwrite: bool = arg(False, "replace existing outputs")

    def __post_init__(self):
        if not 0 <= self.test_size < 1:
            raise UserError(f"argument --test_size: expected 0 to below 1, got {self.test_size}")
        check_least(self, limit=1)


# --- conversion ---


def load_side(
    args: PrepareArguments, split: str | None, counts: Counter, remarks: list[str]
) -> tuple[str, list]:
    """(kind, records) of one side of the data set, without duplicates.

    counts: of what is read and dropped. remarks: gets the first odd rows, and what else to say."""
    source = (args.dataset_name, args.dataset_config, split)
    fields = args.field_names
    shape = loading.find_shape(*source, fields)
    best = next(iter(shape.gives))
    kind = args.to or ("pairs" if best == "step_labels" else best)
    has_steps = {"step_labels", "step_values"} & shape.gives.keys()
    if kind not in shape.gives and not (kind in ("pairs", "step_values") and has_steps):
        given = " or ".join(shape.gives)
        raise UserError(f"{args.dataset_name}: {shape} gives {given}, which cannot become {kind}")
    make_pairs = kind == "pairs" and "pairs" not in shape.gives
    load = {
        "problems": loading.load_problems,
        "pairs": loading.load_step_values if make_pairs else loading.load_pairs,
        "step_labels": loading.load_step_labels,
        "step_values": loading.load_step_values,
    }[kind]
    dropped = Dropped()
    records = list(itertools.islice(load(*source, dropped=dropped, fields=fields), args.limit))
    counts["labelled steps read" if make_pairs else f"{kind} read"] += len(records)
    for reason, count in dropped.items():
        counts[f"  dropped, {reason}"] += count
    remarks += dropped.remarks()
    if make_pairs:
        return kind, pair_steps(records, counts)
    with taking_long("looking for duplicates"):
        return kind, drop_duplicates(kind, records, counts)


def pair_steps(values: Iterable[StepValue], counts: Counter) -> list[PreferencePair]:
    """Scored pairs of a right step (score 0.5 or more) and a wrong step after the same prefix.

    All steps are used; those of the smaller side several times."""
    after: dict[tuple, tuple[list[StepValue], list[StepValue]]] = defaultdict(lambda: ([], []))
    for value in merge_values(values, counts, drop_conflicts=True):
        right, wrong = after[value.prompt, tuple(value.prefix)]
        (right if value.score >= 0.5 else wrong).append(value)
    pairs = []
    for (prompt, prefix), (right, wrong) in after.items():
        if not right or not wrong:
            other = "wrong" if right else "right"
            counts[f"  steps without a {other} one after the same prefix"] += len(right + wrong)
            continue
        for k in range(max(len(right), len(wrong))):
            better, worse = right[k % len(right)], wrong[k % len(wrong)]
            steps, scores = ([better.step], [worse.step]), ([better.score], [worse.score])
            pairs.append(PreferencePair(prompt, *steps, list(prefix), *scores))
    return pairs


def _grouped(records: Iterable, key: Callable[[Any], Any]) -> list[list]:
    groups = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return list(groups.values())


def merge_values(
    values: Iterable[StepValue], counts: Counter, drop_conflicts: bool = False
) -> list[StepValue]:
    """Each step after its prefix once, with the mean of its scores.

    It is a conflict if a step has scores below 0.5 and others of 0.5 or more."""
    merged = []
    for same in _grouped(values, lambda value: (value.prompt, tuple(value.prefix), value.step)):
        counts["  merged, step seen before"] += len(same) - 1
        scores = [value.score for value in same]
        if min(scores) < 0.5 <= max(scores):
            done = "dropped" if drop_conflicts else "their scores averaged"
            counts[f"  steps called right and wrong, {done}"] += 1
            if drop_conflicts:
                continue
        mean = replace(same[0], score=fmean(scores), rollouts=None, visits=None)
        merged.append(same[0] if len(same) == 1 else mean)
    return merged


# kind -> (key that duplicates share, whether two records with this key agree, name of a record)
SAME: dict[str, tuple[Callable, Callable, str]] = {
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


def drop_duplicates(kind: str, records: Iterable, counts: Counter) -> list:
    """Each record once. Records that contradict each other are dropped: different answers, opposite
    preferences, different labels."""
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


# --- two sides ---


def problem_key(prompt: str) -> str:
    """Equal for prompts that differ only in case and white space: they are the same problem."""
    return one_line(prompt).casefold()


def split_by_problem(records: list, test_size: float, seed: int) -> tuple[list, list]:
    """(train, test): about `test_size` of the problems, with all their records, are the test side.

    Each side has a problem if there are two problems or more, and `test_size` is above 0."""
    keys = sorted({problem_key(record.prompt) for record in records})
    random.Random(seed).shuffle(keys)
    count = min(max(1, round(test_size * len(keys))), len(keys) - 1) if test_size else 0
    test = set(keys[:count])
    sides: tuple[list, list] = ([], [])
    for record in records:
        sides[problem_key(record.prompt) in test].append(record)
    return sides


def has_two_sides(args: PrepareArguments) -> bool:
    """Whether the data set is a folder with test files, and with others to train on."""
    if args.dataset_split or not Path(args.dataset_name).is_dir():
        return False
    try:
        sides = [folder_files(args.dataset_name, split) for split in (None, "test")]
    except RecordError:
        return False
    return not {*sides[0]} & {*sides[1]}


def write_sides(train: Path, test: Path, sides: tuple[list, list]) -> None:
    """Write both files or none; a side without records has no file.

    The train file gets its name last: whoever finds it finds the test file that belongs to it."""
    with together():
        for path, side in ((test, sides[1]), (train, sides[0])):
            if side:
                write_records(path, side)
        train.unlink(missing_ok=True)  # an old one never stands beside a new test file
    if not sides[1]:
        test.unlink(missing_ok=True)  # of an earlier run; --overwrite allows to remove it


def next_command(kind: str, output: Path, scored: bool) -> str:
    """The command that uses the records, and writes where nothing is yet."""
    if kind == "problems":
        flags = ("--input", output, "--output", beside(output, "pairs"))
        return here("python utils/build_synthetic_dataset.py", *flags)
    if kind == "pairs" and not scored:
        flags = ("--input", output, "--output", beside(output, "scored"))
        return here("python reward_model/evaluate_steps.py", *flags)
    training = "dpo" if kind == "pairs" else "prm"
    trained = unused(at_root(f"saved_model/{file_stem(output)}"))
    flags = ("--dataset_name", output, "--output_dir", trained)
    return here(f"python train.py {training}", *flags)


def main() -> None:
    (args,) = parse_args(PrepareArguments, description=__doc__.split("\n\n")[0])
    output = Path(args.output)
    stem = file_stem(output)
    test_output = output.with_name(f"{stem}_test{output.name.removeprefix(stem)}")
    source = Path(args.dataset_name)
    read = [path for path in (source, *source.rglob("*")) if path.is_file()]
    check_outputs([output, test_output], read, args.overwrite)

    counts, remarks = Counter[str](), list[str]()
    if has_two_sides(args):
        (kind, train), (other, test) = (
            load_side(args, split, counts, remarks) for split in (None, "test")
        )
        remarks = [line for line in remarks if not line.endswith(NOT_READ.format("test"))]
        if kind != other:
            raise UserError(f"{args.dataset_name}: train files give {kind}, test files {other}")
        test_keys = {problem_key(record.prompt) for record in test}
        disjoint = [record for record in train if problem_key(record.prompt) not in test_keys]
        counts["  dropped from train, problem is on the test side"] += len(train) - len(disjoint)
        train = disjoint
    else:
        kind, records = load_side(args, args.dataset_split, counts, remarks)
        train, test = split_by_problem(records, args.test_size, args.seed)
    print(f"{args.dataset_name}: {kind}")
    for what, count in counts.items():
        if count:
            print(f"{what:<60}{count:>8}")
    for line in dict.fromkeys(remarks):
        print(line)
    if not train:
        raise UserError(
            f"{args.dataset_name}: no {kind} were found (see above), nothing was written"
        )
    write_sides(output, test_output, (train, test))
    for path, side in ((output, train), (test_output, test)):
        if side:
            problems = len({problem_key(record.prompt) for record in side})
            print(f"wrote {len(side)} {kind} of {problems} problem{'s' * (problems > 1)} to {path}")
    scored = kind == "pairs" and train[0].chosen_scores is not None
    print(f"next: {next_command(kind, output, scored)}")


if __name__ == "__main__":
    run(main)
