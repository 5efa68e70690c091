"""transformers alone opens what `fastadv train` saves: after `import fastadv`, or with the code that lies beside it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from fastadv import auto_classes
from fastadv.train import model
from fastadv.train.modeling_mean_pool import MeanPoolClassifier, MeanPoolConfig

ROOT = Path(__file__).resolve().parents[2]
LABELS = ["bad", "good"]


@pytest.fixture
def checkpoint(encoder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    model.build(str(encoder), LABELS, 0.1).save_pretrained(folder)
    model.tokenizer_of(str(encoder)).save_pretrained(folder)
    return folder


def scores(folder: Path, text: str) -> dict[str, float]:
    """What our own loader and softmax say."""
    encoded = model.tokenizer_of(str(folder))(text, return_tensors="pt")
    logits = model.load_checkpoint(folder).eval()(encoded["input_ids"]).logits[0]
    return dict(zip(LABELS, logits.softmax(-1).tolist(), strict=True))


AFTER_IMPORT = """
import pickle, sys
import fastadv
assert not {"torch", "transformers"} & set(sys.modules), "import fastadv is lean"
from transformers import AutoConfig
assert type(AutoConfig.from_pretrained("saved")).__module__ == "fastadv.train.configuration_mean_pool"
assert "fastadv.train.modeling_mean_pool" not in sys.modules, "a configuration needs no model"
from transformers import AutoModelForSequenceClassification, pipeline
network = AutoModelForSequenceClassification.from_pretrained("saved")
from fastadv.train.model import MeanPoolClassifier
assert type(pickle.loads(pickle.dumps(network))) is type(network) is MeanPoolClassifier
assert not [one for one in sys.meta_path if type(one).__module__ == "fastadv.auto_classes"], "nothing waits any more"
(found,) = pipeline("text-classification", model="saved")(["a fine film"], top_k=None)
print()  # transformers may have asked a question on this line
print({one["label"]: one["score"] for one in found})
"""

WITHOUT_FASTADV = """
import sys
sys.modules["fastadv"] = None  # an import is an error
from transformers import AutoModelForSequenceClassification, pipeline
try:
    AutoModelForSequenceClassification.from_pretrained("saved")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
(found,) = pipeline("text-classification", model="saved", trust_remote_code=True)(["a fine film"], top_k=None)
print()  # transformers may have asked a question on this line
print({one["label"]: one["score"] for one in found})
"""


@pytest.mark.parametrize("script", [AFTER_IMPORT, WITHOUT_FASTADV], ids=["after import fastadv", "without fastadv"])
def test_transformers_opens_it(checkpoint: Path, script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script],
        cwd=checkpoint.parent,
        env={"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        text=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = eval(done.stdout.splitlines()[-1])
    assert found == pytest.approx(scores(checkpoint, "a fine film"), abs=1e-6)


def test_what_is_imported_already_is_registered_at_once(checkpoint: Path) -> None:
    registered = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING._extra_content
    assert registered.pop(MeanPoolConfig) is MeanPoolClassifier
    finders = list(sys.meta_path)
    auto_classes.register()
    assert sys.meta_path == finders
    found = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    assert type(found) is MeanPoolClassifier


def test_token_types_go_to_the_encoder(encoder: Path) -> None:
    """Tokenizers of BERT give them, and a pipeline passes them on."""
    network = model.build(str(encoder), LABELS, 0.1).eval()
    ids = torch.tensor([[2, 7, 9, 3]])
    assert torch.equal(network(ids, token_type_ids=torch.zeros_like(ids)).logits, network(ids).logits)
    assert not torch.equal(network(ids, token_type_ids=torch.ones_like(ids)).logits, network(ids).logits)


def test_a_registration_that_fails_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The module that waits for it is imported all the same."""
    (tmp_path / "awaited.py").write_text("value = 7\n")
    monkeypatch.syspath_prepend(tmp_path)

    def fails() -> None:
        raise TypeError("another transformers")

    monkeypatch.setattr(auto_classes, "REGISTERS", {"awaited": fails})
    auto_classes.register()
    with pytest.warns(UserWarning, match="Auto classes cannot load fastadv's classifiers: another transformers"):
        found = importlib.import_module("awaited")
    assert found.value == 7
    assert type(found.__spec__.loader).__name__ == type(found.__loader__).__name__ == "SourceFileLoader"
