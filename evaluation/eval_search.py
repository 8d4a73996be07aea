"""Guided search against what it costs: exact accuracy over n and over sampled tokens, for every strategy, on held-out problems.

Which aggregate a strategy uses, and which guided strategy the controls are run for, is chosen on validation splits at the largest
n; test splits are only reported. Whatever was measured is appended to search.jsonl and never measured again: a stopped run goes on,
and a run with one more strategy does the new part only.
"""

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_input, check_model, check_output, parse_args, run
from common.errors import UserError
from common.files import at_root, read_records
from evaluation.metrics import print_table, write_result
from evaluation.search_measurement import (
    POOL_SIZES,
    Outcomes,
    SearchArgs,
    SearchMeasurements,
    Setting,
    choose,
    wanted,
)
from evaluation.search_report import Report
from lm.registry import check_policy
from reasoning.records import Problem
from reasoning.splits import HELD_OUT
from reward_model.registry import check_judge, judge_name

NAME = "search"


def check(
    args: SearchArgs,
) -> tuple[dict[str, list[Problem]], dict[str, list[Problem]], dict[str, Path]]:
    """The problems of the splits that are reported and of those on which is chosen, and where the outputs go; all that can be wrong
    is found here, before any work."""
    check_policy(args)
    check_judge(args)
    if args.other_model is not None:
        check_model(
            args.other_model,
            "make models-large" if Path(args.other_model).name == "policy-large" else None,
        )
        if Path(args.other_model).name == Path(args.model_name_or_path).name:
            raise UserError(
                f"argument --other_model: is called as the policy is, {Path(args.other_model).name}: rename one"
            )
    reported, chosen_on = (
        {Path(name).stem.removeprefix("problems_"): name for name in names}
        for names in (args.splits, args.choose_on)
    )
    if len(reported) < len(args.splits) or len(chosen_on) < len(args.choose_on):
        raise UserError("argument --splits or --choose_on: two splits have the same name")
    if both := reported.keys() & chosen_on.keys():
        raise UserError(
            f"argument --choose_on: nothing is chosen on what is reported, {', '.join(sorted(both))}"
        )
    problems = {}
    for split, name in (reported | chosen_on).items():
        path = at_root(f"data/problems_{name}.jsonl") if name in HELD_OUT else name
        check_input(path, "make data" if name in HELD_OUT else None)
        problems[split] = list(read_records(path, Problem))[: args.limit]
    folder = Path(args.output_dir)
    outputs = {
        "rows": folder / f"{NAME}.jsonl",
        "result": folder / f"{NAME}.json",
        "plot": folder.parent / "plots" / f"{NAME}.png",
    }
    for path in outputs.values():
        check_output(str(path), overwrite=True)
    chosen_on = {split: problems[split][: args.choose_limit] for split in chosen_on}
    return {split: problems[split] for split in reported}, chosen_on, outputs


def main() -> None:
    (args,) = parse_args(SearchArgs, description=__doc__)
    splits, chosen_on, outputs = check(args)

    from evaluation.plots import frontier_plot

    measured = SearchMeasurements(args, outputs["rows"])
    try:
        chosen = choose(args, measured, chosen_on)
        report = Report(args, chosen["aggregates"])
        sizes = sorted(
            {*args.n, *(size for size in POOL_SIZES if size <= args.samples), args.samples}
        )
        shown = {*args.n, args.samples}
        one = {name: [how] for name, how in chosen["aggregates"].items()}
        for split, problems in splits.items():
            (greedy,) = measured.measure(
                [Setting("greedy", 1)], problems, f"{split}: greedy"
            ).values()
            other = None
            if args.other_model is not None:
                (other,) = measured.measure(
                    [Setting("greedy", 1)], problems, f"{split}: {report.other}", "other"
                ).values()
            found: dict[Setting, Outcomes] = {}
            for settings in wanted(args, one, sizes):
                label = (
                    "one pool of solutions"
                    if len(settings) > 1
                    else f"{settings[0].strategy} {settings[0].n}"
                )
                found |= measured.measure(settings, problems, f"{split}: {label}")
            for guide in args.controls if chosen["strategy"] else ():
                for n in args.n:
                    setting = Setting(
                        chosen["strategy"], n, chosen["aggregates"][chosen["strategy"]], guide
                    )
                    found |= measured.measure([setting], problems, f"{split}: {setting.name} {n}")
            curve = {
                setting.n: outcomes
                for setting, outcomes in found.items()
                if setting.strategy == "majority_vote"
            }
            report.add(
                split, {s: o for s, o in found.items() if s.n in shown}, greedy, other, curve
            )
    finally:
        measured.close()

    title = f"{report.policy}, guided by {judge_name(args)}"
    controls = [Setting(chosen["strategy"], 1, guide=guide).name for guide in args.controls]
    frontier_plot(
        outputs["plot"], {split: report.frontier(split) for split in splits}, controls, title
    )
    extras = {
        "chosen": chosen,
        "equal_tokens": report.equal_tokens,
        "trend_p": report.trend_p,
        "left_out": report.left_out,
    }
    write_result(outputs["result"], report.metrics, asdict(args), [args.seed], **extras)
    tried = sorted(chosen["accuracies"].items(), key=lambda item: -item[1])
    on = ", ".join(f"{len(problems)} {split}" for split, problems in chosen_on.items())
    print_table(
        f"chosen at n = {args.n[-1]} on {on}",
        ["strategy", "accuracy"],
        [(name, f"{value:.3f}") for name, value in tried],
    )
    for split, problems in splits.items():
        heading = f"{split}: {len(problems):,} problems; {title}; tokens and judged steps a problem; a majority vote of as many tokens"
        print_table(heading, report.columns(), report.rows(split))
    trends = [
        (name.removesuffix("/trend"), report.metrics[name], "" if p is None else f"{p:.2g}")
        for name, p in report.trend_p.items()
    ]
    if trends:
        print_table(
            "accuracy gained when n is multiplied by 4", ["search", "gain", "p (Page)"], trends
        )
    for name, count in report.left_out.items():
        print(f"{name}: {count} proposals were left out by the judge")
    print(f"wrote {outputs['result']}, {outputs['plot']} and {outputs['rows']} (every problem)")


if __name__ == "__main__":
    run(main)
