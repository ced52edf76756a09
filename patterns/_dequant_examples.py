"""Ways to write a linear layer with a quantised weight, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_fuse.rewrite.pattern import Example

N, K, G = 16, 32, 8


class Quantised(nn.Module):
    """`forward(module, x)` on buffers q, s, z."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **buffers: Tensor) -> None:
        super().__init__()
        self.run = forward
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def make(
    forward: Callable[[Any, Tensor], Any], buffers: Callable[[torch.dtype], dict[str, Tensor]]
) -> Callable[[torch.dtype], tuple[Callable[..., Any], tuple[Any, ...]]]:
    """An example of a forward function on a quantised weight."""

    def build(dtype: torch.dtype) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Quantised(forward, **buffers(dtype)), (torch.randn(2, 3, K).to(dtype).requires_grad_(),)

    return build


def int8(*scale: int, of: tuple[int, ...] = (N, K), zero: bool = False) -> Callable[[torch.dtype], dict[str, Tensor]]:
    """int8 codes with scales of a shape and, maybe, zero points."""

    def buffers(dtype: torch.dtype) -> dict[str, Tensor]:
        found = {"q": torch.randint(-128, 128, of).to(torch.int8), "s": torch.rand(scale).to(dtype) / 64}
        if zero:
            found["z"] = torch.randint(-8, 8, scale).to(torch.int8)
        return found

    return buffers


def int4(*of: int, groups: int = K // G) -> Callable[[torch.dtype], dict[str, Tensor]]:
    """Two codes a byte, with scales and floating-point zero points of groups."""

    def buffers(dtype: torch.dtype) -> dict[str, Tensor]:
        q = torch.randint(0, 256, of).to(torch.uint8)
        return {"q": q, "s": torch.rand(N, groups).to(dtype) / 16, "z": (torch.rand(N, groups) * 15).to(dtype)}

    return buffers


def fp8(dtype8: torch.dtype, *scale: int) -> Callable[[torch.dtype], dict[str, Tensor]]:
    """8-bit floats with scales of a shape."""

    def buffers(dtype: torch.dtype) -> dict[str, Tensor]:
        return {"q": torch.randn(N, K).to(dtype8), "s": torch.rand(scale) + 0.5}

    return buffers


def grouped_int4(m: Any, x: Tensor) -> Tensor:
    q = torch.stack([m.q & 0xF, m.q >> 4], -1).reshape(N, K // G, G)
    w = (q.to(x.dtype) - m.z.unsqueeze(-1)) * m.s.unsqueeze(-1)
    return F.linear(x, w.reshape(N, K))


def high_nibble_first(m: Any, x: Tensor) -> Tensor:
    q = torch.stack(((m.q >> 4).to(torch.int8) - 8, (m.q & 15).to(torch.int8) - 8), dim=-1).view(N, K)
    return F.linear(x, (q.to(x.dtype) * m.s.repeat_interleave(G, dim=1)))


def halves_of_rows(m: Any, x: Tensor) -> Tensor:
    rows = m.q.shape[0]
    w = torch.empty((2 * rows, m.q.shape[1]), dtype=x.dtype, device=m.q.device)
    w[:rows] = (m.q & 0b11110000) >> 4
    w[rows:] = m.q & 0b00001111
    w = (w - m.z.reshape(-1, 1)) * m.s.reshape(-1, 1)
    return torch.matmul(x, w.reshape(N, K).t())


def blocks(m: Any, x: Tensor) -> Tensor:
    s = m.s.repeat_interleave(8, 0).repeat_interleave(16, 1)
    return F.linear(x, (m.q.to(torch.float32) * s).to(x.dtype))


def gptq(dtype: torch.dtype) -> dict[str, Tensor]:
    """Eight codes an int32 along K."""
    q = torch.randint(-(2**31), 2**31, (K // 8, N)).to(torch.int32)
    return {"q": q, "s": torch.rand(K // G, N).to(dtype) / 16, "shifts": torch.arange(0, 32, 4).to(torch.int32)}


def gptq_forward(m: Any, x: Tensor) -> Tensor:
    q = torch.bitwise_right_shift(m.q.unsqueeze(1).expand(-1, 8, -1), m.shifts.view(1, 8, 1)) & 0xF
    w = m.s.unsqueeze(1) * (q.reshape(K // G, G, N) - 8)
    return x @ w.reshape(K, N)


def nf4(m: Any, x: Tensor) -> Tensor:
    q = torch.stack((m.q >> 4, m.q & 0xF), dim=-1).flatten().to(torch.int32)
    w = m.table[q].view(-1, G) * m.s.view(-1, 1)
    return F.linear(x, w.view(N, K).to(x.dtype))


def q8_0(dtype: torch.dtype) -> dict[str, Tensor]:
    """Blocks of a half-precision scale and 32 codes, as bytes."""
    d, q = (torch.rand(N, 1) / 64).half(), torch.randint(-128, 128, (N, 32)).to(torch.int8)
    return {"q": torch.cat([d.view(torch.uint8), q.view(torch.uint8)], 1)}


def q8_0_forward(m: Any, x: Tensor) -> Tensor:
    d, q = torch.split(m.q.view(torch.uint8).reshape(-1, 34), [2, 32], dim=1)
    w = d.view(torch.float16) * q.view(torch.int8)
    return F.linear(x, w.reshape(N, K).to(x.dtype))


def q4_0(dtype: torch.dtype) -> dict[str, Tensor]:
    """Blocks of a half-precision scale and 16 bytes of codes."""
    d = (torch.rand(N, 1) / 64).half()
    return {"q": torch.cat([d.view(torch.uint8), torch.randint(0, 256, (N, 16)).to(torch.uint8)], 1)}


def q4_0_forward(m: Any, x: Tensor) -> Tensor:
    d, q = torch.split(m.q.reshape(-1, 18), [2, 16], dim=1)
    shifts = torch.tensor([0, 4], dtype=torch.uint8, device=q.device).reshape(1, 1, 2, 1)
    q = ((q.reshape(N, -1, 1, 16) >> shifts) & 0x0F).reshape(N, -1).to(torch.int8) - 8
    return F.linear(x, (d.view(torch.float16) * q).reshape(N, K).to(x.dtype))


_ROW = int8(N, 1)
_SPELLINGS: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[torch.dtype], dict[str, Tensor]]]] = {
    "row": (lambda m, x: F.linear(x, m.q.to(x.dtype) * m.s), _ROW),
    "row in float": (lambda m, x: F.linear(x, (m.q.float() * m.s.float()).to(x.dtype)), _ROW),
    "row as addmm": (
        lambda m, x: torch.addmm(m.b, x.flatten(0, 1), (m.s * m.q).to(x.dtype).T),
        lambda dtype: {**_ROW(dtype), "b": torch.randn(N).to(dtype)},
    ),
    "columns": (lambda m, x: x @ (m.q.to(x.dtype) * m.s), int8(N, of=(K, N))),
    "tensor": (lambda m, x: F.linear(x, m.q.to(x.dtype) * m.s), int8()),
    "output": (lambda m, x: F.linear(x, m.q.to(x.dtype)) * m.s, int8(N)),
    "output in float": (lambda m, x: (x @ m.q.t().to(x.dtype) * m.s.float()).to(x.dtype), int8(1, N)),
    "output of one scale": (lambda m, x: m.s * F.linear(x, m.q.to(x.dtype)), int8()),
    "no scale": (lambda m, x: F.linear(x, m.q.to(x.dtype)) / 64, fp8(torch.float8_e4m3fn)),
    "a number": (lambda m, x: F.linear(x, m.q.to(x.dtype) * 0.0173), _ROW),
    "zero points": (lambda m, x: F.linear(x, (m.q.to(x.dtype) - m.z) * m.s), int8(N, 1, zero=True)),
    "groups": (
        lambda m, x: F.linear(
            x, ((m.q.view(N, -1, G).float() - m.z[:, :, None]) * m.s[:, :, None].float()).view(N, K).to(x.dtype)
        ),
        int8(N, K // G, zero=True),
    ),
    "int4": (grouped_int4, int4(N, K // 2)),
    "int4 high first": (high_nibble_first, int4(N, K // 2)),
    "int4 halves": (halves_of_rows, int4(N * K // G // 2, G)),
    "int4 in int32": (gptq_forward, gptq),
    "fp8 tensor": (lambda m, x: F.linear(x, (m.q.float() * m.s).to(x.dtype)), fp8(torch.float8_e4m3fn)),
    "fp8 row": (lambda m, x: F.linear(x, (m.q.float() * m.s).to(x.dtype)), fp8(torch.float8_e5m2, N, 1)),
    "fp8 blocks": (blocks, fp8(torch.float8_e4m3fn, 2, 2)),
    "table": (
        nf4,
        lambda dtype: {
            "q": torch.randint(0, 256, (N * K // 2,)).to(torch.uint8),
            "s": torch.rand(N * K // G),
            "table": torch.randn(16),
        },
    ),
    "Q8_0": (q8_0_forward, q8_0),
    "Q4_0": (q4_0_forward, q4_0),
}


def spellings() -> Iterator[Example]:
    """Everything that must be recognised."""
    for name, (forward, buffers) in _SPELLINGS.items():
        yield Example(name, make(forward, buffers))


def _two(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    w = m.q.to(x.dtype) * m.s
    return F.linear(x, w), F.linear(2 * x, w)


def _escaping(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    w = m.q.to(x.dtype) * m.s
    return F.linear(x, w), w


def _updated(m: Any, x: Tensor) -> Tensor:
    w = m.q.to(x.dtype) * m.s
    out = F.linear(x.detach(), w)
    w.mul_(2)
    return out * F.linear(x, m.q.to(x.dtype))


_NEAR_MISSES: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[torch.dtype], dict[str, Tensor]]]] = {
    "scale of columns": (lambda m, x: F.linear(x, m.q.to(x.dtype) * m.s), int8(K)),
    "divided by a number": (lambda m, x: F.linear(x, m.q.to(x.dtype) / 127.0), _ROW),
    "output of rows": (lambda m, x: F.linear(x[0], m.q.to(x.dtype)) * m.s[:3], _ROW),
    "scale and clamp": (lambda m, x: F.linear(x, (m.q.to(x.dtype) * m.s).clamp(-1, 1)), _ROW),
    "two readers": (_two, _ROW),
    "weight returned": (_escaping, _ROW),
    "written in place": (_updated, _ROW),
    "codes computed": (lambda m, x: F.linear(x, (m.q ^ 1).to(x.dtype) * m.s), _ROW),
    "wraps around": (lambda m, x: F.linear(x, (m.q - m.z).to(x.dtype) * m.s), int8(N, 1, zero=True)),
}


def near_misses() -> Iterator[Example]:
    """What must not be recognised, or changes nothing."""
    for name, (forward, buffers) in _NEAR_MISSES.items():
        yield Example(name, make(forward, buffers), fuses=False)
    yield Example("scale that learns", _learning, fuses=False)


def _learning(dtype: torch.dtype) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    module, inputs = make(_SPELLINGS["row"][0], _ROW)(dtype)
    assert isinstance(module, nn.Module)
    scale = module.s
    del module.s
    module.register_parameter("s", nn.Parameter(scale))  # type: ignore[arg-type]
    return module, inputs
