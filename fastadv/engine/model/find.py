"""Find the embedding that a method perturbs, through whatever wraps the model."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

One = str | nn.Module | tuple[str | nn.Module, str]
EmbeddingChoice = One | Sequence[One] | None

SIDES = ("output", "input")


class Site(NamedTuple):
    """Where a perturbation enters: what a module returns ("output"), or what it is given ("input")."""

    module: nn.Module
    side: str = "output"


FLAT = "_fsdp_wrapped_module"  # the name that FSDP1 gives to what it wraps


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module under torch.compile, DDP, FSDP1, DeepSpeed and PEFT."""
    inner = _inside(model)
    while inner is not None:
        model, inner = inner, _inside(inner)
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    if "_orig_mod" in model._modules:
        return model._modules["_orig_mod"]
    if FLAT in model._modules:
        return model._modules[FLAT]
    library = library_of(model)
    if isinstance(model, (DistributedDataParallel, nn.DataParallel)) or library == "deepspeed":
        return model._modules.get("module")
    if library == "peft":
        return model._modules.get("base_model") or model._modules.get("model")
    return None


def library_of(model: nn.Module) -> str:
    """The package that a module's class is from."""
    return type(model).__module__.split(".")[0]


def is_compiled(model: nn.Module) -> bool:
    """Whether `model` or a part of it runs under torch.compile (by `torch.compile(model)` or `model.compile()`)."""
    return any(map(_is_compiled, model.modules()))


def is_traced(model: nn.Module, modules: Sequence[nn.Module]) -> bool:
    """Whether one of `modules` is in a part of `model` that runs under torch.compile."""
    compiled = [part for part in model.modules() if _is_compiled(part)]
    return any(inner is module for part in compiled for inner in part.modules() for module in modules)


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def find(model: nn.Module, choice: EmbeddingChoice) -> list[nn.Module]:
    """The modules whose outputs (or inputs) carry the perturbation: see `sites`."""
    return list(dict.fromkeys(site.module for site in sites(model, choice)))


def sites(model: nn.Module, choice: EmbeddingChoice) -> list[Site]:
    """Where the perturbation enters, in the order of `choice`; what is named twice comes once.

    `None` asks the model (`get_input_embeddings`, as transformers has it), then the outermost modules inside it that
    can be asked, then takes the only `nn.Embedding`. A name may hold alternatives, "layers.{8,16}.mlp".

    Raises:
        ValueError: none or several fit; the message lists the candidates. Or the input of an embedding, which is ids.
        TypeError: `choice` is none of a name, a module, a pair of one of these with a side, or a sequence of these.
    """
    if choice is None:
        return [Site(module) for module in _default(model)]
    one = isinstance(choice, (str, nn.Module)) or _is_pair(choice)
    if not one and not (isinstance(choice, Sequence) and choice):
        raise TypeError(f"embedding= takes a module's name, a module, or a sequence of these, not {choice!r}")
    every: Sequence[Any] = [choice] if one else choice  # type: ignore[assignment]
    return list(dict.fromkeys(site for each in every for site in _sites(model, each)))


def _is_pair(choice: object) -> bool:
    """Whether it is a module (or its name) with a side. A list of two names is two modules."""
    return isinstance(choice, tuple) and len(choice) == 2 and isinstance(choice[1], str) and choice[1] in SIDES


def _sites(model: nn.Module, choice: Any) -> list[Site]:
    named, side = choice if _is_pair(choice) else (choice, "output")
    every = _alternatives(named) if isinstance(named, str) else [named]
    found = [Site(chosen(model, each), side) for each in every]
    if side == "input" and any(isinstance(site.module, nn.Embedding) for site in found):
        raise ValueError(f"embedding=({named!r}, 'input'): what an embedding is given are ids; perturb its output")
    return found


def _alternatives(pattern: str) -> list[str]:
    """The names that "layers.{8,16}.mlp" stands for: "layers.8.mlp" and "layers.16.mlp"."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(part.strip() for part in parts) for parts in itertools.product(*choices)]


def names(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """What the model calls each site's module, with ":input" where it is perturbed there."""
    known: dict[nn.Module, str] = {}
    for name, part in _names(unwrap(model)):
        known.setdefault(part, name)
    every = [known.get(site.module) or type(site.module).__name__ for site in sites]
    return [name if site.side == "output" else f"{name}:input" for name, site in zip(every, sites, strict=True)]


def _default(model: nn.Module) -> list[nn.Module]:
    inner = unwrap(model)
    asked, found = _ask(inner), _candidates(inner)
    answers = _answers(inner) if asked is None else {"": asked}
    tables = {id(table_of(one)) for one in answers.values()}
    if len(tables) == 1:  # an encoder and a decoder may each have a module around the table of the one that is told
        told = dict.fromkeys(answers.values())
        shared = (part for part in found.values() if id(table_of(part)) in tables)
        return list(dict.fromkeys((*told, *shared)))
    if len(found) == 1:
        return list(found.values())
    problem = "has several embeddings" if found else "has no nn.Embedding"
    if answers:
        problem += f" ({', '.join(answers)} have one each)"
    raise ValueError(
        f"{type(inner).__name__} {problem}: say which module's output to perturb, embedding=NAME or embedding=MODULE. "
        f"{_listed(inner)}"
    )


def _answers(model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The input embeddings of the outermost modules inside `model` that name one, by the module that does.

    Tables of words alone, where there are any: an image tower answers with the layer that projects its patches.
    """
    found: dict[str, nn.Module] = {}
    for name, part in model.named_children():
        asked = _ask(part)
        found |= _answers(part, f"{prefix}{name}.") if asked is None else {prefix + name: asked}
    return {name: one for name, one in found.items() if isinstance(one, nn.Embedding)} or found


def _ask(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_input_embeddings", None)
    if getter is None:
        return None
    try:
        answer = getter()
    except (NotImplementedError, AttributeError):
        return None
    return answer if isinstance(answer, nn.Module) else None


def chosen(model: nn.Module, choice: object, option: str = "embedding") -> nn.Module:
    """The module that `choice` is, or the only one that it names; `option` is what the user gave it as.

    Raises:
        ValueError: none or several have that name; the message lists the candidates.
        TypeError: it is neither a module nor a name.
    """
    if isinstance(choice, nn.Module):
        return choice
    if not isinstance(choice, str):
        raise TypeError(f"{option}= takes names and modules, not {choice!r}")
    inner = unwrap(model)
    named: dict[str, nn.Module] = dict(_names(inner))
    outer: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))  # as a wrapper's user lists them
    exact = named.get(choice, outer.get(choice))
    found = {} if exact is None else {choice: exact}
    found = found or {name: part for name, part in named.items() if name.endswith("." + choice)}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    problem = f"several modules are called {choice!r}: {', '.join(found)}"
    if not found:
        problem = f"no module is called {choice!r}"
    known = _listed(inner) if option == "embedding" else "model.named_modules() has them all."
    raise ValueError(f"{problem}. Give one full name. {known}")


def _names(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module by its names (a shared one has several), as they are without FSDP1."""
    for name, part in model.named_modules(remove_duplicate=False):
        yield name.replace(f"{FLAT}.", ""), part


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Embedding)}


def _listed(model: nn.Module) -> str:
    names = [f"{name} {tuple(part.weight.shape)}" for name, part in _candidates(model).items()]  # type: ignore[arg-type]
    return f"Candidates: {', '.join(names) or 'none; any module with a [B, T, D] output will do'}."


def vocabulary(module: nn.Module) -> int | None:
    """The number of rows of an embedding table; None for a module without one."""
    return module.num_embeddings if isinstance(module, nn.Embedding) else None


def table_of(module: nn.Module) -> object:
    """What the rows of `module` are in: two modules may share it. A module without a table stands for itself."""
    return module.weight if isinstance(module, nn.Embedding) else module


def is_plain_lookup(module: nn.Module) -> bool:
    """Whether `module` is exactly `weight[ids]`, of rows in one piece, so that gather and add may be one op."""
    if type(module) is not nn.Embedding or module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return False
    weight = module.weight
    return is_whole(weight) and weight.stride(-1) == 1


def is_whole(weight: torch.Tensor) -> bool:
    """Whether a weight is there as a whole, in memory that stays: FSDP and DeepSpeed's ZeRO-3 see to that otherwise."""
    return type(weight) in (nn.Parameter, torch.Tensor) and not is_cut(weight)


def is_cut(weight: torch.Tensor) -> bool:
    """Whether FSDP1 or DeepSpeed's ZeRO-3 gathers this weight for a pass, and frees it after."""
    base = weight._base
    flat = hasattr(weight, "_fsdp_flattened") or (base is not None and hasattr(base, "_fsdp_flattened"))
    return flat or hasattr(weight, "ds_id")


def first_tensor(output: Any) -> Any:
    """A module's output, or the tensor that a tuple of outputs begins with."""
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def mean_row_norm(model: nn.Module, choice: EmbeddingChoice) -> float:
    """The mean l2 norm of the rows that the perturbed embeddings return: over all tables, each once.

    Raises:
        ValueError: a perturbed module is no table.
    """
    tables = {id(table_of(module)): module for module in find(model, choice)}
    norms = torch.cat([_row_norms(module) for module in tables.values()])
    return float(norms.mean())


def _row_norms(module: nn.Module) -> torch.Tensor:
    if not isinstance(module, nn.Embedding):
        raise ValueError(  # noqa: TRY004 - the option is wrong, not a type
            f"relative=True takes its unit from an embedding's rows, and {type(module).__name__} has none: give radii "
            "in the units of its output"
        )
    weight: torch.Tensor = module.weight
    if is_cut(weight):
        raise ValueError(
            "relative=True reads all rows of the embedding, and FSDP1 or ZeRO-3 has freed them: make the method before "
            "they wrap the model, or give radii in the embedding's own units"
        )
    wide = torch.float32 if weight.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    if type(module).forward is nn.Embedding.forward:
        norms: torch.Tensor = torch.linalg.vector_norm(_whole(weight), dim=1, dtype=wide)
        return norms
    ids = torch.arange(module.num_embeddings, device=weight.device)  # a scaled table's rows are its output
    look = _past_hooks(module) if hasattr(weight, "full_tensor") else module
    parts = [torch.linalg.vector_norm(look(part), dim=1, dtype=wide) for part in torch.split(ids, 4096)]
    return torch.cat(parts)


def _whole(tensor: Any) -> Any:
    """All of a placed tensor; what else there is as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _past_hooks(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The forward of a sharded module over its whole parameters: FSDP2 takes one that is called alone for the root."""
    alone = object.__new__(type(module))
    whole = {name: _whole(parameter) for name, parameter in module._parameters.items()}
    alone.__dict__ = {**module.__dict__, "_parameters": whole}
    return functools.partial(type(module).forward, alone)
