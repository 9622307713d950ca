"""Dense products by name, into memory that is there: "torch" (cuBLAS on CUDA) or "quack" (QuACK, CuTe DSL, on Hopper).

QuACK's tile is the one whose waves over the device's processors compute the fewest numbers. That is most of what tells its
tiles apart: of 22 on an H200 at its power limit, in 33 products of layers and heads of Qwen3-30B-A3B, GPT-OSS-20B and
Nemotron 3 Nano with many tokens, a number took all but the same time in each. Not in 208 columns and ping-pong, which are a
fifth to a half slower where the second operand lies along its columns.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

#: A tile of QuACK's: rows, columns, ping-pong, and the blocks along rows and along columns that load together.
Tile = tuple[int, int, bool, int, int]
#: What a number costs in such a tile.
_TILES: dict[Tile, float] = {
    (128, 192, True, 2, 1): 1.0,
    (128, 160, True, 2, 1): 1.01,
    (128, 224, False, 2, 1): 1.03,
    (256, 208, False, 1, 2): 1.05,
    (256, 128, False, 2, 1): 1.05,
}


@functools.lru_cache
def _tile(rows: int, columns: int, processors: int) -> Tile:
    def cost(tile: Tile) -> float:
        m, n, _, pair_m, pair_n = tile
        blocks = -(-rows // (m * pair_m)) * -(-columns // (n * pair_n)) * 2
        return -(-blocks // processors) * m * n * _TILES[tile]

    return min(_TILES, key=cost)


def _readable(t: Tensor) -> bool:
    """Whether TMA reads and writes it: rows or columns contiguous, the next 16 bytes or a multiple further, as is the first."""
    short, long = sorted(t.stride())
    return short == 1 and long % 8 == 0 and t.data_ptr() % 16 == 0


def mm(gemm: str, a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out [m, n] = a [m, k] @ b [k, n]; with ``add``: out += a @ b.

    QuACK takes 16 bits; matrices in a layout that it does not support go to torch.
    """
    if gemm == "torch" or not a.numel() or not b.numel() or not all(map(_readable, (a, b, out))):
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
        return
    tile = _tile(*out.shape, torch.cuda.get_device_properties(out.device).multi_processor_count)
    by_quack(a, b.transpose(0, 1), out, tile, out if add else None)


def by_quack(
    a: Tensor, b: Tensor, out: Tensor, tile: Tile, added: Tensor | None = None, scale: float = 1.0, **bounds: Tensor | None
) -> None:
    """QuACK's own call, ``bounds`` of its groups included: b is [n, k], ``added`` joins ``scale`` times the product."""
    from quack.gemm import gemm

    rows, columns, pingpong, *pair = tile
    gemm(a, b, out, added, None, rows, columns, *pair, pingpong=pingpong, alpha=scale, **bounds)
