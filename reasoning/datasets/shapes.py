"""Conversion of public data sets, and of files with their fields, into this project's records.

SHAPES lists the known shapes; reasoning/datasets/loading.py recognizes the shape of a data set and
applies its conversion. A conversion takes a row and `dropped` (reasoning/datasets/files.py), and
yields records. A row that does not have the form of its shape raises RecordError. A row that has
the form but cannot be used (an answer `notfound`, a question without a step) is left out and
counted in `dropped`. The caller leaves out rows that lack a field of their shape or have it empty.

A step is one line (reasoning/steps.py). A published step with line breaks, mostly LaTeX, is joined
into one line, so that splitting the response again gives equally many steps. Its words stay as
published, `Step 3:` included, except that the annotations of GSM8K (`<<48/2=24>>`) are removed. A
text without marked steps is cut by `split_text`. Reference solutions (GSM8K, MATH) are written in
this project's format: `Step 1: ...`, and a last step `Answer: ...`. Where word problems have an
equation in place of a solution, the steps are those of the equation (reasoning/equations.py).
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

from common.errors import RecordError
from common.files import Readable
from reasoning.answers import extract_answer, same_answer
from reasoning.datasets.files import Dropped, show
from reasoning.datasets.ranking import RankedGroup
from reasoning.equations import (
    OPERATORS,
    Expression,
    number,
    parse_infix,
    parse_prefix,
    shown,
    work_out,
)
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

NO_ANSWER = "problems without a checkable answer"

# --- fields ---


# How programs write that a text is missing. A person's "None" or "N/A" is none of them.
_MISSING = {"null", "nan", "<na>", "#n/a"}


def is_empty(value: Any) -> bool:
    """Whether a field has no value: null, NaN, white space, `null` as a text, an empty list."""
    if isinstance(value, str):
        return not value.strip() or value.strip().lower() in _MISSING
    return value is None or value in ([], {}) or (isinstance(value, float) and math.isnan(value))


def drop_empty(values: dict[str, Any], dropped: Dropped) -> bool:
    """Count a row by the name of its first empty value. False if it has none."""
    empty = next((name for name, value in values.items() if is_empty(value)), None)
    if empty is not None:
        dropped[NO_ANSWER if empty == "answer" else f"rows with an empty '{empty}'"] += 1
    return empty is not None


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
    """A text, or a number as text: many files have the answer 52 as a number."""
    value = _field(row, path, (str, int, float), "a text")
    if isinstance(value, bool):
        raise RecordError(f"field '{path}': expected a text, got true or false")
    if is_empty(value):
        raise RecordError(f"field '{path}': expected a text, got an empty one")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RecordError(f"field '{path}': expected a text, got {value}")
        value = int(value) if value.is_integer() else value
    return str(value).strip()


def _whole(value: Any) -> Any:
    """The whole number of a CSV cell, or of a table that has its numbers as floats."""
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,9}(\.0)?\s*", value):
        value = float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _truth(value: Any) -> bool | None:
    """True or false, `true` or `False` as in a CSV cell; None for all else."""
    text = str(value).strip().lower() if isinstance(value, bool | str) else ""
    return {"true": True, "false": False}.get(text)


def _texts(row: Any, path: str) -> list[str]:
    texts = _field(row, path, list, "a list of texts")
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RecordError(f"field '{path}': expected a list of texts, got {show(texts)}")
    return texts


def _label(value: Any) -> float | None:
    """A label from true, false or a number from 0 to 1; None from null."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool | int | float) and 0 <= value <= 1:
        return float(value)
    expected = "true, false, null or a number from 0 to 1"
    raise RecordError(f"field 'labels': expected {expected}, got {show(value)}")


def _solution(
    prompt: str,
    steps: Sequence[str],
    labels: Sequence[float | None],
    dropped: Dropped,
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


# Words in place of an answer that was not found, or that a proof does not have.
_NO_ANSWER = re.compile(
    r"(?:an? |the )?proofs?(?: problem| question)?|proved|proven|q\.?e\.?d\.?"
    r"|see (?:the )?(?:\w+ )?(?:proof|solution|explanation|answer|above|below|image|figure)s?"
    r"|(?:(?:final )?answer )?(?:was )?not[ _-]?(?:found|provided|given|available|applicable)"
    r"|no[ _-](?:final[ _-])?answer(?: found)?|unknown|unanswered|missing|unavailable|omitted"
    r"|n/a|n\.a\.?|#n/a|<na>|null|nan|<none>|to ?do|tb[ad]|[-–—_?.…*∎■□\s]+|\\(?:black)?square",
    re.IGNORECASE,
)
# These may be the answer (of which primes are even squares? none), so the solution decides.
_NO_ANSWER_OR_NONE = re.compile(r"none|nil", re.IGNORECASE)


def _is_answer(answer: str, solution: str = "") -> bool:
    """Whether a text can be checked as an answer; `proof`, `notfound` and `N/A` cannot.

    `none` can, if there is no solution or if the solution has this word too. `no solution`,
    `undefined` and `does not exist` always can: they are answers of MATH."""
    plain = re.sub(r"\\(?:text|mathrm|textbf|boxed)\s*|[{}$()\[\]\"'`]", "", answer).strip()
    if not plain or _NO_ANSWER.fullmatch(plain.rstrip(".! ") or plain):
        return False
    if solution and _NO_ANSWER_OR_NONE.fullmatch(plain.rstrip(".! ")):
        return re.search(rf"\b{plain.rstrip('.! ')}\b", solution, re.IGNORECASE) is not None
    return True


def _problem(
    prompt: str, answer: str | None, dropped: Dropped, steps: Sequence[str] = (), solution: str = ""
) -> Iterator[Problem]:
    """One Problem, or none if its answer cannot be checked."""
    if answer and _is_answer(answer, solution):
        yield Problem(prompt, answer, _reference(list(steps), answer) if steps else [])
    else:
        dropped[NO_ANSWER] += 1


def _gsm8k_problem(row: dict, dropped: Dropped) -> Iterator[Problem]:
    """`answer`: one step a line with <<annotations>>, then `#### 72`.

    In a user's own file `answer` may also be the answer alone."""
    prompt, solution = _question_of(row), _text(row, "answer")
    answer, lines = extract_answer(solution), split_steps(_ANNOTATION.sub("", solution))
    steps = [one_line(line) for line in lines if not CLOSING_STEP.match(line)]
    if answer is None and len(lines) == 1:
        yield from _problem(prompt, lines[0], dropped)
    else:
        yield from _problem(prompt, answer, dropped, steps)


def _math_problem(row: dict, dropped: Dropped) -> Iterator[Problem]:
    """`solution`: prose, the answer in \\boxed{}. A sentence is a step; drawings are removed.

    NuminaMath and others also have the answer in `answer`."""
    prompt, solution = _question_of(row), _text(row, "solution")
    if is_empty(row.get("answer")):
        answer = extract_answer(one_line(solution))
    else:
        answer = one_line(_text(row, "answer"))
    steps = split_sentences(re.sub(r"\[asy\].*?\[/asy\]", "", solution, flags=re.DOTALL))
    yield from _problem(prompt, answer, dropped, steps, solution)


def _problem_with_answer(prompt_field: str, answer_field: str) -> Callable:
    """For data sets that have the right answer, but no reference solution."""

    def problem(row: dict, dropped: Dropped) -> Iterator[Problem]:
        prompt = _question_of(row) if prompt_field == "question" else _text(row, prompt_field)
        answer: Any = row
        for name in answer_field.split("."):
            answer = answer.get(name) if isinstance(answer, dict) else None
        text = None if is_empty(answer) else _text({"answer": answer}, "answer")
        yield from _problem(prompt, text, dropped)

    return problem


# --- SVAMP, MAWPS, ASDiv: problems with an equation ---

_PLACEHOLDER = re.compile(r"\b(?:number|N_)(\d+)\b")  # number0 or N_00
_GADGET = re.compile(r"<gadget[^>]*>(.*?)</gadget>", re.DOTALL)
_UNIT = re.compile(r"\s*\([^()]*\)")


def _with_equation(
    prompt: str, answer: str, expressions: Sequence[Expression], dropped: Dropped
) -> Iterator[Problem]:
    """One Problem, or none if the value of the last expression is not the answer.

    It has the steps of all expressions, or none if decimals cannot show them exactly."""
    try:
        worked = [work_out(expression) for expression in expressions]
    except ZeroDivisionError:
        dropped["problems whose equation divides by zero"] += 1
        return
    value = shown(worked[-1][0])
    with suppress(ValueError):  # words, or a fraction: compared as it is
        answer = shown(number(answer))
    if not same_answer(answer, value):
        dropped["problems whose answer is not the value of their equation"] += 1
        return
    steps = [step for _, part in worked for step in part or []]
    if any(part is None for _, part in worked):
        dropped.notes["problems without steps: decimals cannot show them exactly"] += 1
        steps = []
    yield Problem(prompt, value, _reference(steps, value) if steps else [])


def _with_infix(
    prompt: str, answer: str, equations: Sequence[str], dropped: Dropped
) -> Iterator[Problem]:
    try:
        expressions = [parse_infix(equation) for equation in equations]
    except ValueError:
        dropped["problems whose equation is no plain arithmetic"] += 1
    else:
        yield from _with_equation(prompt, answer, expressions, dropped)


def _svamp_problem(row: dict, dropped: Dropped) -> Iterator[Problem]:
    """`Equation` is infix: `( 8.0 - 3.0 )`."""
    equation = _text(row, "equation")
    yield from _with_infix(_question_of(row), _text(row, "answer"), [equation], dropped)


def _calculator_problem(row: dict, dropped: Dropped) -> Iterator[Problem]:
    """`chain`: `<gadget id="calculator">8 - 3</gadget>`, then its output, and so on."""
    equations = _GADGET.findall(_text(row, "chain")) or [_text(row, "result")]
    prompt = _joined_marks(_text(row, "question"))
    yield from _with_infix(prompt, _text(row, "result"), equations, dropped)


def _placeholder_problem(row: dict, dropped: Dropped) -> Iterator[Problem]:
    """`Question` and `Equation` have `number0` or `N_00` in place of the first of the `Numbers`.

    `Equation` is prefix, `- number0 number1`, or infix, `( N_00 - N_01 )`."""
    numbers, equation = _text(row, "numbers").split(), _text(row, "equation")
    try:
        in_text = [shown(number(text)) for text in numbers]
        prompt = _PLACEHOLDER.sub(lambda match: in_text[int(match[1])], _text(row, "question"))
        equation = _PLACEHOLDER.sub(lambda match: numbers[int(match[1])], equation)
    except (ValueError, IndexError):
        expected = "a number for every placeholder"
        raise RecordError(f"field 'numbers': expected {expected}, got {show(numbers)}") from None
    prompt, answer, tokens = _joined_marks(prompt), _text(row, "answer"), equation.split()
    if len(tokens) < 2 or tokens[0] not in OPERATORS:
        yield from _with_infix(prompt, answer, [equation], dropped)
        return
    try:
        expression = parse_prefix(tokens)
    except ValueError:
        dropped["problems whose equation is no plain arithmetic"] += 1
    else:
        yield from _with_equation(prompt, answer, [expression], dropped)


def _joined_marks(text: str) -> str:
    """The text without the spaces that a program put around marks: `Tom 's cat , too .`"""
    text = re.sub(r"\s(?=[.,;:?!)]|'(?:s|re|ve|ll|d|m)\b|n't\b)", "", one_line(text))
    return re.sub(r"(?<=s)\s(?='\s)|(?<=\()\s", "", text)  # girls ' team


def _asdiv_problem(row: dict, dropped: Dropped) -> Iterator[Problem]:
    """`Formula`: `7+2=9`, or several with `;` between them. `Answer`: `9 (apples)`.

    Many formulas are no plain arithmetic, as `LCM[2,3]=6`; their problems have no steps."""
    answer = _text(row, "answer")
    prompt, answer = _question_of(row), _UNIT.sub("", answer) or answer
    try:
        expressions = []
        for equation in _text(row, "formula").split(";"):
            left, right = equation.split("=")
            number(right)  # `13 r1` is none
            expressions.append(parse_infix(left))
    except ValueError:
        dropped.notes["problems without steps: their formula is no plain arithmetic"] += 1
        yield from _problem(prompt, answer, dropped)
    else:
        yield from _with_equation(prompt, answer, expressions, dropped)


# --- PRM800K, Math-Shepherd, ProcessBench, TRL: labelled steps ---

# PRM800K rates a step 1 (good), 0 (neutral) or -1 (bad). Its authors count neutral steps as right
# (Lightman et al. 2023, arXiv 2305.20050, section 2.6). A step that the labeller wrote, because all
# completions were bad, has no rating; it is right.
_RATINGS = {1: 1.0, 0: 1.0, -1: 0.0, None: None}


def _prm800k_labels(row: dict, dropped: Dropped) -> Iterator[LabelledSolution]:
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
        if not isinstance(step, dict):
            raise RecordError(f"{where}: expected an object with completions, got {show(step)}")
        completions = _field(step, "completions", (list, type(None)), "a list") or []
        rated = [_prm800k_completion(completion, where) for completion in completions]
        chosen, human = _whole(step.get("chosen_completion")), step.get("human_completion")
        if chosen is not None:
            is_index = isinstance(chosen, int) and not isinstance(chosen, bool)
            if not is_index or not 0 <= chosen < len(rated):
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
    generated = _field(row, "question", dict, "an object").get("pre_generated_steps") or []
    if not isinstance(generated, list):
        raise RecordError("field 'question.pre_generated_steps': expected a list of texts")
    whole = [
        _prm800k_text({"text": text}, "field 'question.pre_generated_steps'") for text in generated
    ]
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
    if isinstance(rating, bool | list | dict) or rating not in _RATINGS:
        raise RecordError(f"{where}: expected a rating of -1, 0 or 1, got {show(rating)}")
    return text, _RATINGS[rating]


def _shepherd_labels(row: dict, dropped: Dropped) -> Iterator[LabelledSolution]:
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


def _processbench_labels(row: dict, dropped: Dropped) -> Iterator[LabelledSolution]:
    """`label`: index of the first wrong step, or -1; no labels after it (Zheng et al. 2024)."""
    prompt, steps = _text(row, "problem"), _texts(row, "steps")
    error = _field({"label": _whole(row["label"])}, "label", int, "a whole number")
    if not -1 <= error < len(steps):
        expected = f"-1 or the index of one of {len(steps)} steps"
        raise RecordError(f"field 'label': expected {expected}, got {error}")
    labels: list[float | None] = [1.0] * len(steps)
    if error >= 0:
        labels[error:] = [0.0] + [None] * (len(steps) - error - 1)
    yield from _solution(prompt, steps, labels, dropped, _truth(row.get("final_answer_correct")))


def _trl_labels(row: dict, dropped: Dropped) -> Iterator[LabelledSolution]:
    prompt = _prompt_of(_context(row) or [])
    if prompt is None:
        dropped["prompts of more than one turn"] += 1
        return
    steps = [_ANNOTATION.sub("", step) for step in _texts(row, "completions")]
    labels = [_label(label) for label in _field(row, "labels", list, "a list of labels")]
    if len(steps) != len(labels):
        expected = f"one label for each of {len(steps)} steps"
        raise RecordError(f"field 'labels': expected {expected}, got {len(labels)}")
    yield from _solution(prompt, steps, labels, dropped)


def _own_labels(row: dict, dropped: Dropped) -> Iterator[LabelledSolution]:
    """In a CSV true and false are texts."""
    fields = _only(row, LabelledSolution)
    if isinstance(fields["final_correct"], str):
        fields["final_correct"] = _truth(fields["final_correct"])
    own = LabelledSolution.from_row(fields)
    yield from _solution(own.prompt, own.steps, own.labels, dropped, own.final_correct)


def _only(row: dict, kind: type) -> dict:
    """The fields of a row that a record has."""
    return {field.name: row.get(field.name) for field in fields(kind)}


# --- Step-DPO, TRL: preferences ---


def _step_dpo_pair(row: dict, dropped: Dropped) -> Iterator[PreferencePair]:
    """One right and one wrong step after the same prefix: scores 1 and 0.

    The published prefix may end with the number of the next step ("... Step 3:"), which then moves
    to both steps."""
    prompt, initial = _text(row, "prompt"), _field(row, "initial_reason_steps", str, "a text")
    names = ("chosen", "rejected")
    if drop_empty({name: row.get(name) for name in names}, dropped):
        return
    sides = {side: one_line(_text(row, side)) for side in names}
    chosen, rejected = sides.values()
    prefix = split_text(initial.replace("Let's think step by step.", "", 1))
    if prefix and re.fullmatch(r"Step\s+\d+\s*:", prefix[-1]):
        marker = prefix.pop()
        chosen, rejected = f"{marker} {chosen}", f"{marker} {rejected}"
    if chosen == rejected:
        dropped["pairs with the same step on both sides"] += 1
        return
    scores: dict[str, Any] = {"chosen_scores": [1.0], "rejected_scores": [0.0]}
    yield PreferencePair(prompt, [chosen], [rejected], prefix, **scores)


# --- the prompt of a row ---

# columns that hold a prompt, those that hold a part of one, and those that hold a conversation
_PROMPTS = ("prompt", "question", "problem", "query", "instruction")
_PARTS = ("input", "body", "context", "passage")
_SYSTEM = ("system", "system_prompt", "system_message")
_CONVERSATIONS = ("prompt", "context", "messages", "conversations", "conversation")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}

Turns = list[tuple[str, str]]  # (role, text)


def _question_of(row: dict) -> str:
    """The prompt of a row with one question. Raises RecordError."""
    turns = _context(row)
    prompt = _prompt_of(turns) if turns else None
    if prompt is None:
        raise RecordError("field 'prompt': expected one question, as a text or as messages")
    return prompt


def _column_prompt(row: dict) -> str | None:
    """The text of the columns that hold the prompt, or None. `prompt` is always the whole prompt.

    Raises RecordError if several columns may hold a part of it, so that none is lost."""

    def texts_of(*names: str) -> dict[str, str]:
        kinds = (str, int, float)
        values = {name: dict.get(row, name) for name in names}
        filled = [name for name, value in values.items() if isinstance(value, kinds)]
        return {name: _text(row, name) for name in filled if not is_empty(values[name])}

    texts = texts_of("prompt") or texts_of(*_PROMPTS, *_PARTS)
    if {"instruction", "input"} <= texts.keys():  # Alpaca
        texts["instruction"] += "\n" + texts.pop("input")
    if {"question", "body"} <= texts.keys():  # SVAMP, where a body may end without a mark
        body = texts.pop("body")
        texts["question"] = f"{body}{'' if body[-1] in '.,;:?!' else ','} {texts['question']}"
    if not texts:
        return None
    longest = max(texts.values(), key=len)
    if any(one_line(text) not in one_line(longest) for text in texts.values()):
        names = "' and '".join(texts)
        raise RecordError(f"columns '{names}' may be parts of the prompt; join them as 'prompt'")
    return longest


def _turns(value: Any, name: str) -> Turns | None:
    """The turns of a conversation: messages with role and content (or from and value), one such
    message, or a text `Human: ... Assistant: ...`. None for any other text."""
    if isinstance(value, str):
        _, *parts = re.split(r"(?:^|\n\n)\s*(Human|Assistant):", value)
        if not value.lstrip().startswith("Human:") or "Assistant" not in parts[::2]:
            return None
        roles = [_ROLES.get(part.lower(), "assistant") for part in parts[::2]]
        return list(zip(roles, map(str.strip, parts[1::2]), strict=True))
    turns: Turns = []
    messages: list[Any] = value if isinstance(value, list) else [value]
    for message in messages:
        role, content = None, None
        if isinstance(message, dict):
            role = message.get("role", message.get("from", message.get("source")))
            content = next((message[k] or "" for k in ("content", "value") if k in message), None)
        if isinstance(content, list):
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "".join(text for text in texts if isinstance(text, str))
        if not isinstance(content, str) or not isinstance(role, str):
            expected = "a text or messages with role and content"
            raise RecordError(f"field '{name}': expected {expected}, got {show(value)}")
        turns.append((_ROLES.get(role.lower(), role.lower()), content))
    return turns


def _context(row: dict) -> Turns | None:
    """The turns before the answer, from the columns of a row; None if no column has them."""
    turns: Turns | None = None
    if not isinstance(row.get("prompt"), list | dict):
        text = _column_prompt(row)
        if text is not None:
            turns = _turns(text, "prompt") or [("user", text)]
    for name in _CONVERSATIONS if turns is None else ():
        if isinstance(row.get(name), list | dict) and row[name]:
            turns = _turns(row[name], name)
            break
    if turns and turns[-1][0] == "assistant":  # the answer, or the empty start of one
        turns = turns[:-1]
    system = next((row[name] for name in _SYSTEM if not is_empty(row.get(name))), None)
    if turns and isinstance(system, str) and turns[0][0] != "system":
        turns = [("system", system.strip()), *turns]
    if turns and not is_empty(row.get("history")):
        turns = [*turns, ("user", "")]  # earlier turns in a column of their own
    return turns


def _prompt_of(turns: Turns) -> str | None:
    """The prompt of a conversation with one question, the system message first; otherwise None."""
    turns = [(role, text.strip()) for role, text in turns if role != "system" or text.strip()]
    if [role for role, _ in turns] not in (["user"], ["system", "user"]):
        return None
    return _text({"prompt": "\n\n".join(text for _, text in turns)}, "prompt")


# --- Step-DPO, TRL and others: preferences ---


def _text_pair(row: dict, dropped: Dropped) -> Iterator[tuple[str, str, str]]:
    """(prompt, chosen, rejected) of a preference, or nothing if it cannot be used.

    The sides are texts or messages; the prompt is in columns of its own, or before the answer in
    both sides. Where messages have it, their turns count."""
    found = _sides(row)
    if drop_empty(found, dropped):
        return
    first, second = (_turns(side, name) for name, side in found.items())
    context: Turns | None
    if first is None and second is None:
        sides, context = [str(side).strip() for side in found.values()], _context(row)
        if context is None:
            yield from _guessed_pair(row, sides, dropped)
            return
    elif first is None or second is None:
        raise RecordError(f"field '{next(iter(found))}': expected texts or messages on both sides")
    else:
        if first[:-1] != second[:-1] or {first[-1][0], second[-1][0]} != {"assistant"}:
            dropped["pairs whose sides differ in more than one answer"] += 1
            return
        sides, context = [first[-1][1].strip(), second[-1][1].strip()], first[:-1]
        if not any(role == "user" for role, _ in context):
            context = [*context, *(_context(row) or [])]
        elif one_line(str(row.get("prompt", ""))) not in ["", *(one_line(t) for _, t in context)]:
            dropped.notes["rows whose 'prompt' is not the user's turn, which is used"] += 1
        if not context:
            raise RecordError(_no_prompt(row))
    prompt = _prompt_of(context)
    if prompt is None:
        dropped["prompts of more than one turn"] += 1
        return
    if all(_repeats(side, prompt) for side in sides):
        dropped.notes["rows whose sides begin with the prompt, which is cut off there"] += 1
        sides = [side[len(prompt) :].strip() for side in sides]
    if drop_empty(dict(zip(found, sides, strict=True)), dropped):
        return
    if sides[0] == sides[1]:
        dropped["pairs with the same answer on both sides"] += 1
    else:
        yield prompt, sides[0], sides[1]


def _sides(row: dict) -> dict[str, Any]:
    """The two sides of a preference by the names of their columns. A number becomes a text."""
    names = ("chosen", "rejected") if "chosen" in row else ("chosen_response", "rejected_response")
    if names[0] not in row and "messages" in row:  # ms-swift: the last message is the better answer
        turns = _turns(row["messages"], "messages") or []
        if [role for role, _ in turns[-1:]] != ["assistant"]:
            raise RecordError("field 'messages': expected an answer as the last message")
        sides = {"messages": turns[-1][1], names[1]: row.get(names[1])}
    else:
        sides = {name: row.get(name) for name in names}
    for name, side in sides.items():
        if not isinstance(side, list | dict) and not is_empty(side):
            sides[name] = _text({name: side}, name)
    return sides


def _repeats(side: str, prompt: str) -> bool:
    """Whether a side begins with the whole prompt: `2 + 2` does not count in `2 + 2 = 4`."""
    after = side.removeprefix(prompt)
    return after != side and (
        after[:1] in ("", "\n") or (prompt[-1] in ".?!:" and after[:1].isspace())
    )


def _no_prompt(row: dict) -> str:
    """The error for a row without a prompt, with the column that may hold it."""
    known = {"chosen", "rejected", *_PROMPTS, *_PARTS, *_SYSTEM}
    likely = [name for name, value in row.items() if name not in known and _is_prose(value)]
    hint = f"; if it is in '{likely[0]}', rename that column" if likely else ""
    return f"field 'prompt' is missing: expected a text, also as {', '.join(_PROMPTS[1:])}{hint}"


def _is_prose(value: Any) -> bool:
    """Whether a value may be a prompt: a text of several words, not a name or a number."""
    return isinstance(value, str) and len(value.split()) > 1


def _guessed_pair(row: dict, sides: list[str], dropped: Dropped) -> Iterator[tuple[str, str, str]]:
    """Both sides begin with the prompt, as in TRL's implicit format; it is cut between words.

    Raises RecordError if a column may hold the prompt."""
    empty = next((name for name in _PROMPTS if name in row), None)
    prompt = re.sub(r"\S*\Z", "", sides[0][: shared_prefix(*sides)])
    if empty is not None:
        dropped[f"rows with an empty '{empty}'"] += 1
    elif "rename" in (error := _no_prompt(row)):
        raise RecordError(error)
    elif not prompt.strip():
        dropped["pairs without a common prompt"] += 1
    else:
        dropped.notes["rows without a prompt: guessed, the words with which both sides begin"] += 1
        yield prompt.strip(), sides[0][len(prompt) :], sides[1][len(prompt) :]


def _trl_pair(row: dict, dropped: Dropped) -> Iterator[PreferencePair]:
    for prompt, *sides in _text_pair(row, dropped):
        chosen, rejected = map(split_text, sides)
        if not chosen or not rejected or chosen == rejected:
            dropped["pairs with the same steps on both sides"] += 1
        else:
            yield PreferencePair.from_solutions(prompt, chosen, rejected)


def group_of(row: dict, dropped: Dropped) -> Iterator[RankedGroup]:
    """A ranked group, or a pair as a group of two whole answers. Raises RecordError."""
    if not is_empty(row.get("answers")) and not is_empty(row.get("ranks")):
        yield RankedGroup.from_row({name: row.get(name) for name in ("prompt", "answers", "ranks")})
    elif "initial_reason_steps" in row or _has_steps(row):
        convert = _own_pair if _has_steps(row) else _step_dpo_pair
        for pair in convert(row, dropped):
            sides = (pair.chosen, pair.rejected)
            answers = ["\n".join([*pair.prefix, *side]) for side in sides]
            yield RankedGroup(pair.prompt, answers, [1, 2])
    else:
        for prompt, *answers in _text_pair(row, dropped):
            group = {"prompt": prompt, "answers": answers, "ranks": [1, 2]}
            yield RankedGroup.from_row(group)


def _own_pair(row: dict, dropped: Dropped) -> Iterator[PreferencePair]:
    yield _in_one_line(PreferencePair.from_row(_only(row, PreferencePair)))


# --- OmegaPRM, three columns: values of steps ---


def _omegaprm_values(row: dict, dropped: Dropped) -> Iterator[StepValue]:
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


def _own_value(row: dict, dropped: Dropped) -> Iterator[StepValue]:
    """In a CSV the numbers are texts, and 0,5 may be a half."""
    fields = _only(row, StepValue)
    fields |= {name: _whole(fields[name]) for name in ("rollouts", "visits")}
    score = fields["score"]
    try:
        fields["score"] = float(score.replace(",", ".")) if isinstance(score, str) else score
    except ValueError:
        expected = "expected a score from 0 to 1"
        raise RecordError(f"field 'score': {expected}, got {show(score)}") from None
    yield _in_one_line(StepValue.from_row(fields))


def three_columns(value: StepValue) -> dict[str, Any]:
    """A StepValue as a row of the three-column table: `question`, `next_step`, `score`.

    `question` is the problem and, in the lines after it, the prefix. Rollouts and visits are left
    out. A reader of the table ends the problem before the first line that begins with `Step 1:`, so
    the first step must begin with it, and no line of the problem may. Raises RecordError."""
    value = _in_one_line(value)
    question = "\n".join([value.prompt, *value.prefix])
    row = {"question": question, "next_step": value.step, "score": value.score}
    (back,) = _three_column_value(row, Dropped())
    if (back.prompt, back.prefix, back.step) != (value.prompt, value.prefix, value.step):
        raise RecordError(
            "the end of this problem cannot be found in three columns: expected a first step that "
            "begins with 'Step 1:'"
        )
    return row


def _three_column_value(row: dict, dropped: Dropped) -> Iterator[StepValue]:
    question = _text(row, "question")
    first = _FIRST_STEP.search(question)
    end = first.start() if first else len(question)
    prompt, prefix = question[:end].strip(), split_steps(question[end:])
    value = {"prompt": prompt, "prefix": prefix, "step": _text(row, "next_step")}
    yield from _own_value({**value, "score": row["score"]}, dropped)


def _own_problem(row: dict, dropped: Dropped) -> Iterator[Problem]:
    problem = Problem.from_row({**_only(row, Problem), "answer": _text(row, "answer")})
    if _is_answer(problem.answer, " ".join(problem.steps)):
        yield _in_one_line(problem)
    else:
        dropped[NO_ANSWER] += 1


# --- shapes ---

KINDS: dict[str, type[Readable]] = {
    "problems": Problem,
    "pairs": PreferencePair,
    "step_labels": LabelledSolution,
    "step_values": StepValue,
}


@dataclass(frozen=True)
class Shape:
    """How to recognize a data set, and what can be made of it.

    fields: every row has them. gives: kind of record (a key of KINDS) -> conversion, best kind
    first. test: a further condition on the row. may_be_empty: of the fields."""

    name: str
    fields: tuple[str, ...]
    gives: dict[str, Callable[[dict, Dropped], Iterator]]
    test: Callable[[dict], bool] = lambda row: True
    may_be_empty: tuple[str, ...] = ()

    @property
    def needed(self) -> list[str]:
        """The fields that no usable row has empty."""
        return [field for field in self.fields if field not in self.may_be_empty]

    def fits(self, row: dict, with_values: bool) -> bool:
        """Whether a row has the fields, and with_values has a value in each that needs one."""
        if any(field not in row for field in self.fields):
            return False
        if with_values and any(is_empty(row[field]) for field in self.needed):
            return False
        return self.test(row)

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.fields)})"


def _has_steps(row: dict) -> bool:
    steps = dict.get(row, "chosen")
    return isinstance(steps, list) and bool(steps) and all(isinstance(step, str) for step in steps)


# The first shape that fits a row is the row's shape. The comments give the source of a shape: its
# name on the hub, or its repository.
SHAPES = [
    Shape(  # xinlai/Math-Step-DPO-10K
        "Step-DPO",
        ("prompt", "initial_reason_steps", "chosen", "rejected"),
        {"pairs": _step_dpo_pair, "problems": _problem_with_answer("prompt", "answer")},
        may_be_empty=("initial_reason_steps", "chosen", "rejected"),
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
    Shape(  # axolotl, argilla
        "responses", ("chosen_response", "rejected_response"), {"pairs": _trl_pair}
    ),
    # ms-swift
    Shape("messages", ("messages", "rejected_response"), {"pairs": _trl_pair}),
    Shape(
        "problems", ("prompt", "answer"), {"problems": _own_problem}, lambda row: "rank" not in row
    ),
    Shape("MATH", ("problem", "solution"), {"problems": _math_problem}),
    Shape(  # mwpt5/MAWPS, cq01/mawps-asdiv-a_svamp; MAWPS and ASDiv in github.com/arkilpatel/SVAMP
        "number placeholders",
        ("question", "numbers", "equation", "answer"),
        {"problems": _placeholder_problem},
    ),
    Shape(  # EleutherAI/asdiv, github.com/chaochun/nlu-asdiv-dataset
        "ASDiv",
        ("body", "question", "formula", "answer"),
        {"problems": _asdiv_problem},
        may_be_empty=("body",),
    ),
    Shape(  # ChilleD/SVAMP, github.com/arkilpatel/SVAMP
        "SVAMP",
        ("body", "question", "equation", "answer"),
        {"problems": _svamp_problem},
        may_be_empty=("body",),
    ),
    # MU-NLPC/Calc-mawps, MU-NLPC/Calc-svamp, MU-NLPC/Calc-asdiv_a
    Shape("Calc-X", ("question", "chain", "result"), {"problems": _calculator_problem}),
    Shape("GSM8K", ("question", "answer"), {"problems": _gsm8k_problem}),
    Shape(
        "problem and answer",
        ("problem", "answer"),
        {"problems": _problem_with_answer("question", "answer")},
    ),
]
