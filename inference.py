"""Answer problems step by step: one `--prompt`, a file (`--input`, `--output`), or a loop.

With `--serve` a page on this machine answers prompts with base and tuned policy side by side.

The loop asks for prompts. With `--search` a judge guides the search: `--search beam --show_scores`
shows what was proposed for every step, what was kept, and why. With `--search best_of_n --scorer
MODEL` a response reward model chooses among whole answers. Control characters in an answer are
printed as escapes (`\\x1b`), in a pipe too; --output has the text as it is.
"""

import copy
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from common.cli import (
    arg,
    check_input,
    check_least,
    check_model,
    check_output,
    here,
    is_model_directory,
    parse_args,
    run,
)
from common.errors import JudgeError, UserError
from common.files import at_root, read_records, write_records
from common.identity import adapter_base
from common.page_server import check_port, prepare, serve
from common.progress import progress_bar, taking_long
from common.terminal import printable
from lm.registry import BASE, PolicyArgs, check_policy, open_policy, warn_of_foreign_prompts
from reasoning.records import Prompt
from reward_model.protocols import SCORE_AGGREGATES, ResponseScorer, Solution, StepJudge
from reward_model.registry import (
    CHUNK,
    JudgeArgs,
    check_judge,
    check_scorer,
    judge_files,
    open_judge,
    open_scorer,
    score_all,
    warn_of_foreign_responses,
    warn_of_foreign_text,
)
from search.candidates import Round, SearchBudget, SearchResult
from search.strategies import NEED_NO_JUDGE, PICKS, STRATEGIES

if TYPE_CHECKING:
    from lm.policy import Policy

Guide = StepJudge | ResponseScorer | None


@dataclass
class InferenceArgs(JudgeArgs, PolicyArgs):
    prompt: str | None = arg(None, "the problem; without it and --input: a loop")
    model_name_or_path: str = arg(
        at_root("saved_model/stepwise_dpo_tinyllama"),
        "the policy: a model directory or a hub name; before any training the default "
        "is models/policy-mini; with --policy_base_url its name on the server",
    )
    temperature: float | None = arg(
        None, "0: greedy; above 0: sampled (default: 0; with --search 1)"
    )
    max_new_tokens: int = arg(256, "longest answer, in tokens")
    show_scores: bool = arg(
        False,
        "show the judge's score of each step, 0 (wrong) to 1 (right); with --search "
        "show all proposals",
    )
    search: str | None = arg(None, "search strategy, guided by the judge", choices=[*STRATEGIES])
    n: int = arg(SearchBudget.n, "with --search: proposals for each prefix, or whole solutions")
    beams: int = arg(
        SearchBudget.beams, "with --search: beams of beam, subtrees of dvts, walks of mcts"
    )
    max_steps: int = arg(SearchBudget.max_steps, "with --search: most steps of a solution")
    aggregate: str = arg(
        SearchBudget.aggregate,
        "with --search: how step scores become one number",
        choices=[*SCORE_AGGREGATES],
    )
    scorer: str | None = arg(
        None,
        "with --search best_of_n: a response reward model that scores whole answers, "
        "instead of the judge",
    )
    input: str | None = arg(None, "JSONL of rows with a field 'prompt'; needs --output")
    serve: bool = arg(
        False,
        "serve a page on this machine that answers prompts with base and tuned policy side by "
        "side, with the judge's scores and the search tree",
    )
    base_model: str | None = arg(
        None,
        "with --serve: the policy beside it (default: the base of an adapter, else "
        "models/policy-mini)",
    )
    port: int = arg(7861, "with --serve: port of the page")
    output: str | None = arg(None, "JSONL of the answers to --input, in the same order")
    overwrite: bool = arg(False, "replace --output if it exists")
    seed: int = arg(0, "seed of sampled answers and of --judge shuffled")

    def __post_init__(self) -> None:
        self.given_temperature = self.temperature
        if self.temperature is None:
            self.temperature = 1.0 if self.search else 0.0
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"argument --temperature: expected 0 or more, got {self.temperature}")
        check_least(self, max_new_tokens=1, seed=0)
        if (self.input is None) != (self.output is None):
            raise ValueError("--input and --output go together")
        if self.input is not None and self.prompt is not None:
            raise ValueError("give --prompt or --input, not both")
        length, temperature = self.max_new_tokens, self.temperature
        self.budget = SearchBudget(
            self.n, self.beams, self.max_steps, length, temperature, self.aggregate
        )
        if self.serve and (self.prompt, self.input, self.scorer) != (None, None, None):
            raise ValueError("argument --serve: goes without --prompt, --input and --scorer")
        if not self.serve and (self.base_model is not None or self.port != InferenceArgs.port):
            raise ValueError("arguments --base_model and --port: go with --serve")
        check_port(self.port)
        if self.search is None and not self.serve:
            if self.budget != SearchBudget(max_new_tokens=length, temperature=temperature):
                raise ValueError(
                    "arguments --n, --beams, --max_steps and --aggregate: go with --search"
                )
        elif self.search not in (None, "greedy") and temperature == 0 and self.n > 1:
            raise ValueError(
                "argument --temperature: at 0 all proposals are alike, a --search has nothing to "
                "choose from"
            )
        has_judge = self.judge != JudgeArgs.judge
        if self.scorer is not None and (self.search != "best_of_n" or has_judge):
            raise ValueError(
                "argument --scorer: goes with --search best_of_n, and without a --judge"
            )
        if has_judge and not self.uses_judge:
            raise ValueError(
                "argument --judge: goes with --show_scores, --serve or a --search that it guides"
            )
        if self.judge == "shuffled" and self.search is not None:
            raise ValueError(
                "argument --judge: shuffled guides no search; random scores are --judge random"
            )
        if self.judge == "shuffled" and self.input is None:
            raise ValueError(
                "argument --judge: shuffled permutes the scores of many answers, it needs --input"
            )

    @property
    def uses_judge(self) -> bool:
        guided = self.search not in (None, *NEED_NO_JUDGE)
        return self.scorer is None and (self.show_scores or self.serve or guided)


def check_prompt(prompt: str) -> None:
    """Raises UserError if the prompt is empty or not UTF-8."""
    if not prompt.strip():
        raise UserError("the prompt is empty: write a problem")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not UTF-8 text") from None


def choose_model(args: InferenceArgs) -> str:
    """The given model, by default the trained one; before any training the base model."""
    default = InferenceArgs.model_name_or_path
    if args.model_name_or_path != default or is_model_directory(default):
        check_model(args.model_name_or_path)
        return args.model_name_or_path
    check_model(BASE, "make models-policy")
    print(
        f"no trained model yet (`{here('python train.py')}` makes one): the base answers, {BASE}",
        file=sys.stderr,
    )
    return BASE


# --- one prompt, and the loop ---


def answer(
    policy: "Policy", judge: Guide, prompt: str, args: InferenceArgs, seed: int
) -> list[str]:
    """Print the answer while it is written, with the judge's score behind each finished step.
    Returns its steps.

    A search prints its answer at the end, and so does a server."""
    check_prompt(prompt)
    prompt = prompt.strip()
    if args.search is not None:
        with taking_long("searching"):
            (found,) = STRATEGIES[args.search]([prompt], policy, judge, args.budget, seed)
        show(found, args)
        return found.steps
    steps: list[str] = []
    line = ""
    pieces = policy.stream(prompt, args.temperature, args.max_new_tokens, seed)
    for piece in itertools.chain(pieces, ["\n"]):
        *ends, rest = piece.split("\n")
        for text in ends:
            step, line = (line + text).strip(), ""
            if step:
                steps.append(step)
                score = f"   [{_score_last(judge, prompt, steps)}]" if judge else ""
                print(printable(text) + score)
        print(printable(rest), end="", flush=True)
        line += rest
    return steps


def _score_last(judge: StepJudge, prompt: str, steps: list[str]) -> str:
    scores = judge.score_steps([(prompt, steps)], skip=[len(steps) - 1])[0]
    return judge.unscored_reason if scores is None else f"{scores[0]:.2f}"


def check_guide(guide: Guide, answers: Sequence[Solution], args: InferenceArgs) -> bool:
    """Warn on stderr if the judge or scorer does not know the words of the answers; returns
    whether."""
    if guide is None:
        return False
    if args.scorer is None:
        return warn_of_foreign_text(guide, answers)
    responses = [(prompt, "\n".join(steps)) for prompt, steps in answers]
    return warn_of_foreign_responses(guide, responses)


def show(found: SearchResult, args: InferenceArgs) -> None:
    """Print the answer of a search; with --show_scores also the rounds, the scores and the cost."""
    if not args.show_scores:
        print(printable("\n".join(found.steps)))
        return
    for number, candidates in enumerate(found.rounds, 1):
        print(printable("\n".join(_round(number, candidates, args))) + "\n")
    scores = found.scores or []
    for k, step in enumerate(found.steps):
        score = f"   [{scores[k]:.2f}]" if scores and not args.scorer else ""
        print(printable(step) + score)
    judged = f"score {scores[0]:.3f}" if args.scorer else f"{found.judged} steps judged"
    cost = f"{found.proposals} proposals, {found.tokens} tokens, {judged}, {found.seconds:.1f} s"
    cost += f", {found.left_out} proposals left out" if found.left_out else ""
    cost += "" if found.finished else "; the answer did not end by itself"
    print(f"({args.search}: {cost})", file=sys.stderr)


def _round(number: int, candidates: Round, args: InferenceArgs) -> Iterator[str]:
    """The lines of a round: one a candidate, kept ones and high values first.

    A line has the mark of a kept candidate, its value, the number of equal proposals, the scores of
    its steps, its text, and a note if something is wrong with it. Several prefixes have a heading
    each."""
    whole = args.search in ("greedy", *PICKS)
    by = "votes" if args.search == "majority_vote" else f"the {args.aggregate} of their step scores"
    by = "the scorer" if args.scorer else by
    samples = sum(candidate.count for candidate, _ in candidates)
    kind = "solutions" if whole else "proposals"
    yield f"round {number}: {samples} {kind}, {len(candidates)} different, kept (>) by {by}"
    by_prefix: dict[tuple[str, ...], Round] = {}
    for candidate, kept in candidates:
        prefix = () if whole else candidate.state.steps[:-1]
        by_prefix.setdefault(prefix, []).append((candidate, kept))
    for prefix, group in by_prefix.items():
        if len(by_prefix) > 1:
            yield f"  after {prefix[-1]}" if prefix else "  at the start"
        group.sort(key=lambda pair: (not pair[1], -pair[0].value(args.aggregate)))
        for candidate, kept in group:
            scored = candidate.scores is not None
            value = f"{candidate.value(args.aggregate):.3f}" if scored else "-----"
            shown = slice(None) if whole else slice(-1, None)
            scores = " ".join(f"{score:.2f}" for score in (candidate.scores or [])[shown])
            text = " | ".join(candidate.state.steps[shown])
            note = f"   ({candidate.note})" if candidate.note else ""
            mark = ">" if kept else " "
            yield f"  {mark} {value}  {candidate.count:3} x  [{scores}]  {text}{note}"


def ask(policy: "Policy", judge: Guide, args: InferenceArgs) -> None:
    """The loop; it ends on exit, quit, Ctrl-D or Ctrl-C. Each prompt has the next seed."""
    sys.stdin.reconfigure(errors="surrogateescape")  # check_prompt refuses text that is not UTF-8
    print("Write a problem and press Enter; exit, quit, Ctrl-D or Ctrl-C ends.", file=sys.stderr)
    warned = False
    try:
        for seed in itertools.count(args.seed):
            prompt = input("> ").strip()
            if prompt.lower() in ("exit", "quit"):
                return
            try:
                if seed == args.seed:
                    warn_of_foreign_prompts(policy, args.model_name_or_path, [prompt])
                steps = answer(policy, judge, prompt, args, seed)
                warned = warned or check_guide(judge, [(prompt, steps)], args)
            except (UserError, JudgeError) as error:
                print(printable(error), file=sys.stderr)
    except (EOFError, KeyboardInterrupt):
        print()


# --- the page ---


def serve_page(args: InferenceArgs, judge: StepJudge) -> None:
    """Serve the page of evaluation/answer_page.py until Ctrl-C."""
    from evaluation.answer_page import AnswerPage, css

    base = copy.copy(args)
    base.model_name_or_path = base_of(args)
    chosen = {"base": base, "tuned": args}
    if base.model_name_or_path == args.model_name_or_path:
        del chosen["tuned"]
    policies = {name: (open_policy(one), one.model_name_or_path) for name, one in chosen.items()}

    def settings(strategy: str | None, n: int) -> SearchBudget:
        usual = 1.0 if strategy else 0.0
        given = args.given_temperature
        return replace(args.budget, n=n, temperature=usual if given is None else given)

    first = args.search or (None if args.given_temperature == 0 else "beam")
    page = AnswerPage(policies, judge, settings, first, args.n, args.seed)
    serve(page.blocks(), css(), "answers", args.port)


def base_of(args: InferenceArgs) -> str:
    """The policy that the page shows beside the tuned one."""
    if args.base_model is not None:
        return args.base_model
    return adapter_base(args.model_name_or_path)[0] or BASE


# --- a file of prompts ---


# One row of --output:
#   {"prompt": "Mia has 12 apples. ...",
#    "steps": ["Step 1: 12 + 14 = 26", ...],
#    "finished": true,                  the answer ended by itself, within --max_new_tokens
#    "scores": [0.98, ...],             with --show_scores; missing if the judge cannot score it
#    "score": 3.1,                      with --show_scores and --scorer, instead of "scores"
#    "proposals": 448, "tokens": 5012}  with --search: sampled steps or solutions, and their tokens
def search_file(policy: "Policy", judge: Guide, prompts: list[str], args: InferenceArgs) -> None:
    rows, left_out = [], 0
    with progress_bar(total=len(prompts), desc=args.search, unit="prompt") as bar:
        for start in range(0, len(prompts), CHUNK):
            chunk = prompts[start : start + CHUNK]
            results = STRATEGIES[args.search](chunk, policy, judge, args.budget, args.seed)
            if start == 0:
                check_guide(judge, [(found.prompt, found.steps) for found in results], args)
            for found in results:
                row = {"prompt": found.prompt, "steps": found.steps, "finished": found.finished}
                if args.show_scores:
                    row |= {"score": found.scores[0]} if args.scorer else {"scores": found.scores}
                rows.append(row | {"proposals": found.proposals, "tokens": found.tokens})
                left_out += found.left_out
            bar.update(len(chunk))
    write_records(args.output, rows)
    note = f"; {left_out} proposals left out ({judge.unscored_reason})" if left_out else ""
    print(f"wrote {len(rows)} answers to {args.output}{note}")


def answer_file(policy: "Policy", judge: Guide, prompts: list[str], args: InferenceArgs) -> None:
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
        {"prompt": prompt, "steps": steps, "finished": reply.finished, "scores": step_scores}
        for (prompt, steps), (reply,), step_scores in zip(answers, replies, scores, strict=True)
    ]
    write_records(args.output, rows)
    note = ""
    if judge and None in scores:
        note = f", {scores.count(None)} without scores ({judge.unscored_reason})"
    print(f"wrote {len(rows)} answers to {args.output}{note}")


def main() -> None:
    (args,) = parse_args(InferenceArgs, description=__doc__)
    prompts = []
    if args.prompt is not None:
        check_prompt(args.prompt)
        prompts = [args.prompt]
    if args.input is not None:
        check_input(args.input)
        read = [args.input, args.model_name_or_path, args.scorer, *judge_files(args)]
        check_output(args.output, args.overwrite, read)
        prompts = [row.prompt for row in read_records(args.input, Prompt)]
    if args.uses_judge:
        check_judge(args)
    if args.scorer is not None:
        check_scorer(args)
    if args.policy_base_url is None:
        args.model_name_or_path = choose_model(args)
    check_policy(args)
    if args.serve and args.policy_base_url is None:
        check_model(base_of(args), "make models-policy" if base_of(args) == BASE else None)
    if args.serve:
        prepare()

    sys.stdout.reconfigure(errors="replace")  # ? for characters that the terminal cannot show
    if args.scorer is not None:
        opened = open_scorer(args)
    else:
        opened = open_judge(args) if args.uses_judge else nullcontext()
    with opened as judge:
        if args.serve:
            return serve_page(args, judge)
        policy = open_policy(args, prompts)
        if args.input is not None:
            (search_file if args.search else answer_file)(policy, judge, prompts, args)
        elif args.prompt is not None:
            steps = answer(policy, judge, args.prompt, args, args.seed)
            check_guide(judge, [(args.prompt, steps)], args)
        else:
            ask(policy, judge, args)


if __name__ == "__main__":
    run(main)
