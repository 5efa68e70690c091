"""What is said before training, and the warnings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastadv.train import job, overview
from fastadv.train.data import DataSettings
from fastadv.train.overview import Overview
from tests.train.command import train
from tests.train.conftest import texts, write_csv


def seen(encoder: Path, path: Path, *extra: str, max_length: int = 64, **columns: Any) -> Overview:
    settings = job.Settings(str(encoder), DataSettings(str(path), **columns), max_length=max_length, extra=extra)
    return job.prepare(settings).overview


def test_sound_data_have_no_warnings(encoder: Path, tmp_path: Path) -> None:
    found = seen(encoder, write_csv(tmp_path / "sound.csv", texts(600)), "--num-train-epochs", "4")
    assert found.warnings == []
    assert (found.unknown, found.truncated, found.cut, found.steps) == (0, 0, 0, 60)
    assert sum(found.train.values()) == 480 and sum(found.test.values()) == 120


def test_unknown_and_truncated_tokens(encoder: Path, tmp_path: Path) -> None:
    """Of ten words four are unknown, and a text of ten is cut to six."""
    words = ["fine film with a story", "dull scene of the actor"]
    rows = [(f"{words[n % 2]} x{n} y{n} z{n} w{n} was", "ab"[n % 2]) for n in range(100)]
    path = write_csv(tmp_path / "odd.csv", rows)
    whole = seen(encoder, path)
    assert (whole.tokens, whole.unknown, whole.truncated) == (800, 0.4, 0)
    assert "40% of the tokens are unknown to the tokenizer" in " ".join(whole.warnings)
    cut = seen(encoder, path, max_length=8)
    assert (cut.tokens, cut.truncated, cut.cut) == (480, 1, 0.4)
    assert "100% of the texts are longer than 8 tokens and are cut, which loses 40% of all tokens" in " ".join(
        cut.warnings
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (texts(40), "1 optimizer steps in all teach little: raise --num-train-epochs"),
        (texts(40), "8 test samples measure little"),
        ([*texts(60), ("a fine scene", "odd"), ("a dull scene", "odd")], "fewer than 10 training samples: 'odd'."),
        ([*texts(60), ("a fine scene", "odd")], "no test samples: 'odd'."),
        ([*texts(60), *((f"a scene {n}", "NaN") for n in range(20))], "'NaN' is a class now"),
        ([(f"a scene {n}", "one" if n % 20 else "two") for n in range(200)], "95.0% of the training samples are 'one'"),
        ([*texts(60), *((text.upper(), "odd") for text, _ in texts(60)[:9])], "9 rows repeat a text with another"),
        (texts(60) * 2, "60 rows repeat a text, and are left out"),
    ],
)
def test_warnings_say_what_to_do(encoder: Path, tmp_path: Path, rows: list[tuple[str, str]], message: str) -> None:
    if "another" in message:
        rows = [*rows, ("a film", "odd"), ("the film", "odd")]
    found = seen(encoder, write_csv(tmp_path / "rows.csv", rows))
    assert [one for one in found.warnings if one.startswith(message)]


@pytest.mark.parametrize("extra", [[], ["--gradient-accumulation-steps", "2"], ["--max-steps", "3"]])
def test_the_steps_are_those_of_the_trainer(encoder: Path, table: Path, extra: list[str]) -> None:
    run = train(encoder, table, "run", "--num-train-epochs", "1.5", "--attack-samples", "1", "--seed", "3", *extra)
    result = json.loads((run / "result.json").read_text())
    assert result["settings"]["overview"]["steps"] == result["models"]["plain"]["cost"]["steps"]


def test_what_is_printed_and_kept(encoder: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(encoder, table, "run", "--max-steps", "1", "--attack-samples", "1")
    printed = capsys.readouterr()
    result = json.loads((run / "result.json").read_text())
    assert result["settings"]["overview"]["train"] == {"bad": 46, "good": 50}
    for line in ("task: classification", "optimizer steps: 1 in each training", "0.0% of them unknown"):
        assert line in printed.out
    assert len(result["warnings"]) == 2
    assert all(f"warning: {warning}\n" in printed.err for warning in result["warnings"])


def test_many_classes_are_summed_up(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastadv.train.announce import announce

    rows = [(f"a scene {n} {m}", f"class {n}") for n in range(30) for m in range(3 + n)]
    prepared = job.prepare(job.Settings(str(encoder), DataSettings(str(write_csv(tmp_path / "many.csv", rows)))))
    announce(replace(prepared, overview=replace(prepared.overview, warnings=[])))
    printed = capsys.readouterr()
    assert "19 more" in printed.out and "class 29" in printed.out and "class 10 " not in printed.out
    assert printed.err == ""
    assert overview.counts(prepared.samples.test, prepared.samples)["class 29"] == 6
