"""Documents packed into rows, with `groups=`, train as the same documents do with a row for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadv
from tests.models import CLASSES, D, V
from tests.support import assert_close, assert_gradients, clear, gradients, record, refused, seeded, snapshot

LENGTHS = (5, 3, 1, 4, 2, 5)
ROWS = ((0, 1, 2), (3, 4, 5))  # which documents each packed row has
EXACT = 1e-10


class Answer(NamedTuple):
    loss: Tensor
    losses: Tensor | None
    logits: Tensor


class Reader(nn.Module):
    """Attention within documents. Answers for each token, or for each document."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.of = of
        self.words, self.places = nn.Embedding(V, D), nn.Embedding(8, D)
        self.tap = nn.Identity()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        self.first, self.second, self.head = nn.Linear(D, 24), nn.Linear(24, D), nn.Linear(D, CLASSES)

    def forward(self, layout: Layout, labels: Tensor) -> Answer:
        h = self.tap(self.words(layout.ids)) + self.places(layout.places)
        groups = layout.groups
        alike = (groups.unsqueeze(2) == groups.unsqueeze(1)) & (groups >= 0).unsqueeze(1)
        scores = (self.q(h) @ self.k(h).mT / D**0.5).masked_fill(~alike, -1e9)
        h = h + (scores.softmax(-1) @ self.v(h)) * (groups >= 0).unsqueeze(-1)
        h = h + self.second(torch.tanh(self.first(h)))
        answers = self.head(h)
        if self.of == "token":
            mine = torch.where(layout.document >= 0, labels[layout.document], -100)
            return Answer(F.cross_entropy(answers.flatten(0, 1), mine.flatten(), ignore_index=-100), None, answers)
        pooled = torch.stack([answers[layout.document == n].mean(0) for n in range(len(LENGTHS))])
        losses = F.cross_entropy(pooled, labels, reduction="none")
        return Answer(losses.mean(), losses, pooled)


class Layout(NamedTuple):
    """The documents in rows; `document` says which, from one end of the batch to the other, -1 for none."""

    ids: Tensor
    places: Tensor
    groups: Tensor
    document: Tensor

    @staticmethod
    def of(rows: tuple[tuple[int, ...], ...]) -> Layout:
        width = 1 + max(sum(LENGTHS[n] for n in row) for row in rows)
        generator = torch.Generator().manual_seed(3)
        words = [torch.randint(2, V // 2, (length,), generator=generator) for length in LENGTHS]
        found = Layout(*(torch.full((len(rows), width), fill) for fill in (0, 0, -1, -1)))
        for r, row in enumerate(rows):
            begin = 0
            for place, n in enumerate(row):
                here = slice(begin, begin + LENGTHS[n])
                found.ids[r, here], found.places[r, here] = words[n], torch.arange(LENGTHS[n])
                found.groups[r, here], found.document[r, here] = place, n
                begin += LENGTHS[n]
        return found

    def documents(self, values: Tensor) -> Tensor:
        """The values [B, T, ...] of the documents' positions, document by document."""
        return torch.cat([values[self.document == n] for n in range(len(LENGTHS))])

    def start(self, shape: tuple[int, ...], mask: Tensor) -> Tensor:
        """A random start that is the same for the same place of the same document."""
        assert torch.equal(mask, self.groups >= 0)
        noise = 0.05 * torch.randn(len(LENGTHS), 8, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        return noise[self.document, self.places].reshape(shape)


PADDED, PACKED = Layout.of(tuple((n,) for n in range(len(LENGTHS)))), Layout.of(ROWS)
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])
Make = Callable[[Reader, Layout], fastadv.Method]


def pgd(**options: Any) -> Make:
    given = {"epsilon": 0.4, "step_size": 0.3, "steps": 2, **options}
    return lambda model, layout: fastadv.PGD(model, embedding="words", **given)


METHODS: dict[str, Make] = {
    **{f"pgd {scope} {norm}": pgd(scope=scope, norm=norm) for scope in ("sample", "token", "batch", "table", "row")
       for norm in ("l2", "linf")},
    **{f"pgd {direction} {ball}": pgd(direction=direction, ball=ball) for direction in ("l2", "sign", "max")
       for ball in ("l2", "linf", None)},
    "pgd by eager ops": pgd(fused=False),
    "pgd relative": pgd(relative=True, epsilon=0.1, step_size=0.1),
    "fgm": lambda m, _: fastadv.FGM(m, epsilon=0.4, scope="sample", embedding="words"),
    "fgsm": lambda m, x: fastadv.FGSM(m, epsilon=0.05, random_start=x.start, embedding="words"),
    "freelb": lambda m, x: fastadv.FreeLB(m, epsilon=0.2, random_start=x.start, embedding="words"),
    "freelb linf": lambda m, x: fastadv.FreeLB(m, epsilon=0.2, norm="linf", random_start=x.start, embedding="words"),
    "freeat": lambda m, _: fastadv.FreeAT(m, epsilon=0.2, norm="l2", embedding="words"),
    "freeat linf": lambda m, _: fastadv.FreeAT(m, epsilon=0.01, embedding="words"),
    "smart": lambda m, x: fastadv.SMART(m, epsilon=0.2, random_start=x.start, embedding="words"),
    "smart sample": lambda m, x: fastadv.SMART(
        m, epsilon=0.2, steps=2, scope="sample", random_start=x.start, embedding="words"),
    "smart sample l2": lambda m, x: fastadv.SMART(
        m, epsilon=0.2, norm="l2", scope="sample", random_start=x.start, embedding="words"),
    "smart mt-dnn": lambda m, x: fastadv.SMART(  # of "mse", since what it has for classes is in float32
        m, update="mt-dnn", divergence="mse", random_start=x.start, embedding="words"),
    "vat": lambda m, x: fastadv.VAT(m, epsilon=0.3, steps=2, random_start=x.start, embedding="words"),
    "vat linf": lambda m, x: fastadv.VAT(m, epsilon=0.3, norm="linf", random_start=x.start, embedding="words"),
    "yopo": lambda m, x: fastadv.YOPO(m, epsilon=0.3, split="first", random_start=x.start, embedding="words"),
    "yopo linf": lambda m, x: fastadv.YOPO(
        m, epsilon=0.3, norm="linf", split="first", random_start=x.start, embedding="words"),
    "llr": lambda m, x: fastadv.LLR(m, epsilon=0.05, random_start=x.start, embedding="words"),
    "llr l2": lambda m, x: fastadv.LLR(m, epsilon=0.4, norm="l2", random_start=x.start, embedding="words"),
    "llr adam": lambda m, x: fastadv.LLR(m, epsilon=0.05, optimizer="adam", random_start=x.start, embedding="words"),
    "neftune": lambda m, x: fastadv.NEFTune(m, random_start=x.start, embedding="words"),
    "awp": lambda m, _: fastadv.AWP(m, gamma=0.01),
    "bregman": lambda m, x: fastadv.BregmanProximal(m, method=pgd()(m, x), decay=0.9),
}  # fmt: skip


def trained(name: str, of: str, layout: Layout, **given: Tensor) -> tuple[list[Any], dict[str, Tensor], list[Tensor]]:
    """Two steps on the batch: the figures, the gradients, and what the model saw in each pass."""
    model = seeded(lambda: Reader(of))
    adv = METHODS[name](model, layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if isinstance(adv, fastadv.BregmanProximal):
        adv.attach(optimizer)
    figures: list[Any] = []
    with record(model) as seen:
        for turn in range(2):
            result = adv.backward(lambda: model(layout, LABELS), **given)
            figures += [result.loss, result.adv_loss, adv.perturbation_norm, adv.skipped]
            if turn == 0:
                optimizer.step()
                optimizer.zero_grad()
    return figures, gradients(model), [layout.documents(one) for one in seen]


@pytest.mark.parametrize("of", ["token", "document"])
@pytest.mark.parametrize("name", METHODS)
def test_packed_is_padded(name: str, of: str) -> None:
    want, want_gradients, want_seen = trained(name, of, PADDED, mask=PADDED.groups >= 0)
    got, got_gradients, got_seen = trained(name, of, PACKED, groups=PACKED.groups)
    for one, other in zip(got, want, strict=True):
        assert_close(one.double(), other.double(), EXACT, "figure")
    assert len(got_seen) == len(want_seen) > 0
    for one, other in zip(got_seen, want_seen, strict=True):
        assert_close(one, other, EXACT, "the embedding that the model saw")
    assert_gradients(got_gradients, want_gradients, EXACT)


def searched(layout: Layout, make: Make = METHODS["pgd sample l2"], **given: Any) -> fastadv.Found:
    model = seeded(lambda: Reader("token"))
    with make(model, layout) as adv:
        return adv.find(lambda: model(layout, LABELS), **given)  # type: ignore[attr-defined,no-any-return]


def norms(values: Tensor) -> Tensor:
    """Of the packed documents."""
    return torch.stack([values[PACKED.document == n].norm() for n in range(len(LENGTHS))])


def test_each_document_has_the_radius_and_padding_has_nothing() -> None:
    found = searched(PACKED, groups=PACKED.groups)
    [values] = found.values
    assert torch.allclose(norms(values), torch.full((len(LENGTHS),), 0.4).double(), rtol=1e-12)
    assert (values[PACKED.groups < 0] == 0).all()
    [by_row] = searched(PACKED, mask=PACKED.groups >= 0).values
    assert norms(by_row).max() < 0.39


def test_what_was_found_is_applied_and_perturbed_does_both() -> None:
    model = seeded(lambda: Reader("token"))
    adv = METHODS["pgd sample l2"](model, PACKED)
    with adv.perturbed(lambda: model(PACKED, LABELS), groups=PACKED.groups), torch.no_grad():
        got = model(PACKED, LABELS).loss
    found = searched(PADDED, mask=PADDED.groups >= 0)
    model = found._engine.model
    found._engine.closed = False
    with METHODS["pgd sample l2"](model, PADDED).perturbed(
        lambda: model(PADDED, LABELS), mask=PADDED.groups >= 0
    ), torch.no_grad():  # fmt: skip
        assert_close(got, model(PADDED, LABELS).loss, EXACT, "adversarial loss")


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(
    ("scope", "direction"),
    [("sample", "l2"), ("sample", "max"), ("sample", "sign"), ("token", "sign"), ("batch", "sign")],
)
def test_a_document_whose_gradient_is_not_finite_takes_no_step_and_others_do(
    scope: str, direction: str, fused: bool | None
) -> None:
    """For the sign, whatever the scope: there a sample stands or falls by itself."""
    model = seeded(lambda: Reader("token"))
    broken = (PACKED.document == 1).unsqueeze(-1)
    model.tap.register_forward_hook(
        lambda module, inputs, out: out.register_hook(lambda g: g.masked_fill(broken, math.inf)) and None
    )
    adv = pgd(direction=direction, ball=None, clean_weight=0.0, scope=scope, steps=1, fused=fused)(model, PACKED)
    [values] = adv.find(lambda: model(PACKED, LABELS), groups=PACKED.groups).values  # type: ignore[attr-defined]
    assert int(adv.skipped) == 1
    moved = norms(values) > 0
    assert moved.tolist() == [n != 1 for n in range(len(LENGTHS))]


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        pytest.param(lambda m, _: fastadv.FreeLB(m, random_start=0.5, embedding="words"), "length", id="freelb"),
        pytest.param(lambda m, _: fastadv.NEFTune(m, alpha=0.5, embedding="words"), "length", id="neftune"),
        pytest.param(lambda m, _: fastadv.VAT(m, xi=0.5, embedding="words"), "norm", id="vat"),
        pytest.param(lambda m, _: fastadv.SMART(m, epsilon=5.0, embedding="words"), "normal", id="smart"),
    ],
)
def test_random_starts_are_by_document(make: Make, kind: str) -> None:
    """The same random numbers in both, scaled by each document's length, or brought to the norm."""
    starts = []
    for given in ({"groups": PACKED.groups}, {"mask": PACKED.groups >= 0}):
        model = seeded(lambda: Reader("token"))
        adv = make(model, PACKED)
        torch.manual_seed(11)
        drawn: list[Tensor] = []

        def closure(model: Reader = model, drawn: list[Tensor] = drawn) -> Answer:
            answer = model(PACKED, LABELS)
            drawn.extend(lookup.delta.detach().clone() for lookup in adv._engine.last.lookups)  # noqa: B023
            return answer

        adv.backward(closure, **given)
        starts.append(next(one for one in drawn if one.any()))
    ours, by_row = starts
    if kind == "normal":
        assert torch.equal(ours, by_row)
        return
    if kind == "norm":
        assert torch.allclose(norms(ours), torch.full((len(LENGTHS),), 0.5).double(), rtol=1e-5)
        return
    for n, length in enumerate(LENGTHS):
        here = PACKED.document == n
        row = int(here.any(1).nonzero())
        longer = sum(LENGTHS[m] for m in ROWS[row])
        assert torch.allclose(ours[here], by_row[here] * math.sqrt(longer / length), rtol=1e-6)
        assert ours[here].abs().max() <= 0.5 / math.sqrt(length * D)


def test_a_mask_and_groups_leave_what_lies_in_both() -> None:
    mask, groups = torch.ones_like(PACKED.groups), changed((1, 1, -1))
    mask[0, 1] = 0
    [values] = searched(PACKED, mask=mask, groups=groups).values
    assert ((values != 0).any(-1) == ((groups >= 0) & (mask == 1))).all()
    [hole] = searched(PACKED, groups=groups.masked_fill(mask == 0, -1)).values
    assert torch.equal(hole, values)  # a document goes on behind a position that is left out


def test_padding_ids_are_left_out_as_without_groups() -> None:
    def make() -> Reader:
        model = Reader("token")
        model.words = nn.Embedding(V, D, padding_idx=int(PACKED.ids[0, 3]))
        return model

    model = seeded(make)
    adv = METHODS["pgd sample l2"](model, PACKED)
    for _ in range(2):
        [values] = adv.find(lambda: model(PACKED, LABELS), groups=PACKED.groups).values  # type: ignore[attr-defined]
        here = (PACKED.groups >= 0) & (PACKED.ids != model.words.padding_idx)
        assert ((values != 0).any(-1) == here).all()


def test_numbers_may_be_any_in_any_order_and_of_any_integer_dtype() -> None:
    [want] = searched(PACKED, groups=PACKED.groups).values
    numbers = torch.tensor([7, 0, 300])
    for dtype in (torch.int64, torch.int32, torch.int16):
        other = torch.where(PACKED.groups >= 0, numbers[PACKED.groups], -1).to(dtype)
        [got] = searched(PACKED, groups=other).values
        assert torch.equal(got, want)


def test_leading_padding_and_rows_of_padding_alone() -> None:
    [want] = searched(PACKED, groups=PACKED.groups).values

    def moved(x: Tensor, fill: int) -> Tensor:
        empty = torch.full((1, x.shape[1] + 2), fill)
        return torch.cat([empty, F.pad(x, (2, 0), value=fill), empty])

    layout = Layout(moved(PACKED.ids, 0), moved(PACKED.places, 0), moved(PACKED.groups, -1), moved(PACKED.document, -1))
    [got] = searched(layout, groups=layout.groups).values
    assert_close(layout.documents(got), PACKED.documents(want), EXACT, "perturbation")


def changed(*places: tuple[int, int, int]) -> Tensor:
    groups = PACKED.groups.clone()
    for row, place, value in places:
        groups[row, place] = value
    return groups


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(
    ("given", "error", "phrase"),
    [
        ({"groups": PACKED.groups[:, 1:]}, ValueError, "groups has shape"),
        ({"groups": PACKED.groups[0]}, ValueError, "groups has shape"),
        ({"groups": PACKED.groups.double()}, TypeError, "integer dtype"),
        ({"groups": PACKED.groups >= 0}, TypeError, "integer dtype"),
        ({"groups": PACKED.groups.tolist()}, TypeError, "groups must be a tensor"),
        ({"groups": torch.full_like(PACKED.groups, -1)}, ValueError, "-1 everywhere"),
        ({"groups": changed((0, 9, -100))}, ValueError, "holds -100"),
        ({"groups": changed((1, 7, 0))}, ValueError, "row 1 has 0 at position 7 again"),
        ({"groups": changed((0, 2, 1))}, ValueError, "again"),
        ({"groups": PACKED.groups, "mask": PACKED.groups[:, 1:] >= 0}, ValueError, "mask and groups are of the same"),
        ({"groups": PACKED.groups, "mask": PACKED.groups < 0}, ValueError, "leave no position"),
    ],
)
def test_refuses(given: dict[str, Any], error: type[Exception], phrase: str, search: bool) -> None:
    model = seeded(lambda: Reader("token"))
    adv = METHODS["pgd sample l2"](model, PACKED)
    call: Any = adv.find if search else adv.backward  # type: ignore[attr-defined]
    for _ in range(2):
        refused(model, lambda: call(lambda: model(PACKED, LABELS), **given), error, phrase)
    assert adv.backward(lambda: model(PACKED, LABELS), groups=PACKED.groups).adv_loss is not None


def test_llr_takes_the_losses_of_documents_and_no_others() -> None:
    model = seeded(lambda: Reader("document"))
    adv = fastadv.LLR(model, embedding="words")

    def closure() -> dict[str, Tensor]:
        losses = model(PACKED, LABELS).losses
        return {"loss": losses.mean(), "losses": losses.view(2, 3).mean(1)}

    refused(model, lambda: adv.backward(closure, groups=PACKED.groups), ValueError, "6 documents", "2 losses")


def test_groups_of_each_call() -> None:
    """An encoder and a decoder: what is packed in one need not be in the other."""
    from tests.models import TwoCalls
    from tests.support import batch

    model = seeded(TwoCalls)
    source, target, labels = batch()["input_ids"], batch(4, 5, seed=6)["input_ids"], batch()["labels"]
    groups = torch.tensor([[0, 0, 1, 1, 1]]).expand(4, 5)
    adv = fastadv.PGD(model, epsilon=0.4, step_size=0.4, steps=1, scope="sample", embedding=model.shared)
    first, second = adv.find(lambda: model(source, target, labels), groups=[None, groups]).values
    want = torch.full((4,), 0.4, dtype=torch.float64)
    assert torch.allclose(first.flatten(1).norm(dim=1), want)
    assert torch.allclose(second[:, :2].flatten(1).norm(dim=1), want)
    assert torch.allclose(second[:, 2:].flatten(1).norm(dim=1), want)


def test_a_step_that_fails_with_groups_leaves_no_trace() -> None:
    model = seeded(lambda: Reader("token"))
    adv = METHODS["freelb"](model, PACKED)
    adv.backward(lambda: model(PACKED, LABELS), groups=PACKED.groups)
    clear(model)
    calls = []

    def closure() -> Answer:
        calls.append(0)
        if len(calls) == 2:
            raise KeyError("mine")
        return model(PACKED, LABELS)

    before = snapshot(model)
    with pytest.raises(KeyError):
        adv.backward(closure, groups=PACKED.groups)
    from tests.support import assert_unchanged

    assert_unchanged(model, before)
