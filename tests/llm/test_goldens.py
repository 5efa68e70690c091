"""The recorded losses of LAT, CAT, CAPO, ER-CAT, R2D2 and circuit breakers at their perturbations; their defects.

Runs and tolerances: tests/goldens/llm/losses.md.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv import llm
from tests.llm.recorded import kept, moved, of, perturbed, recorded
from tests.support import assert_close, golden

AWAY, SAFE, UTILITY = slice(0, 3), slice(3, 6), slice(6, 9)


def check_gradients(model: nn.Module, loss: Tensor, run: dict[str, Any], tolerance: float = 1e-10) -> None:
    """Of every weight that trains; the recorded ones of the others are zero or not comparable."""
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert found
    for name, grad in found.items():
        assert_close(grad, run["g"][name], tolerance, name)


def test_r2d2() -> None:
    run = golden("llm/r2d2_log_1_minus_p")
    logits = run["logits"].requires_grad_()
    loss = llm.away(llm.Scores.of(logits, run["labels"], shift=False))
    loss.backward()
    assert_close(loss, run["loss"], 1e-12, "loss")
    assert_close(logits.grad, run["grad"], 1e-12, "gradient")
    scores = llm.Scores.of(run["logits"], run["labels"], shift=False)
    assert (scores.log_probs < -5).any(), "a token is below the threshold"
    assert llm.away(scores, threshold=None) > loss


@pytest.mark.parametrize("name", ["cat_tl_ul", "cat_tl_ul_log1mp"])
def test_cat(name: str) -> None:
    model, run = recorded(name)
    harmful = kept(model, run, AWAY, run["delta"][-1])
    plain = name == "cat_tl_ul"
    away = llm.away(harmful, "cross_entropy", cutoff=-1e4, jump=True) if plain else llm.away(harmful)
    toward = llm.toward(kept(model, run, SAFE, moved(run)), cutoff=0.0 if plain else 0.5, jump=True)
    utility = llm.toward(kept(model, run, UTILITY))
    for found, which in ((away, "away_loss"), (toward, "toward_loss"), (utility, "utility_loss")):
        assert_close(found, run[which], 1e-12, which)
    loss = 0.5 * away + 0.5 * toward + utility
    assert_close(loss, run["loss"], 1e-12, "loss")
    check_gradients(model, loss, run)


def test_cats_attack() -> None:
    """Its loss at the start and in the end is `toward` of the harmful answer."""
    model, run = recorded("cat_tl_ul")
    start = llm.toward(kept(model, run, AWAY, run["delta"][0]))
    assert_close(start, run["loss_attack"][0], 1e-12, "at delta 0")
    assert_close(llm.toward(kept(model, run, AWAY, run["delta"][3])), run["loss_attack"][3], 1e-12, "at delta 3")


def test_cat_leaves_out_targets_of_id_zero() -> None:
    """Defect: `target_ids > 0`. With token 0 in a target, that code scores the others alone; here it counts."""
    model, run = recorded("cat_tl_ul")
    labels = run["labels"][AWAY].clone()
    row, column = (labels != -100).nonzero()[1]
    ids = run["input_ids"][AWAY].clone()
    ids[row, column] = labels[row, column] = 0
    data = {"input_ids": ids, "attention_mask": run["attention_mask"][AWAY]}
    with torch.no_grad():
        logits = model(**data).logits[:, :-1].flatten(0, 1)
        found = llm.toward(llm.score(model, labels=labels, **data))
    true, theirs = labels[:, 1:].flatten(), labels[:, 1:].where(labels[:, 1:] > 0, -100).flatten()
    assert_close(found, F.cross_entropy(logits, true), 1e-12, "token 0 counts")
    assert abs(found - F.cross_entropy(logits, theirs)) > 1e-3


def test_capo() -> None:
    """Its jump at -5 is in the run; the recorded references are in order there."""
    model, run = recorded("capo_tl_ipo")
    base = llm.base_score(model, **{name: run[name] for name in ("input_ids", "attention_mask", "labels")}).means()
    assert_close(base, run["logps"], 1e-12, "references")
    harmful, safe = kept(model, run, AWAY, run["delta"][-1]), kept(model, run, SAFE, moved(run))
    ipo = llm.ipo(safe, harmful, base[SAFE], base[AWAY], threshold=-5.0, jump=True)
    utility = llm.toward(kept(model, run, UTILITY))
    assert_close(ipo, run["dpo_loss"], 1e-12, "ipo")
    assert_close(llm.away(harmful, "cross_entropy"), run["away_loss"], 1e-12, "away")
    assert_close(ipo + utility, run["loss"], 1e-12, "loss")
    check_gradients(model, ipo + utility, run)


def test_capos_defects() -> None:
    """References that were appended in order and are popped from the end are other samples'; and a token that falls
    below -5 counts 0 there, and -5 here."""
    model, run = recorded("capo_tl_ipo")
    harmful, safe = kept(model, run, AWAY, run["delta"][-1]), kept(model, run, SAFE, moved(run))
    assert (harmful.log_probs < -5).any()
    references = list(run["logps"])
    popped = torch.stack([references.pop() for _ in run["logps"]])
    theirs = llm.ipo(safe, harmful, popped[SAFE], popped[AWAY], threshold=-5.0, jump=True)
    assert abs(theirs - run["dpo_loss"]) > 0.05 * run["dpo_loss"]
    ours = llm.ipo(safe, harmful, run["logps"][SAFE], run["logps"][AWAY], threshold=-5.0)
    assert abs(ours - run["dpo_loss"]) > 0.05 * run["dpo_loss"]


@pytest.mark.parametrize("jump", [True, False])
def test_the_margin_at_the_threshold(jump: bool) -> None:
    """One token of three passes -5: CAPO's margin moves by 5 / 3, ours by nothing."""
    targets = llm.Targets.of(torch.tensor([[-100, 0, 0, 0]]))
    safe = llm.Scores(torch.zeros(3, 2, dtype=torch.float64), targets)

    def loss(nudge: float) -> Tensor:
        p = torch.tensor([0.5, 0.5, -5.0 + nudge], dtype=torch.float64)
        p[2] = p[2].exp()
        harmful = llm.Scores(torch.stack((p, 1 - p), dim=1).log(), targets)
        found = llm.ipo(safe, harmful, safe.means(), safe.means(), threshold=-5.0, jump=jump)
        return 2 - found.sqrt()  # the margin, which is below 1 / (2 beta) = 2

    moved_by = loss(1e-9) - loss(-1e-9)
    assert_close(moved_by + 1, torch.tensor(1 + (5 / 3 if jump else 0), dtype=torch.float64), 1e-8, "margin")


def test_lat() -> None:
    """toward, away and sft at the held perturbation; the first of its optimizer steps."""
    model, run = recorded("lat_tl_step_toward_away_sft")
    deltas = run["delta"]
    with perturbed(model, deltas):
        toward = llm.toward(llm.score(model, **of(run["def_tokens"], run["def_labels_mask"])))
        away = llm.away(llm.score(model, **of(run["adv_tokens"], run["adv_labels_mask"])))
    sft = llm.toward(llm.score(model, **of(run["sft_def_tokens"], run["sft_def_labels_mask"])))
    for found, which in ((toward, "toward"), (away, "away"), (sft, "sft")):
        assert_close(found, run[f"loss_def_{which}"][0], 1e-12, which)
    (0.6 * sft + 0.2 * toward + 0.2 * away).backward()
    for name, weight in model.named_parameters():
        if "layers" in name:
            assert_close(weight.grad, run["g"][name], 1e-10, name)


def test_lats_dpo() -> None:
    """Normalising with a key that nothing reads halves it."""
    model, run = recorded("lat_tl_step_dpo")
    safe = of(run["def_tokens"], run["def_labels_mask"])
    harmful = of(run["adv_tokens"], run["adv_labels_mask"])
    base = [llm.base_score(model, **data) for data in (safe, harmful)]
    with perturbed(model, run["delta"]):
        loss = llm.dpo(llm.score(model, **safe), llm.score(model, **harmful), *base, beta=0.3)
    assert_close(loss, run["loss_def_dpo"][0], 1e-12, "dpo")
    check_gradients(model, loss / 2, run)


def test_ercat() -> None:
    """Beyond its cutoffs each term goes on at a thousandth, without a jump: its away loss of 3.000118 says so."""
    model, run = recorded("ercat_tl_l2")
    prompt, seen = run["prompt_ids"], run["prompt_mask"]
    terms = []
    for answer, mask in ((run["benign_ids"], run["benign_mask"]), (run["harmful_ids"], run["harmful_mask"])):
        ids = torch.cat((prompt, answer), dim=1)
        room = torch.zeros(3, answer.shape[1], 32, dtype=torch.float64)
        labels = torch.cat((prompt, answer), dim=1).where(torch.cat((seen * 0, mask), dim=1).bool(), -100)
        attended = torch.cat((seen, torch.ones_like(answer)), dim=1)
        with perturbed(model, {"embed_tokens": torch.cat((run["delta"][-1], room), dim=1)}):
            terms.append(llm.score(model, input_ids=ids, attention_mask=attended, labels=labels))
    toward = llm.toward(terms[0], cutoff=1.0)
    away = llm.away(terms[1], "cross_entropy", cutoff=-3.0)
    assert_close(toward, run["toward_loss"], 1e-12, "toward")
    assert_close(-away, run["away_loss"], 1e-12, "away")
    assert away > llm.away(terms[1], "cross_entropy"), "beyond its cutoff"


@pytest.mark.parametrize("step", [1, 149])
def test_circuit_breakers(step: int) -> None:
    """`retain` is the norms of all hidden states, padding 0 in the mean; the cosine term is written out."""
    model, run = recorded(f"circuit_breakers_tl_step{step}", scale=1.0)
    retain, retain_base = both(model, run["retain_ids"], run["retain_mask"])
    broken, broken_base = both(model, run["cb_ids"], run["cb_mask"])
    attended = run["retain_mask"].expand(retain.shape[:-1])
    kept_loss = llm.retain(retain, retain_base, attended, "norm") * attended.double().mean()
    cosine = F.cosine_similarity(broken[2:4], broken_base[2:4], dim=-1).relu() * run["cb_mask"]
    broken_loss = cosine.sum() / (2 * run["cb_mask"].sum())
    loss = 10 * (step / 300 * kept_loss + (1 - step / 300) * broken_loss)
    assert_close(loss, run["loss"], 1e-10, "loss")
    check_gradients(model, loss, run)


def both(model: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [layers, B, T, D] with adapters and without."""
    with llm.adapters_off(model), torch.no_grad():
        base = torch.stack(model(ids, attention_mask=mask, output_hidden_states=True).hidden_states)
    return torch.stack(model(ids, attention_mask=mask, output_hidden_states=True).hidden_states), base
