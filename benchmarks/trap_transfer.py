"""Does a PRM see mistakes of a kind that it has not learned from?

    python benchmarks/trap_transfer.py    # about 4 hours on 2 cores; the same command resumes it

Traps are of three kinds: borrow, times, boxes (docs/problem_world.md). For each kind a PRM learns
from the trees of problems without such a trap, and it is tested at the traps of this kind. The
comparison is a PRM that learned from as many trees of any problems. Both are trained as
models/prm-mini is, on step values alone. The test: steps that policy-mini sampled for test problems
after right prefixes; the figure is the AUROC of right against wrong ones.

Writes trap_transfer.json to --output_dir."""

import itertools
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.runs import BASE, as_flags
from common.cli import arg, check_least, check_model, parse_args, run
from common.files import at_root, read_rows, write_records
from evaluation.metrics import auroc_difference, auroc_metric
from evaluation.results import print_table, write_result
from reasoning.grading import grade_steps
from reasoning.problems import Story, stories

TREES, DATA, MODELS = "data/mcts_trees.jsonl.gz", "data/trap_transfer", "saved_model/trap_transfer"
START = "models/policy-surprisal"
KINDS = ("borrow", "times", "boxes")
KIND_OF_EVENT = {"lose": "borrow", "times": "times", "sets": "boxes"}
# the two trainings of models/prm-mini, each on labels of the same trees
STAGES = {"mc": {"learning_rate": 4e-4}, "relative": {"learning_rate": 3e-4, "running_min": True}}
COMMON = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "eval_strategy": "no"}


@dataclass
class TransferArguments:
    trees: int = arg(2000, "trees that every PRM learns from")
    test: int = arg(1000, "test problems")
    samples: int = arg(4, "samples of each test problem")
    output_dir: str = arg(at_root("evaluation/results"), "folder of trap_transfer.json")

    def __post_init__(self) -> None:
        check_least(self, trees=1, test=1, samples=1)


def trap_kinds(story: Story) -> list[str]:
    """The kind of the trap at every event, or an empty text."""
    traps = zip(story.events, story.values(), strict=False)
    return [KIND_OF_EVENT[event.kind] if event.is_trap(value) else "" for event, value in traps]


def train_prm(name: str, trees: Sequence[dict]) -> Path:
    """The PRM of some trees; it is trained unless it is there already."""
    name = f"{name}_{len(trees)}"
    folder = Path(at_root(MODELS), name)
    path, start = Path(at_root(DATA), f"{name}.jsonl"), at_root(START)
    if not (folder / "relative/config.json").exists():
        write_records(path, trees)
    for labels, settings in STAGES.items():
        output = folder / labels
        if not (output / "config.json").exists():
            steps = path.with_name(f"{name}_{labels}.jsonl")
            flags = {"from_trees": path, "labels": labels, "output": steps, "overwrite": True}
            flags |= {"keep_dropped": True}
            _call("utils/build_mcts_dataset.py", flags)
            flags = {"model_name_or_path": start, "dataset_name": steps, "output_dir": output}
            more = {"run_name": f"trap_transfer_{name}_{labels}"}
            _call("train.py", COMMON | settings | flags | more, "prm")
        start = str(output)
    return folder / "relative"


def _call(script: str, flags: dict, *commands: str) -> None:
    subprocess.run([sys.executable, at_root(script), *commands, *as_flags(flags)], check=True)


def main() -> None:
    (args,) = parse_args(TransferArguments, description=__doc__)
    check_model(at_root(START))
    by_prompt = {story.prompt(): story for story in stories("train")}
    trees = [tree for _, tree in read_rows(at_root(TREES))]
    kinds_of = {tree["prompt"]: {*trap_kinds(by_prompt[tree["prompt"]])} for tree in trees}
    judges = {"all": train_prm("all", trees[: args.trees])}
    for kind in KINDS:
        without = [tree for tree in trees if kind not in kinds_of[tree["prompt"]]]
        judges[kind] = train_prm(f"without_{kind}", without[: args.trees])

    # torch would slow --help
    from lm.policy import Policy
    from reward_model.process_reward_model import ProcessRewardModel

    asked = list(itertools.islice(stories("test"), args.test))
    policy = Policy.load(at_root(BASE))
    prompts = [story.prompt() for story in asked]
    sampling = {"n": args.samples, "temperature": 1.0, "progress": "sampling test problems"}
    answers = policy.generate(prompts, **sampling)
    solutions = [
        (number, one.steps)
        for number, own in enumerate(answers)
        for one in own
        if one.finished and one.steps
    ]
    texts = [(prompts[number], tuple(steps)) for number, steps in solutions]
    scores = {name: ProcessRewardModel(path).score_steps(texts) for name, path in judges.items()}
    metrics, table = {}, []
    for kind in KINDS:
        found = []  # (problem, label, score of the PRM of all, score of the PRM without this kind)
        for k, (number, steps) in enumerate(solutions):
            labels = grade_steps(steps, asked[number].problem())
            for j, trap in enumerate(trap_kinds(asked[number])[: len(steps)]):
                if trap == kind and all(labels[:j]):
                    found.append((number, labels[j], scores["all"][k][j], scores[kind][k][j]))
        clusters, labels, known, unknown = zip(*found, strict=True)
        metrics[f"{kind}/learned/auroc"] = auroc_metric(labels, known, clusters)
        metrics[f"{kind}/not learned/auroc"] = auroc_metric(labels, unknown, clusters)
        difference = auroc_difference(labels, unknown, known, clusters)
        metrics[f"{kind}/not learned minus learned"] = difference
        table.append((kind, *[*metrics.values()][-3:], len(found)))
    title = f"step AUROC at the traps of a kind, PRMs of {args.trees} trees"
    columns = ["kind", "learned from all kinds", "not from this kind", "difference", "steps"]
    print_table(title, columns, table)
    result = Path(args.output_dir, "trap_transfer.json")
    write_result(result, {k: m for k, m in metrics.items() if m}, vars(args), [42])
    print(f"wrote {result}")


if __name__ == "__main__":
    run(main)
