"""The classic scripts' calls: their recorded numbers, and those of the script in `fastadv.reference`."""

from __future__ import annotations

import pytest
import torch

import fastadv
from fastadv import reference
from tests.classic import Whole, fgm_step, method, pgd_step
from tests.models import TiedLM, TinyModel
from tests.oracles.recorded import ENGINES, FGM_ZHIHU, PGD_ZHIHU, Watched, check_zhihu, hyperparameters, load, zhihu
from tests.support import assert_close, assert_gradients, batch, clear, gradients, record, seeded


@pytest.mark.parametrize("fused", ENGINES)
@pytest.mark.parametrize("name", FGM_ZHIHU)
def test_fgm_meets_the_script(name: str, fused: bool | None) -> None:
    model, run, watched = zhihu(name)
    before = Whole(model)
    fgm = method(fastadv.FGM, model, fused)
    with record(model) as seen:
        fgm_step(fgm, watched, **hyperparameters(name))
    check_zhihu(model, run, watched, seen)
    assert before.unchanged()


@pytest.mark.parametrize("fused", ENGINES)
@pytest.mark.parametrize("name", PGD_ZHIHU)
def test_pgd_meets_the_script(name: str, fused: bool | None) -> None:
    model, run, watched = zhihu(name)
    numbers, before = hyperparameters(name), Whole(model)
    pgd = method(fastadv.PGD, model, fused)
    with record(model) as seen:
        pgd_step(pgd, model, watched, numbers["steps"], epsilon=numbers["epsilon"], alpha=numbers["step_size"])
    check_zhihu(model, run, watched, seen)
    assert before.unchanged()


@pytest.mark.parametrize("fused", ENGINES)
def test_every_match_moves_by_its_own_norm(fused: bool | None) -> None:
    """Words, positions, and the layer norm's two vectors, as the script's substring matches them."""
    model, run = load("fgm_zhihu_mlp_multi_match", TinyModel)
    watched, before = Watched(lambda: model(run["ids"], run["mask"], run["labels"]).loss), Whole(model)
    fgm = method(fastadv.FGM, model, fused)
    watched().backward()
    fgm.attack(1.0, "embeddings")
    moved = 0
    for name, p in model.named_parameters():
        r = p.detach() - run["w"][name]
        assert_close(r, run["r"][name], 1e-7, name)
        moved += bool(r.any())
    assert moved == 4
    watched().backward()
    fgm.restore()
    assert before.unchanged()
    assert_gradients(gradients(model), run["g"], 1e-7)
    want = torch.stack([run["loss_clean"].reshape(()), run["loss_adv"].reshape(())])
    assert_close(torch.stack(watched.losses), want, 1e-7, "losses")


def test_a_script_that_gives_nothing_gets_the_scripts_numbers() -> None:
    """Epsilon 1.0, and alpha 0.3; a method that was given others has those."""
    model, run, watched = zhihu("fgm_zhihu_mlp_eps1.0")
    fgm_step(method(fastadv.FGM, model), watched)
    assert_gradients(gradients(model), run["g"], 1e-7)
    model, run, watched = zhihu("pgd_zhihu_mlp_eps1.0_a0.3_K5")
    pgd_step(method(fastadv.PGD, model), model, watched, 5)
    assert_gradients(gradients(model), run["g"], 1e-7)
    model, run, watched = zhihu("pgd_zhihu_mlp_eps0.5_a0.3_K3")
    pgd_step(method(fastadv.PGD, model, epsilon=0.5, step_size=0.3), model, watched, 3)
    assert_gradients(gradients(model), run["g"], 1e-7)


@pytest.mark.parametrize("fused", ENGINES)
@pytest.mark.parametrize("kind", ["fgm", "pgd"])
def test_accumulation_mixes_micro_batches_as_the_script_does(kind: str, fused: bool | None) -> None:
    results = []
    for ours in (True, False):
        model = seeded(TinyModel)
        embedding = model.word_embeddings
        if kind == "fgm":
            attacker = method(fastadv.FGM, model, fused) if ours else reference.FGM(embedding)
        else:
            attacker = method(fastadv.PGD, model, fused) if ours else reference.PGD(model, embedding)
        for seed in (1, 2, 3):
            data = batch(seed=seed)
            if kind == "fgm":
                fgm_step(attacker, lambda: model(**data).loss, epsilon=0.7)  # noqa: B023
            else:
                pgd_step(attacker, model, lambda: model(**data).loss, 3, epsilon=0.5, alpha=0.3)  # noqa: B023
        results.append(gradients(model))
    assert_gradients(*results, 1e-9)


@pytest.mark.parametrize("steps", [1, 3])
def test_words_that_only_a_later_attack_touches(steps: int) -> None:
    """Another batch between two attacks: new rows are copied before they move, and the ball is around all of them."""
    results = []
    for ours in (True, False):
        model = seeded(TinyModel)
        start = Whole(model)
        attacker = method(fastadv.PGD, model) if ours else reference.PGD(model, model.word_embeddings)
        for t in range(steps):
            data = batch(seed=t)
            clear(model)
            model(**data).loss.backward()
            attacker.attack(epsilon=0.4, alpha=0.3, is_first_attack=t == 0)
        results.append(model.word_embeddings.weight.detach().clone())
        attacker.restore()
        assert not ours or start.unchanged()
    assert_close(results[0], results[1], 1e-12, "table")


@pytest.mark.parametrize("fused", ENGINES)
def test_a_tied_output_layer_moves_too(fused: bool | None) -> None:
    """The softmax touches every row: the whole table moves, as in the script."""
    results, ids = [], batch()["input_ids"]
    for ours in (True, False):
        model = seeded(TiedLM)
        before = Whole(model)
        fgm = fastadv.FGM(model, fused=fused) if ours else reference.FGM(model.embed)
        model(ids).loss.backward()
        fgm.attack(epsilon=0.5, **({"emb_name": "embed"} if ours else {}))
        assert model.head.weight is model.embed.weight
        assert (model.embed.weight.detach() != before.kept[0][1]).any(dim=1).all()
        model(ids).loss.backward()
        fgm.restore()
        assert not ours or before.unchanged()
        results.append(gradients(model))
    assert_gradients(*results, 1e-9)
