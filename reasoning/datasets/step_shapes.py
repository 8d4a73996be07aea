"""Conversion of rows of public data sets into labelled solutions and values of steps."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from common.errors import RecordError
from reasoning.answers import extract_answer, same_answer
from reasoning.datasets.files import Dropped, show
from reasoning.datasets.row_fields import field_of, fields_of, in_one_line, text_of, texts_of
from reasoning.datasets.row_prompt import context_of, prompt_of
from reasoning.records import LabelledSolution, StepValue
from reasoning.steps import STEP_NUMBER, one_line, split_steps, split_text, without_annotations

_FIRST_STEP = re.compile(rf"^{STEP_NUMBER.pattern}", re.IGNORECASE | re.MULTILINE)
# PRM800K ends a solution with "\n\n# Answer\n\n29"
_PRM_ANSWER = re.compile(r"\s*^#\s*Answer\s*$\s*", re.MULTILINE)


def _whole(value: Any) -> Any:
    """The whole number of a CSV cell, or of a table that has its numbers as floats."""
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,9}(\.0)?\s*", value):
        value = float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _truth(value: Any) -> bool | None:
    """True or false, `true` or `False` as in a CSV cell; None for all else."""
    text = str(value).strip().lower() if isinstance(value, bool | str) else ""
    return {"true": True, "false": False}.get(text)


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


# --- PRM800K, Math-Shepherd, ProcessBench, TRL: labelled steps ---

# PRM800K rates a step 1 (good), 0 (neutral) or -1 (bad). Its authors count neutral steps as right
# (Lightman et al. 2023, arXiv 2305.20050, section 2.6). A step that the labeller wrote, because all
# completions were bad, has no rating; it is right.
_RATINGS = {1: 1.0, 0: 1.0, -1: 0.0, None: None}


def prm800k_labels(row: dict, dropped: Dropped) -> Iterator[LabelledSolution]:
    """The solution that was labelled, then one solution for each alternative to one of its steps.

    The alternative is the last step of its solution and the only labelled one, so that no rating is
    used twice. Where labelling stopped at the first error, the later steps (`pre_generated_steps`)
    follow without labels."""
    prompt = text_of(row, "question.problem")
    steps: list[str] = []
    labels: list[float | None] = []
    alternatives: list[tuple[list[str], list[float | None]]] = []
    for k, step in enumerate(field_of(row, "label.steps", list, "a list of steps"), 1):
        where = f"field 'label.steps', step {k}"
        if not isinstance(step, dict):
            raise RecordError(f"{where}: expected an object with completions, got {show(step)}")
        completions = field_of(step, "completions", (list, type(None)), "a list") or []
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
    generated = field_of(row, "question", dict, "an object").get("pre_generated_steps") or []
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


def shepherd_labels(row: dict, dropped: Dropped) -> Iterator[LabelledSolution]:
    """`input`: question and steps, a tag `ки` after each step. `label`: + or - for each tag.

    The label of the last step is that of the final answer (Wang et al. 2024, arXiv 2312.08935: a
    step is right if some rollout from it ends right)."""
    parts, label = text_of(row, "input").split("ки"), text_of(row, "label")
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
    steps = [without_annotations(text) for text in (marker + first, *parts[1:-1])]
    yield from _solution(question.strip(), steps, labels, dropped, labels[-1] == 1)


def processbench_labels(row: dict, dropped: Dropped) -> Iterator[LabelledSolution]:
    """`label`: index of the first wrong step, or -1; no labels after it (Zheng et al. 2024)."""
    prompt, steps = text_of(row, "problem"), texts_of(row, "steps")
    error = field_of({"label": _whole(row["label"])}, "label", int, "a whole number")
    if not -1 <= error < len(steps):
        expected = f"-1 or the index of one of {len(steps)} steps"
        raise RecordError(f"field 'label': expected {expected}, got {error}")
    labels: list[float | None] = [1.0] * len(steps)
    if error >= 0:
        labels[error:] = [0.0] + [None] * (len(steps) - error - 1)
    yield from _solution(prompt, steps, labels, dropped, _truth(row.get("final_answer_correct")))


def trl_labels(row: dict, dropped: Dropped) -> Iterator[LabelledSolution]:
    prompt = prompt_of(context_of(row) or [])
    if prompt is None:
        dropped["prompts of more than one turn"] += 1
        return
    steps = [without_annotations(step) for step in texts_of(row, "completions")]
    labels = [_label(label) for label in field_of(row, "labels", list, "a list of labels")]
    if len(steps) != len(labels):
        expected = f"one label for each of {len(steps)} steps"
        raise RecordError(f"field 'labels': expected {expected}, got {len(labels)}")
    yield from _solution(prompt, steps, labels, dropped)


def own_labels(row: dict, dropped: Dropped) -> Iterator[LabelledSolution]:
    """In a CSV true and false are texts."""
    fields = fields_of(row, LabelledSolution)
    if isinstance(fields["final_correct"], str):
        fields["final_correct"] = _truth(fields["final_correct"])
    own = LabelledSolution.from_row(fields)
    yield from _solution(own.prompt, own.steps, own.labels, dropped, own.final_correct)


# --- OmegaPRM, three columns: values of steps ---


def omegaprm_values(row: dict, dropped: Dropped) -> Iterator[StepValue]:
    """`solution_prefix`: question and prefix of a solution. `mc_value`: value of its last step.

    The value is the share of rollouts from the prefix that end right. A step is a paragraph."""
    question = text_of(row, "question")
    for k, node in enumerate(field_of(row, "reasoning_steps", list, "a list"), 1):
        prefix = field_of(node, "solution_prefix", str, "a text").strip()
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


def own_value(row: dict, dropped: Dropped) -> Iterator[StepValue]:
    """In a CSV the numbers are texts, and 0,5 may be a half."""
    fields = fields_of(row, StepValue)
    fields |= {name: _whole(fields[name]) for name in ("rollouts", "visits")}
    score = fields["score"]
    try:
        fields["score"] = float(score.replace(",", ".")) if isinstance(score, str) else score
    except ValueError:
        expected = "expected a score from 0 to 1"
        raise RecordError(f"field 'score': {expected}, got {show(score)}") from None
    yield in_one_line(StepValue.from_row(fields))


def three_columns(value: StepValue) -> dict[str, Any]:
    """A StepValue as a row of the three-column table: `question`, `next_step`, `score`.

    `question` is the problem and, in the lines after it, the prefix. Rollouts and visits are left
    out. A reader of the table ends the problem before the first line that begins with `Step 1:`, so
    the first step must begin with it, and no line of the problem may. Raises RecordError."""
    value = in_one_line(value)
    question = "\n".join([value.prompt, *value.prefix])
    row = {"question": question, "next_step": value.step, "score": value.score}
    (back,) = three_column_value(row, Dropped())
    if (back.prompt, back.prefix, back.step) != (value.prompt, value.prefix, value.step):
        raise RecordError(
            "the end of this problem cannot be found in three columns: expected a first step that "
            "begins with 'Step 1:'"
        )
    return row


def three_column_value(row: dict, dropped: Dropped) -> Iterator[StepValue]:
    question = text_of(row, "question")
    first = _FIRST_STEP.search(question)
    end = first.start() if first else len(question)
    prompt, prefix = question[:end].strip(), split_steps(question[end:])
    value = {"prompt": prompt, "prefix": prefix, "step": text_of(row, "next_step")}
    yield from own_value({**value, "score": row["score"]}, dropped)
