"""Public data sets, and files of their shapes, as this project's records.

A data set is the name of one on the hub (streamed), a local file (.jsonl, .json, .csv, .parquet) or a folder of such files. Its
shape is recognized from the fields of its first row; SHAPES says what each shape gives. A row that is not what its shape says is
a RecordError with file and line. A row that is sound and of no use (an empty `rejected`, a question without a step) is left out
and counted in `dropped`, a Counter of reasons that the caller may hand in.

A step is a line (reasoning/steps.py). A published step with line breaks in it, mostly LaTeX, is joined into one line, so that as
many steps come back when the response is split again. Its words stay as published, `Step 3:` included, except that the
annotations of GSM8K (`<<48/2=24>>`) are taken out. Text that comes in one piece is cut by `split_text`. Reference solutions
(GSM8K, MATH) are written as this project's own: `Step 1: ...`, and a closing `Answer: ...`.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.errors import RecordError
from reasoning.answers import extract_answer, same_answer
from reasoning.datasets.files import load_rows, show
from reasoning.records import LabelledSolution, PreferencePair, Problem, StepValue
from reasoning.steps import (
    CLOSING_STEP,
    STEP_NUMBER,
    one_line,
    split_sentences,
    split_steps,
    split_text,
)

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_FIRST_STEP = re.compile(rf"^{STEP_NUMBER.pattern}", re.IGNORECASE | re.MULTILINE)
# PRM800K ends a solution with "\n\n# Answer\n\n29"
_PRM_ANSWER = re.compile(r"\s*^#\s*Answer\s*$\s*", re.MULTILINE)

# --- fields --------------------------------------------------------------------------------------------------------------------


def _field(row: Any, path: str, kind: type | tuple, expected: str) -> Any:
    """The value at `question.problem`; RecordError if it is not there or of another type."""
    value = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        got = "nothing" if value is None else type(value).__name__
        raise RecordError(f"field '{path}': expected {expected}, got {got}")
    return value


def _text(row: Any, path: str) -> str:
    text = _field(row, path, str, "a text")
    if not text.strip():
        raise RecordError(f"field '{path}': expected a text, got an empty one")
    return text.strip()


def _texts(row: Any, path: str) -> list[str]:
    texts = _field(row, path, list, "a list of texts")
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RecordError(f"field '{path}': expected a list of texts, got {show(texts)}")
    return texts


def _label(value: Any, where: str) -> float | None:
    """true, false or a number from 0 to 1, which is a label; null, which is none."""
    if value is None or (isinstance(value, bool | int | float) and 0 <= value <= 1):
        return None if value is None else float(value)
    raise RecordError(
        f"{where}: expected true, false, null or a number from 0 to 1, got {show(value)}"
    )


def _solution(
    prompt: str,
    steps: list[str],
    labels: list[float | None],
    final_correct: bool | None,
    dropped: Counter,
):
    """One LabelledSolution, or none (counted) if nobody labelled a step or a step is empty."""
    steps = [one_line(step) for step in steps]
    if all(label is None for label in labels):
        dropped["solutions without a labelled step"] += 1
    elif not all(steps):
        dropped["solutions with an empty step"] += 1
    else:
        row = {"prompt": prompt, "steps": steps, "labels": labels, "final_correct": final_correct}
        yield LabelledSolution.from_row(row)


def _in_one_line(record: Any) -> Any:
    """A record whose steps may have line breaks, without them."""
    names = [name for name in ("steps", "prefix", "chosen", "rejected") if hasattr(record, name)]
    record = replace(
        record, **{name: [one_line(step) for step in getattr(record, name)] for name in names}
    )
    return replace(record, step=one_line(record.step)) if hasattr(record, "step") else record


# --- GSM8K, MATH: problems with a reference solution -----------------------------------------------------------------------------


def _reference(steps: list[str], answer: str) -> list[str]:
    """A reference solution as this project writes it: numbered steps, and the answer in a closing one."""
    return [
        *[
            step if STEP_NUMBER.match(step) else f"Step {k}: {step}"
            for k, step in enumerate(steps, 1)
        ],
        f"Answer: {answer}",
    ]


def _gsm8k_problem(row: dict, dropped: Counter) -> Iterator[Problem]:
    """`answer`: one step a line with <<annotations>>, then `#### 72`; or, in a user's own file, the answer and nothing else."""
    prompt, solution = _text(row, "question"), _text(row, "answer")
    answer, lines = extract_answer(solution), split_steps(_ANNOTATION.sub("", solution))
    steps = [one_line(line) for line in lines if not CLOSING_STEP.match(line)]
    if answer is None and len(lines) == 1:
        yield Problem(prompt, lines[0])
    elif answer is None:
        raise RecordError("field 'answer': no final answer; expected a last line '#### 72'")
    else:
        yield Problem(prompt, answer, _reference(steps, answer) if steps else [])


def _math_problem(row: dict, dropped: Counter) -> Iterator[Problem]:
    """`solution`: prose with the answer in \\boxed{}. Drawings in it are left out, and what is left is cut into sentences."""
    prompt, solution = _text(row, "problem"), _text(row, "solution")
    answer = (
        one_line(row["answer"])
        if isinstance(row.get("answer"), str)
        else extract_answer(one_line(solution))
    )
    if not answer:
        dropped["problems without a final answer"] += 1
        return
    solution = re.sub(r"\[asy\].*?\[/asy\]", "", solution, flags=re.DOTALL)
    yield Problem(prompt, answer, _reference(split_sentences(solution), answer))


def _problem_with_answer(prompt_field: str, answer_field: str) -> Callable:
    """Data sets of steps that also have the right answer, and no reference solution."""

    def problem(row: dict, dropped: Counter) -> Iterator[Problem]:
        prompt = _text(row, prompt_field)
        answer = row
        for name in answer_field.split("."):
            answer = answer.get(name)
        if isinstance(answer, str) and answer.strip():
            yield Problem(prompt, answer.strip())
        else:
            dropped["problems without a final answer"] += 1

    return problem


# --- PRM800K, Math-Shepherd, ProcessBench, TRL: labelled steps -------------------------------------------------------------------

# PRM800K rates a step 1 (good), 0 (neutral) or -1 (bad). Its authors count neutral steps as right (Lightman et al. 2023, arXiv
# 2305.20050, section 2.6); a step that the labeller wrote because all were bad has no rating and is right.
_RATINGS = {1: 1.0, 0: 1.0, -1: 0.0, None: None}


def _prm800k_labels(row: dict, dropped: Counter) -> Iterator[LabelledSolution]:
    """The solution that was labelled; then every alternative to one of its steps, as a solution that ends there and whose
    other steps are unlabelled: so no rating is given twice.

    Where the labelling stopped at the first error, the steps behind it (`pre_generated_steps`) are there, unlabelled."""
    prompt, steps, labels = _text(row, "question.problem"), [], []
    alternatives = []
    for k, step in enumerate(_field(row, "label.steps", list, "a list of steps"), 1):
        where = f"field 'label.steps', step {k}"
        completions = _field(step, "completions", (list, type(None)), "a list") or []
        rated = [_prm800k_completion(completion, where) for completion in completions]
        chosen, human = step.get("chosen_completion"), step.get("human_completion")
        if chosen is not None:
            if not isinstance(chosen, int) or not 0 <= chosen < len(rated):
                raise RecordError(
                    f"{where}: chosen_completion {show(chosen)} is none of its {len(rated)} completions"
                )
            goes_on = rated.pop(chosen)
        elif human is not None:
            goes_on = (_prm800k_text(human, where), 1.0)
        elif rated:
            goes_on = rated.pop(0)  # the step of the solution; what follows it are other tries
        else:
            break
        alternatives += [([*steps, text], [*[None] * len(steps), label]) for text, label in rated]
        steps, labels = [*steps, goes_on[0]], [*labels, goes_on[1]]
        if chosen is None and human is None:
            break
    if not steps:
        dropped["solutions without a labelled step"] += 1
        return
    whole = [
        _prm800k_text({"text": text}, "")
        for text in (row["question"].get("pre_generated_steps") or [])
    ]
    if whole[: len(steps)] == steps:
        labels, steps = labels + [None] * (len(whole) - len(steps)), whole
    reference, answer = (
        row["question"].get("ground_truth_answer"),
        extract_answer(one_line(steps[-1])),
    )
    final_correct = (
        same_answer(answer, reference)
        if isinstance(reference, str) and answer is not None
        else None
    )
    yield from _solution(prompt, steps, labels, final_correct, dropped)
    for texts, ratings in alternatives:
        yield from _solution(prompt, texts, ratings, None, dropped)


def _prm800k_text(completion: Any, where: str) -> str:
    if not isinstance(completion, dict) or not isinstance(completion.get("text"), str):
        raise RecordError(f"{where}: expected a completion with a text, got {show(completion)}")
    return one_line(_PRM_ANSWER.sub(" Answer: ", completion["text"]))


def _prm800k_completion(completion: Any, where: str) -> tuple[str, float | None]:
    text = _prm800k_text(completion, where)
    if completion.get("rating") not in _RATINGS:
        raise RecordError(
            f"{where}: expected a rating of -1, 0 or 1, got {show(completion.get('rating'))}"
        )
    return text, _RATINGS[completion.get("rating")]


def _shepherd_labels(row: dict, dropped: Counter) -> Iterator[LabelledSolution]:
    """`input`: question and steps, a tag `ки` ends each step; `label`: the same with + or - in the tag's place. The label of the
    last step is that of the final answer (Wang et al. 2024, arXiv 2312.08935: a step is right if some continuation ends right)."""
    parts, label = _text(row, "input").split("ки"), _text(row, "label")
    labels, position = [], 0
    for part in parts[:-1]:
        sign = label[position + len(part) : position + len(part) + 1]
        if label[position : position + len(part)] != part or sign not in ("+", "-"):
            dropped["rows whose tags do not fit their input"] += 1
            return
        labels.append(float(sign == "+"))
        position += len(part) + 1
    question, marker, first = parts[0].rpartition("Step 1:")
    if not question.strip() or not labels:
        dropped["rows without 'Step 1:' or without a tag"] += 1
        return
    steps = [_ANNOTATION.sub("", text) for text in (marker + first, *parts[1:-1])]
    yield from _solution(question.strip(), steps, labels, labels[-1] == 1, dropped)


def _processbench_labels(row: dict, dropped: Counter) -> Iterator[LabelledSolution]:
    """`label`: the index of the first wrong step, -1 if there is none; steps behind it are unlabelled (Zheng et al. 2024)."""
    prompt, steps = _text(row, "problem"), _texts(row, "steps")
    error = _field(row, "label", int, "a whole number")
    if not -1 <= error < len(steps):
        raise RecordError(
            f"field 'label': expected -1 or the index of one of {len(steps)} steps, got {error}"
        )
    labels = (
        [1.0] * len(steps)
        if error < 0
        else [1.0] * error + [0.0] + [None] * (len(steps) - error - 1)
    )
    correct = row.get("final_answer_correct")
    yield from _solution(
        prompt, steps, labels, correct if isinstance(correct, bool) else None, dropped
    )


def _trl_labels(row: dict, dropped: Counter) -> Iterator[LabelledSolution]:
    prompt = _prompt_text(row["prompt"])
    if prompt is None:
        dropped["prompts of more than one turn"] += 1
        return
    steps = [_ANNOTATION.sub("", step) for step in _texts(row, "completions")]
    labels = [
        _label(label, "field 'labels'") for label in _field(row, "labels", list, "a list of labels")
    ]
    if len(steps) != len(labels):
        raise RecordError(
            f"field 'labels': expected one label for each of {len(steps)} steps, got {len(labels)}"
        )
    yield from _solution(prompt, steps, labels, None, dropped)


def _own_labels(row: dict, dropped: Counter) -> Iterator[LabelledSolution]:
    solution = LabelledSolution.from_row(row)
    yield from _solution(
        *(getattr(solution, name) for name in ("prompt", "steps", "labels", "final_correct")),
        dropped,
    )


# --- Step-DPO, TRL: preferences --------------------------------------------------------------------------------------------------


def _step_dpo_pair(row: dict, dropped: Counter) -> Iterator[PreferencePair]:
    """One right and one wrong step after the same beginning: scores 1 and 0. The published beginning may end with the number of
    the step to come ("... Step 3:"), which goes in front of both."""
    prompt, beginning = _text(row, "prompt"), _field(row, "initial_reason_steps", str, "a text")
    chosen, rejected = (
        one_line(_field(row, side, str, "a text")) for side in ("chosen", "rejected")
    )
    for side, step in (("chosen", chosen), ("rejected", rejected)):
        if not step:
            dropped[f"pairs with an empty '{side}'"] += 1
            return
    prefix = split_text(beginning.replace("Let's think step by step.", "", 1))
    if prefix and re.fullmatch(r"Step\s+\d+\s*:", prefix[-1]):
        marker = prefix.pop()
        chosen, rejected = f"{marker} {chosen}", f"{marker} {rejected}"
    if chosen == rejected:
        dropped["pairs with the same step on both sides"] += 1
        return
    yield PreferencePair(
        prompt, [chosen], [rejected], prefix, chosen_scores=[1.0], rejected_scores=[0.0]
    )


def _prompt_text(prompt: Any) -> str | None:
    """The question in a prompt: a text, or messages (a system message goes in front). None if there is more than one turn."""
    if isinstance(prompt, str):
        return _text({"prompt": prompt}, "prompt")
    texts = _message_texts(prompt, "prompt")
    if [role for role, _ in texts] not in (["user"], ["system", "user"]):
        return None
    return _text({"prompt": "\n\n".join(text for _, text in texts)}, "prompt")


def _message_texts(messages: Any, name: str) -> list[tuple[str, str]]:
    """(role, text) of chat messages whose content is a text or a list of text parts."""
    texts = []
    for message in messages if isinstance(messages, list) else [None]:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            content = "".join(
                str(part.get("text", "")) for part in content if isinstance(part, dict)
            )
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise RecordError(
                f"field '{name}': expected a text or messages with role and content, got {show(messages)}"
            )
        texts.append((message["role"], content))
    return texts


def _trl_pair(row: dict, dropped: Counter) -> Iterator[PreferencePair]:
    """TRL's preference format, plain or conversational, the prompt in a field of its own or in front of both sides."""
    prompt, sides = row.get("prompt"), [row["chosen"], row["rejected"]]
    if all(isinstance(side, str) for side in sides):
        if prompt is None:  # both sides begin with it; cut between words, as TRL does
            common = "".join(
                a
                for a, b in itertools.takewhile(
                    lambda ab: ab[0] == ab[1], zip(*sides, strict=False)
                )
            )
            prompt = re.match(r"(?s)(?:.*\s)?", common)[0]
            sides = [side[len(prompt) :] for side in sides]
            if not prompt.strip():
                dropped["pairs without a common prompt"] += 1
                return
    else:
        messages = [
            _message_texts(side, name)
            for side, name in zip(sides, ("chosen", "rejected"), strict=True)
        ]
        if prompt is None:
            k = next(
                (k for k, (a, b) in enumerate(zip(*messages, strict=False)) if a != b),
                min(map(len, messages)),
            )
            prompt, messages = row["chosen"][:k], [side[k:] for side in messages]
        if any([role for role, _ in side] != ["assistant"] for side in messages):
            dropped["pairs whose sides differ in more than one answer"] += 1
            return
        sides = [side[0][1] for side in messages]
    question, (chosen, rejected) = _prompt_text(prompt), map(split_text, sides)
    if question is None:
        dropped["prompts of more than one turn"] += 1
    elif not chosen or not rejected:
        dropped[f"pairs with an empty '{'rejected' if chosen else 'chosen'}'"] += 1
    elif chosen == rejected:
        dropped["pairs with the same steps on both sides"] += 1
    else:
        yield PreferencePair.of_solutions(question, chosen, rejected)


def _own_pair(row: dict, dropped: Counter) -> Iterator[PreferencePair]:
    yield _in_one_line(PreferencePair.from_row(row))


# --- OmegaPRM: values of beginnings ----------------------------------------------------------------------------------------------


def _omegaprm_values(row: dict, dropped: Counter) -> Iterator[StepValue]:
    """`solution_prefix` is the question and the beginning of a solution, `mc_value` the share of rollouts from there that end
    right: the value of the beginning's last step (a paragraph)."""
    question = _text(row, "question")
    for k, node in enumerate(_field(row, "reasoning_steps", list, "a list"), 1):
        beginning = _field(node, "solution_prefix", str, "a text").strip()
        if not beginning.startswith(question):
            raise RecordError(
                f"field 'reasoning_steps', item {k}: its solution_prefix does not begin with the question"
            )
        steps = split_text(beginning.removeprefix(question))
        if steps:
            value = {
                "prompt": question,
                "prefix": steps[:-1],
                "step": steps[-1],
                "score": node.get("mc_value"),
            }
            yield StepValue.from_row(value)
        else:
            dropped["values of a question without a step"] += 1


def _own_value(row: dict, dropped: Counter) -> Iterator[StepValue]:
    """Numbers of a CSV come as texts."""
    numbers = {name: row.get(name) for name in ("score", "rollouts", "visits")}
    try:
        numbers = {
            name: json.loads(value) if isinstance(value, str) else value
            for name, value in numbers.items()
        }
    except ValueError:
        raise RecordError(
            f"field 'score': expected a score from 0 to 1, got {show(row.get('score'))}"
        ) from None
    yield _in_one_line(StepValue.from_row({**row, **numbers}))


def three_columns(value: StepValue) -> dict[str, str | float]:
    """A StepValue as a row of the three-column table: `question` (the problem, and under it the steps so far, one a line),
    `next_step`, `score`. Rollouts and visits are left out. Raises RecordError for a value that would come back as another one: the
    problem ends where the first line begins with `Step 1:`, so the first step has to begin so, and no line of the problem may."""
    value = _in_one_line(value)
    row = {
        "question": "\n".join([value.prompt, *value.prefix]),
        "next_step": value.step,
        "score": value.score,
    }
    (back,) = _three_column_value(row, Counter())
    if (back.prompt, back.prefix, back.step) != (value.prompt, value.prefix, value.step):
        raise RecordError(
            "three columns cannot say where this problem ends: expected a first step that begins with 'Step 1:'"
        )
    return row


def _three_column_value(row: dict, dropped: Counter) -> Iterator[StepValue]:
    question = _text(row, "question")
    first = _FIRST_STEP.search(question)
    end = first.start() if first else len(question)
    value = {
        "prompt": question[:end].strip(),
        "prefix": split_steps(question[end:]),
        "step": _text(row, "next_step"),
    }
    yield from _own_value({**value, "score": row["score"]}, dropped)


def _own_problem(row: dict, dropped: Counter) -> Iterator[Problem]:
    yield _in_one_line(Problem.from_row(row))


# --- shapes ----------------------------------------------------------------------------------------------------------------------

KINDS = {
    "problems": Problem,
    "pairs": PreferencePair,
    "step_labels": LabelledSolution,
    "step_values": StepValue,
}


@dataclass(frozen=True)
class Shape:
    """`fields`: what its rows must have. `gives`: kind of record (KINDS) -> function of (row, dropped), the best kind first."""

    name: str
    fields: tuple[str, ...]
    gives: dict[str, Callable[[dict, Counter], Iterator]]
    test: Callable[[dict], bool] = lambda row: True

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.fields)})"


def _has_steps(row: dict) -> bool:
    return isinstance(row["chosen"], list) and all(isinstance(step, str) for step in row["chosen"])


# The first that fits a row is its shape. Source of each: the name on the hub, or the repository that publishes it.
SHAPES = [
    Shape(  # xinlai/Math-Step-DPO-10K
        "Step-DPO",
        ("prompt", "initial_reason_steps", "chosen", "rejected"),
        {"pairs": _step_dpo_pair, "problems": _problem_with_answer("prompt", "answer")},
    ),
    Shape(  # github.com/openai/prm800k
        "PRM800K",
        ("question", "label"),
        {
            "step_labels": _prm800k_labels,
            "problems": _problem_with_answer("question.problem", "question.ground_truth_answer"),
        },
        lambda row: isinstance(row["question"], dict),
    ),
    # peiyi9979/Math-Shepherd
    Shape("Math-Shepherd", ("input", "label"), {"step_labels": _shepherd_labels}),
    # Qwen/ProcessBench
    Shape("ProcessBench", ("problem", "steps", "label"), {"step_labels": _processbench_labels}),
    Shape(  # openreasoner/MATH-APS
        "OmegaPRM",
        ("question", "reasoning_steps"),
        {
            "step_values": _omegaprm_values,
            "problems": _problem_with_answer("question", "final_answer"),
        },
    ),
    Shape(
        "TRL stepwise supervision",
        ("prompt", "completions", "labels"),
        {"step_labels": _trl_labels},
    ),
    Shape("labelled solutions", ("prompt", "steps", "labels"), {"step_labels": _own_labels}),
    Shape("step values", ("prompt", "step", "score"), {"step_values": _own_value}),
    # of searched steps, as CSV
    Shape(
        "three columns", ("question", "next_step", "score"), {"step_values": _three_column_value}
    ),
    Shape("pairs of steps", ("prompt", "chosen", "rejected"), {"pairs": _own_pair}, _has_steps),
    Shape(
        "TRL preference",
        ("chosen", "rejected"),
        {"pairs": _trl_pair},
        lambda row: not _has_steps(row),
    ),
    Shape(
        "problems", ("prompt", "answer"), {"problems": _own_problem}, lambda row: "rank" not in row
    ),
    Shape("MATH", ("problem", "solution"), {"problems": _math_problem}),
    Shape("GSM8K", ("question", "answer"), {"problems": _gsm8k_problem}),
]


def shape_of(row: dict, where: str) -> Shape:
    """The shape of a row. Raises RecordError with the fields found and the shapes known."""
    for shape in SHAPES:
        if all(row.get(field) is not None for field in shape.fields) and shape.test(row):
            return shape
    raise RecordError(
        f"{where}: fields {', '.join(row) or 'none'} are of no known shape; known: {'; '.join(map(str, SHAPES))}"
    )


def find_shape(name: str, config: str | None = None, split: str | None = None) -> Shape:
    """The shape of a data set, from its first row. Raises RecordError."""
    where, row = next(load_rows(name, config, split))
    return shape_of(row, where)


def load_records(
    kinds: Sequence[str],
    name: str,
    config: str | None = None,
    split: str | None = None,
    dropped: Counter | None = None,
) -> Iterator[tuple[str, Any]]:
    """(where, record) of the first of `kinds` (KINDS) that the data set's shape gives. Raises RecordError."""
    convert, dropped = None, Counter() if dropped is None else dropped
    for where, row in load_rows(name, config, split):
        if convert is None:
            shape = shape_of(row, where)
            convert = next((shape.gives[kind] for kind in kinds if kind in shape.gives), None)
            if convert is None:
                raise RecordError(
                    f"{name}: {shape} gives {' or '.join(shape.gives)}, no {' or '.join(kinds)}; "
                    "python utils/prepare_dataset.py makes some of one kind from another"
                )
        missing = [field for field in shape.fields if field not in row]
        if missing:
            raise RecordError(f"{where}: field '{missing[0]}' is missing in a file of {shape}")
        try:
            for record in convert(row, dropped):
                yield where, record
        except RecordError as error:
            raise RecordError(f"{where}: {error}") from None


def load_problems(
    name: str, config: str | None = None, split: str | None = None, dropped: Counter | None = None
) -> Iterator[Problem]:
    """Problems with their answers, and reference solutions where the data set has them. Raises RecordError."""
    return (record for _, record in load_records(["problems"], name, config, split, dropped))


def load_step_labels(
    name: str, config: str | None = None, split: str | None = None, dropped: Counter | None = None
) -> Iterator[LabelledSolution]:
    """Solutions whose steps are labelled: 1 right, 0 wrong, None unlabelled. Raises RecordError."""
    return (record for _, record in load_records(["step_labels"], name, config, split, dropped))


def load_pairs(
    name: str, config: str | None = None, split: str | None = None, dropped: Counter | None = None
) -> Iterator[PreferencePair]:
    """Preference pairs with the steps that both sides share in `prefix`, scored if the data set says which step is right. Raises
    RecordError. (Pairs from labelled steps need the whole data set at once: utils/prepare_dataset.py.)"""
    return (record for _, record in load_records(["pairs"], name, config, split, dropped))


def load_step_values(
    name: str, config: str | None = None, split: str | None = None, dropped: Counter | None = None
) -> Iterator[StepValue]:
    """Steps with their values, 0..1: Monte Carlo estimates, or the labels of labelled steps. Raises RecordError."""
    for _, record in load_records(["step_values", "step_labels"], name, config, split, dropped):
        if isinstance(record, StepValue):
            yield record
            continue
        for k, (step, label) in enumerate(zip(record.steps, record.labels, strict=True)):
            if label is not None:
                yield StepValue(record.prompt, step, label, prefix=record.steps[:k])
