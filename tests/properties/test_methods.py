"""What holds for every step, whatever the batch and the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import fastadv
from tests.models import TinyModel, V
from tests.oracles import oracles
from tests.support import assert_close, assert_gradients, clear, gradients, record, same_bits, seeded

EXAMPLES = settings(max_examples=25)
MODEL = seeded(lambda: TinyModel("tfm"))
# Where two runs are compared that round differently, l2 alone: a gradient that is zero but for rounding has any sign.


@dataclass
class Case:
    """One batch, one method."""

    ids: Tensor
    mask: Tensor | None
    labels: Tensor
    scope: str
    norm: str
    options: dict[str, Any]
    seed: int

    def run(self, scale: float = 1.0, **changes: Any) -> tuple[list[Tensor], dict[str, Tensor], fastadv.StepResult]:
        """A step; the perturbation of each pass, the gradients, the result."""
        clear(MODEL)
        torch.manual_seed(self.seed)
        options = self.options | changes
        adv = fastadv.PGD(MODEL, embedding="word_embeddings", scope=self.scope, norm=self.norm, **options)
        try:
            with record(MODEL) as seen:
                result = adv.backward(lambda: scale * MODEL(self.ids, labels=self.labels).loss, mask=self.mask)
        finally:
            adv.close()
        plain = MODEL.word_embeddings.weight.detach()[self.ids]
        return [embedded - plain for embedded in seen], gradients(MODEL), result

    @property
    def keep(self) -> Tensor:
        return torch.ones_like(self.ids).bool() if self.mask is None else self.mask.bool()


@st.composite
def cases(
    draw: st.DrawFn,
    scopes: tuple[str, ...] = oracles.SCOPES,
    norms: tuple[str, ...] = oracles.NORMS,
    starts: bool = True,
) -> Case:
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    words = draw(st.sampled_from([2, 8, V]))  # few words: many repeats
    ids = torch.randint(0, words, (rows, length), generator=generator)
    mask = torch.rand(rows, length, generator=generator) < 0.7 if draw(st.booleans()) else None
    if mask is not None:
        mask[0, 0] = True  # one that covers no token is refused
    options = {
        "epsilon": draw(st.sampled_from([1e-3, 0.1, 1.0, 5.0])),
        "step_size": draw(st.sampled_from([0.0, 1e-3, 0.3, 2.0])),
        "steps": draw(st.integers(1, 4)),
        "random_start": draw(st.sampled_from([False, True, 0.05])) if starts else False,
        "clean_weight": draw(st.sampled_from([0.0, 1.0])),
    }
    labels = torch.randint(0, 3, (rows,), generator=generator)
    return Case(ids, mask, labels, draw(st.sampled_from(scopes)), draw(st.sampled_from(norms)), options, 7)


def in_groups(case: Case, r: Tensor) -> Tensor:
    """A perturbation of positions in the shape in which its norm is taken."""
    if case.scope not in oracles.TABLE_SCOPES:
        return r
    table = r.new_zeros(V, r.shape[-1])
    table[case.ids[case.keep]] = r[case.keep]
    return table


@EXAMPLES
@given(cases())
def test_every_perturbation_after_an_ascent_is_inside_the_ball(case: Case) -> None:
    perturbations, _, _ = case.run()
    climbed = perturbations[-case.options["steps"] :]
    for r in climbed:
        groups = in_groups(case, r)
        sizes = oracles.norm2(groups, case.scope) if case.norm == "l2" else groups.abs()
        assert float(sizes.max()) <= case.options["epsilon"] * (1 + 1e-9) + 1e-12


@EXAMPLES
@given(cases())
def test_no_perturbation_where_the_mask_says_nothing_is(case: Case) -> None:
    perturbations, _, result = case.run()
    for r in perturbations:
        assert not r[~case.keep].any()
        assert r.isfinite().all()
    assert result.adv_loss is not None
    assert result.adv_loss.isfinite()


@EXAMPLES
@given(cases(scopes=oracles.TABLE_SCOPES))
def test_in_table_scopes_equal_ids_move_alike(case: Case) -> None:
    for r in case.run()[0]:
        assert_close(in_groups(case, r)[case.ids][case.keep], r[case.keep], 1e-9, "perturbation of equal ids")


@EXAMPLES
@given(cases())
def test_weights_stay_and_a_step_repeats_bit_for_bit(case: Case) -> None:
    before = {name: p.detach().clone() for name, p in MODEL.named_parameters()}
    _, first, _ = case.run()
    _, second, _ = case.run()
    for name, p in MODEL.named_parameters():
        assert same_bits(p.detach(), before[name]), name
        assert same_bits(first[name], second[name]), name


@EXAMPLES
@given(cases(norms=("l2",)), st.sampled_from([1e-6, 0.25, 1e6]))
def test_the_perturbation_does_not_depend_on_the_scale_of_the_loss(case: Case, scale: float) -> None:
    plain, grads, _ = case.run()
    scaled, scaled_grads, _ = case.run(scale)
    assert_close(scaled[-1], plain[-1], 1e-6, "perturbation")
    assert_gradients(scaled_grads, {name: scale * grad for name, grad in grads.items()}, 1e-6)


@EXAMPLES
@given(cases(scopes=("sample", "token"), norms=("l2",), starts=False))
def test_samples_do_not_see_each_other(case: Case) -> None:
    """In sample and token scope each sample's perturbation is the one that it has alone."""
    together = case.run()[0][-1]
    for row in range(len(case.ids)):
        mask = None if case.mask is None else case.mask[row : row + 1]
        if mask is not None and not mask.any():
            assert not together[row].any()
            continue
        alone = Case(
            case.ids[row : row + 1], mask, case.labels[row : row + 1], case.scope, case.norm, case.options, case.seed
        )
        (r,) = alone.run()[0][-1]
        assert_close(r, together[row], 1e-6, f"sample {row}")


@EXAMPLES
@given(cases(norms=("l2",), starts=False), st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(case: Case, random: Any) -> None:
    order = list(range(len(case.ids)))
    random.shuffle(order)
    mask = None if case.mask is None else case.mask[order]
    shuffled = Case(case.ids[order], mask, case.labels[order], case.scope, case.norm, case.options, case.seed)
    want, got = case.run()[0][-1], shuffled.run()[0][-1]
    assert_close(got, want[order], 1e-6, "perturbation")


@EXAMPLES
@given(cases(starts=False))
def test_epsilon_zero_is_twice_plain_training(case: Case) -> None:
    clear(MODEL)
    MODEL(case.ids, labels=case.labels).loss.backward()
    plain = gradients(MODEL)
    factor = 1 + case.options["clean_weight"]
    _, grads, result = case.run(epsilon=0.0)
    assert_gradients(grads, {name: factor * grad for name, grad in plain.items()}, 1e-12)
    assert_close(result.loss, result.adv_loss, 1e-12, "loss")


@EXAMPLES
@given(cases(starts=False))
def test_a_small_step_up_the_gradient_raises_the_loss(case: Case) -> None:
    perturbations, _, result = case.run(epsilon=1e-4, step_size=1e-4, steps=1, clean_weight=1.0)
    if perturbations[-1].norm() == 0:
        return
    assert float(result.adv_loss) >= float(result.loss) - 1e-12


def test_the_ball_is_reached_and_left_by_no_step() -> None:
    """The first property would hold of an engine that never moves; this one steps to the rim and along it."""
    case = Case(torch.arange(12).reshape(2, 6), None, torch.tensor([0, 1]), "sample", "l2", {}, 7)
    options = {"epsilon": 0.5, "step_size": 0.3, "steps": 5, "random_start": False, "clean_weight": 1.0}
    lengths = [oracles.norm2(r, "sample").flatten() for r in case.run(**options)[0]]
    assert lengths[0].tolist() == [0, 0]
    assert lengths[1].tolist() == pytest.approx([0.3, 0.3])
    assert lengths[-1].tolist() == pytest.approx([0.5, 0.5])
