"""The judges a script can use, by the one flag `--judge`, and the arguments they take.

A script mixes `JudgeArgs` into its own arguments, calls `check_judge` before any work and then `with open_judge(args) as judge`.
A new judge is one function and one line in `JUDGES` and in `USES`.
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import check_input, check_model, is_model_directory
from common.errors import UserError
from common.files import at_root, content_hash, read_records
from reasoning.problems import problems
from reasoning.records import Problem
from reasoning.splits import held_out_files
from reward_model.protocols import Solution, StepJudge
from reward_model.templates import TEMPLATES

if TYPE_CHECKING:
    from reward_model.response_reward_model import ResponseRewardModel

CHUNK = 64  # solutions a judge is given at once


def _gguf(args: "JudgeArgs") -> StepJudge:
    from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer

    return TinyLlamaRewardScorer(args.judge_path, args.judge_template, args.threads)


def _hf(args: "JudgeArgs") -> StepJudge:
    from reward_model.judges.hf import HFJudge

    return HFJudge(args.judge_path, args.judge_template)


def _prm(args: "JudgeArgs") -> StepJudge:
    from reward_model.process_reward_model import ProcessRewardModel

    return ProcessRewardModel(args.judge_path)


def _response(args: "JudgeArgs") -> StepJudge:
    from reward_model.response_reward_model import ResponseJudge, ResponseRewardModel

    return ResponseJudge(ResponseRewardModel(args.judge_path))


def _openai(args: "JudgeArgs") -> StepJudge:
    from reward_model.judges.openai import OpenAIJudge

    judge = OpenAIJudge(
        args.judge_base_url,
        args.judge_model,
        args.judge_template,
        samples=args.judge_samples,
        in_flight=args.judge_requests,
        cache=args.judge_cache,
    )
    # a server that cannot be used is found before the work begins
    judge.score_steps([("2 + 3 = ?", ["Step 1: 2 + 3 = 5"])])
    return judge


def _exact(args: "JudgeArgs") -> StepJudge:
    from reward_model.controls import ExactJudge

    if args.judge_problems is not None:
        return ExactJudge(read_records(args.judge_problems, Problem))
    # quicker than to generate
    held_out = (read_records(path, Problem) for path in held_out_files())
    return ExactJudge(itertools.chain(*held_out, problems("train")))


def _shuffled(args: "JudgeArgs") -> StepJudge:
    from reward_model.controls import ShuffledJudge

    return ShuffledJudge(JUDGES[args.shuffled_judge](args), args.seed)


def _random(args: "JudgeArgs") -> StepJudge:
    from reward_model.controls import RandomJudge

    return RandomJudge(args.seed)


def _human(args: "JudgeArgs") -> StepJudge:
    from reward_model.judges.human import HumanJudge

    return HumanJudge(args.judge_labels)


JUDGES = {
    "gguf": _gguf,
    "hf": _hf,
    "prm": _prm,
    "response": _response,
    "openai": _openai,
    "exact": _exact,
    "shuffled": _shuffled,
    "random": _random,
    "human": _human,
}
USES = {  # judge -> its own arguments, first what it is called by
    "gguf": ("judge_path", "judge_template", "threads"),
    "hf": ("judge_path", "judge_template"),
    "prm": ("judge_path",),
    "response": ("judge_path",),
    "openai": (
        "judge_model",
        "judge_base_url",
        "judge_template",
        "judge_samples",
        "judge_requests",
        "judge_cache",
    ),
    "exact": ("judge_problems",),
    "random": ("seed",),
    "human": ("judge_labels",),
}
CHANGE_NO_SCORE = {"threads", "judge_requests", "judge_cache"}
MINIATURES = {  # judge -> its judge_path without one, and what makes it
    "prm": (at_root("models/prm-mini"), "make models-prm"),
    "response": (at_root("models/reward-mini"), "make models-reward"),
}
FILES = ("judge_path", "judge_problems", "judge_labels")
NEEDED = {  # without a default
    "judge_model": "the name of its model",
    "judge_base_url": "the URL of its server",
    "judge_labels": "a JSONL of step labels",
}


@dataclass
class JudgeArgs:
    """The arguments of all judges, mixed into those of a script."""

    judge: str = field(
        default="gguf",
        metadata={
            "help": "gguf: a GGUF file of the LLaMA architecture; hf: any causal LM through transformers; prm: a process reward "
            "model; response: a response reward model, each step has the score of the whole; openai: any OpenAI-compatible server "
            "(key from OPENAI_API_KEY); exact: the checker, for ceilings; shuffled: another judge's scores permuted over steps, a "
            "control; random: scores drawn by chance, a control; human: labels that people made",
            "choices": list(JUDGES),
        },
    )
    judge_path: str = field(
        default=at_root("models/judge-mini/judge-mini.Q8_0.gguf"),
        metadata={
            "help": "gguf: its file; hf: a model directory, a GGUF file or a hub name; prm, response: a directory or a hub name "
            f"(default {' and '.join(path for path, _ in MINIATURES.values())})"
        },
    )
    judge_template: str | None = field(
        default=None,
        metadata={
            "help": "gguf, hf, openai: how it is asked (default: what the model says of itself; openai: as a chat model)",
            "choices": [*TEMPLATES],
        },
    )
    threads: int | None = field(
        default=None, metadata={"help": "gguf: threads (default: as many as pay off)"}
    )
    judge_base_url: str | None = field(
        default=None, metadata={"help": "openai: URL of the server, http://localhost:8000/v1"}
    )
    judge_model: str | None = field(default=None, metadata={"help": "openai: name of the model"})
    judge_samples: int = field(
        default=5, metadata={"help": "openai: verdicts a step from a server that gives no logprobs"}
    )
    judge_requests: int = field(default=16, metadata={"help": "openai: most requests at once"})
    judge_cache: str = field(
        default=at_root("logs/judge_answers.jsonl"),
        metadata={"help": "openai: every answer, so that none is paid for twice"},
    )
    judge_problems: str | None = field(
        default=None,
        metadata={
            "help": "exact: JSONL of problems with reference steps (default: the embedded world's)"
        },
    )
    judge_labels: str | None = field(default=None, metadata={"help": "human: JSONL of step labels"})
    shuffled_judge: str = field(
        default="gguf", metadata={"help": "shuffled: whose scores are permuted", "choices": [*USES]}
    )
    seed: int = field(default=0, metadata={"help": "shuffled, random: seed of the scores"})


def _inner(args: JudgeArgs) -> str:
    """The judge whose scores they are in the end."""
    return args.shuffled_judge if args.judge == "shuffled" else args.judge


def check_judge(args: JudgeArgs) -> None:
    """Raises UserError for a mistake in the judge's arguments, before anything heavy is imported. Fills in the path of a reward
    model, which has a default of its own."""
    inner = _inner(args)
    path, made_by = MINIATURES.get(inner, (JudgeArgs.judge_path, "make models"))
    if args.judge_path == JudgeArgs.judge_path:
        args.judge_path = path
    used = {
        *USES[inner],
        "judge",
        "seed",
        *(["shuffled_judge"] if args.judge == "shuffled" else []),
    }
    for argument in fields(JudgeArgs):
        if argument.name not in used and getattr(args, argument.name) != argument.default:
            raise UserError(f"argument --{argument.name}: --judge {args.judge} does not use it")
    for name, what in NEEDED.items():
        if name in used and not getattr(args, name):
            raise UserError(f"argument --{name}: --judge {inner} needs {what}")
    made_by = made_by if args.judge_path == path else None
    if inner == "gguf" or (inner == "hf" and args.judge_path.endswith(".gguf")):
        check_input(args.judge_path, made_by)
    elif inner in ("hf", *MINIATURES):
        check_model(args.judge_path, made_by)
    for path in (args.judge_problems, args.judge_labels):
        if path is not None:
            check_input(path)


def open_judge(args: JudgeArgs) -> StepJudge:
    """The judge that the arguments name. Raises ModelError, JudgeError or RecordError if it cannot be opened."""
    return JUDGES[args.judge](args)


def judge_identity(args: JudgeArgs) -> dict:
    """All that changes a judge's scores, for the `job` of ResumableRows: its name, its arguments, what its files hold."""
    values = {
        name: getattr(args, name) for name in USES[_inner(args)] if name not in CHANGE_NO_SCORE
    }
    values |= {
        name: content_hash(values[name]) or values[name] for name in FILES if values.get(name)
    }
    shuffled = (
        {"shuffled_judge": args.shuffled_judge, "seed": args.seed}
        if args.judge == "shuffled"
        else {}
    )
    return {"judge": args.judge, **values, **shuffled}


def judge_name(args: JudgeArgs) -> str:
    """A short name for titles and files: `judge-mini.Q8_0`, `hf-SmolLM2`, `prm-mini`, `openai-gpt-4o`, `shuffled-exact`."""
    inner = _inner(args)
    called = Path(str(getattr(args, USES[inner][0]) or ""))
    name = called.stem if called.is_file() else called.name
    kinds = dict.fromkeys(
        kind for kind in (args.judge, inner) if kind != "gguf" and not name.startswith(f"{kind}-")
    )
    return "-".join(filter(None, [*kinds, name]))


def score_all(
    judge: StepJudge, solutions: Sequence[Solution], label: str
) -> list[list[float] | None]:
    """The judge's scores of many solutions, with a progress bar."""
    from tqdm import tqdm

    scores: list[list[float] | None] = []
    with tqdm(total=len(solutions), desc=label, unit="solution") as bar:
        for start in range(0, len(solutions), CHUNK):
            scores += judge.score_steps(solutions[start : start + CHUNK])
            bar.update(len(scores) - start)
    return scores


# --- response scorers: `check_scorer` before any work, then `with open_scorer(args) as scorer` ---

MINIATURE_SCORER, SCORER_MADE_BY = MINIATURES["response"]


@dataclass
class ScorerArgs:
    """Mixed into a script's own arguments."""

    scorer: str = field(
        default=at_root("saved_model/response_reward_model"),
        metadata={
            "help": "a response reward model: a folder, or a hub model for sequence classification "
            "with one label; before any training the default is models/reward-mini"
        },
    )


def check_scorer(args: ScorerArgs) -> None:
    """Raises UserError if there is no such model. Where none was trained yet, the miniature is used."""
    if args.scorer == ScorerArgs.scorer and not is_model_directory(args.scorer):
        print(
            "no trained reward model yet (`python train.py reward` makes one): "
            f"{MINIATURE_SCORER} scores",
            file=sys.stderr,
        )
        args.scorer = MINIATURE_SCORER
    check_model(args.scorer, SCORER_MADE_BY if args.scorer == MINIATURE_SCORER else None)


def open_scorer(args: ScorerArgs) -> "ResponseRewardModel":
    """Raises ModelError if the model cannot be loaded."""
    from reward_model.response_reward_model import ResponseRewardModel

    return ResponseRewardModel(args.scorer)
