"""Answer a problem step by step: one `--prompt`, a file of them (`--input`, `--output`), or a loop that asks for them."""

import itertools
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from reasoning.records import Prompt, read_records, write_records
from reward_model.base import PromptTooLong
from utils.cli import UserError, at_root, check_input, check_model, check_output, parse_args, run

BASE = at_root("models/policy-mini")


@dataclass
class InferenceArgs:
    prompt: str | None = field(default=None, metadata={"help": "the problem; without it and --input: a loop"})
    model_name_or_path: str = field(
        default=at_root("saved_model/stepwise_dpo_tinyllama"),
        metadata={"help": "a model directory or a hub name; before any training the default is the base, models/policy-mini"},
    )
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy; above, answers are sampled"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer, in tokens"})
    show_scores: bool = field(default=False, metadata={"help": "the judge's score beside each step, 0 (wrong) to 1 (right)"})
    judge_path: str = field(
        default=at_root("models/judge-mini/judge-mini.Q8_0.gguf"), metadata={"help": "GGUF file of the step judge"}
    )
    input: str | None = field(default=None, metadata={"help": "JSONL with a field 'prompt' a row; needs --output"})
    output: str | None = field(default=None, metadata={"help": "JSONL of the answers to --input, one row a prompt in its order"})
    overwrite: bool = field(default=False, metadata={"help": "replace --output if it is there"})
    seed: int = field(default=0, metadata={"help": "seed of sampled answers"})

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
    """Print the answer as it is written; with a judge, its score behind every step that is complete."""
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
    try:
        return f"{judge.score_step(prompt, step, previous):.2f}"
    except PromptTooLong:
        return "too long for the judge"


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
            except (UserError, PromptTooLong) as error:
                print(error, file=sys.stderr)
    except (EOFError, KeyboardInterrupt):
        print()


# One row of --output:
#   {"prompt": "Mia has 12 apples. ...",
#    "steps": ["Step 1: 12 + 14 = 26", ...],
#    "finished": true,                         the answer ended by itself, within --max_new_tokens
#    "scores": [0.98, ...]}                    with --show_scores; missing where the answer outgrows the judge's context
def answer_file(policy, judge, prompts: list[str], args: InferenceArgs) -> None:
    from tqdm import tqdm

    replies = policy.generate(
        prompts, temperature=args.temperature, max_new_tokens=args.max_new_tokens, seed=args.seed, progress="answers"
    )
    rows, too_long = [], 0
    for prompt, (reply,) in zip(tqdm(prompts, desc="scores", unit="answer", disable=judge is None), replies, strict=True):
        row = {"prompt": prompt, "steps": reply.steps, "finished": reply.finished}
        if judge:
            try:
                row["scores"] = judge.score_steps([(prompt, reply.steps)])[0] if reply.steps else []
            except PromptTooLong:
                too_long += 1
        rows.append(row)
    write_records(args.output, rows)
    unscored = f", {too_long} without scores (they outgrow the judge's context)" if too_long else ""
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
        is_default = args.judge_path == InferenceArgs.judge_path
        check_input(args.judge_path, "python utils/build_embedded_models.py" if is_default else None)
    model = choose_model(args)

    from transformers.utils import logging

    from search.policy import Policy

    logging.disable_progress_bar()  # of loading weights: it would stand in front of the answer
    if args.show_scores:
        from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer

        judging = TinyLlamaRewardScorer(args.judge_path)
    else:
        judging = nullcontext()
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    with judging as judge:
        policy = Policy.load(model)
        if args.input is not None:
            answer_file(policy, judge, prompts, args)
        elif args.prompt is not None:
            answer(policy, judge, args.prompt, args, args.seed)
        else:
            ask(policy, judge, args)


if __name__ == "__main__":
    run(main)
