"""The classifier: its pooling, and what it refuses to load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastadv.jobs.errors import UserError
from fastadv.train import model

LABELS = ["bad", "good"]


@pytest.fixture
def checkpoint(encoder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    model.build(str(encoder), LABELS, 0.1).save_pretrained(folder)
    return folder


def test_the_mean_is_over_real_tokens_alone(encoder: Path) -> None:
    network = model.build(str(encoder), LABELS, 0.1).eval()
    ids = torch.tensor([[2, 7, 9, 3, 0, 0], [2, 8, 3, 0, 0, 0]])
    mask = (ids != 0).long()
    hidden = network.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    pooled = torch.stack([hidden[0, :4].mean(0), hidden[1, :3].mean(0)])
    output = network(ids, mask, labels=torch.tensor([0, 1]))
    torch.testing.assert_close(output.logits, network.head(pooled))
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 1])))
    torch.testing.assert_close(network(ids[1:, :3]).logits, output.logits[1:], atol=1e-5, rtol=1e-5)


def test_pretrained_weights_and_no_pooler(encoder: Path) -> None:
    network = model.build(str(encoder), LABELS, 0.1)
    saved = load_file(encoder / "model.safetensors")
    state = network.encoder.state_dict()
    assert set(saved) - set(state) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert all(torch.equal(state[name], saved[name]) for name in state)
    assert network.get_input_embeddings() is network.encoder.embeddings.word_embeddings


def test_same_seed_same_head(encoder: Path) -> None:
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(model.build(str(encoder), LABELS, 0.1).head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_round_trip(checkpoint: Path) -> None:
    saved = load_file(checkpoint / "model.safetensors")
    network = model.load_checkpoint(checkpoint)
    assert all(torch.equal(value, saved[name]) for name, value in network.state_dict().items())
    assert model.label_names(network) == LABELS


def test_a_checkpoint_of_another_model(encoder: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a checkpoint of another model \(bert\)"):
        model.load_checkpoint(encoder)
    with pytest.raises(UserError, match=r"has no config\.json"):
        model.load_checkpoint(tmp_path)
    weights = load_file(checkpoint / "model.safetensors")
    renamed = {name.replace("head.", "classifier."): value for name, value in weights.items()}
    save_file(renamed, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the weights of another model"):
        model.load_checkpoint(checkpoint)


def test_resuming_from_another_model(encoder: Path, checkpoint: Path) -> None:
    model.check_same_model(checkpoint, model.build(str(encoder), LABELS, 0.1))
    with pytest.raises(UserError, match="a checkpoint of another model"):
        model.check_same_model(checkpoint, model.build(str(encoder), ["a", "b", "c"], 0.1))


def test_what_is_no_encoder(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`fastadv evaluate` reads it"):
        model.encoder_config(str(checkpoint))
    with pytest.raises(UserError, match="no such folder"):
        model.resolve(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="could not be loaded"):
        model.encoder_config(str(tmp_path))
    both = tmp_path / "both"
    both.mkdir()
    (both / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(UserError, match="an encoder and a decoder"):
        model.encoder_config(str(both))
