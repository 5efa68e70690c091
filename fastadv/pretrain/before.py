"""Try what a run names before its folder is made: text, model, method, and the number of processes."""

from __future__ import annotations

from torch import nn

from fastadv import Owner
from fastadv.pretrain import methods, model, text
from fastadv.pretrain.loader import rows_per_step
from fastadv.pretrain.settings import SMALL, Settings

OF_THE_MODEL = ("embedding", "split")  # names of modules, which a stand-in does not have


def check(settings: Settings, world: int) -> None:
    """Look for what the settings name. The plain training must not be through before a method's arguments are tried.

    Raises:
        UserError: the text or the model cannot be found, the method refuses its arguments, or so many processes cannot
            share the rows of a step.
    """
    rows_per_step(settings, world)
    if not settings.streaming:
        text.find(settings.data, settings.text_column)
    if settings.eval_data is not None:
        text.find(settings.eval_data, settings.text_column)
    if settings.model != SMALL:
        model.read_config(settings.model)
    given = methods.arguments(settings.method, settings.extra)
    tried = {name: one for name, one in given.items() if name not in OF_THE_MODEL}
    method = methods.make(settings.method, nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)), tried, Owner())
    if method is not None:
        method.close()
