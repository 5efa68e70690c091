"""`adv.at(mask)` among all else: methods, dropout, checkpoints, compilers, adapters, faults, and what is refused."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastadv
from tests.contracts.test_at import HARMFUL, OTHER, PROMPTS, SAFE, SITES, attack_loss, loss_of, method, training_loss
from tests.every import EVERY, every_but, waves
from tests.models import Stateful, TinyModel
from tests.support import (
    assert_close,
    assert_gradients,
    assert_unchanged,
    batch,
    clear,
    gradients,
    ready,
    seeded,
    snapshot,
)
from tests.tiny_llama import Layer, tiny


def step(model: nn.Module, adv: fastadv.PGD) -> dict[str, Tensor]:
    """Gradients of one step on three forwards, with two in the attack."""
    clear(model)
    adv.backward(lambda: training_loss(model, adv.at), attack=lambda: attack_loss(model, adv.at))
    return gradients(model)


@pytest.mark.parametrize("scope", ["sample", "token"])
@pytest.mark.parametrize("name", every_but("yopo"))
def test_every_method(name: str, scope: str) -> None:
    """One forward at the positions that mask= would give: the same step. (SMART and VAT weigh answers by no mask.)"""
    found = []
    for under_at in (False, True):
        model, data, _ = ready(dropout=0.2)
        mask = data["attention_mask"]
        start = {} if name == "freeat" else {"random_start": waves}
        adv = EVERY[name](model, embedding=model.word_embeddings, scope=scope, **start)
        block: Any = adv.at if under_at else lambda _: contextlib.nullcontext()

        def closure() -> Any:
            with block(mask):  # noqa: B023
                return model(**data)  # noqa: B023

        for _ in range(3):
            torch.manual_seed(5)
            adv.backward(closure, mask=None if under_at else mask)
        found.append((gradients(model), adv.perturbation_norm, torch.get_rng_state()))
    (want, norm, state), (got, norm_at, state_at) = found
    assert_gradients(got, want, 1e-12)
    assert_close(norm_at, norm, 1e-12, "norm")
    assert torch.equal(state_at, state)


@pytest.mark.parametrize("first", [True, False], ids=["at-first", "plain-first"])
@pytest.mark.parametrize("dropout", ["fresh", "same"])
def test_a_first_pass_that_begins_again_draws_as_if_it_had_not(dropout: str, first: bool) -> None:
    """Dropout, a buffer and a random start: the first step that uses `at` is what a later one is."""
    found = []
    for warm in (False, True):
        model, data = seeded(Stateful), batch()
        adv = fastadv.PGD(model, scope="sample", random_start=True, clean_weight=0, dropout=dropout, epsilon=0.5)

        def closure() -> Tensor:
            loss = 0.0 if first else model(data["input_ids"], data["labels"]).loss  # noqa: B023
            with adv.at(data["attention_mask"]):  # noqa: B023
                return loss + model(data["input_ids"], data["labels"]).loss  # noqa: B023

        if warm:
            state = copy.deepcopy(model.state_dict())
            adv.find(closure)
            model.load_state_dict(state)
        torch.manual_seed(3)
        adv.backward(closure)
        found.append((gradients(model), dict(model.named_buffers()), torch.get_rng_state()))
    (got, buffers, rng), (want, buffers_want, rng_want) = found
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert all(torch.equal(buffers[name], buffers_want[name]) for name in buffers_want)
    assert torch.equal(rng, rng_want)


def test_closures_with_and_without_take_turns() -> None:
    """A closure that never uses `at` is perturbed as ever, whatever the last one did."""
    model, data, plain = ready()
    adv = fastadv.PGD(model, embedding="word_embeddings", scope="sample", clean_weight=0)
    twin, _, twin_plain = ready()
    other = fastadv.PGD(twin, embedding="word_embeddings", scope="sample", clean_weight=0)

    def under_at() -> Any:
        with adv.at(data["attention_mask"]):
            return model(**data)

    for _ in range(2):
        adv.backward(under_at)
        clear(model)
        clear(twin)
        adv.backward(plain, mask=data["attention_mask"])
        other.backward(twin_plain, mask=data["attention_mask"])
        assert all(map(torch.equal, gradients(model).values(), gradients(twin).values()))


# Around it


class Recomputed(Layer):
    """A layer under a checkpoint, hooks included, as transformers' gradient checkpointing has it."""

    reentrant = False

    def __call__(self, *args: Any) -> Any:
        return checkpoint(super().__call__, *args, use_reentrant=self.reentrant)


class Reentrant(Recomputed):
    reentrant = True


INSIDE = ["model.layers.1.self_attn", "model.layers.2.self_attn", ("model.layers.3", "input")]  # and recomputed


def checkpointed(model: nn.Module, kind: type[Layer] = Recomputed) -> nn.Module:
    for layer in model.model.layers:
        layer.__class__ = kind
    return model


def test_a_checkpoint_recomputes_what_each_block_said() -> None:
    """Two texts of one shape under one perturbation, and one without: only the checkpoint tells which runs again."""
    short = HARMFUL._replace(**{name: getattr(SAFE, name)[:, :11] for name in ("ids", "attention", "prompt", "target")})
    found = []
    for net in (tiny(), checkpointed(tiny())):
        adv = method(net, embedding=INSIDE)

        def closure(net: nn.Module = net, adv: fastadv.PGD = adv) -> Tensor:
            plain = loss_of(net, short)
            with adv.at(HARMFUL.prompt):
                loss = loss_of(net, HARMFUL)
            with adv.at(short.prompt):
                return plain + 0.5 * loss - 0.7 * loss_of(net, short)

        adv.backward(closure)
        inside = adv.find(closure)
        with inside.applied():
            closure().backward()  # outside of the block, as every backward
        found.append(gradients(net))
    assert_gradients(found[1], found[0], 1e-12)


def test_places_in_checkpoints_without_at() -> None:
    """Several places with outputs of one shape: each is recomputed with its own."""
    found = []
    for net in (tiny(), checkpointed(tiny())):
        adv = method(net, embedding=INSIDE)
        adv.backward(lambda net=net: loss_of(net, SAFE), mask=SAFE.prompt)
        found.append(gradients(net))
    assert_gradients(found[1], found[0], 1e-12)


def test_reentrant_checkpoints_are_refused() -> None:
    model = checkpointed(tiny(), Reentrant)
    adv = method(model)
    with pytest.raises(RuntimeError, match="cannot give the gradient of a perturbation: use"):
        step(model, adv)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_a_compiled_model() -> None:
    """Two texts of other lengths and a plain one: the gradients of the plain model, and no graph breaks."""
    found, short = [], batch(4, 5)
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model, data = seeded(lambda: TinyModel("tfm")), batch()
        net: Any = torch.compile(model, backend="aot_eager") if compiled else model
        adv = method(net, embedding=["word_embeddings", "ff1"])
        first, second = data["attention_mask"].bool().clone(), torch.zeros(4, 5, dtype=torch.bool)
        first[:, 3:], second[:, 2:] = False, True

        def closure() -> Tensor:
            plain = net(**data).loss  # noqa: B023
            with adv.at(first):  # noqa: B023
                loss = net(**data).loss  # noqa: B023
            with adv.at(second):  # noqa: B023
                return plain + loss - 0.5 * net(**short).loss  # noqa: B023

        for _ in range(2):
            clear(model)
            adv.backward(closure)
        found.append(gradients(model))
    assert_gradients(found[1], found[0], 1e-9)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    """The perturbation is float32, and what a bfloat16 model sees is rounded once."""
    model = tiny(dtype=dtype)
    adv = method(model, embedding=SITES[:1], scope="sample")

    def closure() -> Tensor:
        with adv.at(HARMFUL.prompt):
            return loss_of(model, HARMFUL)

    found = adv.find(closure)
    assert found.values[0].dtype == torch.float32
    assert_close(found.values[0][3].norm(), torch.tensor(0.5), 1e-5, "norm")
    seen: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with found.applied(SAFE.prompt), torch.no_grad():
        model(SAFE.ids, SAFE.attention)
    want = model.model.embed_tokens.weight.detach()[SAFE.ids].float()
    for row, prompt in enumerate(SAFE.prompt):
        want[row, prompt] += found.values[0][row, : int(prompt.sum())]
    assert torch.equal(seen[0], want.to(dtype))


def test_probes_with_adapters_off() -> None:
    """An attack that looks at the base model too: adapters are off in a part of the closure alone."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny(), config)
    base = copy.deepcopy(model).unload()
    adv = method(model, embedding=["embed_tokens", "layers.2"])

    def closure(at: Callable[[Tensor], Any]) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with at(HARMFUL.prompt):
                tuned = loss_of(model, HARMFUL)
            with model.disable_adapter(), at(SAFE.prompt):
                return loss_of(model, SAFE) - tuned

        return loss

    found = adv.find(closure(adv.at))
    assert found.sites == ["model.embed_tokens", "model.layers.2"]
    with found.applied(), model.disable_adapter(), adv.at(SAFE.prompt):
        got = loss_of(model, SAFE)
    with contextlib.ExitStack() as stack:
        for site, value in zip(found.sites, found.values, strict=True):
            stack.callback(_adds(base.get_submodule(site), value, SAFE.prompt).remove)
        assert_close(got, loss_of(base, SAFE), 1e-12, "loss of the base model")
    assert not any(p.grad is not None for p in model.parameters())


def _adds(module: nn.Module, value: Tensor, mask: Tensor) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        for row, kept in enumerate(mask):
            hidden[row, kept] += value[row, : int(kept.sum())]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return module.register_forward_hook(hook)


# In eval mode


class Noting(nn.Module):
    """A linear layer that notes whether it is in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(16, 3), []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.training)
        return self.linear(x)


def test_an_attack_in_eval_mode() -> None:
    """Probes have no dropout, full passes have theirs, and a module that was in eval mode stays there."""
    model = seeded(lambda: TinyModel("tfm", dropout=0.3))
    model.classifier = Noting().double()
    data = batch()
    model.bert.ff1.eval()
    modes = [module.training for module in model.modules()]
    options: dict[str, Any] = {"epsilon": 0.5, "step_size": 0.3, "steps": 2, "scope": "sample"}
    adv = fastadv.PGD(model, embedding="word_embeddings", attack_mode="eval", **options)
    adv.backward(lambda: model(**data), mask=data["attention_mask"])
    assert model.classifier.seen == [True, False, False, True]  # the clean pass's gradient is not followed
    assert [module.training for module in model.modules()] == modes
    found = adv.find(lambda: model(**data), data["attention_mask"])
    still = copy.deepcopy(model).eval()
    evaluated = fastadv.PGD(still, embedding="word_embeddings", **options)
    want = evaluated.find(lambda: still(**data), data["attention_mask"])
    assert torch.equal(found.values[0], want.values[0])


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()])
def test_a_fault_in_eval_mode_puts_modes_back(error: BaseException) -> None:
    model, data, _ = ready(dropout=0.3)
    model.bert.ff1.eval()
    adv = fastadv.FGM(model, embedding="word_embeddings", scope="sample", attack_mode="eval")
    before = snapshot(model)
    calls: list[bool] = []

    def closure() -> Any:
        calls.append(model.training)
        if len(calls) == 2:
            raise error
        return model(**data)

    with pytest.raises(type(error)):
        adv.backward(closure, mask=data["attention_mask"])
    assert calls == [True, False]
    assert_unchanged(model, before)


def test_other_modes_are_refused() -> None:
    model, _, _ = ready()
    with pytest.raises(ValueError, match="attack_mode must be one of None, 'eval'"):
        fastadv.PGD(model, attack_mode="train")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="SMART has no option 'attack_mode'"):
        fastadv.SMART(model, attack_mode="eval")  # type: ignore[call-arg]


# Faults


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("index", range(4))
def test_a_fault_inside_a_block_leaves_no_trace(index: int, warm: bool, error: BaseException) -> None:
    model = tiny()
    adv = method(model, random_start=True)
    if warm:
        step(model, adv)
    loss_of(model, OTHER).backward()
    before, calls = snapshot(model), []

    def failing(at: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            calls.append(1)
            with at(HARMFUL.prompt):
                loss = loss_of(model, HARMFUL)
                if len(calls) > index + (0 if warm else 1):  # the first call of all begins again
                    raise error
            return loss

        return closure

    with pytest.raises(type(error)):
        adv.backward(failing(adv.at))
    assert_unchanged(model, before)
    plain = loss_of(model, OTHER)
    with adv.at(HARMFUL.prompt):  # nothing runs: the block does nothing
        assert torch.equal(loss_of(model, OTHER), plain)
    torch.manual_seed(1)
    got = step(model, adv)
    other = tiny()
    torch.manual_seed(1)
    assert_gradients(got, step(other, method(other, random_start=True)), 1e-12)


def test_a_fault_inside_applied() -> None:
    model = tiny()
    adv = method(model)
    found = adv.find(lambda: attack_loss(model, adv.at))
    plain = loss_of(model, SAFE)
    with pytest.raises(KeyboardInterrupt), found.applied(), adv.at(SAFE.prompt):
        raise KeyboardInterrupt
    assert torch.equal(loss_of(model, SAFE), plain)
    with found.applied(SAFE.prompt):
        assert not torch.equal(loss_of(model, SAFE), plain)


def test_a_step_that_is_not_attacked_is_plain() -> None:
    model = tiny()
    adv = method(model, every=2)
    training_loss(model, lambda _: contextlib.nullcontext()).backward()
    want = gradients(model)
    adv.backward(lambda: training_loss(model, adv.at), step=0)
    clear(model)
    adv.backward(lambda: training_loss(model, adv.at), step=1)
    assert_gradients(gradients(model), want, 1e-12)


# What is refused


def refused(
    closure: Callable[[fastadv.PGD, nn.Module], Any], match: str, error: type[Exception], **options: Any
) -> None:
    model = tiny()
    adv = method(model, **options)
    before = snapshot(model)
    with pytest.raises(error, match=match):
        adv.find(lambda: closure(adv, model))
    assert_unchanged(model, before)


def nested(adv: fastadv.PGD, model: nn.Module) -> Tensor:
    with adv.at(SAFE.prompt), adv.at(SAFE.prompt):
        return loss_of(model, SAFE)


def under(*masks: Any, what: Any = SAFE) -> Callable[[fastadv.PGD, nn.Module], Tensor]:
    def closure(adv: fastadv.PGD, model: nn.Module) -> Tensor:
        loss = torch.zeros(())
        for mask in masks:
            with adv.at(mask):
                loss = loss + loss_of(model, what)
        return loss

    return closure


FEWER = SAFE.prompt.clone()
FEWER[1, int(SAFE.prompt[1].nonzero()[0])] = False


@pytest.mark.parametrize(
    ("closure", "match", "error"),
    [
        (nested, r"at\(mask\) inside at\(mask\)", RuntimeError),
        (
            under(HARMFUL.prompt),
            r"shape \(4, 11\), but the perturbed module \(model.embed_tokens\) returned",
            ValueError,
        ),
        (under(SAFE.prompt, FEWER), "Sample 1 has 4 under this mask and 5 under the first", ValueError),
        (under(SAFE.prompt, SAFE.prompt[:3]), "has 3 samples, and the first of the step had 4", ValueError),
        (under(SAFE.prompt[0]), r"not a tensor of shape \(13,\)", ValueError),
        (under([[True]]), "not list", TypeError),
        (under(SAFE.ids), "this one holds|holds", ValueError),
    ],
)
def test_blocks_that_cannot_be(closure: Any, match: str, error: type[Exception]) -> None:
    refused(closure, match, error)


def test_a_block_without_a_forward() -> None:
    def closure(adv: fastadv.PGD, model: nn.Module) -> Tensor:
        with adv.at(SAFE.prompt):
            pass
        return loss_of(model, SAFE)

    refused(closure, "no forward inside .* ran model.embed_tokens, model.layers.1.mlp, model.layers.2", RuntimeError)


def test_a_place_that_never_runs() -> None:
    model = tiny()
    model.spare = nn.Linear(2, 2)
    adv = method(model, embedding=[*SITES, "spare"])
    with pytest.raises(RuntimeError, match=r"no forward inside at\(mask\) ran spare"):
        adv.find(lambda: under(SAFE.prompt)(adv, model))


def test_masks_and_scopes_that_go_without() -> None:
    model = tiny()
    adv = method(model)
    with pytest.raises(ValueError, match="leave mask= and groups= out"):
        adv.backward(lambda: under(SAFE.prompt)(adv, model), mask=SAFE.attention)
    with pytest.raises(ValueError, match="leave mask= and groups= out"):
        adv.backward(lambda: under(SAFE.prompt)(adv, model), groups=SAFE.attention - 1)
    adv.close()
    for scope in ("table", "row"):
        table = method(model, scope=scope, embedding=None)
        with pytest.raises(ValueError, match="scopes 'table' and 'row' have one a word"):
            table.at(SAFE.prompt)
        table.close()
    yopo = fastadv.YOPO(model, split="model.layers.1", scope="sample")
    with pytest.raises(RuntimeError, match="a partial pass ends in the first"):
        yopo.backward(lambda: under(SAFE.prompt)(yopo, model))


def test_the_first_closure_decides() -> None:
    model = tiny()
    adv = method(model, clean_weight=1.0)
    with pytest.raises(RuntimeError, match="an earlier pass of this step ran a closure that perturbs whole forwards"):
        adv.backward(lambda: loss_of(model, SAFE), attack=lambda: under(SAFE.prompt)(adv, model))


def test_what_was_found_otherwise() -> None:
    model = tiny()
    adv = method(model)
    whole = adv.find(lambda: loss_of(model, SAFE))
    with pytest.raises(ValueError, match="was found for whole forwards"):
        whole.applied(SAFE.prompt)
    with whole.applied(), pytest.raises(RuntimeError, match="was found for whole forwards"), adv.at(SAFE.prompt):
        pass
    found = adv.find(lambda: under(SAFE.prompt)(adv, model))
    with pytest.raises(ValueError, match="Sample 1 has 4"):
        found.applied(FEWER)
    with found.applied(SAFE.prompt), pytest.raises(RuntimeError, match="inside at"), adv.at(SAFE.prompt):
        pass


def test_no_position_at_all() -> None:
    """A micro-batch whose rows carry nothing: the plain step."""
    model = tiny()
    adv = method(model)
    loss_of(model, OTHER).backward()
    want = gradients(model)
    clear(model)
    adv.backward(lambda: under(torch.zeros_like(OTHER.prompt), what=OTHER)(adv, model))
    assert_gradients(gradients(model), want, 1e-12)
    assert float(adv.perturbation_norm) == 0
    assert len(PROMPTS) == 4
