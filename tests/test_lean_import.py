"""`import fastadv` needs torch and nothing else, and loads nothing heavy besides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ["triton", "transformers", "accelerate", "safetensors", "matplotlib", "typer", "rich"]

SCRIPT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {optional!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import fastadv
loaded = [name for name in sys.modules if name.startswith("fastadv.")]
print(*loaded, sep="\\n")
assert fastadv.PGD and fastadv.FGM
import fastadv.__main__
fastadv.__main__.main()
"""


def test_imports_without_any_optional_package() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(optional=set(OPTIONAL))],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.splitlines()
    for part in ("fastadv.train", "fastadv.integrations", "fastadv.reference"):
        assert part not in loaded
    assert "gather_perturb" in done.stdout
