"""The diffs of docs/recipes.md for other people's scripts: their lines run in such loops, and train as they should."""

from __future__ import annotations

import contextlib
import re
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastadv
from tests.distributed.workers import waves
from tests.integrations import by_hand
from tests.support import assert_close, seeded

PAGE = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
SCRIPTS = ["train.py", "run_glue_no_trainer.py", "run_clm_no_trainer.py"]
HUNK = re.compile(r"^@@ -(\d+),\d+ \+\d+,\d+ @@.*\n((?:[ +-].*\n|\n)+)", re.MULTILINE)
RADII: dict[str, Any] = {"epsilon": 0.1, "step_size": 0.05, "scope": "sample", "relative": True}
PARTS, STEPS = 2, 2  # micro-batches of an optimizer step, and optimizer steps
SYNCING_LOOP = """
{made}
for _ in range(steps):
    for part in range(gradient_accumulation_steps):
        model.require_backward_grad_sync = part == gradient_accumulation_steps - 1
        {step}
        X, Y = get_batch("train")
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
"""
DIVIDING_LOOP = """
{made}
for number, batch in enumerate(batches):
    {step}
    if (number + 1) % args.gradient_accumulation_steps == 0:
        optimizer.step()
        optimizer.zero_grad()
"""
ACCUMULATING_LOOP = """
{made}
for batch in batches:
    with accelerator.accumulate(model):
        {step}
        optimizer.step()
        optimizer.zero_grad()
"""


def diff(script: str) -> str:
    """The page's diff for that script, as it is shown there."""
    found = re.search(rf'^```diff title="{script}"\n(.*?)^```', PAGE, re.DOTALL | re.MULTILINE)
    assert found, script
    return found[1]


def added(script: str) -> tuple[str, str]:
    """The lines that a diff adds: those that make the method, and those of a step, each from the margin."""
    hunks = [[line[1:] for line in HUNK.findall(diff(script))[n][1].splitlines() if line[:1] == "+"] for n in range(3)]
    imports, made, step = (textwrap.dedent("\n".join(lines)) + "\n" for lines in hunks)
    return imports + made, step


def run(script: str, loop: str, names: dict[str, Any], changes: dict[str, str] | None = None) -> None:
    """The loop with the lines that the page adds to that script; `changes` are made in them."""
    made, step = added(script)
    source = re.sub(r"^( *)\{step\}", lambda found: textwrap.indent(step, found[1]), loop, flags=re.MULTILINE)
    source = source.replace("{made}", made)
    for old, new in (changes or {}).items():
        assert old in source, old
        source = source.replace(old, new)
    exec(compile(source, script, "exec"), {"torch": torch, **names})


@pytest.mark.parametrize("script", SCRIPTS)
def test_git_applies_it(script: str, tmp_path: Path) -> None:
    """To a file that has the lines of its context in their places: nothing in the diff is out of form."""
    patch = diff(script)
    place = re.search(r"^--- a/(\S+)$", patch, re.MULTILINE)
    assert place and place[1].endswith(script)
    before: list[str] = []
    for start, body in HUNK.findall(patch):
        before += ["filler"] * (int(start) - 1 - len(before))
        before += [line[1:] for line in body.splitlines() if line[:1] != "+"]
    file = tmp_path / place[1]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([*before, "filler\n"]))
    subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=tmp_path, check=True)
    after = file.read_text()
    lines = [line for part in added(script) for line in part.splitlines()]
    assert lines and all(line in after for line in lines)
    assert ".backward(loss)\n" not in after


class GPT(nn.Module):
    """Takes ids and targets, returns logits and loss; its head is the table of words."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe, self.mix = nn.Embedding(30, 12), nn.Embedding(8, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 30, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        logits = self.head(torch.tanh(self.mix(hidden)).cumsum(1))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_nanogpt() -> None:
    """DDP, accumulation, a scaler and autocast's place: the weights of a plain loop over whole batches."""
    torch.manual_seed(0)
    ids = torch.randint(0, 30, (STEPS, PARTS, 2, 8))
    batches = [(part, part.roll(-1, 1)) for step in ids for part in step]
    model, want = seeded(GPT), seeded(GPT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    following = iter([*batches[1:], (None, None)])
    names = {
        "model": DistributedDataParallel(model),
        "optimizer": optimizer,
        "scaler": torch.amp.GradScaler("cpu", init_scale=1024.0),
        "ctx": contextlib.nullcontext(),
        "gradient_accumulation_steps": PARTS,
        "get_batch": lambda split: next(following),
        "steps": STEPS,
    }
    run("train.py", SYNCING_LOOP, {**names, "X": batches[0][0], "Y": batches[0][1]})
    adv = fastadv.PGD(want, embedding="wte", **RADII)
    plain = torch.optim.SGD(want.parameters(), lr=0.1)
    for step in ids:
        whole = step.flatten(0, 1)
        adv.backward(lambda: want(whole, whole.roll(-1, 1))[1])  # noqa: B023
        plain.step()
        plain.zero_grad()
    for (name, got), target in zip(model.named_parameters(), want.parameters(), strict=True):
        assert_close(got, target, 1e-12, name)


SMART = {  # in the lines of the diff
    "fastadv.PGD(": "fastadv.SMART(",
    'scope="sample"': 'scope="sample", random_start=waves',
    ".loss, mask": ", mask",
}


@pytest.mark.parametrize(("method", "changes"), [(fastadv.PGD, {}), (fastadv.SMART, SMART)], ids=["pgd", "smart"])
@pytest.mark.parametrize(
    ("script", "loop", "parts"),
    [("run_glue_no_trainer.py", DIVIDING_LOOP, 1), ("run_clm_no_trainer.py", ACCUMULATING_LOOP, PARTS)],
    ids=["glue", "clm"],
)
def test_accelerate(script: str, loop: str, parts: int, method: Any, changes: dict[str, str]) -> None:
    """Accumulation, terms and all: the weights of a plain loop over whole batches."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
    model, want = by_hand.llama().double(), by_hand.llama().double()
    torch.manual_seed(0)
    ids = torch.randint(1, 40, (STEPS, PARTS, 2, 9))
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    rows = [{"input_ids": part, "labels": part, "attention_mask": torch.ones_like(part)} for part in ids.flatten(0, 1)]
    names = {"model": prepared, "optimizer": optimizer, "accelerator": accelerator, "batches": rows, "waves": waves}
    run(script, loop, {**names, "args": SimpleNamespace(gradient_accumulation_steps=PARTS)}, changes)
    adv = method(want, **RADII, random_start=waves if changes else False)
    plain = torch.optim.SGD(want.parameters(), lr=0.1)
    for step in ids:
        whole = step.flatten(0, 1)
        adv.backward(lambda: want(input_ids=whole, labels=whole))  # noqa: B023
        plain.step()
        plain.zero_grad()
    AcceleratorState._reset_state(reset_partial_state=True)
    for (name, got), target in zip(model.named_parameters(), want.named_parameters(), strict=True):
        assert_close(got, target[1], 1e-12, name)
