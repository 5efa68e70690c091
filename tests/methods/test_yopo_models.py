"""YOPO on real models, pass by pass: what each of them saw, and the gradients, against the paper's loop by hooks.

The loop runs whole forwards, and takes p and f_0 from what a hook sees at the split; the tests of where partial passes
end and what they cost are in test_split.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastadv
from tests.bert import VOCABULARY, text, tiny_bert
from tests.oracles import oracles
from tests.support import assert_close, assert_gradients, clear, gradients, seeded

M, N = 3, 3
SIZES: dict[str, Any] = {"step_size": 0.2, "epsilon": 0.5}
Closure = Callable[[], Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks


class Case(NamedTuple):
    """A model, its batch, and which modules are perturbed, are the default split, and run behind it."""

    model: Any
    data: dict[str, Tensor]
    embedding: str
    split: str
    later: str
    tolerance: float = 1e-9


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}


def bert() -> Case:
    return Case(tiny_bert(), text(), "bert.embeddings.word_embeddings", "bert.encoder.layer.0", "classifier")


def checkpointed() -> Case:
    case = bert()
    case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return case


def bf16() -> Case:
    return bert()._replace(model=tiny_bert(dtype=torch.float32), tolerance=0.1)  # bfloat16 has 8 bits


def lora() -> Case:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "value"], r=2, modules_to_save=["classifier"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_bert(), config).double()
    inside = "base_model.model."
    names = ("bert.embeddings.word_embeddings", "bert.encoder.layer.0", "classifier")
    return Case(model, text(), *(inside + name for name in names))


def albert() -> Case:
    """One group of layers, run three times; the embedding is narrower than the rest."""
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(
        **{**SMALL, "num_hidden_layers": 3},
        embedding_size=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
    )
    model = seeded(lambda: AlbertForSequenceClassification(config)).train()
    return Case(
        model, text(), "albert.embeddings.word_embeddings", "albert.encoder.albert_layer_groups.0", "classifier"
    )


def llama() -> Case:
    """A language model, whose layers are given a cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    data = text()
    model = seeded(lambda: LlamaForCausalLM(LlamaConfig(**SMALL))).train()
    data["labels"] = torch.where(data["attention_mask"].bool(), data["input_ids"], -100)
    return Case(model, data, "model.embed_tokens", "model.layers.0", "lm_head", 1e-6)  # its norms are float32


def t5() -> Case:
    """The encoder's lookups alone; a decoder's block has a longer stack of parts than the encoder has of blocks."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=VOCABULARY, **sizes, dropout_rate=0.0, decoder_start_token_id=0)
    model = seeded(lambda: T5ForConditionalGeneration(config)).train()
    data = {**text(), "labels": text(length=5)["input_ids"]}
    return Case(model, data, "encoder.embed_tokens", "encoder.block.0", "decoder.block.0", 1e-5)  # and its are


CASES = [(build, norm) for build in (bert, checkpointed, lora, albert, llama, t5) for norm in ("l2", "linf")]
CASES.append((bf16, "l2"))  # a sign is either right or wrong, and rounding turns some


class Loop:
    """The paper's loop: every forward is a whole one, and all N of the inner steps run f_0."""

    def __init__(self, case: Case, closure: Closure, norm: str, start: Tensor, climbed: Closure | None = None) -> None:
        embedding, split = (case.model.get_submodule(name) for name in (case.embedding, case.split))
        keep = case.data["attention_mask"].unsqueeze(-1).to(start)
        self.seen: list[Tensor] = []  # by a pass of the engine: it has the first inner step's gradient already
        r = start * keep
        for j in range(M):
            self.seen.append(r)
            loss, _ = self.look(embedding, split, closure, r, keep)
            (loss / M).backward()
            if j == M - 1:
                break
            target, hidden = self.look(embedding, split, climbed or closure, r.requires_grad_(), keep)
            (p,) = torch.autograd.grad(target, hidden)
            for i in range(N):
                r = r.detach()
                if i > 0:
                    self.seen.append(r)
                _, hidden = self.look(embedding, split, climbed or closure, r.requires_grad_(), keep)
                (g,) = torch.autograd.grad(hidden, r, p)
                r = oracles.ascend(r.detach(), g, scope="sample", norm=norm, **SIZES)
        self.gradients = gradients(case.model)
        clear(case.model)

    @staticmethod
    def look(
        embedding: nn.Module, split: nn.Module, closure: Closure, r: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor]:
        outputs: list[Any] = []
        handles = (
            embedding.register_forward_hook(lambda *call: call[-1] + keep * r),
            split.register_forward_hook(lambda *call: outputs.append(call[-1])),
        )
        loss = closure()
        for handle in handles:
            handle.remove()
        return loss, outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


def closure_of(case: Case, autocast: bool = False, sign: int = 1) -> Closure:
    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            loss: Tensor = case.model(**case.data).loss
        return sign * loss

    return closure


def start_of(case: Case) -> Tensor:
    width = case.model.get_submodule(case.embedding).weight.shape[1]
    generator = torch.Generator().manual_seed(4)
    shape = (*case.data["input_ids"].shape, width)
    return 0.02 * torch.randn(shape, generator=generator, dtype=torch.float64).to(case.model.dtype)


@contextlib.contextmanager
def perturbations(case: Case) -> Iterator[list[Tensor]]:
    """What is added to the lookups, one entry for each time that they run."""
    module, seen = case.model.get_submodule(case.embedding), []
    words = module.weight.detach()[case.data["input_ids"]]
    handle = module.register_forward_hook(lambda *call: seen.append(call[-1].detach() - words))
    try:
        yield seen
    finally:
        handle.remove()


def compare(seen: list[Tensor], want: list[Tensor], tolerance: float) -> None:
    assert len(seen) == len(want) == M + (M - 1) * (N - 1)
    for number, (mine, its) in enumerate(zip(seen, want, strict=True)):
        assert_close(mine, its, tolerance, f"perturbation of pass {number}")


@pytest.mark.parametrize(("build", "norm"), CASES)
def test_every_pass_is_the_papers(build: Callable[[], Case], norm: str) -> None:
    case = build()
    closure = closure_of(case, autocast=build is bf16)
    start = start_of(case)
    want = Loop(case, closure, norm, start)
    calls: list[str] = []
    case.model.get_submodule(case.later).register_forward_pre_hook(lambda *_: calls.append("ran"))
    adv = yopo(case, norm=norm, random_start=lambda *_: start)
    assert adv._engine.split.module is case.model.get_submodule(case.split)
    with perturbations(case) as seen:
        adv.backward(closure, mask=case.data["attention_mask"])
    compare(seen, want.seen, case.tolerance)
    assert_gradients(gradients(case.model), want.gradients, case.tolerance, floor=max(case.tolerance, 1e-6))
    assert len(calls) == M


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_attack_climbs_another_loss(norm: str) -> None:
    """p is that loss's gradient, and so is what partial passes run."""
    case = bert()
    target = {**case.data, "labels": (case.data["labels"] + 1) % 3}
    closure, climbed = closure_of(case), closure_of(case._replace(data=target), sign=-1)
    start = start_of(case)
    want = Loop(case, closure, norm, start, climbed)
    adv = yopo(case, norm=norm, random_start=lambda *_: start)
    calls: list[str] = []

    def counted(name: str, run: Closure) -> Closure:
        def call() -> Tensor:
            calls.append(name)
            return run()

        return call

    with perturbations(case) as seen:
        mask = case.data["attention_mask"]
        adv.backward(counted("trained", closure), mask=mask, attack=counted("climbed", climbed))
    assert calls == ["trained", *["climbed"] * N] * (M - 1) + ["trained"]
    probes = [0, 4]  # after each full pass but the last, a probe of the other loss at the same place
    assert len(seen) == len(want.seen) + len(probes)
    compare([r for number, r in enumerate(seen) if number not in probes], want.seen, 1e-9)
    assert_gradients(gradients(case.model), want.gradients, 1e-9)


def test_perturbed_climbs_the_same_way() -> None:
    """Inside, the whole model runs: the split ends nothing there."""
    case = bert()
    closure, start = closure_of(case), start_of(case)
    want = Loop(case, closure, "l2", start)
    adv, mask = yopo(case, random_start=lambda *_: start), case.data["attention_mask"]
    with perturbations(case) as seen, adv.perturbed(closure, mask=mask):
        adversarial = closure()
    compare(seen, want.seen, 1e-9)
    assert float(adversarial) > float(closure())
    assert not any(parameter.grad is not None for parameter in case.model.parameters())


def yopo(case: Case, **options: Any) -> fastadv.YOPO:
    return fastadv.YOPO(case.model, embedding=case.embedding, **SIZES, **options)


@pytest.mark.parametrize("compiled", ["split", "later", "rest"])
def test_a_part_is_compiled(compiled: str) -> None:
    """The split itself, a layer behind it, or all but the embedding; without a mask, so that no shape is known."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case = bert()._replace(model=tiny_bert(dtype=torch.float32))
    closure, encoder = closure_of(case), case.model.bert.encoder
    adv = yopo(case, random_start=False)
    adv.backward(closure)
    adv.close()
    want, graphs = gradients(case.model), []
    part = {"split": encoder.layer[0], "later": encoder.layer[1], "rest": encoder}[compiled]
    part.compile(backend="aot_eager")
    adv = yopo(case, random_start=False)
    for _ in range(3):
        clear(case.model)
        adv.backward(closure)
        assert_gradients(gradients(case.model), want, 1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[2] == graphs[1] > 0
    torch._dynamo.reset()


def test_an_idle_split_ends_nothing() -> None:
    """Two methods on one model, whose splits differ: each as if alone. Plain training has nothing of either."""
    case = bert()
    closure, mask, alone = closure_of(case), case.data["attention_mask"], []
    splits = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    for split in splits:
        adv = yopo(case, split=split, random_start=False)
        adv.backward(closure, mask=mask)
        alone.append(gradients(case.model))
        clear(case.model)
        adv.close()
    both = [yopo(case, split=split, random_start=False) for split in splits]
    for adv, want in zip(both, alone, strict=True):
        adv.backward(closure, mask=mask)
        assert_gradients(gradients(case.model), want, 1e-12)
        clear(case.model)
    outputs: list[Tensor] = []
    for layer in case.model.bert.encoder.layer:
        layer.register_forward_hook(lambda *call: outputs.append(call[-1]))
    closure()
    assert len(outputs) == 2
    assert all(output.requires_grad and output._backward_hooks is None for output in outputs)
