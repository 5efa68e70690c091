"""Encoders and decoders of transformers, whose two embeddings are modules of their own around one table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv import reference
from tests.support import assert_gradients, clear, gradients, relative, seeded

SMALL = {"vocab_size": 60, "d_model": 16, "decoder_start_token_id": 2}


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(**SMALL, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0))


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32}
    config = BartConfig(
        **SMALL, **sizes, dropout=0.0, pad_token_id=1, bos_token_id=0, eos_token_id=3, forced_eos_token_id=3
    )
    return BartForConditionalGeneration(config)


@pytest.fixture(params=[t5, bart])
def model(request: pytest.FixtureRequest) -> Any:
    """The output layer has a table of its own: a script that moves a shared one would move both."""
    built: Any = seeded(request.param, dtype=torch.float64).train()
    built.lm_head.weight = nn.Parameter(built.lm_head.weight.detach().clone())
    return built


def closure_of(model: Any) -> Any:
    ids = torch.randint(4, 30, (3, 6), generator=torch.Generator().manual_seed(0))
    return lambda: model(input_ids=ids, labels=ids[:, :4].contiguous()).loss


def shared(model: Any) -> list[nn.Module]:
    return [part for part in model.modules() if isinstance(part, nn.Embedding) and part.num_embeddings == 60]


@pytest.mark.parametrize(("method", "script"), [(fastadv.FGM, reference.fgm), (fastadv.PGD, reference.pgd)])
def test_one_table_moves_as_one(model: Any, method: Any, script: Any) -> None:
    """By default both are perturbed; in table scope a word moves alike in both, as if the table had moved."""
    closure, parts = closure_of(model), shared(model)
    assert len({id(part.weight) for part in parts}) == 1
    script(model, closure, parts[0], epsilon=0.5)
    want = gradients(model)
    clear(model)
    adv = method(model, epsilon=0.5)
    for _ in range(2):
        clear(model)
        adv.backward(closure)
        assert_gradients(gradients(model), want, 1e-5)  # T5's norms are in float32


def seen_by(model: Any, adv: Any) -> list[Tensor]:
    """The perturbations of the encoder's and of the decoder's lookups in the last pass."""
    looked_up: list[Tensor] = []
    for part in shared(model):
        assert isinstance(part, nn.Embedding)
        part.register_forward_hook(
            lambda part, args, output: looked_up.append((output - part.weight[args[0]]).detach())
        )
    adv.backward(closure_of(model))
    return looked_up[-2:]


def test_each_lookup_has_a_ball_of_its_own_in_sample_scope(model: Any) -> None:
    encoder, decoder = seen_by(model, fastadv.FGM(model, epsilon=0.5, scope="sample"))
    assert (encoder.shape[1], decoder.shape[1]) == (6, 4)
    for moved in (encoder, decoder):
        torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full((3,), 0.5).double(), rtol=1e-6, atol=0)


def test_two_tables_are_two(model: Any) -> None:
    """Modules with tables of their own have a perturbation each, also where one word stands in both."""
    encoder, decoder = shared(model)[1:]
    decoder.weight = nn.Parameter(decoder.weight.detach().clone())
    adv = fastadv.FGM(model, embedding=[encoder, decoder], scope="table")
    one, other = seen_by(model, adv)
    # The decoder reads the labels one place to the right: here both look the same word up.
    assert one[0, 0].norm() > 0
    assert other[0, 1].norm() > 0
    assert relative(one[0, 0], other[0, 1]) > 0.1
