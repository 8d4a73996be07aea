"""Answer a problem step by step: one `--prompt`, a file of them (`--input`, `--output`), or a loop that asks for them.

With `--search` a judge guides: `--search beam --show_scores` shows what was proposed for every step, what was kept, and why. With
`--search best_of_n --scorer MODEL` a response reward model chooses among whole answers.
"""

import itertools
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from common.cli import check_input, check_model, check_output, parse_args, run
from common.errors import JudgeError, UserError
from common.files import at_root, read_records, write_records
from lm.registry import BASE, PolicyArgs, check_policy, open_policy
from reasoning.records import Prompt
from reward_model.protocols import SCORE_AGGREGATES
from reward_model.registry import (
    CHUNK,
    JudgeArgs,
    check_judge,
    check_scorer,
    open_judge,
    open_scorer,
    score_all,
)
from search.strategies import NEED_NO_JUDGE, PICKS, STRATEGIES, Round, SearchBudget, SearchResult


@dataclass
class InferenceArgs(JudgeArgs, PolicyArgs):
    prompt: str | None = field(
        default=None, metadata={"help": "the problem; without it and --input: a loop"}
    )
    model_name_or_path: str = field(
        default=at_root("saved_model/stepwise_dpo_tinyllama"),
        metadata={
            "help": "a model directory or a hub name; before any training the default is the base, models/policy-mini; with "
            "--policy_base_url the name by which the server knows it"
        },
    )
    temperature: float | None = field(
        default=None,
        metadata={"help": "0 is greedy; above, answers are sampled (default: 0; with --search 1)"},
    )
    max_new_tokens: int = field(default=256, metadata={"help": "longest answer, in tokens"})
    show_scores: bool = field(
        default=False,
        metadata={
            "help": "the judge's score beside each step, 0 (wrong) to 1 (right); with --search all proposals"
        },
    )
    search: str | None = field(
        default=None,
        metadata={"help": "search for the answer, guided by the judge", "choices": [*STRATEGIES]},
    )
    n: int = field(
        default=SearchBudget.n,
        metadata={"help": "with --search: proposals for each beginning, or whole solutions"},
    )
    beams: int = field(
        default=SearchBudget.beams,
        metadata={"help": "with --search: beams of beam, subtrees of dvts, walks of mcts"},
    )
    max_steps: int = field(
        default=SearchBudget.max_steps, metadata={"help": "with --search: most steps of a solution"}
    )
    aggregate: str = field(
        default=SearchBudget.aggregate,
        metadata={
            "help": "with --search: how the scores of the steps become one number",
            "choices": [*SCORE_AGGREGATES],
        },
    )
    scorer: str | None = field(
        default=None,
        metadata={
            "help": "with --search best_of_n: a response reward model that scores whole answers, in place of the judge"
        },
    )
    input: str | None = field(
        default=None, metadata={"help": "JSONL with a field 'prompt' a row; needs --output"}
    )
    output: str | None = field(
        default=None,
        metadata={"help": "JSONL of the answers to --input, one row a prompt in its order"},
    )
    overwrite: bool = field(default=False, metadata={"help": "replace --output if it is there"})
    seed: int = field(
        default=0, metadata={"help": "seed of sampled answers and of --judge shuffled"}
    )

    def __post_init__(self):
        if self.temperature is None:
            self.temperature = 1.0 if self.search else 0.0
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"argument --temperature: expected 0 or more, got {self.temperature}")
        for name, least in (("max_new_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"argument --{name}: expected {least} or more, got {getattr(self, name)}"
                )
        if (self.input is None) != (self.output is None):
            raise ValueError("--input and --output go together")
        if self.input is not None and self.prompt is not None:
            raise ValueError("give --prompt or --input, not both")
        self.budget = SearchBudget(
            self.n,
            self.beams,
            self.max_steps,
            self.max_new_tokens,
            self.temperature,
            self.aggregate,
        )
        if self.search is None and self.budget != SearchBudget(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature
        ):
            raise ValueError(
                "arguments --n, --beams, --max_steps and --aggregate: go with --search"
            )
        if self.search not in (None, "greedy") and self.temperature == 0 and self.n > 1:
            raise ValueError(
                "argument --temperature: at 0 all proposals are alike, a --search has nothing to choose from"
            )
        if self.scorer is not None and (
            self.search != "best_of_n" or self.judge != JudgeArgs.judge
        ):
            raise ValueError(
                "argument --scorer: goes with --search best_of_n, and without a --judge"
            )
        if self.judge != JudgeArgs.judge and not self.uses_judge:
            raise ValueError(
                "argument --judge: goes with --show_scores or a --search that it guides"
            )
        if self.judge == "shuffled" and self.search is not None:
            raise ValueError(
                "argument --judge: shuffled guides no search; scores by chance are --judge random"
            )
        if self.judge == "shuffled" and self.input is None:
            raise ValueError(
                "argument --judge: shuffled permutes the scores of many answers, it needs --input"
            )

    @property
    def uses_judge(self) -> bool:
        return self.scorer is None and (
            self.show_scores or self.search not in (None, *NEED_NO_JUDGE)
        )


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
    trained = any(
        (Path(default) / name).is_file() for name in ("config.json", "adapter_config.json")
    )
    if args.model_name_or_path != default or trained:
        check_model(args.model_name_or_path)
        return args.model_name_or_path
    check_model(BASE, "python utils/build_embedded_models.py")
    print(
        f"no trained model yet (`python train.py` makes one): the base answers, {BASE}",
        file=sys.stderr,
    )
    return BASE


def answer(policy, judge, prompt: str, args: InferenceArgs, seed: int) -> None:
    """Print the answer as it is written (a server's all at once); with a judge, its score behind every step that is complete."""
    check_prompt(prompt)
    if args.search is not None:
        show(STRATEGIES[args.search]([prompt.strip()], policy, judge, args.budget, seed)[0], args)
        return
    prompt, steps, line = prompt.strip(), [], ""
    for piece in itertools.chain(
        policy.stream(prompt, args.temperature, args.max_new_tokens, seed), ["\n"]
    ):
        *ends, rest = piece.split("\n")
        for text in ends:
            line += text
            if line.strip():
                print(
                    text + (f"   [{_score(judge, prompt, line.strip(), steps)}]" if judge else "")
                )
                steps.append(line.strip())
            line = ""
        print(rest, end="", flush=True)
        line += rest


def _score(judge, prompt: str, step: str, previous: list[str]) -> str:
    scores = judge.score_steps([(prompt, [*previous, step])], skip=[len(previous)])[0]
    return judge.unscored_reason if scores is None else f"{scores[0]:.2f}"


def show(found: SearchResult, args: InferenceArgs) -> None:
    """Print a searched answer; with --show_scores the candidates of every round before it, and the scores of its steps."""
    if not args.show_scores:
        print("\n".join(found.steps))
        return
    for number, candidates in enumerate(found.rounds, 1):
        print("\n".join(_round(number, candidates, args)) + "\n")
    scores = [f"   [{score:.2f}]" for score in (None if args.scorer else found.scores) or []] or [
        ""
    ] * len(found.steps)
    print("\n".join(step + score for step, score in zip(found.steps, scores, strict=True)))
    judged = f"score {found.scores[0]:.3f}" if args.scorer else f"{found.judged} steps judged"
    cost = f"{found.proposals} proposals, {found.tokens} tokens, {judged}, {found.seconds:.1f} s"
    left_out = f", {found.left_out} proposals left out" if found.left_out else ""
    print(
        f"({args.search}: {cost}{left_out}{'' if found.finished else '; the answer did not end by itself'})",
        file=sys.stderr,
    )


def _round(number: int, candidates: Round, args: InferenceArgs) -> list[str]:
    """A line a candidate, best first: whether it was kept, its value, how many proposals said the same, the scores of its steps,
    its text and what is wrong with it. Where several beginnings went on, each has a heading."""
    whole = args.search in ("greedy", *PICKS)
    by = "votes" if args.search == "majority_vote" else f"the {args.aggregate} of their step scores"
    by = "the scorer" if args.scorer else by
    samples = sum(candidate.count for candidate, _ in candidates)
    what = "solutions" if whole else "proposals"
    lines = [f"round {number}: {samples} {what}, {len(candidates)} different, kept (>) by {by}"]
    parents = {} if whole else {candidate.state.steps[:-1]: None for candidate, _ in candidates}
    for parent in parents or [()]:
        there = [pair for pair in candidates if whole or pair[0].state.steps[:-1] == parent]
        if len(parents) > 1:
            lines.append(f"  after {parent[-1]}" if parent else "  from the beginning")
        for candidate, kept in sorted(
            there, key=lambda pair: (not pair[1], -pair[0].value(args.aggregate))
        ):
            scores = candidate.scores or []
            value = (
                f"{candidate.value(args.aggregate):.3f}"
                if candidate.scores is not None
                else "-----"
            )
            own = " ".join(f"{score:.2f}" for score in (scores if whole else scores[-1:]))
            text = " | ".join(candidate.state.steps if whole else candidate.state.steps[-1:])
            note = f"   ({candidate.note})" if candidate.note else ""
            lines.append(
                f"  {'>' if kept else ' '} {value}  {candidate.count:3} x  [{own}]  {text}{note}"
            )
    return lines


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
#    "scores": [0.98, ...],                    with --show_scores; missing where the judge cannot score the answer
#    "score": 3.1,                             with --show_scores and --scorer, in place of "scores"
#    "proposals": 448, "tokens": 5012}         with --search: steps or solutions that were sampled, and the tokens in them
def search_file(policy, judge, prompts: list[str], args: InferenceArgs) -> None:
    from tqdm import tqdm

    rows, left_out = [], 0
    with tqdm(total=len(prompts), desc=args.search, unit="prompt") as bar:
        for start in range(0, len(prompts), CHUNK):
            chunk = prompts[start : start + CHUNK]
            for found in STRATEGIES[args.search](chunk, policy, judge, args.budget, args.seed):
                row = {"prompt": found.prompt, "steps": found.steps, "finished": found.finished}
                if args.show_scores:
                    row |= {"score": found.scores[0]} if args.scorer else {"scores": found.scores}
                rows.append(row | {"proposals": found.proposals, "tokens": found.tokens})
                left_out += found.left_out
            bar.update(len(chunk))
    write_records(args.output, rows)
    print(
        f"wrote {len(rows)} answers to {args.output}"
        + (f"; {left_out} proposals left out ({judge.unscored_reason})" if left_out else "")
    )


def answer_file(policy, judge, prompts: list[str], args: InferenceArgs) -> None:
    replies = policy.generate(
        prompts,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        progress="answers",
    )
    answers = [(prompt, reply.steps) for prompt, (reply,) in zip(prompts, replies, strict=True)]
    scores = score_all(judge, answers, "scores") if judge else [None] * len(answers)
    rows = [
        {"prompt": prompt, "steps": steps, "finished": reply.finished, "scores": of_steps}
        for (prompt, steps), (reply,), of_steps in zip(answers, replies, scores, strict=True)
    ]
    write_records(args.output, rows)
    unscored = (
        f", {scores.count(None)} without scores ({judge.unscored_reason})"
        if judge and None in scores
        else ""
    )
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
    if args.uses_judge:
        check_judge(args)
    if args.scorer is not None:
        check_scorer(args)
    if args.policy_base_url is None:
        args.model_name_or_path = choose_model(args)
    check_policy(args)

    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading weights: it would stand in front of the answer
    # a terminal that cannot show a character shows a question mark
    sys.stdout.reconfigure(errors="replace")
    opened = (
        open_scorer(args) if args.scorer else open_judge(args) if args.uses_judge else nullcontext()
    )
    with opened as judge:
        policy = open_policy(args)
        if args.input is not None:
            (search_file if args.search else answer_file)(policy, judge, prompts, args)
        elif args.prompt is not None:
            answer(policy, judge, args.prompt, args, args.seed)
        else:
            ask(policy, judge, args)


if __name__ == "__main__":
    run(main)
