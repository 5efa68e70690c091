"""The campaigns that do not break single steps, as the catalogue wants them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.campaigns.result import Result

COMMANDS = ("train", "compare", "sweep")


def killed(count: int, seed: int) -> Result:
    """SIGKILLs of all commands, most of them of `train`."""
    from tests.campaigns.kills import kills

    result = Result()
    for command in COMMANDS:
        share = count // 5 if command != "train" else count - 2 * (count // 5)
        if share == 0:
            continue
        found = kills(command, share, seed)
        result.cases += found["kills"]
        result.outcomes["runs"] += found["chains"]
        wrong = {"cannot be resumed": found["not_resumable"], "differs": found["differ"]}
        result.wrong.update({kind: number for kind, number in wrong.items() if number})
        result.details += [f"{command}: {line}" for line in found["lines"]]
    return result


def files(count: int, seed: int) -> Result:
    from tests.campaigns.hostile_files import hostile_files

    return _read(hostile_files(count, seed))


def ops(count: int, seed: int) -> Result:
    from tests.campaigns.fuzz_ops import OPS, fuzz_ops

    found = fuzz_ops(-(-count // len(OPS)), seed)
    wrong = [f"{name}: {one}" for name, part in found["ops"].items() for one in part["first"]]
    return _read({**found, "wrong": {"wrong results": found["wrong"]}, "details": wrong})


def native(count: int, seed: int) -> Result:
    from tests.campaigns.hostile_calls import hostile_calls

    return _read(hostile_calls(count, seed))


def _read(found: dict[str, Any]) -> Result:
    wrong = found["wrong"] if isinstance(found["wrong"], dict) else {"wrong": found["wrong"]}
    details = [str(one) for one in found.get("details", [])]
    counted = Counter({kind: number for kind, number in wrong.items() if number})
    return Result(found["cases"], Counter(found.get("outcomes", {})), counted, details)
