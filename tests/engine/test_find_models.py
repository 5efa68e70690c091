"""Finding the embedding of real models of transformers, and of modules around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    EncoderDecoderModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import fastadv
from fastadv.engine.model.find import find

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
WORDS = {**SIZES, "vocab_size": 40, "max_position_embeddings": 16}
IMAGES = {**SIZES, "image_size": 8, "patch_size": 4}


def bert(**changes: Any) -> BertModel:
    return BertModel(BertConfig(**WORDS, **changes))


class Around(nn.Module):
    """A classifier: encoders somewhere inside, and an embedding of its own, of segments."""

    def __init__(self, *encoders: nn.Module) -> None:
        super().__init__()
        self.segments = nn.Embedding(3, 16)
        self.encoders = nn.ModuleList(encoders)
        self.head = nn.Linear(16, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = [encoder(ids).last_hidden_state.mean(1) for encoder in self.encoders]
        return self.head(torch.stack(hidden).sum(0) + self.segments(torch.zeros_like(ids[:, 0])))


class Part(nn.Module):
    """As sentence-transformers has it: the model is an attribute of the first module of an nn.Sequential."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.auto_model = model


def test_an_encoder_inside_a_classifier() -> None:
    inner = bert()
    assert find(Around(inner), None) == [inner.get_input_embeddings()]
    assert find(nn.Sequential(Part(inner), nn.Identity()), None) == [inner.get_input_embeddings()]


def test_it_is_what_the_forward_runs() -> None:
    torch.manual_seed(0)
    model = Around(bert())
    adv = fastadv.FGM(model, epsilon=0.5, scope="sample")
    ids = torch.randint(1, 40, (3, 7))
    result = adv.backward(lambda: nn.functional.cross_entropy(model(ids), torch.tensor([0, 1, 0])))
    assert result.adv_loss is not None
    assert result.adv_loss > result.loss


def test_the_words_of_a_model_of_texts_and_images() -> None:
    """CLIP names no embedding, its image tower names the layer of its patches: the words are taken."""
    model = CLIPModel(
        CLIPConfig(
            text_config={
                **SIZES,
                "vocab_size": 40,
                "max_position_embeddings": 16,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            vision_config=IMAGES,
            projection_dim=8,
        )
    )
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    assert find(model, None) == [model.text_model.get_input_embeddings()]
    assert isinstance(find(model, None)[0], nn.Embedding)


def test_the_patches_of_a_model_of_images_alone() -> None:
    inner = ViTModel(ViTConfig(**IMAGES))
    assert find(Around(inner), None) == [inner.get_input_embeddings()]
    assert not isinstance(inner.get_input_embeddings(), nn.Embedding)


def test_two_towers_are_listed() -> None:
    with pytest.raises(ValueError, match=r"several embeddings \(encoders.0, encoders.1 have one each\)") as caught:
        find(Around(bert(), bert()), None)
    assert "encoders.1.embeddings.word_embeddings (40, 16)" in str(caught.value)
    assert "embedding=NAME" in str(caught.value)


def test_two_towers_with_one_table() -> None:
    """The same tower twice, towers with the same embedding, and towers whose embeddings share a weight."""
    one, other = bert(), bert()
    assert find(Around(one, one), None) == [one.get_input_embeddings()]
    other.set_input_embeddings(one.get_input_embeddings())
    assert find(Around(one, other), None) == [one.get_input_embeddings()]
    other.set_input_embeddings(nn.Embedding(40, 16))
    other.get_input_embeddings().weight = one.get_input_embeddings().weight
    assert find(Around(one, other), None) == [one.get_input_embeddings(), other.get_input_embeddings()]


def test_an_encoder_and_a_decoder() -> None:
    """T5 shares its table, which all lookups are of; two BERTs do not, and the encoder's is the input."""
    shared = T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    assert {module.weight for module in find(Around(shared), None)} == {shared.shared.weight}
    decoder = bert(is_decoder=True, add_cross_attention=True)
    model = EncoderDecoderModel(encoder=bert(), decoder=decoder)
    assert find(Around(model), None) == [model.encoder.get_input_embeddings()]
