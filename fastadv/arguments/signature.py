"""Check the tensors of an op by a table of text.

A line names an argument, its dtype, its shape and its layout; what follows two dashes is said of a wrong shape::

    grad    goes:delta  [*P, D]  even    -- grad and delta must be equal in shape
    mask?   mask        [*P]     copied

A question mark: may be None. An exclamation mark (`delta!`): is written in place, and shares no memory with the others.

Dtypes: `float` (any of four), `wide` (float32 or float64), `wide:x` (that in which x is computed), `goes:x` (computed
in x's dtype), `same:x`, `near:x` (x's, or that in which x is computed), `int64`, `index` (int64, or int32 and copied),
`bool`, and `mask`: a bool, of which another dtype is a ValueError.

Shapes: a letter is one size, `*P` any number of sizes, `#P` their product, `R+1` one more than R, `>=R` R or more.

Layouts: `contiguous`; `copied`: made contiguous where it is not; `rows`: a matrix, the elements of a row adjacent;
`rows-copied`: made so; `own`: rows that do not overlap either; `even`: rows one distance apart, or copied.

A tensor whose elements do not lie at multiples of their size is copied; `launch` copies it back if it is written.

An address says nothing about what it points to, so all of this is checked before one is used. csrc/signature.h checks
the same in C++, in nanoseconds, and says yes or no. The checks here say why not, and make the copies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadv.arguments.tensors import (
    FLOATS,
    adjacent,
    compute_dtype,
    disjoint,
    is_aligned,
    is_plain,
    row_stride,
    share_memory,
)

# csrc/signature.h has the same orders.
DTYPE_WORDS = ("float", "wide", "wide:", "goes:", "same:", "near:", "int64", "index", "bool", "mask")
LAYOUTS = ("contiguous", "copied", "rows", "rows-copied", "own", "even")
SIZES = ("", "*", "#", "+1", ">=")

Tensors = tuple[Tensor | None, ...]


class Argument(NamedTuple):
    """A line of the table."""

    name: str
    optional: bool
    written: bool
    dtype: str
    of: str  # the argument that the dtype depends on
    shape: tuple[tuple[str, str], ...]  # one of SIZES and a symbol
    layout: str
    remark: str

    @classmethod
    def parse(cls, line: str) -> Argument:
        """Read one line."""
        name, mark, dtype, of, shape, layout, remark = re.fullmatch(  # type: ignore[union-attr]
            r"(\w+)([?!]?)\s+(\w+:?)(\w*)\s+\[(.*)\]\s+([a-z-]+?)(?:\s+-- (.*))?", line.strip()
        ).groups()
        sizes = [re.fullmatch(r"(\*|#|>=|)(\w)(\+1|)", size.strip()) for size in shape.split(",") if size]
        words = tuple((size[1] + size[3], size[2]) for size in sizes if size)
        if dtype not in DTYPE_WORDS or layout not in LAYOUTS or len(words) != len(sizes):
            raise ValueError(f"not an argument: {line!r}")
        return cls(name, mark == "?", mark == "!", dtype, of, words, layout, f": {remark}" if remark else "")


class Sizes(dict[str, tuple[int, ...]]):
    """The sizes that symbols stand for, as the tensors show them one after the other."""

    def take(self, shape: Sequence[int], wanted: Sequence[tuple[str, str]]) -> bool:
        """Whether `shape` is what is wanted; symbols that were unknown are known then."""
        left = list(shape)
        spread = len(left) - len(wanted) + 1  # how many sizes a `*P` takes
        for kind, symbol in wanted:
            count = spread if kind == "*" else 1
            if count < 0 or len(left) < count:
                return False
            here, left = tuple(left[:count]), left[count:]
            if not self._one(kind, symbol, here):
                return False
        return not left

    def _one(self, kind: str, symbol: str, here: tuple[int, ...]) -> bool:
        if kind == ">=":
            return here >= self[symbol]
        if kind == "#":
            return here == (math.prod(self[symbol]),)
        if kind == "+1":
            here = (here[0] - 1,)
        return min(here, default=0) >= 0 and self.setdefault(symbol, here) == here

    def text(self, wanted: Sequence[tuple[str, str]]) -> str:
        """The shape that is wanted, in numbers as far as they are known."""
        words, unknown = [], False
        for kind, symbol in wanted:
            if kind == ">=" or symbol not in self:
                unknown = True
                words.append({"*": "...", ">=": f">={symbol}"}.get(kind, f"{symbol}{kind}"))
            elif kind == "#":
                words.append(str(math.prod(self[symbol])))
            else:
                words += [str(size + (kind == "+1")) for size in self[symbol]]
        if unknown:
            return f"[{', '.join(words)}]"
        return f"({words[0]},)" if len(words) == 1 else f"({', '.join(words)})"


class Signature:
    """The tensors that one form of an op takes; the last line stands for all further ones where `repeats`."""

    def __init__(self, op: str, table: str, *, repeats: bool = False) -> None:
        self.op, self.repeats = op, repeats
        self.arguments = [Argument.parse(line) for line in table.splitlines() if line.strip()]
        self._places = {argument.name: place for place, argument in enumerate(self.arguments)}

    def encoded(self) -> list[tuple[int, int, list[tuple[int, int]], int, bool, bool]]:
        """The table in numbers, for csrc/signature.h."""
        return [
            (
                DTYPE_WORDS.index(one.dtype),
                self._places[one.of] if one.of else 0,
                [(SIZES.index(kind), ord(symbol) - ord("A")) for kind, symbol in one.shape],
                LAYOUTS.index(one.layout),
                one.optional,
                one.written,
            )
            for one in self.arguments
        ]

    def fitted(self, tensors: Tensors) -> tuple[Any, ...]:
        """The tensors as a backend takes them: themselves, or a copy where one is laid out otherwise or misaligned.

        Raises:
            TypeError: a dtype that is not served, or a tensor without plain memory.
            ValueError: a device, shape or layout that does not fit, or a tensor that is written and lies over another.
        """
        sizes, found = Sizes(), list(tensors)
        for place, argument, tensor in self._given(tensors):
            self._check_device(argument, tensor, tensors)
            if not is_plain(tensor):
                kind = type(tensor).__name__
                raise TypeError(f"{self.op}: {argument.name} is a {kind} with no plain memory of its own")
            self._check_dtype(argument, tensor, tensors, sizes)
            self._check_shape(argument, tensor, sizes)
            found[place] = self._laid_out(argument, tensor)
        self._check_apart(found)
        return tuple(tensor if tensor is None or is_aligned(tensor) else tensor.clone() for tensor in found)

    def written(self, tensors: Tensors) -> list[Tensor | None]:
        """Those that are written in place."""
        return [tensor for argument, tensor in zip(self.arguments, tensors, strict=False) if argument.written]

    def check_shapes(self, tensors: Tensors) -> None:
        """The checks for a backend that computes in any dtype and layout: shapes, and dtypes that must be equal."""
        sizes = Sizes()
        for _, argument, tensor in self._given(tensors):
            if argument.dtype in {"same:", "index", "bool", "mask"}:
                self._check_dtype(argument, tensor, tensors, sizes)
            self._check_shape(argument, tensor, sizes)

    def _given(self, tensors: Tensors) -> Iterator[tuple[int, Argument, Tensor]]:
        """Each tensor that is there, its place and its line."""
        last = len(self.arguments) - 1
        if len(tensors) <= last - self.repeats or (len(tensors) > last + 1 and not self.repeats):
            raise TypeError(f"{self.op}: {len(tensors)} tensors for {last + 1} arguments")
        for place, tensor in enumerate(tensors):
            argument = self.arguments[min(place, last)]
            if tensor is not None:
                yield place, argument, tensor
            elif not argument.optional:
                raise TypeError(f"{self.op}: {argument.name} must be a tensor, not None")

    def _check_apart(self, tensors: Sequence[Tensor | None]) -> None:
        """What is written over while it is read gives wrong numbers; an index that is, points anywhere."""
        given = list(self._given(tuple(tensors)))
        for place, argument, tensor in given:
            for other_place, other, read in given if argument.written else ():
                if place != other_place and share_memory(tensor, read):
                    raise ValueError(
                        f"{self.op}: {argument.name} is written in place, but shares memory with {other.name}; "
                        f"pass a clone() of one of them"
                    )

    def _check_device(self, argument: Argument, tensor: Tensor, tensors: Tensors) -> None:
        first = tensors[0]
        if first is not None and tensor.device != first.device:
            raise ValueError(
                f"{self.op}: {argument.name} is on {tensor.device}, but {self.arguments[0].name} is on {first.device}"
            )

    def _check_dtype(self, argument: Argument, tensor: Tensor, tensors: Tensors, sizes: Sizes) -> None:
        kind, got = argument.dtype, tensor.dtype
        other = tensors[self._places[argument.of]].dtype if argument.of else torch.float32  # type: ignore[union-attr]
        if kind in {"float", "goes:"} and got not in FLOATS:
            served = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise TypeError(f"{self.op}: {argument.name} is {got}, but must be one of {served}")
        if kind == "goes:" and compute_dtype(got) != other:
            raise TypeError(f"{self.op}: {argument.name} is {got}, which does not go with {argument.of} of {other}")
        allowed, why = {
            "wide": (FLOATS[:2], ""),
            "wide:": ((compute_dtype(other),), f" for {argument.of} of {other}"),
            "same:": ((other,), f", as {argument.of} is"),
            "near:": ((other, compute_dtype(other)), ""),
            "int64": ((torch.int64,), ""),
            "index": ((torch.int64, torch.int32), ""),
            "bool": ((torch.bool,), ""),
            "mask": ((torch.bool,), f" with shape {sizes.text(argument.shape)}"),
        }.get(kind, ((got,), ""))
        if got not in allowed:
            names = dict.fromkeys(str(dtype) if argument.of else str(dtype).removeprefix("torch.") for dtype in allowed)
            wanted = " or ".join(names)
            error = ValueError if kind == "mask" else TypeError
            raise error(f"{self.op}: {argument.name} must be {wanted}{why}, but is {got}")

    def _check_shape(self, argument: Argument, tensor: Tensor, sizes: Sizes) -> None:
        wanted, got = sizes.text(argument.shape), tuple(tensor.shape)
        if not sizes.take(tensor.shape, argument.shape):
            what = "be bool with" if argument.dtype == "mask" else "have"
            raise ValueError(f"{self.op}: {argument.name} must {what} shape {wanted}, but has {got}{argument.remark}")

    def _laid_out(self, argument: Argument, tensor: Tensor) -> Tensor:
        layout = argument.layout
        if argument.dtype == "index":
            tensor = tensor.to(torch.int64)
        if layout == "contiguous" and not tensor.is_contiguous():
            self._refuse_layout(argument, tensor, "must be contiguous")
        if layout in {"rows", "own"} and not adjacent(tensor):
            why = "is written in place and " if layout == "own" else ""
            self._refuse_layout(argument, tensor, f"{why}must have rows of adjacent elements (inner stride 1)")
        if layout == "own" and not disjoint(tensor):
            self._refuse_layout(argument, tensor, "is written in place, but its rows overlap")
        stays = (
            tensor.is_contiguous()
            or (layout == "rows-copied" and adjacent(tensor))
            or (layout == "even" and row_stride(tensor) is not None)
            or layout in {"rows", "own"}
        )
        return tensor if stays else tensor.contiguous()

    def _refuse_layout(self, argument: Argument, tensor: Tensor, why: str) -> None:
        raise ValueError(
            f"{self.op}: {argument.name} {why}: it has shape {tuple(tensor.shape)} and strides {tensor.stride()}; "
            f"pass {argument.name}.contiguous()"
        )
