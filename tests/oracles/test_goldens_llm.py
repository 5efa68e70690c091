"""The recorded searches of LLM safety's public codes are met: see tests/goldens/llm/README.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastadv
from tests import tiny_llama
from tests.oracles.recorded import ENGINES
from tests.support import assert_close, assert_gradients, golden, gradients

GUARDED = 3e-5  # what is left of a guard of 1e-6 on the gradient's norm


def recorded(name: str) -> tuple[Any, dict[str, Any]]:
    """The model, its adapters merged into its weights, and the run."""
    run = golden(f"llm/{name}")
    model = tiny_llama.load({f"w::{key}": value for key, value in run["w"].items()})
    with torch.no_grad():
        for key, down in run["w"].items():
            if ".lora_A." in key:
                weight = model.get_parameter(key.removeprefix("base_model.model.").replace(".lora_A.default", ""))
                weight += 2 * run["w"][key.replace("lora_A", "lora_B")] @ down
    return model, run


def at_every_step(
    model: Any, closure: Any, want: Tensor, mask: Tensor | None, tolerance: float, **options: Any
) -> None:
    """The perturbation after each of the recorded steps."""
    for steps in range(1, len(want)):
        with fastadv.PGD(model, steps=steps, **options) as adv:
            [found] = adv.find(closure, mask=mask).values
        assert int(adv.skipped) == 0
        assert_close(found[..., : want.shape[2], :], want[steps], tolerance, f"step {steps}")


@pytest.mark.parametrize("fused", ENGINES)
def test_targeted_lat(fused: bool | None) -> None:
    """AdamW on the prompt's embeddings, down the harmful completion's loss, onto a ball per token."""
    model, run = recorded("lat_tl_pgd_embedding")
    labels = run["adv_tokens"].masked_fill(~run["adv_labels_mask"], -100)
    options = {"epsilon": 0.5, "step_size": 0.1, "direction": "adamw", "ball": "l2", "scope": "token", "fused": fused}
    want = run["delta"]["embed_tokens"]
    at_every_step(
        model, lambda: -model(run["adv_tokens"], labels=labels).loss, want, run["prompt_mask"], 1e-12, **options
    )
    assert (want[-1].norm(dim=-1)[run["prompt_mask"]] > 0.499).all()


@pytest.mark.parametrize("fused", ENGINES)
def test_cat_by_adam(fused: bool | None) -> None:
    model, run = recorded("cat_tl_attack_adam")
    rows = [run[name][:3] for name in ("input_ids", "attention_mask")]
    epsilon = float(run["epsilon_absolute"])
    options = {"epsilon": epsilon, "step_size": 0.05, "direction": "adam", "ball": "l2", "scope": "token"}
    at_every_step(
        model, lambda: -model(*rows, labels=run["labels"][:3]).loss, run["delta"], run["delta_mask"], 1e-12,
        fused=fused, **options,
    )  # fmt: skip


@pytest.mark.parametrize("fused", ENGINES)
def test_untargeted_lat(fused: bool | None) -> None:
    """A layer's input, climbing the training loss. And the step that trains.

    Clamped to the clean batch's range, which holds nothing back here: see tests/methods/test_clamp.py.
    """
    model, run = recorded("lat_untargeted_tl_layer2_eps1")
    options: dict[str, Any] = {
        "epsilon": 1.0, "step_size": 1 / 6, "scope": "sample", "clamp": "batch", "clean_weight": 0.0,
        "random_start": lambda shape, mask: run["delta"][0], "embedding": "model.layers.1", "fused": fused,
    }  # fmt: skip

    def closure() -> Tensor:
        loss: Tensor = model(run["ids"], run["mask"], labels=run["labels"]).loss
        return loss

    at_every_step(model, closure, run["delta"], None, GUARDED, **options)
    with fastadv.PGD(model, steps=6, **options) as adv:
        result = adv.backward(closure)
    assert_close(result.adv_loss, run["loss"], GUARDED, "loss")
    assert_gradients(gradients(model), run["g"], GUARDED)


@pytest.mark.parametrize("fused", ENGINES)
def test_er_cat(fused: bool | None) -> None:
    """Normalised steps per token of the prompt, whose completion carries no perturbation."""
    model, run = recorded("ercat_tl_l2")
    completion, prompt = run["harmful_ids"], run["prompt_mask"]
    ids = torch.cat([run["prompt_ids"], completion], dim=1)
    attended = torch.cat([prompt, torch.ones_like(completion)], dim=1)
    mask = torch.cat([prompt, torch.zeros_like(completion)], dim=1)
    labels = completion.masked_fill(run["harmful_mask"] == 0, -100)

    def closure() -> Tensor:
        logits = model(ids, attended).logits[:, prompt.shape[1] - 1 : -1]
        return -F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    at_every_step(model, closure, run["delta"], mask, GUARDED, epsilon=0.7, step_size=0.3, scope="token", fused=fused)
