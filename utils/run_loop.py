"""Run the whole loop on a real model and problems of your own (make real); a stopped run resumes.

    python utils/run_loop.py --problems data/mawps.jsonl --test_problems data/svamp.jsonl

1. cut: problems with worked steps for the warm start, problems to search, validation and test
2. warm start: the model learns to write one step a line (train.py sft)
3. search: trees of its own steps; the value of a step is the share of rollouts that end right
4. pair: a right and a wrong next step of the same state, with their values as scores
5. train: stepwise DPO on the pairs
6. judge: a process reward model learns from the values of all steps
7. compare: base and tuned model answer the test problems, with the reward of that model
8. guide: the tuned model proposes steps, and the process reward model chooses

Further rounds (--rounds) repeat 3 to 8 with the tuned policy on the same problems. The settings of
the stages are in --configs. Everything is written to --output_dir. A stage whose output is there is
not run again."""

import json
import random
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, check_least, parse_args, run
from common.errors import UserError
from common.files import ROOT, at_root, file_stem, write_records, write_text
from common.outputs import together
from evaluation.metrics import Metric
from evaluation.results import print_table
from reasoning.datasets.files import FieldArgs
from reasoning.datasets.selection import select_problems
from reasoning.records import Problem
from reasoning.steps import one_line

SHOWN = ("base_accuracy", "tuned_accuracy", "accuracy_improvement", "reward_improvement")


@dataclass
class LoopArguments:
    problems: str = arg(
        "mwpt5/MAWPS",
        "problems with answers in any shape that reasoning/datasets/shapes.py knows, a file or a "
        "hub data set; those of the warm start need steps",
    )
    test_problems: list[str] = arg(
        [], "further problems that base and tuned model answer; none of them is trained on"
    )
    model_name_or_path: str = arg(
        at_root("models/smollm2-135m-instruct"), "the model to start from, any causal LM"
    )
    output_dir: str = arg(at_root("data/real"), "folder of everything that is written")
    configs: str = arg(at_root("configs/real"), "folder of the settings: one YAML file a stage")
    warm_start: int = arg(200, "problems of the warm start")
    validation: int = arg(300, "validation problems, on which the search chooses its aggregate")
    test: int = arg(500, "test problems cut from --problems")
    rounds: int = arg(1, "rounds of search, training and comparison")
    seed: int = arg(0, "seed of the cut, the samples and the trainings")

    def __post_init__(self) -> None:
        check_least(self, warm_start=1, validation=1, test=1, rounds=1)


# --- stages ---


class Stages:
    """Runs the stages, and keeps the settings and the times in OUTPUT_DIR/stages.json."""

    def __init__(self, folder: Path, settings: dict[str, object]):
        """Raises UserError if the folder is that of a run with other settings."""
        self.path, self.settings = folder / "stages.json", settings
        self.seconds: dict[str, float] = {}
        if not self.path.exists():
            return
        found = json.loads(self.path.read_bytes())
        changed = [name for name in settings if settings[name] != found["settings"].get(name)]
        if changed:
            raise UserError(
                f"{folder}: a run with other settings is there ({', '.join(changed)}); give "
                "another --output_dir, or the same settings to resume it"
            )
        self.seconds = found["seconds"]

    def save(self) -> None:
        kept = {"settings": self.settings, "seconds": self.seconds}
        write_text(self.path, [json.dumps(kept, indent=1)])

    def run(self, title: str, output: Path, *command: object) -> None:
        """Run a script of the repository, unless its output is there.

        Raises SystemExit with the script's exit code if it fails."""
        print(f"\n=== {title} -> {output}", flush=True)
        if output.exists():
            print("    there already")
            return
        print(f"    $ python {shlex.join(map(str, command))}\n", flush=True)
        start = time.monotonic()
        code = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode
        # the time of a stage that was stopped counts as well
        self.seconds[title] = self.seconds.get(title, 0) + time.monotonic() - start
        self.save()
        if code:
            raise SystemExit(code)
        print(f"    ({self.seconds[title] / 60:.1f} minutes)", flush=True)


def settings_of(args: LoopArguments) -> dict[str, object]:
    """What the outputs of all stages depend on. More rounds may be added later."""
    settings = {k: v for k, v in vars(args).items() if k not in ("output_dir", "configs", "rounds")}
    configs = {path.name: path.read_text() for path in sorted(Path(args.configs).glob("*.yaml"))}
    return settings | configs


def test_files(args: LoopArguments, folder: Path) -> dict[str, Path]:
    """Where the problems of each of --test_problems are written."""
    return {name: folder / f"test_{file_stem(name)}.jsonl" for name in args.test_problems}


def wording(prompt: str) -> str:
    """Equal for prompts that differ only in numbers, case and white space."""
    return re.sub(r"\d+([.,]\d+)*", "#", one_line(prompt).casefold())


def take(groups: dict[str, list[Problem]], count: int, with_steps: bool) -> list[Problem]:
    """Remove whole groups, until they have `count` problems; return that many of them.

    What is left of the last group goes into no part. with_steps: only groups of problems with
    steps."""
    taken: list[Problem] = []
    for key, group in list(groups.items()):
        if len(taken) >= count:
            break
        if not with_steps or all(problem.steps for problem in group):
            taken += groups.pop(key)
    return taken[:count]


def cut(args: LoopArguments, folder: Path) -> None:
    """Write `warm_start`, `train`, `validation`, `test` and `test_NAME` .jsonl once.

    Problems that differ only in their numbers are in the same part, so no test problem has a copy
    in another part. Raises UserError if too few are left."""
    if (folder / "train.jsonl").exists():
        return
    read = partial(select_problems, limit=None, default=0, fields=FieldArgs())
    tests = {path: read(name) for name, path in test_files(args, folder).items()}
    others = {wording(problem.prompt) for rows in tests.values() for problem in rows}
    problems = [row for row in read(args.problems) if isinstance(row, Problem)]
    random.Random(args.seed).shuffle(problems)
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        if (key := wording(problem.prompt)) not in others:
            groups.setdefault(key, []).append(problem)
    # the test problems come first, so that they depend on no other size
    sizes = {"test": args.test, "validation": args.validation, "warm_start": args.warm_start}
    parts = {name: take(groups, size, name == "warm_start") for name, size in sizes.items()}
    parts["train"] = [problem for group in groups.values() for problem in group]
    short = [name for name, size in {**sizes, "train": 1}.items() if len(parts[name]) < size]
    if short:
        raise UserError(
            f"{args.problems}: {len(problems)} problems, {sum(bool(p.steps) for p in problems)} of "
            f"them with steps, are too few for the parts {', '.join(short)}: {args.warm_start} of "
            f"the warm start, which need steps, {args.test} of the test, {args.validation} of the "
            "validation and some to search (problems that differ only in their numbers stay "
            "together); lower these numbers"
        )
    with together():
        for path, rows in tests.items():
            write_records(path, rows)
        for name, part in parts.items():
            write_records(folder / f"{name}.jsonl", part)


def main() -> None:
    (args,) = parse_args(LoopArguments, description=__doc__)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    stages = Stages(folder, settings_of(args))
    cut(args, folder)
    stages.save()
    seed = ("--seed", args.seed)

    def config(stage: str) -> tuple[str, ...]:
        return "--config", f"{args.configs}/{stage}.yaml"

    def training(name: str, model: Path | str, rows: Path, output: Path) -> tuple[object, ...]:
        flags = ("--model_name_or_path", model, "--dataset_name", rows, "--output_dir", output)
        logs = ("--logs_dir", folder / "logs", "--run_name", f"{output.parent.name}_{name}")
        return "train.py", name, *config(name), *flags, *logs, *seed

    base = folder / "warm" / "policy"
    stages.run(
        "Warm start",
        base / "config.json",
        *training("sft", args.model_name_or_path, folder / "warm_start.jsonl", base),
    )
    tests = [folder / "test.jsonl", *test_files(args, folder).values()]
    policy, table = base, []
    for number in range(1, args.rounds + 1):
        place = folder / f"round_{number}"
        pairs, trees, values = (
            place / name for name in ("pairs.jsonl", "trees.jsonl.gz", "step_values.jsonl.gz")
        )
        tuned, judge = place / "policy", place / "prm"
        by_judge = ("--judge", "prm", "--judge_path", judge)
        round_seed = ("--seed", args.seed + number - 1)
        stages.run(
            f"Round {number}: search and pair",
            pairs,
            *("utils/build_step_pairs.py", *config("pairs"), "--model_name_or_path", policy),
            *("--input", folder / "train.jsonl", "--output", pairs, "--trees", trees),
            *round_seed,
        )
        stages.run(
            f"Round {number}: train the policy",
            tuned / "config.json",
            *training("dpo", policy, pairs, tuned),
        )
        stages.run(
            f"Round {number}: step values",
            values,
            *("utils/build_mcts_dataset.py", "--from_trees", trees, "--output", values),
        )
        stages.run(
            f"Round {number}: train the judge",
            judge / "config.json",
            *training("prm", policy, values, judge),
        )
        for problems in tests:
            name = problems.stem
            results = place / f"compare_{name}"
            stages.run(
                f"Round {number}: compare on {name}",
                results / "reward_score_comparison.json",
                *("evaluation/eval_reward_scores.py", *config("compare"), *by_judge),
                *("--base_model", base, "--tuned_model", tuned, "--input", problems),
                *("--pairs", pairs, "--output_dir", results),
            )
            found = json.loads((results / "reward_score_comparison.json").read_bytes())["metrics"]
            table.append((number, name, *(Metric(**found[key]) for key in SHOWN)))
        results = place / "search"
        stages.run(
            f"Round {number}: guide",
            results / "search.json",
            *("evaluation/eval_search.py", *config("search"), *by_judge),
            *("--model_name_or_path", tuned, "--choose_on", folder / "validation.jsonl"),
            *("--splits", *tests, "--output_dir", results, *seed),
        )
        policy = tuned
    print_table("base and tuned policy", ["round", "problems", *SHOWN], table)
    times = [(title, f"{seconds / 60:.1f}") for title, seconds in stages.seconds.items()]
    total = sum(stages.seconds.values()) / 60
    print_table(f"time of the stages: {total:.0f} minutes", ["stage", "minutes"], times)


if __name__ == "__main__":
    run(main)
