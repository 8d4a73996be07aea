r"""Formulas become MathML; nothing else of a text becomes markup."""

import html
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.formulas import ATTRIBUTES, TAGS, html_with_formulas


class Page(HTMLParser):
    """The tags, attributes and texts of HTML."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.names, self.text = [], set(), ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize(
    ("text", "tags", "shown"),
    [
        (r"so $\frac{1}{2}$ is left", {"mfrac"}, "so 12 is left"),
        (r"$x^2$, then \(y_1\)", {"msup", "msub"}, "x2, then y1"),
        (r"\[\sqrt{a+b}\]", {"msqrt"}, "a+b"),
        ("$$\\sum_{i=1}^n i$$", {"mo"}, "∑i=1ni"),
        (r"$x$-axis, ($n$)", {"mi"}, "x-axis, (n)"),
        (r"$\begin{matrix}1&2\\3&4\end{matrix}$", {"mtable"}, "1234"),
    ],
)
def test_formulas_are_mathml(text, tags, shown):
    page = Page(html_with_formulas(text))
    assert {"math", *tags} <= set(page.tags)
    assert re.sub(r"[\s\u2061-\u2064]", "", page.text) == shown.replace(" ", "")


@pytest.mark.parametrize(
    "text",
    [
        "She pays $5 and has $6 left.",
        "from $5-$6, or ($7)",
        "$3.50, $4.20 and 5$",
        "`${a}`-${b} ${a}${b}",
        "US$5 and CA$6",
        r"\$5 and \$6",
        r"$\frac{1$",
        r"$\nosuchcommand{x}$",
        "$$ $$",
        "$ x $",
        "a $",
        "$" + "x" * 3000 + "$",
        "<b>1 < 2 & 3</b>",
    ],
)
def test_other_texts_stay_as_they_are(text):
    assert html.unescape(html_with_formulas(text)) == text
    assert not Page(html_with_formulas(text)).tags


EVIL = [
    r"$\href{javascript:alert(1)}{x}$",
    r"$\text{<script>alert(1)</script>}$",
    r"$\text{</math><img src=x onerror=alert(1)>}$",
    r"$\style{background:url(//example.org)}{x}$",
    r"$\class{a}{x} \cssId{b}{y} \color{red}{z}$",
    r"\(<img src=x onerror=alert(1)>\)",
    r"$x \unicode{60}script$",
    "$" + "{" * 1900 + "x" + "}" * 1900 + "$",
    r"$\includegraphics{//example.org/x.png}$",
]


@pytest.mark.parametrize("text", EVIL)
def test_a_formula_brings_no_code_and_no_link(text):
    page = Page(html_with_formulas(text))
    assert set(page.tags) <= TAGS and page.names <= {*ATTRIBUTES, "alttext"}


@pytest.mark.property
@given(
    st.lists(st.sampled_from([*"$$\\(){}[]<>&;^_ \n1x\"'", "\\frac", "\\text", "<b>"]), max_size=30)
)
def test_no_text_becomes_other_markup(parts):
    page = Page(html_with_formulas("".join(parts)))
    assert set(page.tags) <= TAGS and page.names <= {*ATTRIBUTES, "alttext"}
