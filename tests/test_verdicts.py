"""Where an answer says yes or no."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_model.verdicts import answer_start, find_verdict, p_yes, spelling

YES = [
    "YesAnswer: 4", "Yes No Yes",
    "Yes", "yes", "YES", " yes.", "Yes!", "Yes, it is.", "yes it is right", "**Yes**", "_Yes_",
    '"Yes"', "“Yes”", "`Yes`", "(Yes)", "\n\nYes", "Yes\n\nStep 2 is 12 * 3 = 36.", "Yes</s>",
    "1. Yes", "The answer is Yes", "The answer is: yes", "the final answer is **Yes**.",
    "Answer: Yes", "Answer:Yes", "Verdict: YES", "My verdict is yes", "Final verdict - Yes",
    "I'd say yes", "So the answer is yes.", "Well, yes", "Sure, yes", "assistant\n\nYes",
    "\\boxed{Yes}", "$\\boxed{\\text{Yes}}$", "The answer is \\boxed{Yes}.", '{"verdict": "Yes"}',
    '{"reason": "12 * 3 is 36, no?", "answer": "yes"}', "<answer>Yes</answer>", "No error, so Yes",
    "No errors found. Yes.", "There is no mistake here: yes", "No mistake. Yes, right.",
    "There are no arithmetic errors in this step, so the answer is yes.", "no doubt, yes",
    "Step no. 2 is right: yes", "Step No 2 is fine. Yes", "No step is wrong. Yes",
    "Step 1 is right. Step 2 is right. Yes", "12 * 3 = 36. Yes, the last step is right.",
    "Is the last step right? Yes.", "You ask for Yes or No. Yes", "Yes or No: Yes", "Yes/No? Yes",
    "Nothing is wrong: yes", "Not no. Yes", "I can't say no. Yes",
    "The answer would be no if 3 were 4. So the answer is yes.",
    "Let me check. No wait, 3 * 12 = 36, that's right.\n\n**Yes**",
    "<think>No, this is wrong. Answer: No</think>Yes", "<think>\nNo.\n</think>\n\nYes",
    "No, hm.</think> Yes", "<reasoning>no</reasoning><answer>Yes</answer>", "[THINK]No[/THINK]Yes",
    "◁think▷no◁/think▷Yes", "<seed:think>no</seed:think>Yes",
    "<|channel|>analysis<|message|>No?<|end|><|start|>assistant<|channel|>final<|message|>Yes",
    "<|begin_of_thought|>No<|end_of_thought|>Yes", "Yes, although step 1 has no unit",
    "Yes. Is there an error? No.",
]  # fmt: skip
NO = [
    "No", "no", "NO", "No No Yes No", "NoAnswer: 4", " No.", "No, it is not.",
    "No the step is wrong", "No because 2 + 2 = 4",
    "**No**", '"No"', "No\n", "No—the product is 36", "No; 36", "No. 2 + 2 = 4, not 5.",
    "No: yes would be wrong", "The answer is No", "The answer is no, since 2 + 2 = 4",
    "Verdict: No", "Answer: **No**", "Step 2 is wrong. No", "Step 2 is wrong.\nNo",
    "12 * 3 = 36, not 38. No, it is wrong.", "No step 2 is wrong", "No line 3 says 4",
    "I would say no", "So no.", "That's a no from me",
    "Let me think: 3 * 12 = 36. Yes, step 1. But step 2 says 49. Therefore the answer is no.",
    "<think>Yes</think>No", "<think>yes</think>\nThe last step is not right, so no.",
    '{"answer": "no"}', "\\boxed{No}", "Yes or no? No.", "not yes but no",
    "The answer is not yes. No.",
]  # fmt: skip
NEITHER = [
    "", "   ", "**", "Maybe", "Right", "Correct.", "Incorrect", "True", "False", "Not right",
    "Wrong.", "The step is not right", "There is no error", "No error", "No errors found.",
    "no one knows", "no-one", "No mistakes in this step.", "There is no way to tell", "Yes or No",
    "yes/no", "Yes and no", "not yes", "I cannot say yes", "I can't say yes or no", "Yesterday",
    "Noon", "Nope", "Yeah", "N", "Y", "yes-men", "Step no. 2", "The answer is N", "eyes", "noyes",
    "no wrong steps", "<think>Yes", "<think>\nNo, the answer is no.", "<think>Yes</thi",
    "[THINK]yes", "<|channel|>analysis<|message|>Yes",
    "Is the last step of this solution right? Answer Yes or No.",
]  # fmt: skip


@pytest.mark.parametrize("text", YES)
def test_yes(text):
    verdict = find_verdict(text)
    assert verdict is not None and verdict.is_yes
    assert text[verdict.start : verdict.start + 3].lower() == "yes"


@pytest.mark.parametrize("text", NO)
def test_no(text):
    verdict = find_verdict(text)
    assert verdict is not None and not verdict.is_yes
    assert text[verdict.start : verdict.start + 2].lower() == "no"


@pytest.mark.parametrize("text", NEITHER)
def test_neither(text):
    assert find_verdict(text) is None


LEADS = [
    "Yes",
    "**Yes",
    "The answer is Yes",
    "Verdict: No",
    "<think>no</think>\n\nYes",
    "I'd say yes",
]


def test_a_verdict_that_leads_is_that_of_every_longer_answer():
    for text in LEADS:
        verdict = find_verdict(text)
        assert verdict.leads
        for more in (", but the answer is no", ".\nFinal answer: No", " <think>", ", yes or no"):
            assert find_verdict(text + more) == verdict
    for text in ("Step 2 is wrong. No", "No error, so yes", "Let me see: yes"):
        assert not find_verdict(text).leads


def test_spellings():
    for token in (
        "Yes",
        " yes",
        "YES",
        "▁Yes",
        "Ġyes",
        '"Yes',
        "Yes.",
        "**Yes**",
        "\nYes",
        "_yes_",
    ):
        assert spelling(token) == "yes"
    assert [spelling(token) for token in ("No", " NO", "n", "Y", " ye")] == [
        "no",
        "no",
        "n",
        "y",
        "ye",
    ]
    for token in ("", " ", "**", "Not", "None", "es", "s", "o", "Yesterday", "yes1", "0", "是"):
        assert spelling(token) is None


def test_the_probability_at_the_verdict():
    text = "The answer is Yes"
    sure = [(0, 3, {"no": 0.001, "yes": 0.0002}), (13, 17, {"yes": 0.9, "no": 0.1})]
    assert p_yes(text, sure) == 0.9
    assert p_yes(text, sure[:1]) is None  # no log-probs are listed at the verdict's token
    assert p_yes("Yes", [(0, 1, {"y": 0.6, "ye": 0.2, "no": 0.2})]) == 0.8  # first letters
    assert p_yes("Yes", [(0, 3, {"yes": 0.6, "y": 0.4, "n": 0.2})]) == pytest.approx(0.75)
    # no verdict: the first place at which yes and no are more likely than all else
    assert p_yes("Sure thing", [(0, 4, {"yes": 0.3}), (4, 10, {"yes": 0.4, "no": 0.2})]) == (
        pytest.approx(2 / 3)
    )
    assert p_yes("Sure", [(0, 4, {"yes": 0.3, "no": 0.2})]) is None
    assert p_yes("Yes4", [(-1, 3, {"yes": 0.8, "no": 0.2})]) == 0.8  # from a base model
    assert p_yes("No error", [(0, 2, {"no": 0.9, "yes": 0.1})]) is None  # it says something else
    assert p_yes("<think>No", [(7, 9, {"no": 0.9, "yes": 0.1})]) is None


def test_long_answers_take_no_time():
    for text in (
        "no error " * 50_000,
        " " * 500_000 + "yes",
        "<think>" * 50_000,
        "yes or no " * 50_000,
        "*" * 500_000,
        "yes " * 100_000 + "no",
        "answer is " * 50_000 + "no",
    ):
        start = time.process_time()
        find_verdict(text)
        answer_start(text)
        assert time.process_time() - start < 10


PIECES = [
    "yes", "no", "Yes", "No", " ", "\n", ".", "**", "the answer is", "error", "or", "not",
    "<think>", "</think>", "2", "\ud83d", "é",
]  # fmt: skip


@pytest.mark.property
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4)).map("".join))
def test_a_verdict_is_a_word_of_the_answer_and_not_of_its_thoughts(text):
    verdict = find_verdict(text)
    if verdict:
        assert verdict.start >= answer_start(text)
        word = text[verdict.start :].lower()
        assert word.startswith("yes" if verdict.is_yes else "no")
        assert verdict.start == 0 or not text[verdict.start - 1].isalnum()
        if verdict.leads:
            assert find_verdict(text + "\nThe answer is no.") == verdict


@pytest.mark.property
@given(
    st.text(max_size=30),
    st.lists(
        st.tuples(
            st.integers(-3, 20),
            st.integers(0, 20),
            st.dictionaries(st.sampled_from(["yes", "no", "y", "ye", "n"]), st.floats(0, 1)),
        )
    ),
)
def test_a_score_is_a_probability(text, places):
    score = p_yes(text, places)
    assert score is None or 0 <= score <= 1 + 1e-9
