"""Answer a problem step by step: one `--prompt`, a file of them (`--input`, `--output`), or a loop that asks for them."""

import itertools
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from reasoning.records import Prompt, read_records, write_records
from reward_model.base import JudgeError
from utils.cli import UserError, at_root, check_input, check_model, check_output, parse_args, run
from utils.judges import JudgeArgs, check_judge, open_judge, score_all
from utils.policies import BASE, PolicyArgs, check_policy, open_policy


@dataclass
class InferenceArgs(JudgeArgs, PolicyArgs):
    prompt: str | None = field(default=None, metadata={"help": "the problem; without it and --input: a loop"})
    model_name_or_path: str = field(
        default=at_root("saved_model/stepwise_dpo_tinyllama"),
        metadata={
            "help": "a model directory or a hub name; before any training the default is the base, models/policy-mini; with "
            "--policy_base_url the name by which the server knows it"
        },
    )
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy; above, answers are sampled"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer, in tokens"})
    show_scores: bool = field(default=False, metadata={"help": "the judge's score beside each step, 0 (wrong) to 1 (right)"})
    input: str | None = field(default=None, metadata={"help": "JSONL with a field 'prompt' a row; needs --output"})
    output: str | None = field(default=None, metadata={"help": "JSONL of the answers to --input, one row a prompt in its order"})
    overwrite: bool = field(default=False, metadata={"help": "replace --output if it is there"})
    seed: int = field(default=0, metadata={"help": "seed of sampled answers and of --judge shuffled"})

    def __post_init__(self):
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"argument --temperature: expected 0 or more, got {self.temperature}")
        for name, least in (("max_new_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"argument --{name}: expected {least} or more, got {getattr(self, name)}")
        if (self.input is None) != (self.output is None):
            raise ValueError("--input and --output go together")
        if self.input is not None and self.prompt is not None:
            raise ValueError("give --prompt or --input, not both")
        if self.judge != JudgeArgs.judge and not self.show_scores:
            raise ValueError("argument --judge: goes with --show_scores")
        if self.judge == "shuffled" and self.input is None:
            raise ValueError("argument --judge: shuffled permutes the scores of many answers, it needs --input")


def check_prompt(prompt: str) -> None:
    """Raises UserError if there is nothing to answer."""
    if not prompt.strip():
        raise UserError("the prompt is empty: write a problem")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not UTF-8 text") from None


def choose_model(args: InferenceArgs) -> str:
    """The model that answers: the trained one, or, where none is given and none was trained yet, the base."""
    default = InferenceArgs.model_name_or_path
    trained = any((Path(default) / name).is_file() for name in ("config.json", "adapter_config.json"))
    if args.model_name_or_path != default or trained:
        check_model(args.model_name_or_path)
        return args.model_name_or_path
    check_model(BASE, "python utils/build_embedded_models.py")
    print(f"no trained model yet (`python train.py` makes one): the base answers, {BASE}", file=sys.stderr)
    return BASE


def answer(policy, judge, prompt: str, args: InferenceArgs, seed: int) -> None:
    """Print the answer as it is written (a server's all at once); with a judge, its score behind every step that is complete."""
    check_prompt(prompt)
    prompt, steps, line = prompt.strip(), [], ""
    for piece in itertools.chain(policy.stream(prompt, args.temperature, args.max_new_tokens, seed), ["\n"]):
        *ends, rest = piece.split("\n")
        for text in ends:
            line += text
            if line.strip():
                print(text + (f"   [{_score(judge, prompt, line.strip(), steps)}]" if judge else ""))
                steps.append(line.strip())
            line = ""
        print(rest, end="", flush=True)
        line += rest


def _score(judge, prompt: str, step: str, previous: list[str]) -> str:
    scores = judge.score_steps([(prompt, [*previous, step])], skip=[len(previous)])[0]
    return judge.left_out if scores is None else f"{scores[0]:.2f}"


def ask(policy, judge, args: InferenceArgs) -> None:
    """The loop; ends on exit, quit, Ctrl-D or Ctrl-C."""
    sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is refused by check_prompt
    print("Write a problem and press Enter; exit, quit, Ctrl-D or Ctrl-C ends.", file=sys.stderr)
    try:
        for seed in itertools.count(args.seed):
            prompt = input("> ").strip()
            if prompt.lower() in ("exit", "quit"):
                return
            try:
                answer(policy, judge, prompt, args, seed)
            except (UserError, JudgeError) as error:
                print(error, file=sys.stderr)
    except (EOFError, KeyboardInterrupt):
        print()


# One row of --output:
#   {"prompt": "Mia has 12 apples. ...",
#    "steps": ["Step 1: 12 + 14 = 26", ...],
#    "finished": true,                         the answer ended by itself, within --max_new_tokens
#    "scores": [0.98, ...]}                    with --show_scores; missing where the judge cannot score the answer
def answer_file(policy, judge, prompts: list[str], args: InferenceArgs) -> None:
    replies = policy.generate(
        prompts, temperature=args.temperature, max_new_tokens=args.max_new_tokens, seed=args.seed, progress="answers"
    )
    answers = [(prompt, reply.steps) for prompt, (reply,) in zip(prompts, replies, strict=True)]
    scores = score_all(judge, answers, "scores") if judge else [None] * len(answers)
    rows = [
        {"prompt": prompt, "steps": steps, "finished": reply.finished, "scores": of_steps}
        for (prompt, steps), (reply,), of_steps in zip(answers, replies, scores, strict=True)
    ]
    write_records(args.output, rows)
    unscored = f", {scores.count(None)} without scores ({judge.left_out})" if judge and None in scores else ""
    print(f"wrote {len(rows)} answers to {args.output}{unscored}")


def main() -> None:
    (args,) = parse_args(InferenceArgs, description=__doc__)
    if args.prompt is not None:
        check_prompt(args.prompt)
    prompts = []
    if args.input is not None:
        check_input(args.input)
        check_output(args.output, args.overwrite)
        prompts = [row.prompt for row in read_records(args.input, Prompt)]
    if args.show_scores:
        check_judge(args)
    if args.policy_base_url is None:
        args.model_name_or_path = choose_model(args)
    check_policy(args)

    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading weights: it would stand in front of the answer
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    with open_judge(args) if args.show_scores else nullcontext() as judge:
        policy = open_policy(args)
        if args.input is not None:
            answer_file(policy, judge, prompts, args)
        elif args.prompt is not None:
            answer(policy, judge, args.prompt, args, args.seed)
        else:
            ask(policy, judge, args)


if __name__ == "__main__":
    run(main)
