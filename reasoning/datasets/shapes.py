"""Conversion of public data sets, and of files with their fields, into this project's records.

SHAPES lists the known shapes; reasoning/datasets/loading.py recognizes the shape of a data set and
applies its conversion. A conversion takes a row and `dropped`, a Counter of reasons, and yields
records. A row that does not have the form of its shape raises RecordError. A row that has the form
but cannot be used (an empty `rejected`, a question without a step) is left out and counted in
`dropped`.

A step is one line (reasoning/steps.py). A published step with line breaks, mostly LaTeX, is joined
into one line, so that splitting the response again gives equally many steps. Its words stay as
published, `Step 3:` included, except that the annotations of GSM8K (`<<48/2=24>>`) are removed. A
text without marked steps is cut by `split_text`. Reference solutions (GSM8K, MATH) are written in
this project's format: `Step 1: ...`, and a last step `Answer: ...`.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.errors import RecordError
from reasoning.answers import extract_answer, same_answer
from reasoning.datasets.files import show
from reasoning.records import LabelledSolution, PreferencePair, Problem, StepValue
from reasoning.steps import (
    CLOSING_STEP,
    STEP_NUMBER,
    one_line,
    shared_prefix,
    split_sentences,
    split_steps,
    split_text,
)

_ANNOTATION = re.compile(r"<<[^<>]*>>")
_FIRST_STEP = re.compile(rf"^{STEP_NUMBER.pattern}", re.IGNORECASE | re.MULTILINE)
# PRM800K ends a solution with "\n\n# Answer\n\n29"
_PRM_ANSWER = re.compile(r"\s*^#\s*Answer\s*$\s*", re.MULTILINE)

# --- fields ---


def _field(row: Any, path: str, kind: type | tuple, expected: str) -> Any:
    """The value at a path like `question.problem`. Raises RecordError if its type is not `kind`."""
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


def _label(value: Any) -> float | None:
    """A label from true, false or a number from 0 to 1; None from null."""
    if value is None or (isinstance(value, bool | int | float) and 0 <= value <= 1):
        return None if value is None else float(value)
    expected = "true, false, null or a number from 0 to 1"
    raise RecordError(f"field 'labels': expected {expected}, got {show(value)}")


def _solution(
    prompt: str,
    steps: Sequence[str],
    labels: Sequence[float | None],
    dropped: Counter,
    final_correct: bool | None = None,
) -> Iterator[LabelledSolution]:
    """One LabelledSolution, or none if no step has a label or a step is empty."""
    lines = [one_line(step) for step in steps]
    if all(label is None for label in labels):
        dropped["solutions without a labelled step"] += 1
    elif not all(lines):
        dropped["solutions with an empty step"] += 1
    else:
        row = {"prompt": prompt, "steps": lines, "labels": labels, "final_correct": final_correct}
        yield LabelledSolution.from_row(row)


def _in_one_line(record: Any) -> Any:
    """The record with each of its steps in one line."""
    names = [name for name in ("steps", "prefix", "chosen", "rejected") if hasattr(record, name)]
    changes: dict[str, Any] = {
        name: [one_line(step) for step in getattr(record, name)] for name in names
    }
    if hasattr(record, "step"):
        changes["step"] = one_line(record.step)
    return replace(record, **changes)


# --- GSM8K, MATH: problems with a reference solution ---


def _reference(steps: list[str], answer: str) -> list[str]:
    """A reference solution in this project's format: numbered steps, then the answer."""
    numbered = [
        step if STEP_NUMBER.match(step) else f"Step {k}: {step}" for k, step in enumerate(steps, 1)
    ]
    return [*numbered, f"Answer: {answer}"]


def _gsm8k_problem(row: dict, dropped: Counter) -> Iterator[Problem]:
    """`answer`: one step a line with <<annotations>>, then `#### 72`.

    In a user's own file `answer` may also be the answer alone."""
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
    """`solution`: prose, the answer in \\boxed{}. A sentence is a step; drawings are removed."""
    prompt, solution = _text(row, "problem"), _text(row, "solution")
    published = row.get("answer")
    if isinstance(published, str):
        answer = one_line(published)
    else:
        answer = extract_answer(one_line(solution)) or ""
    if not answer:
        dropped["problems without a final answer"] += 1
        return
    solution = re.sub(r"\[asy\].*?\[/asy\]", "", solution, flags=re.DOTALL)
    yield Problem(prompt, answer, _reference(split_sentences(solution), answer))


def _problem_with_answer(prompt_field: str, answer_field: str) -> Callable:
    """For data sets of steps that also have the right answer, but no reference solution."""

    def problem(row: dict, dropped: Counter) -> Iterator[Problem]:
        prompt = _text(row, prompt_field)
        answer: Any = row
        for name in answer_field.split("."):
            answer = answer.get(name)
        if isinstance(answer, str) and answer.strip():
            yield Problem(prompt, answer.strip())
        else:
            dropped["problems without a final answer"] += 1

    return problem


# --- PRM800K, Math-Shepherd, ProcessBench, TRL: labelled steps ---

# PRM800K rates a step 1 (good), 0 (neutral) or -1 (bad). Its authors count neutral steps as right
# (Lightman et al. 2023, arXiv 2305.20050, section 2.6). A step that the labeller wrote, because all
# completions were bad, has no rating; it is right.
_RATINGS = {1: 1.0, 0: 1.0, -1: 0.0, None: None}


def _prm800k_labels(row: dict, dropped: Counter) -> Iterator[LabelledSolution]:
    """The solution that was labelled, then one solution for each alternative to one of its steps.

    The alternative is the last step of its solution and the only labelled one, so that no rating is
    used twice. Where labelling stopped at the first error, the later steps (`pre_generated_steps`)
    follow without labels."""
    prompt = _text(row, "question.problem")
    steps: list[str] = []
    labels: list[float | None] = []
    alternatives: list[tuple[list[str], list[float | None]]] = []
    for k, step in enumerate(_field(row, "label.steps", list, "a list of steps"), 1):
        where = f"field 'label.steps', step {k}"
        completions = _field(step, "completions", (list, type(None)), "a list") or []
        rated = [_prm800k_completion(completion, where) for completion in completions]
        chosen, human = step.get("chosen_completion"), step.get("human_completion")
        if chosen is not None:
            if not isinstance(chosen, int) or not 0 <= chosen < len(rated):
                raise RecordError(
                    f"{where}: chosen_completion {show(chosen)} is none of its "
                    f"{len(rated)} completions"
                )
            text, label = rated.pop(chosen)
        elif human is not None:
            text, label = _prm800k_text(human, where), 1.0
        elif rated:
            # the step of the solution; the others are alternatives
            text, label = rated.pop(0)
        else:
            break
        alternatives += [([*steps, other], [*[None] * len(steps), rate]) for other, rate in rated]
        steps, labels = [*steps, text], [*labels, label]
        if chosen is None and human is None:
            break
    if not steps:
        dropped["solutions without a labelled step"] += 1
        return
    generated = row["question"].get("pre_generated_steps") or []
    whole = [_prm800k_text({"text": text}, "") for text in generated]
    if whole[: len(steps)] == steps:
        labels, steps = labels + [None] * (len(whole) - len(steps)), whole
    reference = row["question"].get("ground_truth_answer")
    answer, final_correct = extract_answer(one_line(steps[-1])), None
    if isinstance(reference, str) and answer is not None:
        final_correct = same_answer(answer, reference)
    yield from _solution(prompt, steps, labels, dropped, final_correct)
    for texts, ratings in alternatives:
        yield from _solution(prompt, texts, ratings, dropped)


def _prm800k_text(completion: Any, where: str) -> str:
    if not isinstance(completion, dict) or not isinstance(completion.get("text"), str):
        raise RecordError(f"{where}: expected a completion with a text, got {show(completion)}")
    return one_line(_PRM_ANSWER.sub(" Answer: ", completion["text"]))


def _prm800k_completion(completion: Any, where: str) -> tuple[str, float | None]:
    text, rating = _prm800k_text(completion, where), completion.get("rating")
    if rating not in _RATINGS:
        raise RecordError(f"{where}: expected a rating of -1, 0 or 1, got {show(rating)}")
    return text, _RATINGS[rating]


def _shepherd_labels(row: dict, dropped: Counter) -> Iterator[LabelledSolution]:
    """`input`: question and steps, a tag `ки` after each step. `label`: + or - for each tag.

    The label of the last step is that of the final answer (Wang et al. 2024, arXiv 2312.08935: a
    step is right if some rollout from it ends right)."""
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
    yield from _solution(question.strip(), steps, labels, dropped, labels[-1] == 1)


def _processbench_labels(row: dict, dropped: Counter) -> Iterator[LabelledSolution]:
    """`label`: index of the first wrong step, or -1; no labels after it (Zheng et al. 2024)."""
    prompt, steps = _text(row, "problem"), _texts(row, "steps")
    error = _field(row, "label", int, "a whole number")
    if not -1 <= error < len(steps):
        expected = f"-1 or the index of one of {len(steps)} steps"
        raise RecordError(f"field 'label': expected {expected}, got {error}")
    labels: list[float | None] = [1.0] * len(steps)
    if error >= 0:
        labels[error:] = [0.0] + [None] * (len(steps) - error - 1)
    correct = row.get("final_answer_correct")
    final_correct = correct if isinstance(correct, bool) else None
    yield from _solution(prompt, steps, labels, dropped, final_correct)


def _trl_labels(row: dict, dropped: Counter) -> Iterator[LabelledSolution]:
    prompt = _prompt_text(row["prompt"])
    if prompt is None:
        dropped["prompts of more than one turn"] += 1
        return
    steps = [_ANNOTATION.sub("", step) for step in _texts(row, "completions")]
    labels = [_label(label) for label in _field(row, "labels", list, "a list of labels")]
    if len(steps) != len(labels):
        expected = f"one label for each of {len(steps)} steps"
        raise RecordError(f"field 'labels': expected {expected}, got {len(labels)}")
    yield from _solution(prompt, steps, labels, dropped)


def _own_labels(row: dict, dropped: Counter) -> Iterator[LabelledSolution]:
    own = LabelledSolution.from_row(row)
    yield from _solution(own.prompt, own.steps, own.labels, dropped, own.final_correct)


# --- Step-DPO, TRL: preferences ---


def _step_dpo_pair(row: dict, dropped: Counter) -> Iterator[PreferencePair]:
    """One right and one wrong step after the same prefix: scores 1 and 0.

    The published prefix may end with the number of the next step ("... Step 3:"), which then moves
    to both steps."""
    prompt, initial = _text(row, "prompt"), _field(row, "initial_reason_steps", str, "a text")
    sides = {side: one_line(_field(row, side, str, "a text")) for side in ("chosen", "rejected")}
    for side, step in sides.items():
        if not step:
            dropped[f"pairs with an empty '{side}'"] += 1
            return
    chosen, rejected = sides.values()
    prefix = split_text(initial.replace("Let's think step by step.", "", 1))
    if prefix and re.fullmatch(r"Step\s+\d+\s*:", prefix[-1]):
        marker = prefix.pop()
        chosen, rejected = f"{marker} {chosen}", f"{marker} {rejected}"
    if chosen == rejected:
        dropped["pairs with the same step on both sides"] += 1
        return
    scores = {"chosen_scores": [1.0], "rejected_scores": [0.0]}
    yield PreferencePair(prompt, [chosen], [rejected], prefix, **scores)


def _prompt_text(prompt: Any) -> str | None:
    """The question of a prompt: a text, or messages, the system message first.

    None if the messages have more than one turn."""
    if isinstance(prompt, str):
        return _text({"prompt": prompt}, "prompt")
    texts = _message_texts(prompt, "prompt")
    if [role for role, _ in texts] not in (["user"], ["system", "user"]):
        return None
    return _text({"prompt": "\n\n".join(text for _, text in texts)}, "prompt")


def _message_texts(messages: Any, name: str) -> list[tuple[str, str]]:
    """(role, text) of chat messages whose content is a text or a list of text parts."""
    texts = []
    items: list[Any] = messages if isinstance(messages, list) else [None]
    for message in items:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            parts = [part for part in content if isinstance(part, dict)]
            content = "".join(str(part.get("text", "")) for part in parts)
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            expected = "a text or messages with role and content"
            raise RecordError(f"field '{name}': expected {expected}, got {show(messages)}")
        texts.append((message["role"], content))
    return texts


def _trl_pair(row: dict, dropped: Counter) -> Iterator[PreferencePair]:
    """TRL's preference format: texts or messages, the prompt in its own field or in both sides."""
    prompt, sides = row.get("prompt"), [row["chosen"], row["rejected"]]
    if all(isinstance(side, str) for side in sides):
        if prompt is None:  # both sides start with it; cut between words, as TRL does
            common = sides[0][: shared_prefix(*sides)]
            prompt = re.sub(r"\S*\Z", "", common)
            sides = [side[len(prompt) :] for side in sides]
            if not prompt.strip():
                dropped["pairs without a common prompt"] += 1
                return
    else:
        messages = [_message_texts(row[name], name) for name in ("chosen", "rejected")]
        if prompt is None:
            k = shared_prefix(*messages)
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
        yield PreferencePair.from_solutions(question, chosen, rejected)


def _own_pair(row: dict, dropped: Counter) -> Iterator[PreferencePair]:
    yield _in_one_line(PreferencePair.from_row(row))


# --- OmegaPRM, three columns: values of steps ---


def _omegaprm_values(row: dict, dropped: Counter) -> Iterator[StepValue]:
    """`solution_prefix`: question and prefix of a solution. `mc_value`: value of its last step.

    The value is the share of rollouts from the prefix that end right. A step is a paragraph."""
    question = _text(row, "question")
    for k, node in enumerate(_field(row, "reasoning_steps", list, "a list"), 1):
        prefix = _field(node, "solution_prefix", str, "a text").strip()
        if not prefix.startswith(question):
            raise RecordError(
                f"field 'reasoning_steps', item {k}: its solution_prefix does not begin with the "
                "question"
            )
        steps, score = split_text(prefix.removeprefix(question)), node.get("mc_value")
        if steps:
            value = {"prompt": question, "prefix": steps[:-1], "step": steps[-1], "score": score}
            yield StepValue.from_row(value)
        else:
            dropped["values of a question without a step"] += 1


def _own_value(row: dict, dropped: Counter) -> Iterator[StepValue]:
    """In a CSV the numbers are texts."""
    numbers = {name: row.get(name) for name in ("score", "rollouts", "visits")}
    try:
        for name, value in numbers.items():
            numbers[name] = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        got = show(row.get("score"))
        raise RecordError(f"field 'score': expected a score from 0 to 1, got {got}") from None
    yield _in_one_line(StepValue.from_row({**row, **numbers}))


def three_columns(value: StepValue) -> dict[str, Any]:
    """A StepValue as a row of the three-column table: `question`, `next_step`, `score`.

    `question` is the problem and, in the lines after it, the prefix. Rollouts and visits are left
    out. A reader of the table ends the problem before the first line that begins with `Step 1:`, so
    the first step must begin with it, and no line of the problem may. Raises RecordError."""
    value = _in_one_line(value)
    question = "\n".join([value.prompt, *value.prefix])
    row = {"question": question, "next_step": value.step, "score": value.score}
    (back,) = _three_column_value(row, Counter())
    if (back.prompt, back.prefix, back.step) != (value.prompt, value.prefix, value.step):
        raise RecordError(
            "the end of this problem cannot be found in three columns: expected a first step that "
            "begins with 'Step 1:'"
        )
    return row


def _three_column_value(row: dict, dropped: Counter) -> Iterator[StepValue]:
    question = _text(row, "question")
    first = _FIRST_STEP.search(question)
    end = first.start() if first else len(question)
    prompt, prefix = question[:end].strip(), split_steps(question[end:])
    value = {"prompt": prompt, "prefix": prefix, "step": _text(row, "next_step")}
    yield from _own_value({**value, "score": row["score"]}, dropped)


def _own_problem(row: dict, dropped: Counter) -> Iterator[Problem]:
    yield _in_one_line(Problem.from_row(row))


# --- shapes ---

KINDS = {
    "problems": Problem,
    "pairs": PreferencePair,
    "step_labels": LabelledSolution,
    "step_values": StepValue,
}


@dataclass(frozen=True)
class Shape:
    """How to recognize a data set, and what can be made of it.

    fields: every row has them. gives: kind of record (a key of KINDS) -> conversion, best kind
    first. test: a further condition on the row."""

    name: str
    fields: tuple[str, ...]
    gives: dict[str, Callable[[dict, Counter], Iterator]]
    test: Callable[[dict], bool] = lambda row: True

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.fields)})"


def _has_steps(row: dict) -> bool:
    return isinstance(row["chosen"], list) and all(isinstance(step, str) for step in row["chosen"])


# The first shape that fits a row is the row's shape. The comments give the source of a shape: its
# name on the hub, or its repository.
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
    # CSV of utils/build_mcts_dataset.py
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
