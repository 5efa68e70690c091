"""SMART, VAT, LLR, AWP and NEFTune in use: what they refuse and how they say it, faults, attention, other closures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadv
from fastadv.methods.smart import UPDATES
from tests.models import CLASSES, D, Stateful, TiedLM, TinyModel, V
from tests.support import (
    assert_close,
    assert_gradients,
    assert_unchanged,
    batch,
    clear,
    gradients,
    record,
    refused,
    same_bits,
    seeded,
    snapshot,
)

COMPARING = {"smart": fastadv.SMART, "vat": fastadv.VAT}
HOLDING = {**COMPARING, "llr": fastadv.LLR}


def tiny(**options: Any) -> tuple[TinyModel, dict[str, Tensor]]:
    """A model with gradients from before, so that a change to them shows."""
    model, data = seeded(lambda: TinyModel("tfm", **options)), batch()
    if not options:
        model(**data).loss.backward()
    return model, data


# What is refused


@pytest.mark.parametrize("name", COMPARING)
class TestClosures:
    def test_only_a_loss(self, name: str) -> None:
        model, data = tiny()
        adv = COMPARING[name](model, embedding=model.word_embeddings)
        phrases = [name.upper(), "only a loss", "(loss, logits)", "model(**batch)"]
        refused(model, lambda: adv.backward(lambda: model(**data).loss), TypeError, *phrases)

    def test_a_dict_without_logits(self, name: str) -> None:
        model, data = tiny()
        adv = COMPARING[name](model, embedding=model.word_embeddings)
        refused(model, lambda: adv.backward(lambda: {"loss": model(**data).loss}), TypeError, "without logits")

    def test_one_class(self, name: str) -> None:
        """The softmax of one class is one: a divergence of distributions would be zero, and nobody would know."""
        model, data = tiny(classes=1)
        data["labels"] = torch.randn(4).double()
        adv = COMPARING[name](model, embedding=model.word_embeddings)
        refused(model, lambda: adv.backward(lambda: model(**data)), ValueError, "one class", "divergence='mse'")
        adv.close()
        squared = COMPARING[name](model, embedding=model.word_embeddings, divergence="mse")
        squared.backward(lambda: model(**data))
        squared.backward(lambda: (model(**data).loss, model(**data).logits[:, 0]))

    def test_perturbed_needs_logits_too(self, name: str) -> None:
        model, data = tiny()
        adv = COMPARING[name](model, embedding=model.word_embeddings)
        with adv.perturbed(lambda: model(**data)), torch.no_grad():
            moved = model(**data).logits
        assert not torch.equal(moved, model(**data).logits)

        def search() -> None:
            with adv.perturbed(lambda: model(**data).loss):
                pytest.fail("the body must not run")

        refused(model, search, TypeError, "only a loss")


@pytest.mark.parametrize("name", HOLDING)
def test_the_output_layer_cannot_be_moved(name: str) -> None:
    model = seeded(TiedLM)
    phrases = [name.upper(), "tied='both'", "tied='lookup'"]
    refused(model, lambda: HOLDING[name](model, scope="table", tied="both"), ValueError, *phrases)
    ids = batch()["input_ids"]
    adv = HOLDING[name](model)
    with record(model) as seen:
        adv.backward(lambda: model(ids))
    assert not torch.equal(seen[-1], seen[0])


class Once(torch.autograd.Function):
    """A custom op as most are written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (1 - x.tanh() ** 2)


class Attends(nn.Module):
    """Attention by torch's fused op; `fast`: an activation without a second derivative."""

    def __init__(self, fast: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, CLASSES)
        self.tap, self.qkv, self.fast = nn.Identity(), nn.Linear(D, 3 * D), fast

    def forward(self, ids: Tensor, labels: Tensor, plain: bool = False) -> Tensor:
        q, k, v = self.qkv(self.tap(self.embed(ids))).unsqueeze(1).chunk(3, -1)
        attended = (q @ k.mT / D**0.5).softmax(-1) @ v if plain else F.scaled_dot_product_attention(q, k, v)
        hidden = Once.apply(attended) if self.fast else attended.tanh()
        return F.cross_entropy(self.head(hidden[:, 0].mean(1)), labels, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_llr_differentiates_fused_attention_twice(dtype: torch.dtype) -> None:
    """By the plain kernel: torch's own choice has no second derivative."""
    model, data = seeded(Attends, dtype=dtype), batch()
    found = []
    for plain in (False, True):
        clear(model)
        adv = fastadv.LLR(model, epsilon=0.1, random_start=0.05)
        torch.manual_seed(2)
        adv.backward(lambda: model(data["input_ids"], data["labels"], plain))  # noqa: B023
        found.append(gradients(model))
        adv.close()
    assert_gradients(found[0], found[1], 1e-4 if dtype == torch.float32 else 1e-9)
    losses = model(data["input_ids"], data["labels"])
    [slope] = torch.autograd.grad(losses.sum(), model.embed.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for"):
        slope.sum().backward()


def test_llr_says_where_there_is_no_second_derivative() -> None:
    model, data = seeded(lambda: Attends(fast=True)), batch()
    adv = fastadv.LLR(model)
    closure = lambda: model(data["input_ids"], data["labels"])  # noqa: E731
    refused(model, lambda: adv.backward(closure), RuntimeError, "LLR differentiates the model twice", "once_diff")


def test_llr_refuses_a_compiled_model() -> None:
    model = seeded(TinyModel)
    compiled = torch.compile(model, backend="eager")
    refused(model, lambda: fastadv.LLR(compiled, embedding="word_embeddings"), ValueError, "torch.compile", "twice")


@pytest.mark.parametrize(
    ("method", "options", "error", "phrases"),
    [
        (fastadv.SMART, {"update": "code"}, ValueError, ["update", *map(repr, UPDATES)]),
        (fastadv.SMART, {"divergence": "l2"}, ValueError, ["divergence", "'symmetric_kl'"]),
        (fastadv.SMART, {"search": "l2"}, ValueError, ["search", "'symmetric_kl'"]),
        (fastadv.SMART, {"weight": -1}, ValueError, ["weight", "at least 0"]),
        (fastadv.SMART, {"epsilon": None}, TypeError, ["epsilon", "number"]),
        (fastadv.VAT, {"xi": 0.0}, ValueError, ["xi", "above 0"]),
        (fastadv.VAT, {"random_start": False}, ValueError, ["random start", "no gradient"]),
        (fastadv.VAT, {"divergence": 3}, ValueError, ["divergence"]),
        (fastadv.LLR, {"optimizer": "sgd"}, ValueError, ["optimizer", "'sign'", "'adam'"]),
        (fastadv.LLR, {"gap_weight": -1.0}, ValueError, ["gap_weight"]),
        (fastadv.LLR, {"slope_weight": "3"}, TypeError, ["slope_weight"]),
        (fastadv.NEFTune, {"alpha": -5.0}, ValueError, ["alpha", "at least 0"]),
    ],
    ids=str,
)
def test_arguments(method: Any, options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
    model, _ = tiny()
    refused(model, lambda: method(model, embedding=model.word_embeddings, **options), error, *phrases)


@pytest.mark.parametrize(
    ("options", "error", "phrases"),
    [
        ({"gamma": -1.0}, ValueError, ["gamma"]),
        ({"epsilon": "0.01"}, TypeError, ["epsilon"]),
        ({"steps": 0}, ValueError, ["steps"]),
        ({"parameters": lambda name, p: False}, ValueError, ["no weight moves", "parameters="]),
        ({"embedding": "word_embeddings"}, TypeError, ["embedding"]),
        ({"scope": "sample"}, TypeError, ["scope"]),
    ],
)
def test_arguments_of_awp(options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
    model, _ = tiny()
    refused(model, lambda: fastadv.AWP(model, **options), error, *phrases)


@pytest.mark.parametrize("method", [fastadv.LLR, fastadv.NEFTune])
def test_attack_where_it_has_no_use(method: Any) -> None:
    model, data = tiny()
    adv = method(model, embedding=model.word_embeddings)
    closure = lambda: model(**data).loss  # noqa: E731
    refused(model, lambda: adv.backward(closure, attack=closure), ValueError, "attack=", "leave it out")


@pytest.mark.parametrize("name", COMPARING)
def test_attack_takes_the_place_of_the_search(name: str) -> None:
    """The perturbation follows another loss; the penalty is the divergence there."""
    model, data = tiny()
    clear(model)
    seen = {}
    for sign in (1, -1):
        adv = COMPARING[name](
            model, embedding=model.word_embeddings, epsilon=0.1, random_start=lambda s, _: torch.zeros(s)
        )
        with record(model) as words:
            adv.backward(lambda: model(**data), attack=lambda: sign * model(**data).loss)  # noqa: B023
        seen[sign] = words[-1] - words[0]
        adv.close()
    assert_close(seen[1], -seen[-1], 1e-9, "perturbation")


# AWP puts weights back


@pytest.mark.parametrize("fails_in", ["closure", "backward", "perturbed"])
@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("index", range(3))
def test_awp_leaves_no_trace_of_a_fault(index: int, earlier: bool, fails_in: str) -> None:
    """Ctrl-C in any pass: weights, gradients, statistics, generators. The memory of the weights stays what it was."""
    model, data = seeded(Stateful), batch()
    if earlier:
        model(data["input_ids"], data["labels"]).loss.backward()
    passes: list[int] = []

    def closure() -> Any:
        passes.append(1)
        if fails_in != "backward" and len(passes) == index + 1:
            raise KeyboardInterrupt
        return model(data["input_ids"], data["labels"])

    def backward(loss: Tensor) -> None:
        if fails_in == "backward" and len(passes) >= index + 1:
            raise KeyboardInterrupt
        loss.backward()

    adv = fastadv.AWP(model, steps=2, gamma=0.1, backward=backward)
    before = snapshot(model)
    try:
        if fails_in == "perturbed":
            with adv.perturbed(closure):
                raise KeyboardInterrupt
        adv.backward(closure)
    except KeyboardInterrupt:
        assert_unchanged(model, before)
    else:
        pytest.fail("it should have failed")


def test_awp_perturbs_for_evaluation() -> None:
    model, data = tiny()
    adv, before = fastadv.AWP(model, gamma=0.05), snapshot(model)
    with adv.perturbed(lambda: model(**data)):
        worse = model(**data).loss.detach()
    assert_unchanged(model, before)
    assert worse > model(**data).loss


def test_awp_stays_where_a_gradient_is_not_finite() -> None:
    """That weight is counted and does not move; the others do."""
    model, data = tiny()
    clear(model)
    adv = fastadv.AWP(model, gamma=0.05)
    before, moved = {n: p.detach().clone() for n, p in model.named_parameters()}, []
    handle = model.classifier.weight.register_hook(lambda grad: grad * float("inf"))

    def closure() -> Any:
        moved.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
        return model(**data)

    adv.backward(closure)
    handle.remove()
    assert "classifier.weight" not in moved[-1]
    assert "bert.ff1.weight" in moved[-1]
    assert int(adv.skipped) == 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_awp_does_not_mind_the_size_of_the_gradient(scale: float) -> None:
    model, data = seeded(lambda: TinyModel("tfm"), dtype=torch.float32), batch()
    found = []
    for factor in (1.0, scale):
        seen: list[Tensor] = []

        def closure() -> Tensor:
            seen.append(model.bert.ff1.weight.detach().clone())  # noqa: B023
            return model(**data).loss * factor  # noqa: B023

        fastadv.AWP(model, gamma=0.05).backward(closure)
        clear(model)
        found.append(seen[-1] - seen[0])
    assert_close(found[1], found[0], 1e-4, "movement")


# Modes and precisions


@pytest.mark.parametrize("name", [*HOLDING, "neftune", "awp", "bregman"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_low_precision_and_autocast(name: str, dtype: torch.dtype) -> None:
    """Finite, near float64's, and repeatable with dropout."""
    makes = {
        **HOLDING,
        "neftune": fastadv.NEFTune,
        "awp": lambda model, embedding: fastadv.AWP(model),
        "bregman": lambda model, embedding: fastadv.BregmanProximal(
            model, decay=0.9, method=fastadv.SMART(model, embedding=embedding)
        ),
    }
    found = []
    for _ in range(2):
        model, data = seeded(lambda: TinyModel("tfm", dropout=0.1), dtype=dtype), batch()
        adv = makes[name](model, embedding="word_embeddings")
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            result = adv.backward(lambda: model(**data))  # noqa: B023
        assert result.loss.isfinite()
        assert result.adv_loss.isfinite()
        found.append(gradients(model))
        assert all(grad.isfinite().all() for grad in found[-1].values())
    assert all(same_bits(found[0][key], found[1][key]) for key in found[0])


def test_vat_looks_at_a_plain_step_without_labels() -> None:
    """Before `start_step`: nothing to train, and no complaint."""
    model, data = tiny()
    clear(model)
    adv = fastadv.VAT(model, embedding=model.word_embeddings, start_step=1)
    result = adv.backward(lambda: {"logits": model(data["input_ids"]).logits})
    assert (result.loss.item(), result.adv_loss) == (0.0, None)
    assert all(p.grad is None for p in model.parameters())
    assert adv.backward(lambda: {"logits": model(data["input_ids"]).logits}).adv_loss > 0


@pytest.mark.parametrize("name", HOLDING)
@pytest.mark.parametrize("inside", [False, True])
def test_checkpointing(name: str, inside: bool) -> None:
    """Segments behind the embedding are recomputed as ever; one around it could not tell which perturbation it saw."""
    from torch.utils.checkpoint import checkpoint

    model, data = tiny()
    clear(model)
    plain = HOLDING[name](model, embedding=model.word_embeddings)
    torch.manual_seed(1)
    plain.backward(lambda: model(**data))
    want = gradients(model)
    plain.close()
    clear(model)

    class Segment(nn.Module):
        def __init__(self, part: nn.Module) -> None:
            super().__init__()
            self.part = part

        def forward(self, *args: Any) -> Any:
            return checkpoint(self.part, *args, use_reentrant=False)

    if inside:
        model.bert.embeddings = Segment(model.bert.embeddings)
        adv = HOLDING[name](model, embedding=model.bert.embeddings.part.word_embeddings)
        if name == "vat":  # its clean pass is over when the perturbation begins to move
            adv.backward(lambda: model(**data))
        else:
            with pytest.raises(RuntimeError, match="keep it outside of checkpointed segments"):
                adv.backward(lambda: model(**data))
    else:
        model.bert.ff1 = Segment(model.bert.ff1)
        adv = HOLDING[name](model, embedding=model.word_embeddings)
        torch.manual_seed(1)
        adv.backward(lambda: model(**data))
        found = gradients(model)
        assert_gradients({key.replace("ff1.part", "ff1"): grad for key, grad in found.items()}, want, 1e-12)


@pytest.mark.parametrize("name", ["smart", "vat", "neftune"])
def test_compiled(name: str) -> None:
    """The same gradients under torch.compile."""
    make = {**COMPARING, "neftune": fastadv.NEFTune}[name]
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, data = seeded(lambda: TinyModel("tfm")), batch()
        adv_model: Any = torch.compile(model, backend="aot_eager") if compiled else model
        adv = make(adv_model, embedding="word_embeddings")
        torch.manual_seed(1)
        for _ in range(2):
            clear(model)
            adv.backward(lambda: adv_model(**data), mask=data["attention_mask"])  # noqa: B023
        found.append(gradients(model))
        adv.close()
    assert_gradients(found[1], found[0], 1e-9)


def test_awp_goes_where_the_model_goes() -> None:
    """To another precision, after it was made and after a step."""
    model, data = seeded(lambda: TinyModel("tfm"), dtype=torch.float32), batch()
    adv = fastadv.AWP(model)
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        clear(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert adv.backward(lambda: model(**data)).adv_loss > 0
        assert all(same_bits(p.detach(), before[name]) for name, p in model.named_parameters())


def test_a_step_by_the_gradients_size_and_a_scaler_do_not_go_together() -> None:
    model, data = tiny()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    adv = fastadv.SMART(model, embedding=model.word_embeddings, update="mt-dnn", scaler=scaler)
    refused(model, lambda: adv.backward(lambda: model(**data)), ValueError, "GradScaler", "'paper'")
