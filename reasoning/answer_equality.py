"""Whether two final answers mean the same.

Numbers with units, times, dates, bases, ratios and words are compared here, math-verify compares
everything else: LaTeX, intervals, sets, matrices, relations (reasoning/math_process.py bounds it).
What only one of two answers names does not count, such as its unit, its base, or whether it is AM
or PM; what both name must agree. Answers that differ in form only are the same: 1/2 and 0.5, 50%
and 0.5, a list in another order. docs/answers.md has the rates of error.
"""

import bisect
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from reasoning.math_process import same_expression

LONGEST = 300  # characters; longer answers are compared as text only
LONGEST_TEXT = 10_000  # characters; of a longer text the end is read
DEEPEST = 30  # nested brackets of an expression for math-verify

# --- one notation for both answers ---

_SIGNS = str.maketrans(
    {
        "\u00a0": " ", "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
        "÷": "/", "⁄": "/", "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ", "≤": r"\leq ",
        "≥": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "±": r"\pm ", "∪": r"\cup ",
        "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "¢": " cents",
        "’": "'", "′": "'",
    }
)  # fmt: skip
_RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ"
_LOWERED = "₀₁₂₃₄₅₆₇₈₉"
_DIGITS = str.maketrans(_RAISED + _LOWERED, "0123456789+-n" + "0123456789")
_ROOT = re.compile(r"√\s*+(?:\(([^()]*+)\)|\{([^{}]*+)\}|(\d++(?:\.\d++)?|[a-zA-Z]))")
_SPACES = re.compile(r"(?<!\\)\\(?:[;:> ]|q?quad(?![a-zA-Z]))|~")
_LAYOUT = re.compile(
    r"(?<!\\)\\(?:[!,]\s*+|[()\[\]]|(?:left|right)\.|(?:left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z]))"
    r"|(?<![\w)])\*\*|\*\*(?![\w(-])|\^\s*+\{?\s*+\\(?:circ|degree)\s*+\}?|\\degree(?![a-zA-Z])"
)
_ESCAPED_TWICE = re.compile(  # as in JSON that was escaped twice
    r"\\\\(?=(?:text|boxed|[dt]?frac|sqrt|leq?|geq?|neq|pi|infty|left|right|cup|cdot|times)(?![a-z]))"
)
_TRIGONOMETRY = re.compile(r"(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_DEGREES = re.compile(r"(?<![\d.])(\d++(?:\.\d++)?)\s*+\^\s*+\{?\s*+\\circ\s*+\}?")
_CURRENCIES = {"$": "dollars", "£": "pounds", "€": "euros", "¥": "yen", "₹": "rupees"}
_AMOUNT_OF_MONEY = re.compile(
    r"(\\?\$|[£€¥₹])\s*+(\d[\d,]*+(?:\.\d++)?|\.\d++)|(\d)\s*+(\\\$|[£€¥₹])"
)
_FRACTION = re.compile(r"\\[dtc]?frac\s*+(?:\{\s*(\d++)\s*\}|(\d))\s*+(?:\{\s*(\d++)\s*\}|(\d))")
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mbox|mathrm|mathbf|operatorname)\s*+\{([^{}]*+)\}"
)
_THOUSANDS = re.compile(r"(?<![\d.,])(?!0)\d{1,3}(?:,\d{3})++(?![\d,])")


def _tidy(text: str) -> str:
    """The text in plain notation: LaTeX in place of Unicode, no layout, no `$` but for money."""
    text = text.translate(_SIGNS)
    text = re.sub(r"(?<=\d)\s*+m([²³])", r"\\text{ m}\1", text)
    text = re.sub(f"[{_RAISED}]+", lambda m: f"^{{{m[0].translate(_DIGITS)}}}", text)
    text = re.sub(f"[{_LOWERED}]+", lambda m: f"_{{{m[0].translate(_DIGITS)}}}", text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)
    text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2] or m[3]}}}", text)
    text = _ESCAPED_TWICE.sub(lambda _: "\\", text).replace("{,}", ",").replace("\\%", "%")
    text = re.sub(r"\\boxed\s*+\{(?=[^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+$)", "", text)  # never closed
    text = re.sub(r"(?<=[\d)])\s*+(and|or)(?=[\d(A-Z\s])", r" \1 ", text)
    if _TRIGONOMETRY.search(text):
        text = _DEGREES.sub(r"{(\1 \\pi / 180)}", text)
    text = _LAYOUT.sub("", _SPACES.sub(" ", text))
    if text.count("$") - text.count("\\$") <= 1:  # not the marks of a formula
        text = _AMOUNT_OF_MONEY.sub(
            lambda m: f"{m[2] or m[3]} {_CURRENCIES[(m[1] or m[4])[-1]]} ", text
        )
    text = re.sub(r"\\?[$£€¥₹]", "", text)
    text = re.sub(r"^(?:\\approx|≈|~|approximately|about|roughly)\s*", "", text.strip(), flags=re.I)
    text = re.sub(
        r"^(?:all real numbers|all reals|the real numbers)$", r"\\mathbb{R}", text, flags=re.I
    )
    return text.strip().rstrip(".,;").strip()


def _unwrapped(text: str) -> str:
    r"""The text without \text{...}; the letter of a unit in it becomes a word: `\text{ m}`."""

    def words(match: re.Match) -> str:
        return f" {_LETTERS.get(match[1].strip(), match[1])} " if match[1].strip() else " "

    return _TEXT.sub(words, text)


def _letters(text: str) -> str:
    """The text without white space but between digits; words also without case and article."""
    text = re.sub(r"^(?:the|an?)\s+(?=[a-z]{3})", "", _TEXT.sub(r"\1", text), flags=re.IGNORECASE)
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d|\s)", "", text)
    text = re.sub(r"^\((\w)\)$", r"\1", text)
    if "\\" in text or not re.search(r"[^\W\d_]{2}", text):
        return text
    return text.casefold()


# --- units ---

_LETTERS = {
    "m": "meters", "g": "grams", "l": "liters", "L": "liters", "s": "seconds", "h": "hours",
    "N": "newtons", "J": "joules", "W": "watts", "V": "volts", "K": "kelvin",
}  # fmt: skip
_UNITS = {
    word: name
    for name, words in {
        "dollar": "dollar bucks buck usd", "cent": "cent", "euro": "euro eur", "yen": "yen",
        "rupee": "rupee", "pound": "pound lb gbp", "ounce": "ounce oz", "ton": "ton tonne",
        "second": "second sec", "minute": "minute min", "hour": "hour hr", "day": "day",
        "week": "week wk", "month": "month", "year": "year yr",
        "mm": "mm millimeter millimetre", "cm": "cm centimeter centimetre",
        "meter": "meter metre", "km": "km kilometer kilometre", "inch": "inch inches in",
        "foot": "foot feet ft", "yard": "yard yd", "mile": "mile mi",
        "mg": "mg milligram", "gram": "gram", "kg": "kg kilogram",
        "ml": "ml milliliter millilitre", "liter": "liter litre", "cup": "cup", "pint": "pint",
        "quart": "quart", "gallon": "gallon gal", "mile/hour": "mph", "km/hour": "kph kmh",
        "celsius": "celsius", "fahrenheit": "fahrenheit", "kelvin": "kelvin",
        "newton": "newton", "joule": "joule", "watt": "watt", "volt": "volt",
    }.items()
    for word in words.split()
}  # fmt: skip
_RATE = re.compile(
    r"(?<![a-zA-Z\\])(km|cm|mm|m|ft|mi|kg|g|l|L)\s*/\s*(hr|h|sec|s|min|day)(?![a-zA-Z])"
)


def _unit(words: str) -> str | None:
    """The common name of a unit: `square feet`, `ft^2` -> `foot2`; None for words it knows not."""
    found: list[str] = []
    power, over = "", False
    for token in re.findall(r"[a-z]+|\^\{?\d\}?|\S", words.lower()):
        if token in ("square", "sq", "cubic", "cu"):
            power = "2" if token.startswith("sq") else "3"
        elif token in ("per", "/"):
            over = True
        elif token in ("squared", "cubed") or token.startswith("^"):
            if not found:
                return None
            found[-1] += (
                "2" if token == "squared" else "3" if token == "cubed" else token.strip("^{}")
            )
        elif token in ("degree", "degrees", "."):
            continue
        else:
            name = _UNITS.get(token) or _UNITS.get(token.removesuffix("s"))
            if name is None:
                return None
            found.append(("/" if over else "") + name + power)
            power = ""
    return "".join(found) or None


def _agree(first: str | None, second: str | None) -> bool:
    """Whether two names agree; a name that only one has does not count."""
    return first is None or second is None or first == second


# --- numbers ---

_AMOUNT = re.compile(
    r"(?:^[-+]\s*+|(?<![\d.])[-+])?(?:(?:\d++\s++)?\d++\s*+/\s*+\d++(?![\d.])"
    r"|(?:\d++(?:\.\d*+)?+|\.\d++)(?:e[-+]?\d{1,2}(?!\d))?)",
    re.IGNORECASE,
)
# all other words of one or two letters are variables
_SHORT_WORDS = re.compile(
    r"cm|mm|km|kg|mg|ml|ft|in|lb|oz|hr|mi|yd|sq|cu|is|he|we|it|an|at|by|so|of|to|on|up"
    r"|my|us|me|if|be|as|no|or"
)
_WORD = re.compile(r"[^\W\d_]+")
_NO_UNITS = re.compile(  # words that change the number beside them
    r"\b(?:and|or|half|halves|thirds?|quarters?|times|plus|minus|negative|than|not|never|no|isn't"
    r"|least|most|between|except|without|if|mod|modulo|base|twice|double|triple|squared|cubed"
    r"|sqrt|sin|cos|tan|log|ln|exp|pi|hundreds|thousands|[mb]illions|a\.?m|p\.?m)\b",
    re.IGNORECASE,
)
_MULTIPLES = {
    "dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9,
    "trillion": 10**12,
}  # fmt: skip
_SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
]  # fmt: skip
_TENS = [
    "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
]  # fmt: skip
_NUMBER_WORDS = {word: k for k, word in enumerate(_SMALL)} | {
    word: 10 * k for k, word in enumerate(_TENS, 2)
}
_IN_WORDS = re.compile(
    rf"({'|'.join(_TENS)})(?:[ -]({'|'.join(_SMALL[1:10])}))?\b|({'|'.join(_SMALL)})\b"
)
_PERCENT = re.compile(r"\s*(?:%|\b(?:percent|per\s+cent|percentage|pct)\b)", re.IGNORECASE)


class _Number(NamedTuple):
    value: Fraction
    decimals: int  # written behind the point; 0 for a fraction
    unit: str | None
    percent: bool
    comma: bool  # written with a decimal comma, or a list of two integers


def _number(text: str) -> _Number | None:
    """The value of a line with one number and perhaps a unit (`18 dollars`, `1,234`, `2 1/2`)."""
    if "\n" in text:
        return None
    before, _, text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text).rpartition("=")
    if before and re.search(r"[,;:(]|\.\s|\b(?:and|or|since|because|as|so|if)\b", before):
        return None  # `9 eggs * $2 = $18` states 18, but `4, since 2 + 3 = 5` does not state 5
    text = _RATE.sub(
        lambda m: f" {_LETTERS.get(m[1], m[1])}/{_LETTERS.get(m[2], m[2])} ", _unwrapped(text)
    )
    text = _FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", text).strip()
    text = re.sub(r"^([-+])\s+", r"\1", text)
    text = re.sub(r"^(?:negative|minus)\s+(?=[\d.a-z])", "-", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text)
    if re.fullmatch(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?", text):
        text = text.replace(" ", "")
    if re.fullmatch(r"[-+]?\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?", text):  # 1.234.567,5
        text = text.replace(".", "")
    comma = bool(re.match(r"[-+]?(?:\d+,(?!\d{3}(?!\d))|0,)\d+(?![\d,.])", text))
    if comma:
        text = text.replace(",", ".", 1)
    percent = _PERCENT.search(text)
    text = _PERCENT.sub(" ", text)
    amounts = list(_AMOUNT.finditer(text))
    in_words = None
    if not amounts and (word := _IN_WORDS.match(text.lower().removeprefix("-"))):
        begin = text.startswith("-")
        spelled = sum(_NUMBER_WORDS[w] for w in word.groups() if w)
        in_words = text[begin + word.end() :].strip() or None
        text = ("-" if begin else "") + f"{spelled} {text[begin + word.end() :]}"
        amounts = list(_AMOUNT.finditer(text))
    if len(amounts) != 1:
        return None
    (amount,) = amounts
    left, right = text[: amount.start()], text[amount.end() :]
    tail = re.sub(r"(?<=[a-z]{2})\s*\^\{?[23]\}?", "", right)  # square and cubic units
    if (
        re.search(r"[^\w\s.,;:'\"/-]|_", left + tail)
        or re.search(r"\d\s*-?[a-zA-Z]$|[a-zA-Z]$", left)
        or _has_variables(f"{before} {left} {tail}")
        or _NO_UNITS.search(f"{left} {tail}")
        or re.search(r"\b(?:of|to)\s*$", left)  # half of 18
        or re.match(r"\s*to\b", right)
    ):
        return None
    value = _fraction(amount[0])
    if value is None:
        return None
    multiple = re.match(
        rf"\s*(?:dollars\s+|euros\s+)?({'|'.join(_MULTIPLES)})\b", right, re.IGNORECASE
    )
    if multiple:
        value *= _MULTIPLES[multiple[1].lower()]
        right = right.replace(multiple[1], " ", 1)
    decimals = len(amount[0].partition(".")[2]) if "e" not in amount[0].lower() else 0
    return _Number(value, decimals, _unit(right) or in_words, bool(percent), comma)


_PARTS = re.compile(r"(?:(\d++)\s++)?(\d++)\s*+/\s*+(\d++)")


def _fraction(digits: str) -> Fraction | None:
    """The value of `3/4`, `2 3/4`, `.5`, `1e3`; None for a division by zero."""
    sign = -1 if digits.startswith("-") else 1
    digits = digits.lower().lstrip("+- ")
    if parts := _PARTS.fullmatch(digits):
        whole, over, under = (int(part or 0) for part in parts.groups())
        return sign * (whole + Fraction(over, under)) if under else None
    return sign * Fraction(re.sub(r"\.$|\.(?=e)", "", digits))


def _written(number: _Number) -> str:
    """The number for math-verify, which rounds decimals but not fractions."""
    value, places = number.value, number.decimals
    if places and (value * 10**places).denominator == 1:
        digits = str(abs(value * 10**places)).zfill(places + 1)
        text = f"{'-' * (value < 0)}{digits[:-places]}.{digits[-places:]}"
    else:
        text = str(value)
    return text + r"\%" * number.percent


def _same_number(first: _Number, second: _Number) -> bool:
    if not _agree(first.unit, second.unit):
        return False
    if first.value == second.value:
        return True
    if first.percent != second.percent:  # 50% is 0.5, and 50 where the question asks for percent
        return first.value * (100 if second.percent else 1) == second.value * (
            100 if first.percent else 1
        )
    return _rounded(first, second) or _rounded(second, first)


def _rounded(decimal: _Number, exact: _Number) -> bool:
    """Whether a decimal with at least 6 places is a fraction without end, cut off: 0.333333."""
    if decimal.decimals < 6 or exact.decimals or abs(decimal.value) < Fraction(1, 100):
        return False
    unending = (exact.value * 10**LONGEST).denominator > 1
    rounded = round(exact.value, decimal.decimals)
    cut = Fraction(int(exact.value * 10**decimal.decimals), 10**decimal.decimals)
    return unending and decimal.value in (rounded, cut)


def _has_variables(text: str) -> bool:
    """Whether the text has a variable: a word of one or two letters that is not English (`3xy`)."""
    return any(
        len(word) < 3 and not _SHORT_WORDS.fullmatch(word.lower()) and word != "a"
        for word in _WORD.findall(text)
    )


# --- what is no number: times, dates, bases, choices, words ---


class _Time(NamedTuple):
    hour: int  # 0..24
    minutes: str  # `30`, or `30:05`
    half: str | None  # `a` or `p`, if it is given


_TIME = re.compile(
    r"(\d{1,2})(?:\s?:\s?(\d{2}(?:\s?:\s?\d{2})?))?\s?(?:o'clock)?(?:\s?in the morning)?"
    r"|(\d{1,2})(?:\s?[:.]\s?(\d{2}(?:\s?:\s?\d{2})?))?\s*([ap])\s?\.?\s?m\.?",
    re.IGNORECASE,
)
_NOON = {"noon": "12 pm", "midday": "12 pm", "midnight": "12 am"}


def _time(text: str) -> _Time | None:
    """`4:30 PM`, `7 a.m.`, `16:30`, `noon`; a lone number can be an hour too."""
    text = re.sub(r"^(?:at\s+|12\s+(?=noon|midnight))", "", text.strip().lower())
    match = _TIME.fullmatch(_NOON.get(text, text))
    if not match or int(match[1] or match[3]) > 24:
        return None
    minutes = (match[2] or match[4] or "00").replace(" ", "")
    return _Time(int(match[1] or match[3]), minutes, match[5])


def _same_time(first: _Time, second: _Time) -> bool:
    if not (first.half or second.half):  # it may be a ratio: 1:12 is not 13:12
        return first == second
    halves = [t.half or ("p" if 12 < t.hour < 24 else None) for t in (first, second)]
    same_hour = (first.hour - second.hour) % 12 == 0
    return same_hour and first.minutes == second.minutes and _agree(*halves)


_MONTHS = [
    "january", "february", "march", "april", "may", "june", "july", "august", "september",
    "october", "november", "december",
]  # fmt: skip
_DAYS = [
    "monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday",
]  # fmt: skip
_MONTH_OF = {month: k for k, month in enumerate(_MONTHS, 1)} | {
    month[:3]: k for k, month in enumerate(_MONTHS, 1)
}


def _date(text: str) -> tuple[int, list[int]] | None:
    """(month, other numbers) of `May 5`, `5th of May, 2020`, `May`."""
    words = re.findall(r"[^\W_]+", re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text.lower()))
    words = [word for word in words if word not in ("of", "the", "on", "in", *_DAYS)]
    months = [_MONTH_OF[word] for word in words if word in _MONTH_OF]
    numbers = [int(word) for word in words if re.fullmatch(r"[0-9]{1,4}", word)]
    if len(months) != 1 or len(words) != 1 + len(numbers) or len(numbers) > 2:
        return None
    return months[0], sorted(numbers)


_BASED = re.compile(
    r"\(?([-+]?(?=[a-z.]*\d)[\da-z.]+)\)?\s*(?:_\s*\{?\s*(?:\(?base\s*)?(\w+)\)?\s*\}?"
    r"|\(?\s*,?\s*(?:in\s+)?base\s*[- ]?(\w+)\s*\)?)",
    re.IGNORECASE,
)


def _based(text: str) -> tuple[str, str] | None:
    """(digits, base) of `4210_{5}`, `A5_{11}`, `4210 (base five)`."""
    match = _BASED.fullmatch(text)
    if not match:
        return None
    base = (match[2] or match[3]).lower()
    return match[1].lower().lstrip("0"), str(_NUMBER_WORDS.get(base, base))


def _same_based(first: str, second: str) -> bool | None:
    """None if neither names a base."""
    texts = [" ".join(_unwrapped(text).split()) for text in (first, second)]
    bases = [_based(text) for text in texts]
    if not any(bases):
        return None
    digits = [
        based[0] if based else text.lower().lstrip("0")
        for based, text in zip(bases, texts, strict=True)
    ]
    return digits[0] == digits[1] and _agree(*(based and based[1] for based in bases))


_CHOICE = r"(?:[A-Z]|\(?[A-Za-z]\))"
_CHOICES = re.compile(rf"{_CHOICE}(?:\s*(?:,\s*and|,|and)\s*{_CHOICE})*")
_RATIO = re.compile(r"\d+(?:\s*:\s*\d+)+|\d+\s+to\s+\d+(?:\s+to\s+\d+)*")
_NOTHING = re.compile(
    r"\\(?:emptyset|varnothing)|\\\{\s*\\\}|(?:the )?empty set"
    r"|(?:there (?:is|are) )?no (?:real )?solutions?"
)


def _choices(text: str) -> list[str] | None:
    """The letters of `B`, `(B)`, `A, C and E`; their order does not matter."""
    if not _CHOICES.fullmatch(text):
        return None
    return sorted(letter.upper() for letter in re.findall(r"\b[A-Za-z]\b", text))


def _ratio(text: str) -> list[int] | None:
    """The numbers of `3:5`, `AB:CD = 3:5`, `3 to 5`."""
    text = text.rpartition("=")[2].strip()
    return [int(number) for number in re.findall(r"\d+", text)] if _RATIO.fullmatch(text) else None


def _nothing(text: str) -> bool:
    return _NOTHING.fullmatch(text.lower()) is not None


_KNOWN_WORDS = re.compile(r"and|inf|infinity|infty|sqrt|pi|sin|cos|tan|log|ln|exp")
# functions in the notation of a programming language
_FUNCTIONS = re.compile(r"(?<![a-zA-Z\\])(sqrt|pi|sin|cos|tan|log|ln|exp|infty)(?![a-zA-Z])")


def _is_prose(text: str) -> bool:
    """Whether the text is words (not a product of one-letter variables), a time, or a ratio."""
    text = re.sub(r"\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+", " ", text)
    if re.fullmatch(r"[^\W\d_]{4,}", text.strip()) or re.search(r"\d\s*:\s*\d", text):
        return True
    words = [word for word in _WORD.findall(text) if len(word) > 2]
    return text.strip() not in words and not all(map(_KNOWN_WORDS.fullmatch, words))


_UNIT_BEHIND = re.compile(
    r"\\(?:text|textbf|textrm|textnormal|mbox|mathrm)\s*\{([^{}]*)\}(\s*\^\s*\{?[23]\}?)?$"
    r"|(?<=[\d)}])(?:\s*(?=[a-zA-Z/]{2}|/)|\s+(?=[mgslhLNJWVK](?:\^\{?[23]\}?)?$))((?:[a-zA-Z]+\.?\s*|/\s*)+(?:\^\{?[23]\}?)?)$"
)


def _without_unit(text: str) -> tuple[str, str | None]:
    """(expression, unit) of `12\\sqrt{13}\\text{ feet}`; any words in \\text{} can be a unit."""
    match = _UNIT_BEHIND.search(text)
    if not match or not match.start():
        return text, None
    words = match[1] if match[1] is not None else match[3]
    power = match[2] or ""
    words = re.sub(r"^\s*([a-zA-Z])(?![a-zA-Z])", lambda m: _LETTERS.get(m[1], m[1]), words)
    unit = _unit(words + power)
    if match[1] is None and unit is None:
        return text, None
    if (
        len(words.split()) > 4
        or _NO_UNITS.search(words)
        or not re.fullmatch(r"[\w\s./^'-]*", words)
    ):
        return text, None
    return text[: match.start()].strip(), unit


# --- comparison ---


def same_answer(answer: str | None, reference: str) -> bool:
    """Whether two answers mean the same. It is the same in both directions.

    Raises RuntimeError if an answer needs math-verify and its process cannot be started."""
    if answer is None:
        return False
    answer, reference = answer.strip(), reference.strip()
    if answer == reference:
        return bool(answer)
    plain = _PLAIN.fullmatch(answer), _PLAIN.fullmatch(reference)
    if plain[0] and plain[1]:
        return _digits(plain[0]) == _digits(plain[1])
    if _same(_tidy(answer), _tidy(reference)):
        return True
    said = [_said(text) or text for text in (answer, reference)]
    return said != [answer, reference] and _same(*map(_tidy, said))


_PLAIN = re.compile(r"([-+]?)0*+([0-9]*+)(?:\.([0-9]*+))?(?<=[0-9])")


def _digits(number: re.Match) -> tuple[str, str, bool]:
    """Of a plain number: the digits before and behind the point, and whether it is negative."""
    whole, part = number[2], (number[3] or "").rstrip("0")
    return whole, part, number[1] == "-" and bool(whole or part)


def _same(first: str, second: str) -> bool:
    if _letters(first) == _letters(second) != "":
        return True
    if not first or not second or max(len(first), len(second)) > LONGEST:
        return False
    same_based = _same_based(first, second)
    if same_based is not None:
        return same_based
    words = [" ".join(_unwrapped(text).split()) for text in (first, second)]
    times = [time for time in map(_time, words) if time]
    if len(times) == 2 and (any(":" in text for text in words) or any(t.half for t in times)):
        return _same_time(times[0], times[1])
    dates = _date(words[0]), _date(words[1])
    if any(dates):
        return dates[0] == dates[1]
    for kind in (_choices, _ratio, _nothing):
        readings = [kind(text) for text in words]
        if all(readings):
            return readings[0] == readings[1]
    one, other = _number(first), _number(second)
    if one and other and not (one.comma and other.comma):
        return _same_number(one, other)
    return _same_otherwise((first, second), (one, other))


def _same_otherwise(texts: tuple[str, str], numbers: tuple[_Number | None, ...]) -> bool:
    """The comparison by math-verify of two expressions, of which one can be a number."""
    expressions, units = [], []
    for text, number in zip(texts, numbers, strict=True):
        if number and not number.comma:
            expression, unit = _written(number), number.unit
        else:
            expression, unit = _without_unit(text)
            if _is_prose(expression) or len(re.findall(r"[(\[{]", expression)) > DEEPEST:
                return False
        expressions.append(_latex(expression))
        units.append(unit)
    if not _agree(*units) or _differ(*expressions):
        return False
    return same_expression(*sorted(expressions))


def _differ(first: str, second: str) -> bool:
    """Whether two expressions differ that math-verify takes for the same.

    It reads capital letters as small ones and words as products, and takes a set for a point, and
    x + y = 5 for 5."""
    names = [
        re.findall(r"\\[a-zA-Z]+|[a-zA-Z]", text.rpartition("=")[2]) for text in (first, second)
    ]
    if set(names[0]) != set(names[1]) and {n.lower() for n in names[0]} == {
        n.lower() for n in names[1]
    }:
        return True
    if first.isalpha() and second.isalpha():
        return True
    for one, other in ((first, second), (second, first)):
        if one.startswith(r"\{") and re.match(r"[(\[].*,.*[)\]]$", other):
            return True
        left = re.sub(r"_\{[^{}]*\}", "", one.partition("=")[0])
        if "=" in one and "=" not in other and re.search(r"\+|\w\s*-", left):
            return True
    return False


def _latex(text: str) -> str:
    text = re.sub(r"\\(?:text|mbox|textrm)\{\s*,?\s*(?:and|or)\s*,?\s*\}", ", ", text)
    text = re.sub(r",\s*,", ",", text)
    text = re.sub(r"\bsqrt\(([^()]*)\)", r"\\sqrt{\1}", text.replace("**", "^"))
    text = re.sub(r"(?<![a-zA-Z\\])(?:infinity|inf)(?![a-zA-Z])", r"\\infty", text)
    text = re.sub(r"([)\]])\s*U\s*([(\[])", r"\1 \\cup \2", text)
    return _FUNCTIONS.sub(r"\\\1", text)


# --- sentences ---

_FORMULA = re.compile(  # a formula in a line does not go on in the next
    r"\$\$([^$]++)\$\$|\$((?:[^$\\\n]|\\[^\n])++)\$|\\\(((?:[^\\\n]|\\(?![()]))++)\\\)"
    r"|\\\[((?:[^\\]|\\(?![\[\]]))++)\\\]"
)
_SAYS = re.compile(r"\b(?:is|are|equals|it's|be)\s+", re.IGNORECASE)
_COLON = re.compile(r"^[^\W\d_][^\d:,;]*+:\s+(?=[^:]*+$)")
_JOINT = re.compile(r"(?:[\s,;]|and|or)*+")
_CLOSING_WORDS = re.compile(r"I hope (?:it|this) is correct|<\|\w+\|>\w*")


def _said(text: str) -> str | None:
    """What a text says: the last formulas of its last sentence, or what follows the last `is`.

    None if the text is no sentence. `Therefore $x = 5$ is the solution.` -> `x = 5`"""
    text = _CLOSING_WORDS.split(text[-LONGEST_TEXT:].strip(), maxsplit=1)[0].strip()
    formulas = list(_FORMULA.finditer(text))
    if formulas and formulas[0].span() == (0, len(text)):
        return None
    starts = [formula.start() for formula in formulas]
    begin = 0
    for match in re.finditer(r"(?<=[.!?])\$*\s+(?=[A-Z])", text):
        k = bisect.bisect(starts, match.end()) - 1
        if k < 0 or formulas[k].end() <= match.end():
            begin = match.end()
    formulas = formulas[bisect.bisect_left(starts, begin) :]
    if not formulas:
        sentence = text[begin:]
        says = list(_SAYS.finditer(sentence)) or list(_COLON.finditer(sentence))
        return sentence[says[-1].end() :] if says else sentence if begin else None
    results = [formulas.pop()]
    while formulas and _JOINT.fullmatch(text, formulas[-1].end(), results[0].start()):
        results.insert(0, formulas.pop())
    before = re.findall(r"[\w']+", text[max(begin, results[0].start() - 40) : results[0].start()])
    if re.search(rf"{_NO_UNITS.pattern}|\bof$", " ".join(before[-2:]), re.IGNORECASE):
        return None  # half of $18$
    return ", ".join(next(filter(None, formula.groups())).strip() for formula in results)
