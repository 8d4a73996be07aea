"""The judges behind the flag `--judge` and the scorer behind `--scorer`, with their arguments.

A script mixes `JudgeArgs` into its own arguments, calls `check_judge(args)` before any work, and
then uses `with open_judge(args) as judge`. A new judge is one function and one line in `JUDGES`; a
flag that it alone needs is one more field of `JudgeArgs`.
"""

import hashlib
import inspect
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import arg, check_input, check_model, here, is_model_directory
from common.errors import UserError
from common.files import at_root, read_records
from common.identity import identity
from common.progress import progress_bar, taking_long
from lm.known_words import warn_of_unknown_words
from lm.server_text import check_url
from reasoning.datasets.loading import problems_of
from reasoning.problems import problems
from reasoning.records import Problem
from reasoning.splits import held_out_files
from reward_model.controls import ExactJudge, OutcomeJudge, RandomJudge, ShuffledJudge
from reward_model.judges.human import HumanJudge
from reward_model.protocols import Response, ResponseScorer, Scores, Solution, StepJudge
from reward_model.score_checks import warn_of_scores
from reward_model.templates import TEMPLATES

if TYPE_CHECKING:
    from reward_model.response_reward_model import ResponseRewardModel

CHUNK = 64  # solutions in one call of a judge

# --- the judges --- The parameters of each function are the flags that its judge uses; the value of
# the first one is part of the judge's name. Imports are local: torch and the judges' libraries
# would slow `--help`.


def _gguf(judge_path: str, judge_template: str | None, threads: int | None) -> StepJudge:
    from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer

    return TinyLlamaRewardScorer(judge_path, judge_template, threads)


def _llamacpp(judge_path: str, judge_template: str | None, threads: int | None) -> StepJudge:
    from reward_model.judges.llamacpp import LlamaCppJudge

    return LlamaCppJudge(judge_path, judge_template, threads)


def _hf(judge_path: str, judge_template: str | None) -> StepJudge:
    from reward_model.judges.hf import HFJudge

    return HFJudge(judge_path, judge_template)


def _prm(judge_path: str) -> StepJudge:
    from reward_model.process_reward_model import ProcessRewardModel

    return ProcessRewardModel(judge_path)


def _response(judge_path: str) -> StepJudge:
    from reward_model.response_reward_model import ResponseJudge, ResponseRewardModel

    return ResponseJudge(ResponseRewardModel(judge_path))


def _openai(
    judge_model: str,
    judge_base_url: str,
    judge_template: str | None,
    judge_samples: int,
    judge_requests: int,
    judge_cache: str,
) -> StepJudge:
    from reward_model.judges.openai import OpenAIJudge

    judge = OpenAIJudge(
        judge_base_url,
        judge_model,
        judge_template,
        samples=judge_samples,
        in_flight=judge_requests,
        cache=judge_cache,
    )
    # one question at once, so that a server that cannot be used fails before the work begins
    with taking_long(f"waiting for {judge_base_url}"):
        judge.score_steps([("2 + 3 = ?", ["Step 1: 2 + 3 = 5"])])
    return judge


def _exact(judge_problems: str | None) -> StepJudge:
    return ExactJudge(_references(judge_problems))


def _outcome(judge_problems: str | None) -> StepJudge:
    return OutcomeJudge(_references(judge_problems))


def _references(judge_problems: str | None) -> Iterator[Problem]:
    if judge_problems is not None:
        return iter(problems_of(judge_problems))
    # the held-out problems first: to read them is faster than to generate the others
    held_out = (read_records(path, Problem) for path in held_out_files())
    return itertools.chain(*held_out, problems("train"))


def _random(seed: int) -> StepJudge:
    return RandomJudge(seed)


def _human(judge_labels: str) -> StepJudge:
    return HumanJudge(judge_labels)


JUDGES: dict[str, Callable[..., StepJudge]] = {
    "gguf": _gguf,
    "llamacpp": _llamacpp,
    "hf": _hf,
    "prm": _prm,
    "response": _response,
    "openai": _openai,
    "exact": _exact,
    "outcome": _outcome,
    "random": _random,
    "human": _human,
}
USES = {name: [*inspect.signature(function).parameters] for name, function in JUDGES.items()}
SHUFFLED = "shuffled"  # a control on top of one of the judges above
CHANGE_NO_SCORE = {"threads", "judge_requests", "judge_cache"}
MINIATURES = {  # judge -> its own default of --judge_path, and the command that makes that model
    "prm": (at_root("models/prm-mini"), "make models-prm"),
    "response": (at_root("models/reward-mini"), "make models-reward"),
}
FILES = ("judge_path", "judge_problems", "judge_labels")
NEEDED = {  # flags that have no default
    "judge_model": "the name of its model",
    "judge_base_url": "the URL of its server",
    "judge_labels": "a JSONL of step labels",
}


@dataclass
class JudgeArgs:
    """The arguments of all judges, mixed into those of a script."""

    judge: str = arg(
        "gguf",
        "gguf: a GGUF file of the LLaMA architecture, through ctransformers; llamacpp: any GGUF "
        "file, through llama.cpp; hf: any causal LM through transformers; prm: a process reward "
        "model; response: a response reward model, each step gets the score of the whole; openai: "
        "any OpenAI-compatible server (key from OPENAI_API_KEY); exact: the checker, for ceilings; "
        "outcome: every step gets 1 if the final answer is right, else 0; "
        "random: uniform random scores, a control; human: labels made by people; shuffled: another "
        "judge's scores permuted over steps, a control",
        choices=[*JUDGES, SHUFFLED],
    )
    judge_path: str = arg(
        at_root("models/judge-mini/judge-mini.Q8_0.gguf"),
        "gguf, llamacpp: its file; hf: a model directory, a GGUF file or a hub name; prm, "
        "response: a model directory or a hub name "
        f"(default {' and '.join(path for path, _ in MINIATURES.values())})",
    )
    judge_template: str | None = arg(
        None,
        "gguf, llamacpp, hf, openai: the text around the question (default: by the model's own "
        "chat template or name; openai: a user's message to a chat model)",
        choices=[*TEMPLATES],
    )
    threads: int | None = arg(
        None, "gguf, llamacpp: CPU threads (default: chosen by a short trial)"
    )
    judge_base_url: str | None = arg(None, "openai: URL of the server, http://localhost:8000/v1")
    judge_model: str | None = arg(None, "openai: name of the model")
    judge_samples: int = arg(5, "openai: sampled verdicts a step, if the server gives no log-probs")
    judge_requests: int = arg(16, "openai: requests at once, at most")
    judge_cache: str = arg(
        at_root("logs/judge_answers.jsonl"),
        "openai: file that keeps every answer, so that none is paid for twice",
    )
    judge_problems: str | None = arg(
        None,
        "exact, outcome: problems with reference steps, or with answers (default: the embedded "
        "problems)",
    )
    judge_labels: str | None = arg(None, "human: JSONL of step labels")
    shuffled_judge: str = arg(
        "gguf", "shuffled: the judge whose scores are permuted", choices=[*JUDGES]
    )
    seed: int = arg(0, "shuffled, random: seed of the scores")


def _inner(args: JudgeArgs) -> str:
    """The key of JUDGES that the scores come from."""
    return args.shuffled_judge if args.judge == SHUFFLED else args.judge


def check_judge(args: JudgeArgs) -> None:
    """Raises UserError for a mistake in the judge's arguments, before anything heavy is imported.

    Fills in `judge_path` for a judge that has its own default path."""
    inner = _inner(args)
    default_path, made_by = MINIATURES.get(inner, (JudgeArgs.judge_path, "make models-policy"))
    if args.judge_path == JudgeArgs.judge_path:
        args.judge_path = default_path
    used = {*USES[inner], "judge", "seed"}
    if args.judge == SHUFFLED:
        used.add("shuffled_judge")
    for argument in fields(JudgeArgs):
        if argument.name not in used and getattr(args, argument.name) != argument.default:
            raise UserError(f"argument --{argument.name}: --judge {args.judge} does not use it")
    for name, what in NEEDED.items():
        if name in used and not getattr(args, name):
            raise UserError(f"argument --{name}: --judge {inner} needs {what}")
    if args.judge_base_url is not None:
        check_url("judge", args.judge_base_url)
    command = made_by if args.judge_path == default_path else None
    if inner in ("gguf", "llamacpp") or (inner == "hf" and args.judge_path.endswith(".gguf")):
        check_input(args.judge_path, command)
    elif inner in ("hf", *MINIATURES):
        check_model(args.judge_path, command)
    for path in (args.judge_problems, args.judge_labels):
        if path is not None:
            check_input(path)


def open_judge(args: JudgeArgs) -> StepJudge:
    """The judge that the arguments name.

    Raises ModelError, JudgeError, ServerError or RecordError if it cannot be opened."""
    inner = _inner(args)
    with taking_long(f"opening the judge {judge_name(args)}"):
        judge = JUDGES[inner](**{name: getattr(args, name) for name in USES[inner]})
    if args.judge != SHUFFLED:
        return judge
    return ShuffledJudge(judge, args.seed)


def judge_files(args: JudgeArgs) -> list[str | None]:
    """The files and folders that a judge reads or keeps, for `check_outputs`."""
    names = [name for name in (*FILES, "judge_cache") if name in USES[_inner(args)]]
    return [getattr(args, name) for name in names]


def judge_identity(args: JudgeArgs) -> dict:
    """What determines a judge's scores, for the `job` of a run that can resume: its name, its
    arguments, and what its files hold."""
    inner = _inner(args)
    values = {name: getattr(args, name) for name in USES[inner] if name not in CHANGE_NO_SCORE}
    for name in FILES:
        if values.get(name):
            values[name] = identity(values[name])
    if inner in ("hf", *MINIATURES):
        from lm.loading import scoring_identity  # torch would slow --help

        values |= scoring_identity()
    if args.judge == SHUFFLED:
        values |= {"shuffled_judge": args.shuffled_judge, "seed": args.seed}
    return {"judge": args.judge, **values}


def judge_flags(args: JudgeArgs) -> list[str]:
    """The judge's arguments that are not their defaults, as flags for another script."""
    given = [
        f for f in fields(JudgeArgs) if getattr(args, f.name) != f.default and f.name != "seed"
    ]
    return [part for f in given for part in (f"--{f.name}", str(getattr(args, f.name)))]


def judge_name(args: JudgeArgs) -> str:
    """A short name for titles and files: `judge-mini.Q8_0`, `hf-SmolLM2`, `prm-mini`,
    `openai-gpt-4o`, `shuffled-exact`."""
    inner = _inner(args)
    model = Path(str(getattr(args, USES[inner][0]) or ""))
    name = model.stem if model.is_file() else model.name
    kinds = [
        kind
        for kind in dict.fromkeys((args.judge, inner))
        if kind != "gguf" and not name.startswith(f"{kind}-")
    ]
    return "-".join(filter(None, [*kinds, name]))


def judge_record(args: JudgeArgs) -> str | None:
    """What a pair says of the judge of its scores: its name, and a hash of what determines them.

    None for the controls, whose scores say nothing of a pair."""
    if args.judge in (SHUFFLED, "random"):
        return None
    identified = json.dumps(judge_identity(args), sort_keys=True)
    return f"{judge_name(args)} {hashlib.sha256(identified.encode()).hexdigest()[:12]}"


def warn_of_foreign_text(judge: StepJudge, solutions: Sequence[Solution]) -> bool:
    """Warn on stderr if a judge does not know the words of the solutions; returns whether."""
    return warn_of_unknown_words(
        judge.count_tokens,
        f"judge ({judge})",
        ["\n".join((prompt, *steps)) for prompt, steps in solutions],
        "name a judge that has learned such text, --judge hf --judge_path MODEL or another of "
        "docs/judges.md; evaluation/eval_judge.py measures a judge on labelled steps",
    )


def score_all(judge: StepJudge, solutions: Sequence[Solution], label: str) -> Scores:
    """The judge's scores of many solutions, with a progress bar, and a warning of foreign text."""
    warn_of_foreign_text(judge, solutions)
    scores: Scores = []
    with progress_bar(total=len(solutions), desc=label, unit="solution") as bar:
        for start in range(0, len(solutions), CHUNK):
            scores += judge.score_steps(solutions[start : start + CHUNK])
            bar.update(len(scores) - start)
    warn_of_scores([score for steps in scores for score in steps or []])
    return scores


# --- response scorers: `check_scorer` before any work, then `with open_scorer(args) as scorer` ---

MINIATURE_SCORER, SCORER_MADE_BY = MINIATURES["response"]


@dataclass
class ScorerArgs:
    """The arguments of a response scorer, mixed into those of a script."""

    scorer: str = arg(
        at_root("saved_model/response_reward_model"),
        "a response reward model: a directory, or a hub model for sequence "
        "classification with one label; before any training the default is models/reward-mini",
    )


def check_scorer(args: ScorerArgs) -> None:
    """Raises UserError if there is no such model. Before any training the miniature is used."""
    if args.scorer == ScorerArgs.scorer and not is_model_directory(args.scorer):
        command = here("python train.py reward")
        note = f"no trained reward model yet (`{command}` makes one)"
        print(f"{note}: {MINIATURE_SCORER} scores", file=sys.stderr)
        args.scorer = MINIATURE_SCORER
    check_model(args.scorer, SCORER_MADE_BY if args.scorer == MINIATURE_SCORER else None)


def open_scorer(args: ScorerArgs) -> "ResponseRewardModel":
    """The scorer that the arguments name. Raises ModelError if it cannot be loaded."""
    with taking_long(f"loading {args.scorer}"):
        # torch would slow --help
        from reward_model.response_reward_model import ResponseRewardModel

        return ResponseRewardModel(args.scorer)


def warn_of_foreign_responses(scorer: ResponseScorer, responses: Sequence[Response]) -> bool:
    """Warn on stderr if a scorer does not know the words of the responses; returns whether."""
    return warn_of_unknown_words(
        scorer.count_tokens,
        f"scorer ({scorer})",
        ["\n".join(response) for response in responses],
        "name a reward model that has learned such text, --scorer MODEL; train.py reward trains "
        "one on ranked answers",
    )
