"""Text from outside (of models, servers and files) as a terminal may show it."""

import re

# C0 without tab and newline, DEL and C1; marks that reverse or hide the order of letters; line
# separators; halves of surrogate pairs
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: object) -> str:
    """str(text) with every control character as its escape: ESC becomes the four letters `\\x1b`.

    A terminal obeys such characters: they move the cursor, hide or recolour text, set the title or
    fill the clipboard. Newlines and tabs stay, and a Windows line end becomes a newline."""
    plain = str(text).replace("\r\n", "\n")
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], plain)
