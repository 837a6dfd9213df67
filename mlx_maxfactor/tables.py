"""Tables of text, for a terminal."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns, the first ``left`` ones to the left, the others right; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = [map(str.ljust, row[:left], widths) for row in rows]
    numbers = [map(str.rjust, row[left:], widths[left:]) for row in rows]
    head, *body = ("  ".join([*a, *b]).rstrip() for a, b in zip(texts, numbers, strict=True))
    return "\n".join([head, "  ".join("-" * width for width in widths), *body])
