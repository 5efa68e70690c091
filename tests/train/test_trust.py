"""Code that comes with a model is never run, and pickles are never read."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch

import fastadv
from fastadv.train.model import build
from tests.train.command import refused

ROOT = Path(fastadv.__file__).parent
TRAP = "import pathlib\npathlib.Path('ran').touch()\n"
TRANSFORMERS = {"AutoConfig", "AutoModel", "AutoTokenizer"}


def _calls() -> list[tuple[Path, ast.Call]]:
    trees = [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(ROOT.rglob("*.py"))]
    return [(path, node) for path, tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_in_the_package_runs_what_it_reads() -> None:
    forbidden = {"eval", "exec", "pickle.load", "pickle.loads", "torch.load", "yaml.load", "marshal.loads", "os.system"}
    called = {ast.unparse(call.func): path for path, call in _calls()}
    assert not forbidden & set(called)
    imported = {
        name
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in [getattr(node, "module", None), *(one.name for one in node.names)]
    }
    assert not {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"} & imported


def test_every_load_says_that_it_trusts_nothing() -> None:
    loads = [call for _, call in _calls() if ast.unparse(call.func).endswith((".from_pretrained", "load_dataset"))]
    assert len(loads) >= 6
    for call in loads:
        words = {one.arg: ast.unparse(one.value) for one in call.keywords}
        whose = ast.unparse(call.func).split(".")[0]
        safe = words.get(None) == "SAFE" or "**SAFE" in ast.unparse(call)
        if whose in TRANSFORMERS or whose == "datasets":
            assert safe or words["trust_remote_code"] == "False", ast.unparse(call)
        if whose in ("AutoModel", "MeanPoolClassifier"):
            assert safe or words["use_safetensors"] == "True", ast.unparse(call)


class Trap:
    """Pickled, it is code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (TRAP,)


@pytest.fixture
def checkpoint(encoder: Path) -> Path:
    folder = Path("model")
    shutil.copytree(encoder, folder)
    (folder / "model.safetensors").unlink()
    build(str(encoder), ["bad", "good"], 0.1).save_pretrained(folder)
    return folder


def _with_code(folder: Path) -> None:
    """The configuration and the tokenizer ask for classes of the folder, and the weights are a pickle."""
    (folder / "evil.py").write_text(TRAP)
    for name, auto in (
        ("config.json", {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    ):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = auto
        if name == "tokenizer_config.json":
            content["tokenizer_class"] = "Evil"
        (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_checkpoint_that_brings_code(
    command: str, checkpoint: Path, table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_code(checkpoint)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked whether to run the code"))
    more = ["--data", str(table)] if command == "evaluate" else ["a fine film"]
    message = refused(capsys, command, str(checkpoint), *more)
    assert "no tokenizer could be loaded" in message
    assert not Path("ran").exists()


def test_an_encoder_that_brings_code(
    encoder: Path, table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(encoder, "theirs")
    _with_code(Path("theirs"))
    content = json.loads(Path("theirs/config.json").read_text())
    Path("theirs/config.json").write_text(json.dumps({**content, "model_type": "evil"}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked whether to run the code"))
    assert "--model theirs could not be loaded" in refused(capsys, "train", "--data", str(table), "--model", "theirs")
    assert not Path("ran").exists()


@pytest.mark.parametrize("kind", ["checkpoint", "encoder"])
def test_a_pickle_is_not_read(
    kind: str, encoder: Path, checkpoint: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint if kind == "checkpoint" else Path(shutil.copytree(encoder, "theirs"))
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Trap()}, folder / "pytorch_model.bin")
    arguments = ["evaluate", str(folder)] if kind == "checkpoint" else ["train", "--model", str(folder)]
    assert "could not be loaded" in (found := refused(capsys, *arguments, "--data", str(table))) or "cannot be" in found
    assert not Path("ran").exists()


def test_a_pipe_among_the_files(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import os

    (checkpoint / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(checkpoint / "generation_config.json")
    assert "a pipe or a device" in refused(capsys, "predict", str(checkpoint), "a film")
