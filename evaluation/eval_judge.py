"""The judge against the exact labels, on the steps of fresh policy samples of held-out problems."""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reasoning.records import Problem, read_records
from utils.cli import UserError, at_root, check_input, check_model, check_output, parse_args, run


@dataclass
class JudgeArgs:
    judge_path: str = field(
        default=at_root("models/judge-mini/judge-mini.Q8_0.gguf"), metadata={"help": "GGUF file of the step judge"}
    )
    model_name_or_path: str = field(default=at_root("models/policy-mini"), metadata={"help": "policy whose samples are judged"})
    input: str = field(
        default=at_root("data/problems_test.jsonl"), metadata={"help": "JSONL of held-out problems with reference steps"}
    )
    output_dir: str = field(
        default=at_root("evaluation/results"), metadata={"help": "folder of the result judge_NAME.json, replaced if there"}
    )
    limit: int | None = field(default=500, metadata={"help": "use the first LIMIT problems"})
    samples: int = field(default=2, metadata={"help": "samples a problem, at temperature 1"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest sample, in tokens"})
    seed: int = field(default=0, metadata={"help": "seed of the samples and of the bootstrap"})

    def __post_init__(self):
        for name, least in (("limit", 1), ("samples", 1), ("max_new_tokens", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"argument --{name}: expected {least} or more, got {value}")


def check(args: JudgeArgs) -> tuple[list[Problem], Path]:
    def made_by(name: str, command: str) -> str | None:
        return command if getattr(args, name) == getattr(JudgeArgs, name) else None

    check_model(args.model_name_or_path, made_by("model_name_or_path", "python utils/build_embedded_models.py"))
    check_input(args.judge_path, made_by("judge_path", "python utils/build_embedded_models.py"))
    check_input(args.input, made_by("input", "make data"))
    problems = list(read_records(args.input, Problem))[: args.limit]
    for problem in problems:
        if not problem.steps:
            raise UserError(f"{args.input}: a problem without reference steps cannot be graded: {problem.prompt[:60]!r}")
    output = Path(args.output_dir) / f"judge_{Path(args.judge_path).stem}.json"
    check_output(str(output), overwrite=True)
    return problems, output


def main() -> None:
    (args,) = parse_args(JudgeArgs, description=__doc__)
    problems, output = check(args)

    from tqdm import tqdm

    from evaluation.metrics import accuracy_metric, auroc_metric, print_table, write_result
    from reasoning.grading import grade_steps
    from reward_model.base import PromptTooLong
    from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer
    from search.policy import Policy

    labels, scores, clusters, left_out = [], [], [], 0
    with TinyLlamaRewardScorer(args.judge_path) as judge:
        policy = Policy.load(args.model_name_or_path)
        prompts = [problem.prompt for problem in problems]
        samples = policy.generate(prompts, args.samples, 1.0, args.max_new_tokens, args.seed, progress="samples")
        for k, problem in enumerate(tqdm(problems, desc="scores", unit="problem")):
            for sample in samples[k]:
                try:
                    scores += judge.score_steps([(problem.prompt, sample.steps)])[0] if sample.steps else []
                except PromptTooLong:
                    left_out += 1
                    continue
                labels += grade_steps(sample.steps, problem)
                clusters += [k] * len(sample.steps)  # samples of one problem stand or fall together
    if not labels:
        raise UserError("no step to judge: every sample is empty or outgrows the judge's context")

    auroc = auroc_metric(labels, scores, clusters, args.seed)
    metrics = {"step_auroc": auroc} if auroc else {}
    metrics["decision_accuracy"] = accuracy_metric(labels, scores, clusters, args.seed)
    right = sum(labels) / len(labels)
    write_result(output, metrics, asdict(args), [args.seed], right_steps=right, left_out=left_out)
    title = f"judge: {args.judge_path}. {len(labels):,} steps of {len(problems):,} problems, {right:.3f} of them right"
    print_table(title, ["metric", "value", "n"], [(name, metric, metric.n) for name, metric in metrics.items()])
    if not auroc:
        print("no step_auroc: all steps have the same label; give more --samples or another --limit")
    if left_out:
        print(f"{left_out} samples left out: they outgrow the judge's context")
    print(f"wrote {output}")


if __name__ == "__main__":
    run(main)
