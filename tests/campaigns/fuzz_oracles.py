"""What the ops should give, in numpy: sums in their order in the dtype of the sum, all else in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
FLOOR = {torch.float32: 1e-43, torch.float64: 1e-320}  # denormals are this far apart, or a few of them


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def array(tensor: Tensor) -> Array:
    """In the dtype of sums: what numpy does with it is rounded as the op rounds it."""
    return np.array(tensor.detach().to(wide(tensor.dtype)).tolist(), wide_numpy(tensor)).reshape(tensor.shape)


def wide_numpy(tensor: Tensor) -> Any:
    return np.float64 if tensor.dtype == torch.float64 else np.float32


def rounded(found: Array, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(found)).to(like.dtype)


def norm(x: Array, kind: str) -> float:
    """The l2 norm or the largest magnitude, of numbers of any size."""
    most = float(np.abs(x).max(initial=0))
    return most * float(np.linalg.norm(x / most)) if kind == "l2" and most > 0 else most


def unit(x: Array, length: float, kind: str) -> Array:
    most = float(np.abs(x).max(initial=0))
    if most == 0:
        return np.zeros_like(x)
    x = x / most
    return length * x / norm(x, kind)


def moved(delta: Array, g: Array, rule: dict[str, Any], tolerance: float, floor: float) -> tuple[Array, Array]:
    """One group after its step, and how far off each element may be."""
    step, direction = rule["step_size"], rule["direction"]
    m = delta + (step * np.sign(g) if direction == "sign" else unit(g, step, direction))
    return brought(m, float(np.abs(delta).max(initial=0)) + (step if bool(g.any()) else 0), rule, tolerance, floor)


def brought(m: Array, size: float, rule: dict[str, Any], tolerance: float, floor: float) -> tuple[Array, Array]:
    """One group on its ball, of what is off by a share of `size`."""
    epsilon, direction, ball = (rule[name] for name in ("epsilon", "direction", "ball"))
    bound = np.full(m.shape, tolerance * size + floor)
    if epsilon is None or ball == "none":
        return m, bound
    if ball == "linf":
        return m.clip(-epsilon, epsilon), bound
    kind = "l2" if ball == "l2" or direction == "l2" else "max"
    length = norm(m, kind)
    if ball == "l2" and length <= epsilon:
        return m, bound
    # What has cancelled in m is off by a larger share of it.
    share = math.sqrt(m.size) * size / length if length > 0 else 1
    return unit(m, epsilon, kind), np.full(m.shape, min(epsilon, tolerance * epsilon * (1 + share)) * 1.01 + floor)


def ascended(
    before: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    rule: dict[str, Any],
    got: Tensor,
    skipped: int,
    starts: Tensor | None = None,
) -> bool:
    if before.numel() == 0:
        return skipped == 0
    g = grad.double() if mask is None else grad.double().masked_fill(~mask.unsqueeze(-1), 0)
    lost = 0
    dtype = before.dtype
    for old, along, new in zip(*(grouped(t.double(), rule, starts) for t in (before, g, got)), strict=True):
        finite = bool(np.isfinite(along).all())
        lost += not finite
        want, bound = moved(old, along if finite else np.zeros_like(along), rule, TOLERANCE[dtype], FLOOR[dtype])
        if not (np.abs(new - want) <= bound).all():
            return False
    return lost == skipped


OPTIMIZERS = {"adam": (0.9, 0.999, 0.0), "adamw": (0.9, 0.999, 0.01), "rmsprop": (None, 0.99, 0.0)}


def moved_by_moments(
    before: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    rule: dict[str, Any],
    got: Tensor,
    skipped: int,
    starts: Tensor | None,
    moments: tuple[Tensor, Tensor],
    count: int,
) -> bool:
    """The moments of before and after, rounded as they are kept; the step from them in float64."""
    if before.numel() == 0:
        return skipped == 0
    g = grad.to(before.dtype) if mask is None else grad.to(before.dtype).masked_fill(~mask.unsqueeze(-1), 0)
    first, second, decay = OPTIMIZERS[rule["direction"]]
    tolerance, floor, lost = TOLERANCE[before.dtype], FLOOR[before.dtype], 0
    planes = [grouped(one, rule, starts) for both in moments for one in (both[0], both[-1])]
    with np.errstate(all="ignore"):
        for old, along, new, m, v, m_after, v_after in zip(
            *(grouped(t, rule, starts) for t in (before, g, got)), *planes, strict=True
        ):
            if not np.isfinite(along).all():
                lost += 1
                want, bound = brought(old.astype(np.float64), float(np.abs(old).max()), rule, tolerance, floor)
                if not (np.array_equal(m, m_after) and np.array_equal(v, v_after)):
                    return False
            else:
                kind = along.dtype.type
                squares = kind(second) * v + kind(1 - second) * along * along
                mean = along.astype(np.float64) if first is None else first * m.astype(np.float64) + (1 - first) * along
                size_of_mean = np.abs(along) if first is None else np.abs(m) + np.abs(along)
                root = 1.0 if first is None else math.sqrt(1 - second**count)
                rate = rule["step_size"] / (1.0 if first is None else 1 - first**count)
                divisor = np.sqrt(squares.astype(np.float64)) / root + 1e-8
                want = (1 - rule["step_size"] * decay) * old.astype(np.float64) + rate * mean / divisor
                size = float((np.abs(old) + rate * size_of_mean / divisor).max())
                want, bound = brought(want, size, rule, tolerance, floor * (1 + rate / 1e-8))  # of m, over the guard
                if not np.allclose(v_after, squares, rtol=tolerance, atol=floor):
                    return False
                if first is not None and not (np.abs(m_after - mean) <= tolerance * size_of_mean + floor).all():
                    return False
            if not (np.abs(new - want) <= bound).all():
                return False
    return lost == skipped


def grouped(x: Tensor, rule: dict[str, Any], starts: Tensor | None) -> list[Array]:
    if starts is None:
        return list(x.reshape(math.prod(x.shape[: rule["group"]]), -1).numpy())
    rows = x.reshape(-1, x.shape[-1]).numpy()
    return [rows[a:b].reshape(-1) for a, b in itertools.pairwise(starts.tolist()) if a < b]


def stepped(
    start: Tensor, grad: Tensor, saved: Tensor, some: Tensor | None, rule: dict[str, Any], got: Tensor, skipped: int
) -> bool:
    every = torch.arange(start.shape[0]) if some is None else some
    others = torch.ones(start.shape[0], dtype=torch.bool)
    others[every] = False
    if not torch.equal(got[others], start[others]):
        return False
    if every.numel() == 0 or start.shape[1] == 0:
        return skipped == 0
    groups = (1, -1) if rule["group"] == 0 else (len(every), start.shape[1])
    dtype, lost = wide(start.dtype), 0
    exact = float(torch.finfo(start.dtype).eps)
    parts = (t.double().reshape(groups).numpy() for t in (start[every], grad[every], saved, got[every]))
    for at, g, centre, new in zip(*parts, strict=True):
        finite = bool(np.isfinite(g).all())
        lost += not finite
        if not finite or not g.any():
            if not np.array_equal(at, new):
                return False
            continue
        bounded = rule["epsilon"] is not None and rule["ball"] != "none"
        origin = centre if bounded else np.zeros_like(at)
        delta, bound = moved(at - origin, g, rule, TOLERANCE[dtype], FLOOR[dtype])
        want = origin + delta
        off = (
            bound * (1 + np.abs(at).max() + np.abs(centre).max()) + exact * np.abs(want) + TOLERANCE[dtype] * np.abs(at)
        )
        if not (np.abs(new - want) <= off).all():
            return False
    return lost == skipped


def embedded(table: Tensor, ids: Tensor, added: Tensor, slot: Tensor | None) -> Tensor:
    words, add = array(table), array(added)
    out = words[ids.numpy()].reshape(len(ids), table.shape[1])
    with np.errstate(all="ignore"):
        for n in range(len(ids)):
            s = n if slot is None else int(slot[n])
            if s >= 0:
                out[n] = out[n] + add[s]
    return rounded(out, table)


def segments(ids: Tensor, mask: Tensor | None, vocabulary: int) -> tuple[Tensor, ...]:
    of, masked = ids.tolist(), [False] * len(ids) if mask is None else (~mask).tolist()
    order = sorted(range(len(of)), key=lambda n: (of[n], masked[n], n))
    words = sorted(set(of))
    room = min(len(of), vocabulary)
    starts, stops = [len(of)] * (room + 1), [len(of)] * room
    for s, word in enumerate(words):
        places = [i for i, n in enumerate(order) if of[n] == word]
        starts[s] = places[0]
        stops[s] = places[0] + sum(not masked[order[i]] for i in places)
    slot = [-1 if masked[n] else words.index(of[n]) for n in range(len(of))]
    return tuple(torch.tensor(found, dtype=torch.int64) for found in (slot, order, starts, stops))


def segment_sum(values: Tensor, groups: Any) -> Tensor:
    rows = array(values)
    out = np.zeros((groups.stops.shape[0], values.shape[1]), rows.dtype)
    with np.errstate(all="ignore"):
        for s, (start, stop) in enumerate(zip(groups.starts.tolist(), groups.stops.tolist(), strict=False)):
            for n in groups.order[start:stop].tolist():
                out[s] = out[s] + rows[n]
    return torch.from_numpy(out)


def backward(table: Tensor, grads: list[Tensor], groups: Any, ids: Tensor, padding: int | None) -> Tensor:
    out, rows = array(table), [array(grad) for grad in grads]
    starts = groups.starts.tolist()
    with np.errstate(all="ignore"):
        for start, stop in itertools.pairwise(starts):
            places = groups.order[start:stop].tolist()
            if not places or int(ids[places[0]]) == padding:
                continue
            total = np.zeros(table.shape[1], out.dtype)
            for grad in rows:
                for n in places:
                    total = total + grad[n].astype(out.dtype)
            word = int(ids[places[0]])
            out[word] = out[word] + total
    return rounded(out, table)


def blended(name: str, number: float, into: Tensor, source: Tensor) -> Tensor:
    if name == "copy":
        return source.clone(memory_format=torch.contiguous_format)
    a, b = array(into), array(source)
    keep, take = (1, number) if name == "accumulate" else (number, 1 - number)
    with np.errstate(all="ignore"):
        return rounded(a.dtype.type(keep) * a + a.dtype.type(take) * b, into).view(into.shape)


def close(got: Tensor, want: Tensor, largest: float) -> bool:
    """Of a sum whose terms are at most `largest`, rounded once or twice."""
    info = torch.finfo(got.dtype)
    exact, apart = 4 * info.eps, info.smallest_normal * info.eps  # denormals are so far apart, whatever their size
    return bool(
        torch.allclose(got.double(), want.double(), rtol=exact, atol=exact * largest + 2 * apart, equal_nan=True)
    )


def log_softmax(x: Array) -> Array:
    x = x - x.max()
    return np.asarray(x - np.log(np.exp(x).sum()))


def against(kind: str, a: Array, b: Array, lowest: float) -> tuple[float, Array, Array]:
    """The divergence of one row and its gradients, in float64; NaN where there is no softmax.

    So far below the largest logit as `lowest`, a class counts for nothing.
    """
    if kind == "mse":
        gap = np.where(a == b, 0, a - b)
        return float((gap**2).mean()), 2 * gap / a.size, -2 * gap / a.size
    log_p, log_q = log_softmax(a), log_softmax(b)
    p, q = (np.where(x - x.max() < lowest, 0, np.exp(log)) for x, log in ((a, log_p), (b, log_q)))
    r = np.where(log_p == log_q, 0, log_p - log_q)

    def total(weight: Array, log: Array) -> float:
        return float(np.where(weight == 0, 0, weight * log).sum())

    if kind == "js":
        m = np.logaddexp(log_p, log_q) - math.log(2)
        u, v = np.where(p > 0, log_p - m, 0), np.where(q > 0, log_q - m, 0)
        return (total(p, u) + total(q, v)) / 2, p * (u - total(p, u)) / 2, q * (v - total(q, v)) / 2
    kl_p, kl_q = total(p, r), total(q, -r)
    if kind == "kl":
        return kl_q, p - q, q * (np.where(q > 0, -r, 0) - kl_q)
    left = p * (np.where(p > 0, r, 0) - kl_p) + p - q
    return kl_p + kl_q, left, q * (np.where(q > 0, -r, 0) - kl_q) + q - p


def divergence(  # noqa: C901
    logits: Tensor, target: Tensor, weights: Tensor, kind: str, value: Tensor, grads: tuple[Tensor, ...]
) -> bool:
    total, slack, tolerance = 0.0, 0.0, 2 * TOLERANCE[wide(logits.dtype)]
    exact = float(torch.finfo(logits.dtype).eps)
    most, lowest = float(torch.finfo(logits.dtype).max), -708.0 if logits.dtype == torch.float64 else -87.0
    with np.errstate(all="ignore"):
        for n, weight in enumerate(weights.tolist()):
            left, right = (grad[n].double().numpy() for grad in grads)
            if weight == 0:
                if left.any() or right.any():
                    return False
                continue
            a, b = logits[n].double().numpy(), target[n].double().numpy()
            one, *want = against(kind, a, b, lowest)
            total += weight * one
            finite = np.abs(np.concatenate([a[np.isfinite(a)], b[np.isfinite(b)], [0]])).max()
            bound = tolerance * (1 + finite)
            if kind == "mse":
                bound = tolerance * (1 + finite) ** 2
            slack += weight * bound
            if math.isnan(one) and kind != "mse":
                if not (np.isnan(left).all() and np.isnan(right).all()):
                    return False
                continue
            if not math.isfinite(one):
                continue
            for got, exactly in zip((left, right), want, strict=True):
                exactly = weight * exactly
                off = np.abs(got - exactly) <= bound + 2 * exact * np.abs(exactly)
                if not (off | (np.abs(exactly) > most / 2)).all():
                    return False
    got_value = float(value)
    if math.isnan(total) or math.isinf(total):
        return not math.isfinite(got_value) and math.isnan(got_value) == math.isnan(total)
    return abs(got_value - total) <= slack + tolerance * abs(total)
