"""What a build makes of the tree: in scratch copies, offline, and with a torch that must not be imported."""

from __future__ import annotations

import email
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["fastadv", "kernels", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in"]
SOURCES += ["README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build reads, without what an earlier build left."""
    copy = tmp_path / "a tree"  # compilers meet paths with spaces
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            stale = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
            shutil.copytree(ROOT / name, copy / name, ignore=stale)
        else:
            shutil.copy(ROOT / name, copy / name)
    poison = tmp_path / "poison"
    poison.mkdir()
    (poison / "torch.py").write_text("raise SystemExit('the build imports torch')\n")
    return copy


def setup(tree: Path, *arguments: str, path: str | None = None, **environment: str) -> str:
    """Runs setup.py with only the compilers that `path` shows; returns what it printed."""
    chosen = {"PATH": os.environ["PATH"] if path is None else path, "HOME": os.environ.get("HOME", "/")}
    chosen |= {"PYTHONPATH": str(tree.parent / "poison"), **environment}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=tree,
        env=chosen,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stdout)
    return done.stdout


def built(tree: Path) -> Path:
    (package,) = tree.glob("build/lib*/fastadv")
    return package


def record(tree: Path) -> dict[str, object]:
    info: dict[str, object] = json.loads((built(tree) / "_build_info.json").read_text())
    return info


def test_without_a_compiler_it_is_pure_python_and_says_why(tree: Path) -> None:
    output = setup(tree, "build", path=str(tree))
    assert record(tree)["native_reason"] == "no C++ compiler found (CXX, g++, c++, clang++)"
    assert "no C++ compiler found" in output
    assert not list(built(tree).glob("_C*"))
    assert (built(tree) / "__init__.py").is_file()
    assert (built(tree) / "py.typed").is_file()
    assert (built(tree) / "kernels" / "__init__.py").is_file()


def test_a_compiler_that_fails_is_a_reason_too(tree: Path) -> None:
    broken = tree / "broken"
    broken.write_text("#!/bin/sh\necho 'fatal error: no licence' >&2\nexit 1\n")
    broken.chmod(0o755)
    setup(tree, "build", CXX=shlex.quote(str(broken)))
    assert record(tree)["native_reason"] == "broken failed: fatal error: no licence"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FASTADV_NATIVE": "1"}, "no C.. compiler found"),
        ({"FASTADV_CUDA": "1"}, "no C.. compiler found"),
        ({"FASTADV_CUDA": "yes"}, "must be auto, 0 or 1"),
    ],
    ids=str,
)
def test_what_was_insisted_on_is_an_error(tree: Path, environment: dict[str, str], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        setup(tree, "build", path=str(tree), **environment)


def test_native_can_be_declined(tree: Path) -> None:
    setup(tree, "build", FASTADV_NATIVE="0")
    assert "FASTADV_NATIVE=0" in str(record(tree)["native_reason"])


def test_a_build_does_not_keep_an_older_library(tree: Path) -> None:
    setup(tree, "build", path=str(tree))
    stale = built(tree) / f"_C{_suffix()}"
    stale.write_bytes(b"older")
    in_place = tree / "fastadv" / stale.name
    in_place.write_bytes(b"older")
    setup(tree, "build_ext", "--inplace", path=str(tree))
    assert not stale.exists()
    assert not in_place.exists()
    assert (tree / "fastadv" / "_build_info.json").is_file()


def _suffix() -> str:
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def test_the_sdist_carries_every_source(tree: Path) -> None:
    setup(tree, "sdist")
    (archive,) = tree.glob("dist/*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {
        path.relative_to(tree).as_posix()
        for folder, pattern in (("csrc", "*.*"), ("fastadv", "**/*.py"), ("kernels", "*.py"))
        for path in (tree / folder).glob(pattern)
    }
    assert wanted | {*SOURCES[3:], "fastadv/py.typed"} <= names
    assert not [name for name in names if name.startswith("tests")]
    assert not [name for name in names if name.endswith((".so", "_build_info.json"))]


def test_metadata(tree: Path) -> None:
    setup(tree, "dist_info", path=str(tree))
    (info,) = tree.glob("fastadv-*.dist-info")
    metadata = email.message_from_string((info / "METADATA").read_text())
    core = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert core == ["torch>=2.6"]
    assert set(metadata.get_all("Provides-Extra", [])) >= {"train", "test", "bench", "docs"}
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    citation = yaml.safe_load((tree / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation), "what the format asks for"
    assert metadata["Version"] == citation["version"]
    released = f"## {citation['version']} - {citation['date-released']}\n"
    assert released in (tree / "CHANGELOG.md").read_text()
    assert "fastadv = fastadv.cli:main" in (info / "entry_points.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "without ninja"])
def test_a_wheel_has_the_cpp_part(tree: Path, ninja: bool) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    if not ninja:
        hide = "import sys\nsys.modules['ninja'] = None\n"
        (tree.parent / "poison" / "sitecustomize.py").write_text(hide)
    setup(tree, "bdist_wheel", FASTADV_CUDA="0", FASTADV_NATIVE="1")
    (library,) = built(tree).glob("_C*")
    content = library.read_bytes()
    assert not [name for name in (b"libtorch", b"libc10") if name in content], "any torch serves"
    assert record(tree)["native_reason"] is None
    assert "FASTADV_CUDA=0" in str(record(tree)["cuda_reason"])
    assert bool(list(tree.glob("build/temp*/cpu/build.ninja"))) == ninja
    check_wheel(tree)


STEP = """
import torch, fastadv
table, head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2)
model = torch.nn.Sequential(table, head)
adv = fastadv.PGD(model, epsilon=0.1, step_size=0.05, steps=2, scope="sample", fused=True)
ids, labels = torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 1])
adv.backward(lambda: torch.nn.functional.cross_entropy(model(ids).mean(1), labels))
assert table.weight.grad.abs().sum() > 0
print(fastadv.__file__, fastadv.native.available())
"""


def check_wheel(tree: Path) -> None:
    """Unpacked where no compiler is, it is what is imported, and its ops take a step."""
    (wheel,) = tree.glob("dist/*.whl")
    site = tree.parent / "site"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    done = subprocess.run(
        [sys.executable, "-c", STEP],
        cwd=site,
        env={"PATH": str(site), "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(site / "fastadv" / "__init__.py"), "True"]


@pytest.mark.slow
def test_an_nvcc_that_fails_leaves_the_cpp_part(tree: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    home = tree.parent / "cuda"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal: unsupported host compiler' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    output = setup(tree, "build", CUDA_HOME=str(home))
    assert list(built(tree).glob("_C*"))
    assert record(tree)["cuda_reason"] == "nvcc failed: nvcc fatal: unsupported host compiler"
    assert "built without CUDA" in output
    with pytest.raises(RuntimeError, match="unsupported host compiler"):
        setup(tree, "build", CUDA_HOME=str(home), FASTADV_CUDA="1")
