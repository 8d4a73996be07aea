"""Final answers: find the answer that a text states. (reasoning/answer_equality.py compares two.)

This module knows no reference solution, so every package may import it.

A line states a final answer in one of four forms:

- a box: `\\boxed{52}`, `\\fbox{52}`; several boxes joined by commas or `and` are several results
- `#### 52`, as in GSM8K, or `<answer>52</answer>`
- a label: `Answer: 52`, `**Final answer:** 52`, `### Answer` and the answer in the next line
- a sentence: `The answer is 52.`

and in other languages of LABELS (`答案：52`, `La réponse est 52`). What follows a label may be
words (`Answer: in May`); what follows `is` must be a value or at most three words that do not
describe (`The answer is blue.` states one, `The answer is positive.` does not). Questions,
conditions, negations and placeholders state none. docs/answers.md has more.
"""

import re
from collections import deque
from itertools import pairwise

from reasoning.answer_equality import same_answer

__all__ = ["extract_answer", "same_answer"]

LABELS = (
    r"(?:final\s+|correct\s+)?answers?|ans|r[ée]ponse(?:\s+finale)?|(?:end)?antwort|resposta"
    r"|respuesta(?:\s+final)?|risposta|antwoord|svar|odpowiedź|cevap|ответ|최종\s*답|정답|答案|答え"
)
_IS = (
    r"is|are|equals|comes\s+(?:out\s+)?to|(?:would|should|must|will)\s+be"
    r"|est|ist|lautet|es|é|è|jest|är|er|是|为|為|は|은|는"
)
_STATEMENT = re.compile(
    rf"(?<![0-9a-zA-Z_À-ÿа-яА-Я])(?:{LABELS})(?![a-z])[*_}}]{{0,4}}"
    r"(?:\s?\([^()]{0,40}\))?"  # Answer (in cm): 5
    r"(?P<of>\s(?:to|for|of|in)\s[^.,;:：=?!$]{1,60}?)?"  # the answer to the question is 5
    rf"\s*+(?:(?P<colon>[:：=＝])[*_}}]{{0,4}}|(?:(?<!\w)|(?<=[案え답]))(?:{_IS})(?![a-zé]))"
    r"\s*+[:：]?\s*+",
    re.IGNORECASE,
)
# the label as a heading, without a colon: `### Answer`, `**Final Answer** 52`
_HEADING = re.compile(
    rf"\s*+(?:\#{{1,6}}\s*+[*_]{{0,3}}|[*_]{{2,3}}|\\textbf\{{)(?:the\s+)?(?:{LABELS})[*_}}:：]{{0,6}}\s*+",
    re.IGNORECASE,
)
_BARE_LABEL = re.compile(rf"\s*+(?:{LABELS})\s?[:：]\s*+|\s*+<answer>\s*+", re.IGNORECASE)
_HASHES = re.compile(r"\s*+####\s*+(?!\d+[.)]\s+\w)")  # not a heading: `#### 1. Read the text`
_TAG = re.compile(r"<answer>([^<]++(?:<(?!/?answer>)[^<]*+)*+)</answer>", re.IGNORECASE)
MOST_STATEMENTS = 50  # in one line; of more, the last are looked at
LONGEST_STATEMENT = 2000  # characters behind a label

# right before the label: what follows is no statement of this answer
_NO_STATEMENT = re.compile(
    r"(?:\b(?:whether|if|unless|suppose|supposing|assume|assuming|imagine|check(?:ing)?|verify(?:ing)?"
    r"|confirm|wonder|why|until|once|before|when|maybe|perhaps|possibly|doubt|says?|said|claims?|claimed"
    r"|thinks|thought|believes|no|another|wrong|incorrect|partial|intermediate|previous|earlier|initial"
    r"|possible|first|other|any|each|every|his|her|their|not(?:\s+say)?|let)|['’]s)"
    r"(?:\s+that)?(?:\s+(?:the|our|my|this|a|an|right|exact|required|see))*\s*$",
    re.IGNORECASE,
)

_FORMULA = r"\$\$[^$]*+\$\$|\$(?:[^$.?!]|[.?!](?!\s+[A-Z][a-z]))*+\$"
_SENTENCE = re.compile(  # a formula, or the end of a sentence
    rf"{_FORMULA}"
    r"|(?P<end>[.](?=\s|$)|!(?=\s+[A-Z][a-z]|\s*+$)|[?](?=[\s$)\"'*]|$)|[。！？]|<[|]|</?s>|<end)"
)
_ABBREVIATION = re.compile(r"\b(?:sq|cu|approx|ca|vs|no|mrs?|ms|dr|st|prof|[ap]\.\s?m)$", re.I)
# what explains an answer: `4, since 2 + 3 = 5`; formulas are left alone
_REASON = re.compile(
    rf"{_FORMULA}|(?P<reason>(?<=\S)(?:(?:\s*[,;:，；]\s*|\s*\(|\s+[-–—]\s+)(?:as|so|but|not"
    r"|that is"
    r"|meaning|considering|rounded|weil|denn|da|car|puisque|parce|porque|perché"
    r"|потому|因为|因為|所以)|(?:\s*[,;:，；]\s*|\s*\(|\s+[-–—]\s+|\s+)(?:since|because|which|where|hence|therefore|thus"
    r"|i\.e\.|given that|I hope|when rounded|as(?=\s+[\d(])))(?![a-z]).*)",
    re.IGNORECASE,
)
_GLOSS = re.compile(r"(?<=[\d$}])\s*+\((?!base|mod|a\.?m|p\.?m)[a-z][a-z -]++\)", re.IGNORECASE)
_EQUATION_AFTER = re.compile(r"\s*+[,;:—–(]\s*+(?=[-\d(\s][^=,;]*=)|\s+(?:and|-)\s+(?=\d[^=,;]*=)")

_ADVERB = re.compile(
    r"(?:therefore|thus|then|hence|so|now|just|also|still|indeed|about|around|equal\s+to|given\s+by"
    r"|found\s+to\s+be|(?!only\s+(?:if|when))[a-z]{2,}ly)[\s,:]+",
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"[-+±~≈<>≤≥$€£¥₹(\[{|\"'“*_\s]*+(?:\d|\.\d|\\[a-zA-Z(\[{$]|[√π∞∅½⅓¼¾⅔]"
    r"|(?!a\s+[a-zA-Z])[a-zA-Zα-ωΑ-Ω](?![\w'’])|[a-zA-Z]{1,3}\s*+[=(^_|+*/<>≤≥≠∈]"
    r"|(?:sqrt|sin|cos|tan|log|ln|exp|pi)\b)"
)
_NO_VALUE = re.compile(
    r"\b(?:than|times\s+(?:as|the|that|its)|digits?\s+long|sure|certain)\b"
    r"|\d\s*-?\s*digit\b|%\s+(?:correct|right)|^\d+[.)]\s+[A-Za-z]",
    re.IGNORECASE,
)
# words that make of what follows `is` a description
_VAGUE = re.compile(
    r"(?:an?|the|not|in|on|at|to|of|for|from|by|with|within|between|among|as|if|whether|when|where|what"
    r"|which|who|how|that|this|these|those|it|its|we|you|i|they|he|she|my|your|our|his|her|their|there"
    r"|here|below|above|never|neither|either|yet|more|less|fewer|greater|smaller|larger|bigger|least"
    r"|most|same|different|correct|incorrect|wrong|right|true\s+that|clear|obvious|unknown|unclear"
    r"|positive|negative|wanted|hard|easy|simple|simpler|small|large|big|close|good|bad|fine|ready|done"
    r"|integers?|numbers?|whole|decimals?|fractions?|digits?|given|known|found|shown|written|likely"
    r"|important|reasonable|valid|invalid|exact|unique|finite|infinite|missing|follows|wrong|any|one\s+of"
    r""
    r"|must|should|can|cannot|could|would|will|may|might|need|needs|has|have|be|been|is|are|was|were|do"
    r"|does|and|or|so|because|since|then|next|only"
    r"|[a-z]{3,}(?<!e)ed|[a-z]{4,}[ai]ble|(?!evening|morning|nothing)[a-z]{5,}ing)"
)
_TITLE = re.compile(  # of a section, behind `####`
    r"solution|conclusion|explanation|steps?|answers?|results?|summary|verification|check|notes?"
    r"|final|analysis|approach|proof|key|calculations?|reasoning|given",
    re.IGNORECASE,
)
_WORKING = re.compile(  # how a solution begins, not an answer
    r"(?:let\b|let['’]s|lets\b|to\s+[a-z]+|first(?:ly)?\b|since\b|because\b|suppose\b|consider\b|assume\b"
    r"|note\b|step\s+\d|see\b|as\s+follows|given\b|using\b|(?:we|i|you)\s+(?:first|need|must|can|will|should"
    r"|start|begin|know|want|use|compute|calculate|find|add|subtract|multiply|divide)\b|there\s+(?:is|are)"
    r"\s+(?:two|three|several|many|different)\s+(?:ways|cases|steps))",
    re.IGNORECASE,
)
_SAYS = re.compile(r"\b(?:is|are|equals|was|were)\s+", re.IGNORECASE)
MOST_WORDS = 12  # of an answer in words behind a label
_PLACEHOLDER = re.compile(
    r"[\W_]*+|(?:\W*\\text\w*\W*)?\W*(?:(?:the|your|my|insert|final|numerical|numeric)\W+)*"
    r"(?:answer|ans|value|result|unknown|todo|tbd|ldots|dots|cdots)(?:\W+here)?\W*|\W*\\[lc]?dots\W*",
    re.IGNORECASE,
)
_YES_NO = re.compile(r"(yes|no|true|false)\b(?=\s*+[,;:.—–-])", re.IGNORECASE)


def extract_answer(text: str) -> str | None:
    """The final answer in the last line that states one, or None. `The answer is $52.` -> `52`."""
    boxes = _boxes(text)
    begin, following = len(text), ""
    for line in reversed(text.splitlines(keepends=True)):
        begin -= len(line)
        inside: list[tuple[int, int, str]] = []
        while boxes and boxes[-1][0] >= begin:
            start, stop, content = boxes.pop()
            inside.insert(0, (start - begin, stop - begin, content))
        answer = _stated_in(line, following, inside)
        if answer:
            return answer
        following = line.strip() or following
    return None


def _stated_in(line: str, following: str, boxes: list[tuple[int, int, str]]) -> str | None:
    """The answer that a line states. following: the next line that is not empty, for headings."""
    if opens_answer(line):
        return _stated(following, most_words=3)
    boxed = _boxed(line, boxes)
    for statement in reversed(deque(_STATEMENT.finditer(line), maxlen=MOST_STATEMENTS)):
        if boxed and boxes[-1][0] >= statement.start():
            return boxed
        before = line[max(0, statement.start() - 60) : statement.start()]
        # "the answer in the form: a/b", "the answer of this = 5"
        asks = statement["of"] and (statement["colon"] in ("=", "＝") or "form:" in statement[0])
        if not asks and not _NO_STATEMENT.search(before):
            most_words = MOST_WORDS if statement["colon"] else 3
            said = _stated(line[statement.end() :], most_words)
            if said:
                return said
    if boxed:
        return boxed
    for tagged in reversed(_TAG.findall(line)):
        return None if _is_placeholder(tagged) else _clean(tagged[:LONGEST_STATEMENT])
    if hashes := _HASHES.match(line):
        return _stated(line[hashes.end() :], most_words=1)
    heading = _HEADING.match(line)
    return _stated(line[heading.end() :], most_words=0) if heading else None


def opens_answer(line: str) -> bool:
    """Whether a line announces that the next one is the answer: `### Answer`, `The answer is:`."""
    line = line.strip()
    for pattern in (_HEADING, _BARE_LABEL):
        match = pattern.match(line)
        if match and match.end() == len(line):
            return True
    if not line.endswith((":", "：")):
        return False
    return any(statement.end() == len(line) for statement in _STATEMENT.finditer(line))


def _stated(text: str, most_words: int) -> str | None:
    """The answer at the start of a text that follows `answer is` or a label; None if it is none.

    most_words: of an answer in words; more than 3 for a label, behind which words may describe."""
    sentence, end = _first_sentence(text[:LONGEST_STATEMENT])
    if end in ("?", "？") or _is_placeholder(sentence):
        return None
    while adverb := _ADVERB.match(sentence):
        sentence = sentence[adverb.end() :]
    if yes_no := _YES_NO.match(sentence):
        return yes_no[1]
    sentence = _without_reasons(sentence)
    if _VALUE.match(sentence):
        return None if _NO_VALUE.search(sentence) else _clean(sentence)
    words = re.findall(r"[^\W_][\w'’.-]*+", sentence)
    if not words or _is_placeholder(sentence):
        return None
    if most_words <= 3:
        vague = len(words) > most_words or any(map(_VAGUE.fullmatch, words))
        vague = vague or (most_words == 1 and _TITLE.fullmatch(words[0]) is not None)
        return None if vague and words != ["neither"] else _clean(sentence)
    says = deque(_SAYS.finditer(sentence), maxlen=1)
    if _WORKING.match(sentence):
        return None
    if says and _VALUE.match(sentence[says[0].end() :]):
        return _clean(sentence[says[0].end() :])  # "the total number of apples is 12"
    return _clean(sentence) if len(words) <= most_words else None


def _is_placeholder(text: str) -> bool:
    return len(text) < 100 and _PLACEHOLDER.fullmatch(text) is not None


def _first_sentence(text: str) -> tuple[str, str]:
    """The first sentence without its end, and how it ends. A formula has no end of a sentence."""
    for match in _SENTENCE.finditer(text):
        end = match["end"]
        if end and not (
            end == "." and _ABBREVIATION.search(text[max(0, match.start() - 8) : match.start()])
        ):
            if (
                end == "!"
                and text[: match.start()].rstrip()[-1:].isdigit()
                and not text[match.end() :].strip()
            ):
                continue  # a factorial
            return text[: match.start()].strip(), end
    return text.strip(), ""


def _without_reasons(sentence: str) -> str:
    for match in _REASON.finditer(sentence):
        if match["reason"]:
            sentence = sentence[: match.start()]
            break
    if _VALUE.match(sentence):
        sentence = _GLOSS.sub("", sentence)
        after = _EQUATION_AFTER.search(sentence)
        # "4, 2 + 3 = 5" states 4, but "x = 3, y = 4" and "(1, a = 2)" are one answer
        if after and re.fullmatch(r"[-+$\\]*[\d.,/%$]+", sentence[: after.start()]):
            sentence = sentence[: after.start()]
    return sentence


_MARKS = [(mark, mark) for mark in ("**", "__", "*", "`", "$$", "$", '"')]
_MARKS += [("\\(", "\\)"), ("\\[", "\\]"), ("“", "”")]


def _clean(answer: str) -> str | None:
    """The answer without the marks around it: `**$52$**.` -> `52`."""
    before = ""
    while answer != before:
        before = answer
        answer = answer.strip().rstrip(".,;").removesuffix("\\\\").strip()
        for left, right in _MARKS:
            if (
                answer.startswith(left)
                and answer.endswith(right)
                and len(answer) > len(left) + len(right)
            ):
                inner = answer[len(left) : -len(right)]
                if left not in inner and right not in inner:
                    answer = inner
        if answer.count("$") == 1 or answer.strip("*").count("*") == 0:
            answer = answer.strip("$*")
        if answer.count("`") == 1:
            answer = answer.strip("`")
        if answer.count("}") > answer.count("{"):
            answer = answer.removesuffix("}")
    return answer or None


# --- boxes ---

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*+")
_JOINT = re.compile(  # between two boxes with results that belong together
    r"(?:[,;&]|and|or|\s)*+|(?:(?:for|in)?\s*[\w()=]{0,12}\s*){0,3}(?:[,;&]+\s*(?:and|or)?|and|or)"
    r"\s*(?:\w{1,6}\s*=)?\s*"
)
_FORM = re.compile(
    r"\b(?:form|format|have\s+to|need\s+to|should|must|will|let\s+me|please)\b", re.I
)


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of every box that is closed. `\\boxed 2` has the content `2`."""
    begins = [(box.start(), box.end()) for box in _BOX.finditer(text)]
    if not begins:
        return []
    closes: dict[int, int] = {}  # where each brace is closed
    opened: list[int] = []
    for brace in re.finditer(r"\\\\|\\.|[{}]", text, re.DOTALL):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closes[opened.pop()] = brace.start()
    found = []
    for start, begin in begins:
        if text[begin : begin + 1] != "{":
            bare = re.compile(r"[^\s$.,{}]++(?:\.\d++)?").match(text, begin)
            if bare:
                found.append((start, bare.end(), bare[0]))
        elif begin in closes:
            found.append((start, closes[begin] + 1, text[begin + 1 : closes[begin]].strip()))
    return found


def _boxed(line: str, boxes: list[tuple[int, int, str]]) -> str | None:
    """The content of the last box of a line, and of those that are joined to it."""
    if not boxes:
        return None
    start, end, content = boxes[-1]
    before, after = line[max(0, start - 100) : start], line[end : end + 10]
    if _is_placeholder(content) or re.match(r"[\s$*)\\\]]*[?]", after):
        return None
    if re.fullmatch(r"[a-zA-Z]|\\text\{[^{}]*\}", content) and _FORM.search(before):
        return None  # "write the answer in the form \boxed{n}"
    results = [content]
    for one, other in pairwise(reversed(boxes)):
        gap = line[other[1] : one[0]]
        plain = re.sub(r"\\(?:text|quad|qquad|mathrm)|\\[\s(),;!\[\]]|[${}.]", " ", gap)
        if other[1] > one[0] or len(gap) > 80 or not _JOINT.fullmatch(" ".join(plain.split())):
            break
        results.insert(0, other[2])
    return ", ".join(results)
