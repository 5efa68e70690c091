"""Options: every method says which it takes, at run time and to a type checker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastadv
from fastadv.methods.options import options_of
from tests.every import EVERY, waves
from tests.models import TinyModel
from tests.support import assert_close, ready, record, seeded

WORDS = "word_embeddings"
NAMES = ("FGSM", "FGM", "PGD", "FreeAT", "YOPO", "FreeLB", "SMART", "LLR", "VAT", "NEFTune", "AWP")
METHODS = [getattr(fastadv, name) for name in NAMES]
METHODS.append(fastadv.BregmanProximal)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("wrong", "right"), [("start_stepp", "start_step"), ("fussed", "fused"), ("drop_out", "dropout")]
)
def test_a_misspelt_option_is_told_with_the_nearest(method: Any, wrong: str, right: str) -> None:
    with pytest.raises(TypeError, match=f"{method.__name__} has no option '{wrong}': did you mean '{right}'?") as error:
        method(seeded(TinyModel), **{wrong: 1})
    assert all(option in str(error.value) for option in options_of(method))


@pytest.mark.parametrize(
    ("wrong", "right"), [("epsilonn", "epsilon"), ("eps", "epsilon"), ("alpha", "step_size"), ("K", "steps"),
                         ("adv_lr", "step_size"), ("emb_name", "embedding"), ("adv_init_mag", "random_start")]
)  # fmt: skip
def test_names_of_other_codes_are_known(wrong: str, right: str) -> None:
    with pytest.raises(TypeError, match=f"did you mean '{right}'. Write fastadv.FreeLB\\(model, {right}=1.0\\)"):
        fastadv.FreeLB(seeded(TinyModel), **{wrong: 1.0})  # type: ignore[arg-type]


def test_the_right_line_has_the_other_options_too() -> None:
    model = seeded(TinyModel)
    right = r"Write fastadv.PGD\(model, epsilon=0.1, alpha=0.05, steps=3, embedding=<Embedding>\)"
    with pytest.raises(TypeError, match=right):
        fastadv.PGD(model, eps=0.1, alpha=0.05, K=3, embedding=model.word_embeddings)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"Write fastadv.FGM\(model, epsilon=0.1\)"):  # whose step is epsilon
        fastadv.FGM(model, adv_lr=0.1)  # type: ignore[call-arg]


def test_an_option_of_another_method() -> None:
    with pytest.raises(TypeError, match=r"FGM has no option 'steps'.*It takes .*scope"):
        fastadv.FGM(seeded(TinyModel), steps=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="NEFTune has no option 'direction'"):
        fastadv.NEFTune(seeded(TinyModel), direction="l2")  # type: ignore[call-arg]


def test_a_method_of_ones_own_has_its_own_options() -> None:
    class Mine(fastadv.PGD):
        def __init__(self, model: nn.Module, *, momentum: float = 0.9, **options: Any) -> None:
            self.momentum = momentum
            super().__init__(model, **options)

    assert Mine(seeded(TinyModel), embedding="word_embeddings", momentum=0.5, steps=2).steps == 2
    with pytest.raises(TypeError, match="Mine has no option 'momentumm': did you mean 'momentum'"):
        Mine(seeded(TinyModel), momentumm=0.5)


@pytest.mark.slow
def test_a_type_checker_knows_every_option(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import fastadv\nfrom torch import nn\n\n\ndef make(model: nn.Module) -> None:\n"
        '    fastadv.PGD(model, epsilon=1.0, scope="token", direction="max", ball=None, relative=True, tied="both")\n'
        "    fastadv.PGD(model, epsilonn=1.0)\n"
        '    fastadv.PGD(model, norm="l3")\n'
        '    fastadv.SMART(model, tied="both")\n'
        '    fastadv.FreeLB(model, dropout="sometimes")\n'
        "    fastadv.FGM(model, steps=3)\n"
        "    fastadv.AWP(model, norm=2)\n"
        "    fastadv.FGM(model, nn.ReLU())\n"
        '    fastadv.PGD(model, "emb", 1.0, 0.3).attack(True)\n'
        '    fastadv.PGD(model, emb_name="emb", epsilon=1.0, alpha=0.3).attack(is_first_attack=True)\n'
        '    fastadv.FGM(model, 1.0, emb_name="emb").attack()\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(script)], capture_output=True, text=True, check=False
    )
    lines = [int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line]
    assert sorted(set(lines)) == [7, 8, 9, 10, 11, 12, 13], done.stdout


@pytest.mark.parametrize("method", METHODS)
def test_the_docstring_lists_every_option(method: Any) -> None:
    described = (method.__doc__ or "").split("Args:")[1].split("Raises:")[0]
    lacking = [option for option in options_of(method) if option not in described and option != "tied"]
    assert not lacking


def test_public_names_are_few() -> None:
    """A PGD shows its settings, its calls and the classic ones, and nothing else."""
    adv = fastadv.PGD(seeded(TinyModel), embedding="word_embeddings")
    names = [name for name in dir(adv) if not name.startswith("_")]
    assert len(names) <= 31, names
    assert "emb_name" not in names
    assert {"epsilon", "step_size", "steps", "backward", "find", "perturbed", "attack", "restore"} <= set(names)


@pytest.mark.parametrize("method", METHODS)
def test_ancestors_are_few(method: Any) -> None:
    between = [cls for cls in method.__mro__[1:] if cls.__module__.startswith("fastadv")]
    assert len(between) <= 4, between


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda model: fastadv.PGD(model, WORDS, 0.1, 0.05),
         "PGD(epsilon=0.1, step_size=0.05, steps=3, norm='l2', scope='table') on TinyModel"),
        (lambda model: fastadv.FreeLB(model, embedding=model.word_embeddings),
         "FreeLB(epsilon=None, step_size=0.1, steps=3, norm='l2', scope='sample', embedding=<Embedding>) on TinyModel"),
        (lambda model: fastadv.PGD(model, WORDS, scope="sample", random_start=waves),
         "PGD(epsilon=1.0, step_size=0.3, steps=3, norm='l2', scope='sample', random_start=<waves>) on TinyModel"),
        (lambda model: fastadv.AWP(model), "AWP(gamma=0.01, epsilon=None, steps=1) on TinyModel"),
        (lambda model: fastadv.BregmanProximal(model, 2.0, method=fastadv.FGM(model, 0.5, WORDS)),
         "BregmanProximal(weight=2.0, decay=0.999, method=FGM(epsilon=0.5, norm='l2', scope='table')) on TinyModel"),
    ],
)  # fmt: skip
def test_repr_tells_how_strong_it_is_and_what_is_not_the_default(make: Any, text: str) -> None:
    assert repr(make(seeded(TinyModel))) == text


def test_a_with_block_closes_it() -> None:
    model, data, closure = ready()
    with fastadv.PGD(model, embedding=model.word_embeddings) as adv:
        adv.backward(closure, mask=data["attention_mask"])
    with pytest.raises(RuntimeError, match="never ran the perturbed embedding"):
        adv.backward(closure)


# Direction and ball, and relative radii


@pytest.mark.parametrize("direction", ["l2", "sign", "max"])
@pytest.mark.parametrize("ball", ["l2", "linf", None])
@pytest.mark.parametrize("scope", ["sample", "token", "batch", "row", "table"])
def test_direction_and_ball_are_chosen_apart(direction: Any, ball: Any, scope: Any) -> None:
    """One large step from zero has the direction's shape, scaled or clipped onto the ball."""
    model, data, closure = ready()
    mask = data["attention_mask"]
    moved = {}
    for radius in (None, 0.25):
        options: dict[str, Any] = {"direction": direction, "ball": ball if radius else None, "scope": scope}
        with fastadv.PGD(model, embedding="word_embeddings", epsilon=0.25, step_size=2.0, steps=1, **options) as adv:
            [moved[radius]] = adv.find(closure, mask).values
    free, held = moved[None], moved[0.25]
    groups = _groups(free, scope), _groups(held, scope)
    if direction == "sign":
        assert set(free.abs().unique().tolist()) <= {0.0, 2.0}
    else:
        size = groups[0].norm(dim=1) if direction == "l2" else groups[0].abs().amax(dim=1)
        assert_close(size[size > 0], torch.full_like(size[size > 0], 2.0), 1e-12, "the step")
    if ball is None:
        assert torch.equal(free, held)
    elif ball == "linf":
        assert torch.equal(held, free.clamp(-0.25, 0.25))
    else:
        scale = 0.25 / groups[0].norm(dim=1, keepdim=True).clamp(min=0.25)
        assert_close(groups[1], groups[0] * scale, 1e-12, "onto the ball")


def _groups(delta: torch.Tensor, scope: str) -> torch.Tensor:
    if scope in ("batch", "table"):
        return delta.reshape(1, -1)
    return delta.flatten(1) if scope in ("sample", "row") else delta.flatten(0, 1)


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("neftune", "fgsm")])
def test_norm_is_the_short_form(name: str) -> None:
    model, data, closure = ready()
    for norm in ("l2", "linf"):
        with EVERY[name](model, embedding="word_embeddings", norm=norm, scope="sample") as adv:
            one, rule = adv.find(closure, data["attention_mask"]).values, adv.rule
        ball = None if rule.ball == "none" else rule.ball
        with EVERY[name](
            model, embedding="word_embeddings", direction=rule.direction, ball=ball, scope="sample",
        ) as adv:  # fmt: skip
            other = adv.find(closure, data["attention_mask"]).values
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    ("make", "absolute"),
    [
        (fastadv.FGM, {"epsilon": 0.5, "scope": "sample"}),
        (fastadv.PGD, {"epsilon": 0.5, "step_size": 0.2, "random_start": 0.1, "scope": "sample"}),
        (fastadv.FreeLB, {"epsilon": 0.5, "step_size": 0.2, "random_start": 0.1}),
        (fastadv.SMART, {"epsilon": 0.5}),
        (fastadv.VAT, {"epsilon": 0.5, "xi": 0.01}),
        (fastadv.FGSM, {"epsilon": 0.1}),
        (fastadv.NEFTune, {"alpha": 3.0}),
    ],
)
def test_relative_radii_are_in_units_of_the_mean_row_norm(make: Any, absolute: dict[str, Any]) -> None:
    model, data, closure = ready()
    unit = float(model.word_embeddings.weight.norm(dim=1).mean())
    scaled = {key: value / unit if isinstance(value, float) else value for key, value in absolute.items()}
    seen = []
    for options in (absolute, {**scaled, "relative": True}):
        with make(model, embedding="word_embeddings", **options) as adv:
            torch.manual_seed(4)
            seen.append(adv.find(closure, data["attention_mask"]).values[0])
    assert seen[0].any()
    assert_close(seen[1], seen[0], 1e-9, "the perturbation")


def test_the_unit_is_taken_once_and_of_what_the_module_returns() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 3.0 * super().forward(input)

    plain, scaled = seeded(lambda: nn.Embedding(10, 4)), seeded(lambda: Scaled(10, 4))
    one = fastadv.FGM(nn.Sequential(plain, nn.Linear(4, 1).double()), epsilon=1.0, relative=True, scope="sample")
    three = fastadv.FGM(nn.Sequential(scaled, nn.Linear(4, 1).double()), epsilon=1.0, relative=True, scope="sample")
    assert three.rule.epsilon == pytest.approx(3 * (one.rule.epsilon or 0))
    with torch.no_grad():
        plain.weight.mul_(100)
    assert three.rule.epsilon == pytest.approx(3 * (one.rule.epsilon or 0))
    with pytest.raises(ValueError, match="relative=True takes its unit from an embedding's rows, and Linear has none"):
        fastadv.PGD(seeded(TinyModel), embedding="ff1", scope="sample", relative=True)


def test_classic_calls_take_the_relative_radius() -> None:
    model, data, closure = ready()
    adv = fastadv.FGM(model, embedding="word_embeddings", epsilon=0.5, relative=True)
    before = model.word_embeddings.weight.detach().clone()
    closure().loss.backward()
    adv.attack(emb_name="word_embeddings")
    moved = float((model.word_embeddings.weight.detach() - before).norm())
    adv.restore()
    assert moved == pytest.approx(0.5 * float(before.norm(dim=1).mean()), rel=1e-9)
    with record(model) as seen:
        model(**data)
    assert torch.equal(seen[0], before[data["input_ids"]])
