"""The losses against their formulas, and their numerics: p near 1, p near 0, bfloat16."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadv import llm
from tests.llm.decoders import V, batch, decoder, full_logits, lora
from tests.support import assert_close


def two_classes(log_odds: list[float], dtype: torch.dtype = torch.float64) -> tuple[Tensor, llm.Scores]:
    """One token per number, of which it is the logit against one other class."""
    logits = torch.tensor([[x, 0.0] for x in log_odds], dtype=dtype, requires_grad=True)
    return logits, llm.Scores(logits, llm.Targets.of(torch.zeros(1, len(log_odds), dtype=torch.long), shift=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("odds", [-80.0, -30.0, -1.0, 0.0, 1.0, 19.9, 20.1, 40.0, 90.0, 1e4])
def test_away_keeps_its_digits(odds: float, dtype: torch.dtype) -> None:
    """-log(1 - p) = log(1 + e^x), to the last digits of the dtype; 1 - p is 0 in float32 from x = 17 on."""
    logits, scores = two_classes([odds], dtype)
    loss = llm.away(scores, threshold=None)
    loss.backward()
    digits = 4 * torch.finfo(dtype).eps
    exact = math.log1p(math.exp(odds)) if odds < 700 else odds
    sigmoid = 1 / (1 + math.exp(-odds))
    assert_close(loss, torch.tensor(exact, dtype=dtype), digits * (1 + abs(odds)), "loss")
    wanted = torch.tensor([[sigmoid, -sigmoid]], dtype=dtype)
    assert_close(logits.grad, wanted, digits * (1 + abs(odds)), "gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    logits = (torch.randn(6, V, generator=torch.Generator().manual_seed(0)) * 8).to(dtype)
    targets = llm.Targets.of(torch.arange(6).unsqueeze(0), shift=False)
    half, single = logits.clone().requires_grad_(), logits.float().requires_grad_()
    found, wanted = (_sum(llm.Scores(one, targets)) for one in (half, single))
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    found.backward()
    wanted.backward()
    assert half.grad.isfinite().all()
    assert torch.equal(half.grad, single.grad.to(dtype))


def _sum(scores: llm.Scores) -> Tensor:
    base = torch.zeros(1)
    return (
        llm.toward(scores)
        + llm.away(scores)
        + llm.away(scores, "cross_entropy")
        + llm.ipo(scores, scores, base, base)
        + llm.dpo(scores, scores, base, base)
    )


def test_a_token_below_the_threshold_stays_in_the_mean() -> None:
    logits, scores = two_classes([2.0, -6.0])
    loss = llm.away(scores)
    loss.backward()
    assert_close(loss, torch.tensor(math.log1p(math.exp(2.0)) / 2, dtype=torch.float64), 1e-14, "loss")
    assert not logits.grad[1].any()
    assert llm.away(scores, threshold=-7.0) > loss


@pytest.mark.parametrize("jump", [True, False])
def test_cutoffs(jump: bool) -> None:
    """A thousandth of the gradient beyond, of either loss; the value is the cutoff's, with CAT's jump or without."""
    logits, scores = two_classes([3.0])
    plain = llm.toward(scores)
    loss = llm.toward(scores, cutoff=0.5, jump=jump)
    assert_close(loss, (0.5 if jump else 0.4995) + 0.001 * plain, 1e-14, "toward")
    (found,), (whole,) = (torch.autograd.grad(one, logits, retain_graph=True) for one in (loss, plain))
    assert_close(found, 0.001 * whole, 1e-14, "gradient")
    assert torch.equal(llm.toward(scores, cutoff=0.01), plain)
    _, scores = two_classes([-6.0])
    away = llm.away(scores, "cross_entropy", cutoff=-5.0, jump=jump)
    assert_close(away, -5.0 * (1 if jump else 0.999) - 0.001 * llm.toward(scores), 1e-14, "away")


def test_ipo_and_dpo_by_hand() -> None:
    labels = torch.tensor([[-100, 1, 2, -100], [-100, 3, 4, 5]])
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 2, 4, V, generator=generator, dtype=torch.float64)
    chosen, rejected, base_chosen, base_rejected = (llm.Scores.of(one, labels) for one in logits)
    log_p = logits[:, :, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp_min(0).expand(4, -1, -1).unsqueeze(-1))
    kept = log_p.squeeze(-1) * (labels[:, 1:] != -100)
    totals, means = kept.sum(-1), kept.sum(-1) / torch.tensor([2, 3])
    for found, sums in ((llm.dpo, totals), (llm.ipo, means)):
        margin = (sums[0] - sums[1]) - (sums[2] - sums[3])
        wanted = -(0.2 * margin).sigmoid().log() if found is llm.dpo else (margin - 1 / 0.4) ** 2
        loss = found(chosen, rejected, base_chosen, base_rejected, beta=0.2)
        assert_close(loss, wanted.mean(), 1e-13, found.__name__)
        assert torch.equal(found(chosen, rejected, sums[2], sums[3], beta=0.2), loss)
    margin = 0.2 * ((totals[0] - totals[1]) - (totals[2] - totals[3]))
    smooth = -0.9 * margin.sigmoid().log() - 0.1 * (-margin).sigmoid().log()
    found = llm.dpo(chosen, rejected, base_chosen, base_rejected, beta=0.2, label_smoothing=0.1)
    assert_close(found, smooth.mean(), 1e-13, "label smoothing")


def test_pairs_fit() -> None:
    _, scores = two_classes([0.0])
    with pytest.raises(ValueError, match="one per pair"):
        llm.ipo(scores, scores, torch.zeros(2), torch.zeros(2))
    empty = llm.Scores(torch.zeros(1, 4), llm.Targets.of(torch.tensor([[-100, 1], [-100, -100]])))
    with pytest.raises(ValueError, match="a sample has no target"):
        llm.dpo(empty, empty, torch.zeros(2), torch.zeros(2))


def kl_of(new: Tensor, base: Tensor) -> Tensor:
    log_p, log_q = new.log_softmax(-1), base.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@pytest.mark.parametrize("fused", [None, False])
def test_kl_to_base(fused: bool | None) -> None:
    model, data = lora(decoder("GPT2")), batch()
    with llm.adapters_off(model), torch.no_grad():
        base = full_logits(model, data)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    wanted = kl_of(full_logits(model, data), base)
    for reference in (None, decoder("GPT2"), llm.base_score(model, **data)):
        found = llm.kl_to_base(model, reference=reference, fused=fused, **data)
        assert_close(found, wanted, 1e-11, "kl")
    pairs = zip(torch.autograd.grad(found, weights), torch.autograd.grad(wanted, weights), strict=True)
    for one, other in pairs:
        assert_close(one, other, 1e-10, "gradient")


def test_lats_kl() -> None:
    """Defects: divided by its own value it is always 1, and its gradient grows as the model nears its base; its mask
    is not shifted; and a model that is its base is 0 / 0 there, and 0 here."""
    model, data = lora(decoder("GPT2")), batch()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    marked = data["labels"] != -100
    inputs = {name: value for name, value in data.items() if name != "labels"}
    with llm.adapters_off(model), torch.no_grad():
        base = model(**inputs).logits[marked]
    plain = kl_of(model(**inputs).logits[marked], base)
    theirs = plain / plain.detach()
    found = llm.kl_to_base(model, normalized=True, shift=False, **data)
    assert_close(found, theirs, 1e-12, "value")
    for one, other in zip(torch.autograd.grad(found, weights), torch.autograd.grad(theirs, weights), strict=True):
        assert_close(one, other, 1e-10, "gradient")
    shifted = llm.kl_to_base(model, **data)
    assert abs(shifted - plain) > 1e-3 * plain
    with pytest.raises(ValueError, match="scored at other positions"):
        llm.kl_to_base(model, reference=llm.base_score(model, **data), shift=False, **data)


def test_lats_kl_where_training_begins() -> None:
    """Defect: a model that still is its base has 0 / 0 there, and 0 here."""
    model, data = decoder("GPT2"), batch()
    base = llm.base_score(model, reference=model, **data)
    assert (kl_of(base.logits, base.logits) / kl_of(base.logits, base.logits)).isnan()
    loss = llm.kl_to_base(model, reference=base, normalized=True, **data)
    loss.backward()
    assert loss == 0
    assert not any(weight.grad.any() for weight in model.parameters())


def test_adapters_come_back_as_they_were() -> None:
    """PEFT alone would make the frozen ones trainable, in the midst of an attack."""
    model, data = lora(decoder("GPT2")), batch()
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_B" in name)
    before = [weight.requires_grad for weight in model.parameters()]
    assert not llm.base_score(model, **data).logits.requires_grad
    assert [weight.requires_grad for weight in model.parameters()] == before
    with pytest.raises(RuntimeError, match="stop"), llm.adapters_off(torch.nn.ModuleDict({"module": model})):
        raise RuntimeError("stop")
    assert [weight.requires_grad for weight in model.parameters()] == before
    assert model.get_model_status().enabled is True
    with model.disable_adapter():
        pass
    assert [weight.requires_grad for weight in model.parameters()] != before
    with pytest.raises(TypeError, match="give reference="):
        llm.base_score(decoder("Llama"), **data)


def test_the_base_has_no_dropout() -> None:
    model, data = lora(decoder("GPT2")).train(), batch()
    model.get_submodule("base_model.model.transformer.h.0").eval()
    before = [one.training for one in model.modules()]
    first, second = (llm.base_score(model, **data).logits for _ in range(2))
    assert torch.equal(first, second)
    assert [one.training for one in model.modules()] == before
    assert not torch.equal(llm.score(model, **data).logits, llm.score(model, **data).logits)


def test_retain() -> None:
    generator = torch.Generator().manual_seed(0)
    states, base = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    states.requires_grad_()
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    kept = (states - base)[mask.bool()]
    assert_close(llm.retain(states, base, mask), kept.square().mean(), 1e-14, "mse")
    assert_close(llm.retain(states, base, mask, "norm"), kept.norm(dim=-1).mean(), 1e-14, "norm")
    assert_close(llm.retain(states, base), (states - base).square().mean(), 1e-14, "no mask")
    padded = base.where(mask.unsqueeze(-1).bool(), torch.nan)
    llm.retain(states, padded, mask).backward()
    assert states.grad.isfinite().all()
    (grad,) = torch.autograd.grad(llm.retain(states, states.detach(), form="norm"), states)
    assert not grad.any(), "at the base itself"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: llm.away(s, "log"), "form must be"),
        (lambda s: llm.away(s, cutoff=-1.0), "cutoff is for form='cross_entropy'"),
        (lambda s: llm.retain(s.logits, s.logits, form="l1"), "form must be"),
        (lambda s: llm.retain(s.logits, s.logits[:1]), "states and base must be"),
        (lambda s: llm.Scores(s.logits[:1], s.targets), "one row per target"),
        (lambda s: llm.Scores.of(torch.zeros(1, 3, 4), torch.zeros(1, 2, dtype=torch.long)), "must be"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    _, scores = two_classes([0.0, 1.0])
    with pytest.raises(ValueError, match=message):
        call(scores)


def test_imports_neither_transformers_nor_peft() -> None:
    script = "import fastadv, sys; fastadv.llm.toward; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {"transformers", "peft", "accelerate"} & set(loaded)
