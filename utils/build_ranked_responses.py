"""Prompts -> several answers each, to be ranked (data/answers.csv).

    python utils/build_ranked_responses.py --rank_by exact --overwrite

Every prompt is answered `--answers` times; the j-th answer has the j-th temperature and top-p (the lists are gone through again and
again) and the seed `--seed` + j, and all three are kept in its row: with them the same model gives the same answer. Nothing is
ranked: utils/rank_responses.py shows the answers to a person. Killed, it resumes.

With `--rank_by exact` problems with reference steps become groups of four that the exact checker ranks (`rule:exact`), one answer
of each kind: 1 right, every step of it; 2 flawed, the right answer with a step that is wrong; 3 wrong, well-formed and with a wrong
answer, as like the right one in length as there is; 4 malformed, cut off or with a step that says nothing. Right and wrong answers
are samples; where nothing flawed or malformed was sampled an error is put into a sample, and `generator` ends with +error. Then
`category` is the kind. Default problems: the generated train problems that no embedded model has learned from.
"""

import hashlib
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_output, parse_args, run
from common.errors import RecordError, UserError
from common.files import ResumableRows, at_root
from lm.registry import PolicyArgs, check_policy, open_policy, policy_identity
from reasoning.answers import extract_answer
from reasoning.datasets.files import load_rows
from reasoning.datasets.loading import load_problems
from reasoning.datasets.ranking import RankedResponse, check_groups, write_answers
from reasoning.grading import grade_steps, is_correct, step_value
from reasoning.problems import changed_numbers, problems
from reasoning.records import Problem, Prompt
from reasoning.splits import default_split, refuse_held_out
from reasoning.steps import CLOSING_STEP, STEP_NUMBER, split_steps

UNIT = 128  # prompts answered together: with the same seeds a group always gives the same answers
LEARNED = 12_000  # train problems whose samples judge-mini learned from: they come first
# train problems, to choose between trainings of a reward model: none learns from their answers
VALIDATION = range(15_200, 18_000)
KINDS = ("right", "flawed", "wrong", "malformed")  # from the best on


@dataclass
class AnswerArguments(PolicyArgs):
    input: str | None = field(
        default=None,
        metadata={
            "help": "prompts: rows with `prompt` and, if you like, `category`, or problems of any shape that reasoning/datasets/shapes.py "
            f"knows; default: the generated train problems from number {LEARNED + 1} on"
        },
    )
    output: str = field(
        default_factory=lambda: at_root("data/answers.csv"),
        metadata={"help": "the answers, a CSV table"},
    )
    chat: bool = field(
        default=False,
        metadata={
            "help": "the prompt is a chat's message as it is, without the instruction to solve a problem step by step"
        },
    )
    rank_by: str = field(
        default="nobody",
        metadata={
            "help": "exact: groups of four ranked by the checker; nobody: left to be ranked",
            "choices": ["nobody", "exact"],
        },
    )
    answers: int = field(
        default=4,
        metadata={"help": "answers a prompt; with --rank_by exact, samples to take the four from"},
    )
    temperature: list[float] = field(
        default_factory=lambda: [0.7, 1.0, 1.3, 1.0],
        metadata={"help": "sampling temperatures, 0 is greedy; for one after another"},
    )
    top_p: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={
            "help": "probabilities above 0, at most 1: only the likeliest tokens that together reach it are drawn"
        },
    )
    max_new_tokens: int = field(default=256, metadata={"help": "tokens an answer may have"})
    seed: int = field(default=0, metadata={"help": "seed of the first answer"})
    limit: int | None = field(
        default=None, metadata={"help": "use the first N prompts; default: all"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the output"})

    def __post_init__(self):
        for name, least in (("answers", 2), ("max_new_tokens", 1), ("limit", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise UserError(
                    f"argument --{name}: expected {least} or more, got {getattr(self, name)}"
                )
        if wrong := [value for value in self.temperature if not 0 <= value < float("inf")]:
            raise UserError(f"argument --temperature: expected 0 or more, got {wrong[0]}")
        if wrong := [value for value in self.top_p if not 0 < value <= 1]:
            raise UserError(f"argument --top_p: expected above 0 and at most 1, got {wrong[0]}")
        if not self.temperature or not self.top_p:
            raise UserError("arguments --temperature and --top_p: expected one number or more")
        if self.chat and self.rank_by == "exact":
            raise UserError(
                "argument --chat: the exact checker reads step-by-step solutions, which a chat does not ask for"
            )

    def settings(self) -> list[dict]:
        """Of every answer to a prompt."""
        temperatures, top_ps = itertools.cycle(self.temperature), itertools.cycle(self.top_p)
        return [
            {"temperature": next(temperatures), "top_p": next(top_ps), "seed": self.seed + number}
            for number in range(self.answers)
        ]


@dataclass(frozen=True)
class PromptTask:
    prompt: str
    category: str = ""
    problem: Problem | None = None
    to_choose: bool = False  # `validation` stands for `train`

    @property
    def split(self) -> str:
        """Of all its answers."""
        split = default_split(self.prompt)
        return "validation" if self.to_choose and split == "train" else split


def read_tasks(args: AnswerArguments) -> list[PromptTask]:
    """Raises UserError if one of them is held out."""
    if args.input is None:
        of_generator = itertools.islice(enumerate(problems("train")), LEARNED, None)
        numbered = itertools.islice(of_generator, args.limit)
        return [
            PromptTask(problem.prompt, "", problem, number in VALIDATION)
            for number, problem in numbered
        ]
    if args.rank_by == "exact":
        rows = (PromptTask(task.prompt, "", task) for task in load_problems(args.input))
    else:
        rows = _prompts(args.input)
    tasks = list(itertools.islice({task.prompt: task for task in rows}.values(), args.limit))
    refuse_held_out(args.input, tasks)
    if args.rank_by == "exact" and (bare := [task for task in tasks if not task.problem.steps]):
        raise UserError(
            f"{args.input}: --rank_by exact needs reference steps, there are none for {bare[0].prompt[:60]!r}"
        )
    return tasks


def _prompts(name: str) -> Iterator[PromptTask]:
    _, first = next(load_rows(name))
    if "prompt" not in first:
        yield from (PromptTask(task.prompt) for task in load_problems(name))
        return
    for where, row in load_rows(name):
        try:
            category = row.get("category") or ""
            if not isinstance(category, str):
                raise RecordError(
                    f"field 'category': expected a text, got {json.dumps(category)[:40]}"
                )
            yield PromptTask(Prompt.from_row(row).prompt, category)
        except RecordError as error:
            raise RecordError(f"{where}: {error}") from None


# --- groups of four, ranked by the exact checker ---


@dataclass(frozen=True)
class Sample:
    text: str
    finished: bool
    settings: dict
    note: str = ""  # what was put in, if anything was


def kind_of(sample: Sample, problem: Problem) -> str:
    """One of KINDS, by the text alone. Well-formed: lines `Step 1:`, `Step 2:` ... with an equation each, and then a line that
    states the answer."""
    steps = split_steps(sample.text)
    says_something = all(
        STEP_NUMBER.match(step) and step_value(step)[0] is not None for step in steps[:-1]
    )
    closes = (
        len(steps) > 1 and CLOSING_STEP.match(steps[-1]) and extract_answer(steps[-1]) is not None
    )
    if not closes or not says_something or any(step.endswith("=") for step in steps):
        return "malformed"
    if not is_correct(steps, problem):
        return "wrong"
    return (
        "right"
        if len(steps) == len(problem.steps) and all(grade_steps(steps, problem))
        else "flawed"
    )


def group_of_four(
    problem: Problem, samples: list[Sample], rng: random.Random
) -> tuple[dict[str, Sample] | None, str]:
    """(kind -> sample, why there is no group)"""
    found: dict[str, list[Sample]] = {kind: [] for kind in KINDS}
    for sample in samples:
        found[kind_of(sample, problem)].append(sample)
    for kind in ("right", "wrong"):
        if not found[kind]:
            return None, f"none {kind}"
    right = found["right"][0]
    wrong = min(found["wrong"], key=lambda sample: _distance(sample.text, right.text))
    flawed = next(iter(found["flawed"]), None) or put_in(right, "flawed", problem, rng)
    malformed = next(iter(found["malformed"]), None) or put_in(
        rng.choice([right, wrong]), "malformed", problem, rng
    )
    if flawed is None or malformed is None:
        return None, "no error could be put in"
    return dict(zip(KINDS, (right, flawed, wrong, malformed), strict=True)), ""


def _distance(text: str, other: str) -> tuple[int, int]:
    """In lines, in characters."""
    return abs(text.count("\n") - other.count("\n")), abs(len(text) - len(other))


def put_in(sample: Sample, kind: str, problem: Problem, rng: random.Random) -> Sample | None:
    """The sample with an error that makes it of this kind, one of all that can be put in."""
    ways = list((changed_numbers if kind == "flawed" else _broken)(split_steps(sample.text), rng))
    rng.shuffle(ways)
    made = (
        Sample("\n".join(steps), sample.finished, sample.settings, note) for steps, note in ways
    )
    return next((one for one in made if kind_of(one, problem) == kind), None)


def _broken(steps: list[str], rng: random.Random) -> Iterator[tuple[list[str], str]]:
    text, body = "\n".join(steps), "\n".join(steps[:-1])
    yield split_steps(text[: rng.randrange(len(body) // 2, len(body))]), "put in: cut off"
    yield steps[:-1], "put in: no closing line"
    k = rng.randrange(len(steps) - 1)
    yield (
        [*steps[:k], steps[k][: steps[k].rindex("=") + 1], *steps[k + 1 :]],
        f"put in: step {k + 1} without its result",
    )


# --- rows ---


def ranked(
    task: PromptTask, samples: list[Sample], generator: str
) -> tuple[list[RankedResponse], str]:
    """(a group of four in random order, why there is none)"""
    rng = random.Random(task.prompt)
    group, why_not = group_of_four(task.problem, samples, rng)
    rows = [
        RankedResponse(
            task.prompt,
            "\n".join(split_steps(sample.text)),
            rank,
            "rule:exact",
            kind,
            f"{generator}+error" if sample.note else generator,
            **sample.settings,
            split=task.split,
            note=sample.note,
        )
        for rank, (kind, sample) in enumerate((group or {}).items(), 1)
    ]
    rng.shuffle(rows)
    return rows, why_not


def unranked(
    task: PromptTask, samples: list[Sample], generator: str
) -> tuple[list[RankedResponse], str]:
    """(the answers that differ, why there are fewer than two)"""
    different: dict[str, Sample] = {}
    for sample in samples:
        if sample.text:
            different.setdefault(sample.text, sample)
    rows = [
        RankedResponse(
            task.prompt,
            text,
            None,
            "",
            task.category,
            generator,
            **sample.settings,
            split=task.split,
        )
        for text, sample in different.items()
    ]
    return (rows, "") if len(rows) > 1 else ([], "all answers alike or empty")


def main() -> None:
    (args,) = parse_args(AnswerArguments, description=__doc__.split("\n\n")[0])
    tasks = read_tasks(args)
    check_policy(args)
    job = {
        name: getattr(args, name) for name in ("rank_by", "chat", "max_new_tokens")
    } | policy_identity(args)
    job["settings"] = args.settings()
    job["tasks"] = hashlib.sha256(json.dumps([asdict(task) for task in tasks]).encode()).hexdigest()
    check_output(args.output, args.overwrite or ResumableRows.pending(args.output, job))

    policy = open_policy(args, args.chat)
    if args.chat and args.policy_base_url is None and not policy.tokenizer.chat_template:
        raise UserError(f"argument --chat: {args.model_name_or_path} has no chat template")
    rows = ResumableRows(args.output, job, UNIT, args.overwrite)
    if rows.rows:
        print(f"resuming: {len(rows.rows)} of {len(tasks)} prompts are done")
    answer_prompts(args, tasks, policy, rows)
    answers = [RankedResponse(**answer) for row in rows.rows for answer in row["answers"]]
    summary(args, rows.rows, answers)
    if not answers:
        rows.finish()
        raise UserError("no group of answers came out (see above), nothing was written")
    check_groups(answers, args.output)
    write_answers(args.output, answers)
    rows.finish()
    print(f"wrote {len(answers)} answers to {args.output}")


def answer_prompts(
    args: AnswerArguments, tasks: list[PromptTask], policy, rows: ResumableRows
) -> None:
    """Append one row a prompt: its answers or why there are none, and counts."""
    from tqdm import tqdm

    path = Path(args.model_name_or_path)
    generator = path.resolve().name if path.is_dir() else args.model_name_or_path
    make = ranked if args.rank_by == "exact" else unranked
    with tqdm(total=len(tasks), initial=len(rows.rows), desc="answering", unit="prompt") as bar:
        for start in range(len(rows.rows), len(tasks), UNIT):
            group = tasks[start : start + UNIT]
            options = {"max_new_tokens": args.max_new_tokens, "chat": args.chat}
            columns = [
                [
                    Sample(*text, settings)
                    for text in policy.texts([task.prompt for task in group], **settings, **options)
                ]
                for settings in args.settings()
            ]
            for task, *samples in zip(group, *columns, strict=True):
                answers, why_not = make(task, samples, generator)
                ended = sum(sample.finished for sample in samples)
                kinds = (
                    Counter(kind_of(sample, task.problem) for sample in samples)
                    if task.problem
                    else {}
                )
                rows.append(
                    {
                        "answers": list(map(asdict, answers)),
                        "why_not": why_not,
                        "ended": ended,
                        "kinds": kinds,
                    }
                )
                bar.update()


def summary(args: AnswerArguments, rows: list[dict], answers: list[RankedResponse]) -> None:
    samples = len(rows) * args.answers
    print(
        f"{len(rows)} prompts, {samples} samples, {sum(row['ended'] for row in rows)} ended by themselves"
    )
    kinds = Counter(itertools.chain.from_iterable(Counter(row["kinds"]).elements() for row in rows))
    if kinds:
        print(
            "samples: "
            + ", ".join(f"{kind} {kinds[kind]} ({kinds[kind] / samples:.3f})" for kind in KINDS)
        )
    if args.rank_by == "exact":
        made = Counter(answer.category for answer in answers if answer.note)
        print("put in: " + ", ".join(f"{kind} {made[kind]}" for kind in KINDS if made[kind]))
    why_not = Counter(row["why_not"] for row in rows if row["why_not"])
    groups = Counter({answer.prompt: answer.split for answer in answers}.values())
    dropped = (
        "; prompts without: " + ", ".join(f"{why}: {count}" for why, count in why_not.most_common())
        if why_not
        else ""
    )
    splits = ", ".join(f"{count} {split}" for split, count in groups.most_common()) or "none"
    print(f"{sum(groups.values())} groups ({splits}){dropped}")


if __name__ == "__main__":
    run(main)
