"""Which format of `packed_weight` a closure computes: candidates from shapes and types, proven on random weights.

The closure and the candidate's decoder run on random codes, scales and zero points, also on NaN, infinities and
subnormals; what agrees bit for bit for all of them is taken. So the proof does not rest on the weights that the model
happens to have, and holds for those that it is given later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from torch_fuse._compat import unset_fake_temporarily
from torch_fuse.graph.closure import Closure
from torch_fuse.graph.miss import Miss
from torch_fuse.graph.values import tensor
from torch_fuse.kernels.packed_weight import Format, decode, unpacked
from torch_fuse.patterns._packed_parts import Part, Reading, candidates, codes_of

_DRAWS = 4

_known: dict[tuple[Any, ...], Reading | str] = {}


def read(closure: Closure, shape: tuple[int, int], transposed: bool, output: tuple[int, str] | None = None) -> Reading:
    """What a closure computes.

    Args:
        closure: the closure.
        shape: (N, K) of the weight.
        transposed: it computes [K, N].
        output: (rows, compute) of a scale that the product is multiplied by.

    Raises:
        Miss: when no format agrees with it.
    """
    key = (*closure.key(), shape, transposed, output, torch.get_default_dtype())  # the last: of `int8 * 1.0`
    if key not in _known:
        if len(_known) >= 512:
            _known.clear()
        with unset_fake_temporarily(), torch.no_grad():
            try:
                _known[key] = _search(closure, shape, transposed, output)
            except Miss as miss:
                _known[key] = miss.reason
    found = _known[key]
    if isinstance(found, str):
        raise Miss(found, closure.root)
    return found


def _search(closure: Closure, shape: tuple[int, int], transposed: bool, output: tuple[int, str] | None) -> Reading:
    def drawn(draw: int) -> tuple[list[Tensor], Tensor]:
        leaves = [_random(leaf, draw, i) for i, leaf in enumerate(closure.leaves)]
        return leaves, _run(closure, leaves, transposed)

    leaves, weight = drawn(0)
    ones = [leaves[0], *(torch.ones_like(leaf) for leaf in leaves[1:])]
    plain = _run(closure, ones, transposed)
    codes = list(codes_of(closure, shape))
    if closure.others:  # else a number in the graph scales them, and the cheap test does not hold
        codes = [found for found in codes if _could_be(found, leaves[0], plain)]
    for reading in candidates(closure, shape, codes, output):
        if _agree(reading, leaves, weight) and all(_agree(reading, *drawn(draw)) for draw in range(1, _DRAWS)):
            return reading
    read = ", ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in leaves)
    raise Miss(f"no known format computes this weight {list(shape)} from {read}")


def _run(closure: Closure, leaves: list[Tensor], transposed: bool) -> Tensor:
    weight, like = closure.run(leaves), tensor(closure.root)
    if like is None or weight.dtype != like.dtype or weight.shape != like.shape:
        raise Miss(f"{closure.root.name} is {weight.dtype}{list(weight.shape)} when it is computed by itself")
    return weight.t() if transposed else weight


def _could_be(found: tuple[Part, int, str, str], leaf: Tensor, weight: Tensor) -> bool:
    """Whether a weight whose scales and zero points are 1 has the steps of these codes: a cheap test."""
    part, bits, kind, nibbles = found
    if kind not in ("int", "uint"):
        return True
    try:
        codes = unpacked(part.of([leaf]), Format(bits, kind, nibbles=nibbles)).float()
    except (ValueError, RuntimeError, IndexError):
        return False
    seen = weight.float()
    return codes.shape == seen.shape and bool((codes - codes[:1, :1] == seen - seen[:1, :1]).all())


def _agree(reading: Reading, leaves: list[Tensor], weight: Tensor) -> bool:
    """Whether a candidate's decoder gives the very bits that the closure gives."""
    try:
        found = decode(*reading.parts(leaves), reading.form, weight.dtype)
    except (ValueError, RuntimeError, IndexError):  # the leaf cannot be viewed like this
        return False
    return found.shape == weight.shape and same_bits(found, weight)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape are equal, signs of zeros included; one NaN is as good as another."""
    if a.dtype != b.dtype:
        return False
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    same = a.contiguous().view(bits) == b.contiguous().view(bits)
    return bool((same | (a.isnan() & b.isnan())).all())


def _random(leaf: Node, draw: int, place: int) -> Tensor:
    """Another tensor like leaf number `place`, unlike other leaves of its shape: codes of all values; ordinary scales
    first, all bit patterns in the last draw.

    Integers that are no codes are zero points, which a byte holds, whatever their type.
    """
    like = tensor(leaf)
    assert like is not None
    size = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True))
    where: dict[str, Any] = {
        "generator": torch.Generator(like.device).manual_seed(64 * draw + place),
        "device": like.device,
    }
    if place == 0 or like.dtype.itemsize == 1 or (draw == _DRAWS - 1 and like.dtype.is_floating_point):
        flat = torch.randint(0, 256, (size * like.dtype.itemsize,), dtype=torch.uint8, **where).view(like.dtype)
    elif like.dtype.is_floating_point:
        flat = (torch.randn(size, **where) * (0.1 if draw == 0 else 20.0)).to(like.dtype)
    else:
        flat = torch.randint(-128, 256, (size,), **where).to(like.dtype)
    return torch.as_strided(flat, like.shape, like.stride())
