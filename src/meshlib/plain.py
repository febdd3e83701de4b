"""Text from outside, as it may stand in a log, on a terminal or on a page.

Decides that nothing in it can move a cursor, begin a new line or turn the direction of writing, and that it ends.
"""

from __future__ import annotations

LONGEST = 500


def printable(text: str) -> str:
    """The text on one line, with what cannot be printed escaped."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def plain(text: str, longest: int = LONGEST) -> str:
    """The same, and cut if it is longer than so many characters."""
    if not text.isprintable():
        text = printable(text[: longest + 1])
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
