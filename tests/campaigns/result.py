"""What a campaign found: how many cases, how they ended, and what is wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

SHOWN = 40  # violations that are kept with their words, of each part


@dataclass
class Result:
    """Of a campaign or a part of one; results add up."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)

    def add(self, other: Result) -> None:
        self.cases += other.cases
        self.outcomes.update(other.outcomes)
        self.wrong.update(other.wrong)
        self.details = [*self.details, *other.details][:SHOWN]

    def violate(self, kind: str, what: str) -> None:
        self.wrong[kind] += 1
        if len(self.details) < SHOWN:
            self.details.append(f"{kind}: {what}")

    def as_json(self) -> dict[str, Any]:
        counted = {"outcomes": dict(self.outcomes), "wrong": dict(self.wrong)}
        return {"cases": self.cases, **counted, "details": self.details}


def read(found: dict[str, Any]) -> Result:
    """A result that went through JSON."""
    result = Result(int(found["cases"]))
    result.outcomes.update(found.get("outcomes", {}))
    result.wrong.update({kind: count for kind, count in found.get("wrong", {}).items() if count})
    result.details = [str(one) for one in found.get("details", [])][:SHOWN]
    return result
