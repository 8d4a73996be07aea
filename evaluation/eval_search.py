"""Guided search on held-out problems: exact accuracy over n and over sampled tokens, by strategy.

Validation splits decide, at the largest n, which aggregate a strategy uses and for which guided
strategy the controls are run; test splits are only reported. Measurements are appended to
search.jsonl and never repeated: a stopped run resumes, and a run with one more strategy measures
that strategy only.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_input, check_model, parse_args, run
from common.errors import UserError
from common.files import at_root, file_stem
from common.outputs import together
from common.progress import taking_long
from evaluation.results import output_paths, print_table, write_result
from evaluation.search_measurement import (
    POOL_SIZES,
    Choice,
    Outcomes,
    SearchArgs,
    SearchMeasurements,
    Setting,
    choose,
    setting_groups,
)
from evaluation.search_report import Report
from lm.registry import check_policy
from reasoning.datasets.loading import problems_of
from reasoning.records import Problem
from reasoning.samples import SHOWN, samples_file, show_samples
from reasoning.splits import HELD_OUT, MAKES_HELD_OUT
from reward_model.registry import check_judge, judge_files, judge_name

Splits = dict[str, list[Problem]]  # name -> problems


def check(args: SearchArgs) -> tuple[Splits, Splits]:
    """The reported splits, and the splits for choosing.

    Raises UserError or RecordError for anything wrong with the arguments or files, before any
    work."""
    check_policy(args)
    check_judge(args)
    if args.other_model is not None:
        name = Path(args.other_model).name
        check_model(args.other_model, "make models-large" if name == "policy-large" else None)
        if name == Path(args.model_name_or_path).name:
            raise UserError(
                f"argument --other_model: has the same name as the policy, {name}: rename one"
            )
    reported, for_choosing = (
        {file_stem(name).removeprefix("problems_"): name for name in names}
        for names in (args.splits, args.choose_on)
    )
    if len(reported) < len(args.splits) or len(for_choosing) < len(args.choose_on):
        raise UserError("argument --splits or --choose_on: two splits have the same name")
    if both := reported.keys() & for_choosing.keys():
        raise UserError(
            f"argument --choose_on: {', '.join(sorted(both))} is reported, choose on other splits"
        )
    problems = {}
    for split, name in (reported | for_choosing).items():
        path = at_root(f"data/problems_{name}.jsonl") if name in HELD_OUT else name
        check_input(path, MAKES_HELD_OUT if name in HELD_OUT else None)
        problems[split] = problems_of(path, args.limit)
    return (
        {split: problems[split] for split in reported},
        {split: problems[split][: args.choose_limit] for split in for_choosing},
    )


def measure_split(
    args: SearchArgs,
    choice: Choice,
    measurements: SearchMeasurements,
    split: str,
    problems: Sequence[Problem],
) -> dict[Setting, Outcomes]:
    """The outcomes of all settings of a split: the strategies, then the controls."""
    found: dict[Setting, Outcomes] = {}
    sizes = {*args.n, *(size for size in POOL_SIZES if size < args.samples), args.samples}
    aggregates = {strategy: [aggregate] for strategy, aggregate in choice.aggregates.items()}
    for settings in setting_groups(args, aggregates, sorted(sizes)):
        label = f"{settings[0].strategy} {settings[0].n}"
        if len(settings) > 1:
            label = "one pool of solutions"
        found |= measurements.measure(settings, problems, f"{split}: {label}")
    for setting in controls(args, choice):
        label = f"{split}: {setting.name} {setting.n}"
        found |= measurements.measure([setting], problems, label)
    return found


def controls(args: SearchArgs, choice: Choice) -> list[Setting]:
    """The best guided strategy with each of the controls as its guide, at every n."""
    if choice.strategy is None:
        return []
    aggregate = choice.aggregates[choice.strategy]
    return [
        Setting(choice.strategy, n, aggregate, guide) for guide in args.controls for n in args.n
    ]


def main() -> None:
    (args,) = parse_args(SearchArgs, description=__doc__)
    splits, for_choosing = check(args)
    names = [*args.splits, *args.choose_on]
    files = [at_root(f"data/problems_{name}.jsonl") if name in HELD_OUT else name for name in names]
    read = [*files, args.model_name_or_path, args.other_model, *judge_files(args)]
    plot, rows, result = output_paths(args.output_dir, "search", read, args.overwrite, True)
    samples = samples_file(result, args.overwrite)
    measurements = SearchMeasurements(args, rows)
    try:
        choice = choose(args, measurements, for_choosing)
        report = Report(args, choice.aggregates)
        for split, problems in splits.items():
            setting, other = Setting("greedy", 1), None
            greedy = measurements.measure([setting], problems, f"{split}: greedy")[setting]
            if not any(greedy.correct):
                print(f"{split}: no greedy answer is right")
                show_samples(measurements.examples(problems[:SHOWN]), samples)
            if args.other_model is not None:
                label = f"{split}: {report.other}"
                other = measurements.measure([setting], problems, label, "other")[setting]
            found = measure_split(args, choice, measurements, split, problems)
            shown = {s: o for s, o in found.items() if s.n in (*args.n, args.samples)}
            votes = {s.n: o for s, o in found.items() if s.strategy == "majority_vote"}
            with taking_long("computing intervals"):
                report.add(split, shown, greedy, other, votes)
    finally:
        measurements.close()

    title = f"{report.policy}, guided by {judge_name(args)}"
    lines = {split: report.frontier(split) for split in splits}
    dashed = {setting.name for setting in controls(args, choice)}
    extras = {
        "chosen": asdict(choice),
        "equal_tokens": report.matched_n,
        "trend_p": report.trend_p,
        "left_out": report.left_out,
    }
    with together(), taking_long("drawing"):
        from evaluation.plots import frontier_plot  # slow to import (matplotlib)

        frontier_plot(plot, lines, dashed, title)
        write_result(result, report.metrics, asdict(args), [args.seed], **extras)
    compared = sorted(choice.accuracies.items(), key=lambda item: -item[1])
    counts = ", ".join(f"{len(problems)} {split}" for split, problems in for_choosing.items())
    print_table(
        f"chosen at n = {args.n[-1]} on {counts} problems",
        ["strategy", "accuracy"],
        [(name, f"{value:.3f}") for name, value in compared],
    )
    report.print_tables(title)
    print(f"wrote {result}, {plot} and {rows} (every problem)")


if __name__ == "__main__":
    run(main)
