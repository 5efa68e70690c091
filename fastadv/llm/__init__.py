"""Losses that make chat models refuse robustly and unlearning hold, on the positions of target tokens alone.

`score` runs a model on a batch and keeps the logits that predict a target; the losses take what it returns:

    >>> from fastadv import llm
    >>> safe = {"input_ids": ids, "labels": labels}  # doctest: +SKIP
    >>> loss = llm.toward(llm.score(model, **safe)) + llm.away(llm.score(model, **harmful))  # doctest: +SKIP

Nothing here imports transformers or peft.
"""

from fastadv.llm.away import away
from fastadv.llm.base_model import adapters_off, base_score
from fastadv.llm.cutoff import limited
from fastadv.llm.dpo import dpo
from fastadv.llm.ipo import ipo
from fastadv.llm.kl_to_base import kl_to_base
from fastadv.llm.retain import retain
from fastadv.llm.scores import Scores, score
from fastadv.llm.targets import Targets
from fastadv.llm.toward import toward

__all__ = [
    "Scores",
    "Targets",
    "adapters_off",
    "away",
    "base_score",
    "dpo",
    "ipo",
    "kl_to_base",
    "limited",
    "retain",
    "score",
    "toward",
]
