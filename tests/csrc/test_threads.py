"""ThreadSanitizer sees a race in csrc where one is planted, and none where there is none: what `make tsan` rests on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastadv.native import toolchain

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent / "threads"
pytestmark = pytest.mark.native
# A change of csrc, and whether it is a race.
CHANGES = {
    "none": ("rows_cpu.cpp", "", "", False),
    "a count that all threads add to": (
        "rows_cpu.cpp", "std::atomic<std::int64_t> skipped{0};", "std::int64_t skipped = 0;", True,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_race_is_reported(name: str, tmp_path: Path) -> None:
    setarch = shutil.which("setarch")  # GCC's ThreadSanitizer wants addresses where it expects them
    if not sys.platform.startswith("linux") or setarch is None:
        pytest.skip("runs ThreadSanitizer as Linux has it")
    file, old, new, races = CHANGES[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    text = (csrc / file).read_text()
    assert not old or text.count(old) == 1
    (csrc / file).write_text(text.replace(old, new) if old else text)
    program = str(tmp_path / "rows")
    try:
        gxx = toolchain.find_cxx().command
        flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-fvisibility=hidden", f"-I{csrc}"]
        toolchain.run([*gxx, *flags, "-c", str(HERE / "gomp.cpp"), "-o", str(tmp_path / "gomp.o")])
        sources = [str(csrc / "rows_cpu.cpp"), str(HERE / "rows.cpp")]
        for source in sources:
            toolchain.run([*gxx, *flags, "-fopenmp", "-c", source, "-o", str(tmp_path / f"{Path(source).stem}.o")])
        objects = [str(tmp_path / f"{stem}.o") for stem in ("rows_cpu", "rows", "gomp")]
        toolchain.run([*gxx, "-fsanitize=thread", *objects, "-o", program])
    except toolchain.ToolchainError as missing:
        pytest.skip(str(missing))
    done = subprocess.run(
        [setarch, "-R", program],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "TSAN_OPTIONS": ""},
    )
    assert ("data race" in done.stderr) is races, done.stderr
    assert (done.returncode == 66) is races
    if name == "none":
        assert done.stdout == "400"
