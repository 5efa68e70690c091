"""`import fastadv` loads nothing heavy; its names need torch and nothing else."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import fastadv
from fastadv import methods

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
assert "torch" not in sys.modules
assert fastadv.PGD and fastadv.FGM
assert "torch" in sys.modules
loaded = [name for name in sys.modules if name.startswith("fastadv.")]
print(*loaded, sep="\\n")
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


@pytest.mark.parametrize("name", [name for name in fastadv.__all__ if name != "__version__"])
def test_names_are_those_of_the_methods(name: str) -> None:
    found = getattr(fastadv, name)
    assert found is getattr(methods, name)
    assert pickle.loads(pickle.dumps(found)) is found
    assert name in dir(fastadv)


def test_a_star_brings_all_names() -> None:
    namespace: dict[str, object] = {}
    exec("from fastadv import *", namespace)
    assert set(fastadv.__all__) <= set(namespace)


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="module 'fastadv' has no attribute 'PDG'"):
        _ = fastadv.PDG  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="cannot import name 'PDG' from 'fastadv'"):
        exec("from fastadv import PDG")


@pytest.mark.parametrize("part", ["ops", "methods", "engine", "native", "classic"])
def test_parts_need_no_import_of_their_own(part: str) -> None:
    script = f"import fastadv; assert fastadv.{part}.__name__ == 'fastadv.{part}'"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


TYPED = """
import fastadv, torch
from fastadv import *
def use(model: torch.nn.Module) -> None:
    reveal_type(fastadv.PGD(model, epsilon=1.0))
    reveal_type(FGM(model))
    reveal_type(fastadv.__version__)
    fastadv.PDG
"""


@pytest.mark.slow
def test_type_checkers_see_every_name(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    file = tmp_path / "typed.py"
    file.write_text(TYPED)
    found, _, _ = api.run(["--strict", "--config-file", str(ROOT / "pyproject.toml"), str(file)])
    assert 'type is "fastadv.methods.pgd.PGD"' in found
    assert 'type is "fastadv.methods.fgm.FGM"' in found
    assert 'type is "str"' in found
    assert 'Module has no attribute "PDG"' in found
    assert "Found 1 error" in found
