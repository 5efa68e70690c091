"""The head at target positions alone: the numbers of full logits, on every kind of decoder, wrapped or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadv
from fastadv import llm
from tests.llm.decoders import KINDS, V, batch, decoder, full_logits, gradients, lora
from tests.support import assert_close


class Rows:
    """How many rows of logits the model made."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[int] = []
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda _module, _args, output: self.seen.append(output[..., 0].numel()))


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lift the casts to float32 in transformers' norms and softmaxes, which make padded rows NaN besides."""
    cast, softmax = Tensor.to, F.softmax

    def to(self: Tensor, *args: Any, **options: Any) -> Tensor:
        return self if args[:1] == (torch.float32,) else cast(self, *args, **options)

    def wide(x: Tensor, *args: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return softmax(x, *args, dtype=None if dtype == torch.float32 else dtype, **options)

    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "float", lambda self: self)
    monkeypatch.setattr(F, "softmax", wide)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_full_logits(kind: str) -> None:
    model, data = decoder(kind), batch()
    ids = data["labels"][:, 1:][data["labels"][:, 1:] != -100]
    rows = Rows(model)

    def full() -> Tensor:
        log_p = full_logits(model, data).log_softmax(dim=-1).gather(1, ids.unsqueeze(1)).squeeze(1)
        return -log_p.mean() - torch.log(1 - log_p.exp()).mean()

    def cut() -> Tensor:
        scores = llm.score(model, **data)
        return llm.toward(scores) + llm.away(scores, threshold=None)

    wanted, found = gradients(model, full), gradients(model, cut)
    assert rows.seen == [data["input_ids"].numel(), len(ids)]
    assert_close(cut(), full(), 1e-12, "loss")
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert_close(found[name], value, 1e-11, name)


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "GPT2"])
def test_peft(kind: str) -> None:
    """Adapters everywhere, and a head that is trained beside them."""
    model = lora(decoder(kind), modules_to_save=["lm_head"] if kind == "Llama" else None)
    data = batch()
    with torch.no_grad():
        assert_close(llm.score(model, **data).logits, full_logits(model, data), 1e-12, "logits")
    assert sum(weight.requires_grad for weight in model.parameters())
    assert all(value.any() for name, value in gradients(model, lambda: llm.toward(llm.score(model, **data))).items())


class Plain(nn.Module):
    """A language model of no library; `named` says whether its head can be found."""

    def __init__(self, named: bool, output: str = "tensor") -> None:
        super().__init__()
        self.embed, self.output = nn.Embedding(V, 6), output
        head = nn.Linear(6, V)
        self.lm_head, self.other = (head, None) if named else (None, head)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        logits = (self.lm_head or self.other)(self.embed(input_ids).cumsum(dim=1))
        return {"tensor": logits, "tuple": (logits, None), "dict": {"logits": logits}, "none": None}[self.output]


@pytest.mark.parametrize("output", ["tensor", "tuple", "dict"])
@pytest.mark.parametrize("named", [True, False])
def test_other_models(named: bool, output: str) -> None:
    """A head that cannot be found runs everywhere, and the numbers are the same."""
    model, data = Plain(named, output).double(), batch()
    whole = Plain(named, "tensor").double()
    whole.load_state_dict(model.state_dict())
    wanted = whole(data["input_ids"], data["attention_mask"])[:, :-1][data["labels"][:, 1:] != -100]
    assert_close(llm.score(model, **data).logits, wanted, 1e-14, "logits")


def test_a_compiled_model_computes_full_logits() -> None:
    """One graph serves all batches; a hook per call would compile one per call."""
    graphs: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = Plain(named=True).double()
    compiled = torch.compile(model, backend=backend)
    for data in (batch(seed=1), batch(seed=2), {**batch(seed=3), "labels": batch(seed=3)["input_ids"]}):
        assert_close(llm.score(compiled, **data).logits, llm.score(model, **data).logits, 1e-14, "logits")
    assert len(graphs) == 1


def test_the_hook_goes_whatever_happens() -> None:
    model, data = Plain(named=True), batch()
    with pytest.raises(IndexError):
        llm.score(model, **{**data, "input_ids": data["input_ids"] + V})
    llm.score(model, **data)
    assert not model.lm_head._forward_pre_hooks


def test_what_does_not_fit_is_refused() -> None:
    model, data = Plain(named=True), batch()
    with pytest.raises(ValueError, match="labels must have the positions that the model sees"):
        llm.score(model, **{**data, "labels": data["labels"][:, 1:]})
    with pytest.raises(TypeError, match="give a causal language model"):
        llm.score(Plain(named=True, output="none"), **data)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("peft", [True, False])
def test_in_an_attack(peft: bool, checkpointing: bool) -> None:
    """PGD with these losses is PGD with those of full logits, pass by pass."""
    found = []
    for loss in (lambda m, d: llm.toward(llm.score(m, **d)), lambda m, d: _whole(m, d)):
        model, data = decoder("Llama"), batch()
        model = lora(model) if peft else model
        if checkpointing:
            model.train().gradient_checkpointing_enable()
        adv = fastadv.PGD(model, epsilon=0.5, step_size=0.3, steps=2, scope="token")
        seen: list[Tensor] = []

        def closure(model: nn.Module = model, data: Any = data, seen: Any = seen, loss: Any = loss) -> Tensor:
            seen.append(loss(model, data))
            return seen[-1]

        adv.backward(closure, mask=data["attention_mask"])
        adv.close()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((torch.stack(seen).detach(), grads))
    (cut, cut_gradients), (full, full_gradients) = found
    assert len(set(cut.tolist())) == 3  # the perturbation reached every pass
    assert_close(cut, full, 1e-10, "losses")
    assert cut_gradients.keys() == full_gradients.keys()
    for name, value in full_gradients.items():
        assert_close(cut_gradients[name], value, 1e-10, name)


def _whole(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(full_logits(model, data), data["labels"][:, 1:][data["labels"][:, 1:] != -100])


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)])
def test_labels_are_token_ids(wrong: Tensor) -> None:
    with pytest.raises(TypeError, match="labels must be token ids"):
        llm.Targets.of(wrong)


def test_labels_have_a_target() -> None:
    with pytest.raises(ValueError, match=r"must be \[B, T\]"):
        llm.Targets.of(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="no target"):
        llm.Targets.of(torch.tensor([[5, -100, -100]]))  # nothing predicts the first
    assert llm.Targets.of(torch.tensor([[5, -100, -100]]), shift=False).place.tolist() == [0]
