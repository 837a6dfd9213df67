"""The plan: which parameter goes to which optimizer."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PlanEntry:
    """One trainable parameter: what it is and who updates it.

    Attributes:
        path: Its path in the model.
        shape: Its shape.
        role: One of ``roles.ROLES``.
        optimizer: Label of the member that updates it.
        rate: That member's rate, or the peak of its schedule where it is known, when it was made.
        layout: How it holds matrices, see ``functional.LAYOUTS``.
        state_bytes: Bytes of its optimizer state.
        note: "guessed" for a head that was found last of all, "unexplained" for an array that
            belongs to no layer the router knows, else empty.
    """

    path: str
    shape: tuple[int, ...]
    role: str
    optimizer: str
    rate: float
    layout: str
    state_bytes: int
    note: str


class Plan(tuple[PlanEntry, ...]):
    """The trainable parameters, in order of definition. ``print(plan)`` shows them as a table."""

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state in all."""
        return sum(entry.state_bytes for entry in self)

    def __repr__(self) -> str:
        header = ("path", "shape", "role", "optimizer", "rate", "state bytes")
        rows = [
            (
                e.path,
                str(e.shape),
                f"{e.role} ({e.note})" if e.note else e.role,
                e.optimizer,
                f"{e.rate:.2g}",
                f"{e.state_bytes:,}",
            )
            for e in self
        ]
        total = (f"{len(self)} parameters", "", "", "total", "", f"{self.state_bytes:,}")
        return table([header, *rows, total], left=4)


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns, the first ``left`` ones to the left, the others right; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = [map(str.ljust, row[:left], widths) for row in rows]
    numbers = [map(str.rjust, row[left:], widths[left:]) for row in rows]
    head, *body = ("  ".join([*a, *b]).rstrip() for a, b in zip(texts, numbers, strict=True))
    return "\n".join([head, "  ".join("-" * width for width in widths), *body])
