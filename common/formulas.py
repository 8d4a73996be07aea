r"""LaTeX formulas in a text as MathML, which browsers draw by themselves; all else is escaped.

A formula stands between `$ $`, `$$ $$`, `\( \)` or `\[ \]`. Sums of money are no formulas: as in
Pandoc's Markdown, no space follows the first `$` or precedes the last, and no digit follows it.
"""

import html
import re
from xml.etree import ElementTree

FORMULA = re.compile(
    r"\$\$(?P<display>[^$]+)\$\$|\\\[(?P<bracket>.+?)\\\]|\\\((?P<inline>.+?)\\\)"
    r"|(?<![\\$\w])\$(?![\s$])(?P<dollar>[^$`\n]*[^$`\s\\])\$(?![\w{$])",
    re.DOTALL,
)
LONGEST = 2000  # characters of a formula; a longer one is shown as plain text
# What of MathML Core a formula needs. It has no links, no styles and no scripts.
TAGS = {
    *("math", "menclose", "mfrac", "mi", "mmultiscripts", "mn", "mo", "mover", "mpadded"),
    *("mphantom", "mprescripts", "mroot", "mrow", "ms", "mspace", "msqrt", "mstyle", "msub"),
    *("msubsup", "msup", "mtable", "mtd", "mtext", "mtr", "munder", "munderover", "none"),
}
ATTRIBUTES = {
    *("accent", "columnalign", "columnlines", "columnspacing", "depth", "display", "displaystyle"),
    *("fence", "form", "height", "largeop", "linethickness", "lspace", "mathvariant", "maxsize"),
    *("minsize", "movablelimits", "notation", "rowlines", "rowspacing", "rspace", "scriptlevel"),
    *("separator", "stretchy", "symmetric", "voffset", "width"),
}


def html_with_formulas(text: str) -> str:
    """The text as HTML: its formulas as MathML, everything else escaped.

    What is no LaTeX, or LaTeX that cannot be converted, stays as it was written."""
    shown, end = [], 0
    for match in FORMULA.finditer(text):
        shown += [html.escape(text[end : match.start()]), _math_of(match)]
        end = match.end()
    return "".join([*shown, html.escape(text[end:])])


def _math_of(match: re.Match[str]) -> str:
    kind = match.lastgroup or ""
    source, is_block = match[kind], kind in ("display", "bracket")
    plain = re.sub(r"\\\\|\\[{}]", "", source)
    is_prose = (
        kind == "dollar" and re.search("[a-zA-Z]{3}", source) and not set(source) & {*"\\^_="}
    )
    if is_prose or len(source) > LONGEST or plain.count("{") != plain.count("}"):
        return html.escape(match[0])
    from latex2mathml.converter import convert  # reads a table of all symbols

    try:
        found = ElementTree.fromstring(convert(source, display="block" if is_block else "inline"))
    # it raises errors of many kinds, IndexError and RecursionError among them
    except Exception:
        return html.escape(match[0])
    for element in found.iter():
        element.tag = element.tag.rpartition("}")[2]
        is_unknown = (element.text or "").startswith("\\")  # a command that it does not know
        if is_unknown or element.tag not in TAGS:
            return html.escape(match[0])
        for name in set(element.attrib) - ATTRIBUTES:
            del element.attrib[name]
    found.set("alttext", source)  # for readers of screens, and what is copied
    return ElementTree.tostring(found, encoding="unicode", short_empty_elements=False)
