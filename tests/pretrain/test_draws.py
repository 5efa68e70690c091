"""A row's random numbers are the same in any batch."""

from __future__ import annotations

import torch

from fastadv.pretrain.draws import ByRow, key

CPU = torch.device("cpu")


def test_a_row_draws_alike_in_any_batch() -> None:
    for draw in ("uniform", "normal"):
        whole, part = ByRow(1, 2, [5, 6, 7]), ByRow(1, 2, [7, 5])
        for _ in range(2):  # draws after one another
            one, other = (getattr(source, draw)((len(source._keys), 4, 3), CPU) for source in (whole, part))
            assert torch.equal(one[[2, 0]], other)


def test_seeds_steps_rows_and_draws_differ() -> None:
    sources = [ByRow(0, 0, [0]), ByRow(1, 0, [0]), ByRow(0, 1, [0]), ByRow(0, 0, [1])]
    found = [source.uniform((1, 8), CPU) for source in (*sources, sources[0])]
    for index, one in enumerate(found):
        for other in found[index + 1 :]:
            assert not torch.equal(one, other)


def test_distributions() -> None:
    source = ByRow(0, 0, range(64))
    uniform, normal = source.uniform((64, 1000), CPU), source.normal((64, 1000), CPU)
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1 and abs(float(uniform.mean()) - 0.5) < 0.01
    assert abs(float(normal.mean())) < 0.02 and abs(float(normal.std()) - 1) < 0.02
    rows = torch.corrcoef(normal)
    assert float((rows - torch.eye(64)).abs().max()) < 0.2


def test_keys_are_apart() -> None:
    keys = {key(seed, step, row) for seed in range(4) for step in range(50) for row in range(50)}
    assert len(keys) == 4 * 50 * 50
    assert len({one >> 1 & 0xFFFFFFFF for one in keys}) > 0.999 * len(keys)  # a CPU's generator takes these bits alone
