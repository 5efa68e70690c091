"""The launchers of csrc/gather_perturb.h and csrc/gather_perturb_backward.h."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import increment_version

from fastadv import native
from fastadv.arguments import signatures
from fastadv.native.launch import Launch

BACKWARD = "gather_perturb_backward"


def _check_backward(tensors: Sequence[Tensor], padding_idx: int) -> None:
    del padding_idx
    count, most = len(tensors) - 4, native.extension().most_grads
    if count > most:
        raise ValueError(f"{BACKWARD}: there are {count} grads, but at most {most} are served")


_RUN = {
    form: Launch("gather_perturb_cpu", form)
    for form in (signatures.GATHER, signatures.GATHER_BY_POSITION, signatures.GATHER_BY_SLOT)
}
_BACKWARD = Launch("gather_perturb_backward_cpu", signatures.GATHER_BACKWARD, _check_backward)


def gather_perturb(weight: Tensor, ids: Tensor, delta: Tensor | None, slot: Tensor | None) -> Tensor:
    r"""Look rows up and add their perturbation, rounded once.

    .. math:: out_n = round(W[ids_n] + \delta_n), \quad round(W[ids_n] + \delta[slot_n]), \quad\text{or}\quad W[ids_n]

    `fastadv.arguments.signatures` lists the tensors. Nothing is mutated.

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: a shape, stride or device that does not fit.
        IndexError: an id outside the table or a slot outside `delta`; nothing has been read then.
        RuntimeError: the extension is not there, or the tensors are not on the CPU.

    Examples:
        >>> table = torch.arange(6.0).view(3, 2)
        >>> gather_perturb(table, torch.tensor([2, 0]), torch.full((2, 2), 0.5), None)
        tensor([[4.5000, 5.5000],
                [0.5000, 1.5000]])
    """
    form, tensors = signatures.gather(weight, ids, delta, slot)
    out: Tensor = _RUN[form](tensors)
    return out


def gather_perturb_backward(
    table_grad: Tensor, grads: Sequence[Tensor], ids: Tensor, order: Tensor, starts: Tensor, padding_idx: int
) -> None:
    r"""Add the gradients of positions to the rows of their ids; `padding_idx` is the row that gets nothing, or -1.

    .. math:: G[w] \leftarrow round\Big(G[w] + \sum_g \sum_{i:\, ids_i = w} g_i\Big)

    `table_grad` is mutated, in touched rows alone. There may be up to 64 `grads`.

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: a shape, stride or device that does not fit, too many grads, or a plan of other ids.
        IndexError: an id outside the table, or a plan outside the positions; nothing has been written then.
        RuntimeError: the extension is not there, or the tensors are not on the CPU.

    Examples:
        >>> table_grad, grad = torch.zeros(3, 1), torch.tensor([[1.0], [2.0], [4.0]])
        >>> ids, order, starts = torch.tensor([2, 0, 2]), torch.tensor([1, 0, 2]), torch.tensor([0, 1, 3])
        >>> gather_perturb_backward(table_grad, [grad], ids, order, starts, -1)
        >>> table_grad.flatten()
        tensor([2., 0., 5.])
    """
    _BACKWARD((table_grad, ids, order, starts, *grads), padding_idx)
    increment_version((table_grad,))
