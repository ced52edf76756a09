"""The shapes of bench_masked_attention, and attention with their masks as transformers writes it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Case(NamedTuple):
    """One shape; `left` and `right` are the op's."""

    batch: int
    length: int
    heads: int
    kv: int
    dim: int
    left: int | None
    right: int | None
    padded: bool = False
    softcap: float = 0.0
    sinks: bool = False

    @property
    def written(self) -> bool:
        """Whether SDPA cannot compute it."""
        return bool(self.softcap or self.sinks)


CASES = {
    "causal_padded_64": Case(4, 2048, 32, 32, 64, None, 0, True),
    "causal_padded_80": Case(4, 2048, 32, 32, 80, None, 0, True),
    "causal_padded_128": Case(4, 2048, 32, 32, 128, None, 0, True),
    "window_1024": Case(1, 8192, 32, 8, 128, 1023, 0),
    "bert_padded": Case(32, 512, 12, 12, 64, None, None, True),
    "causal_padded_256": Case(2, 2048, 16, 8, 256, None, 0, True),
    "gemma2_2b": Case(1, 4096, 8, 4, 256, 4095, 0, softcap=50.0),
    "gemma2_2b_8k_window": Case(1, 8192, 8, 4, 256, 4095, 0, softcap=50.0),
    "gemma2_short": Case(4, 256, 8, 4, 256, None, 0, softcap=50.0),
    "gpt_oss_window": Case(1, 4096, 64, 8, 64, 127, 0, sinks=True),
    "gpt_oss_full": Case(1, 4096, 64, 8, 64, None, 0, sinks=True),
    "gpt_oss_short": Case(4, 256, 64, 8, 64, 127, 0, sinks=True),
}
Data = tuple[list[Tensor], Tensor | None, Tensor]  # q, k, v and maybe sinks; which tokens are there; a gradient


def make(case: Case, device: str) -> Data:
    options: Any = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float16}
    shapes = [(n, case.length) for n in (case.heads, case.kv, case.kv)]
    tensors = [torch.randn(case.batch, s, h, case.dim, **options).transpose(1, 2).requires_grad_() for h, s in shapes]
    if case.sinks:
        tensors.append(torch.randn(case.heads, **options).requires_grad_())
    grad = torch.randn(case.batch, case.length, case.heads, case.dim, **options).transpose(1, 2)
    if case.sinks:
        grad[1:] = 0.0  # the exact gradient of the sinks is the first batch's
    if not case.padded:
        return tensors, None, grad
    lengths = torch.randint(
        case.length // 2, case.length + 1, (case.batch, 1), generator=torch.Generator().manual_seed(0)
    )
    return tensors, (torch.arange(case.length) < lengths).long().to(device), grad


def dense(q: Tensor, tokens: Tensor | None, left: int | None, right: int | None) -> Tensor:
    """The mask as transformers builds it."""
    i = torch.arange(q.shape[2], device=q.device)[None, None, :, None]
    j = torch.arange(q.shape[2], device=q.device)[None, None, None, :]
    keep = i >= 0
    if left is not None:
        keep = keep & (j > i - left - 1)
    if right is not None:
        keep = keep & (j <= i + right)
    if tokens is not None:
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
        keep = keep & tokens.to(torch.bool)[batch, j]
    return keep.expand(q.shape[0], -1, q.shape[2], q.shape[2])


def written(case: Case, **options: Any) -> Callable[..., Tensor]:
    """As transformers' Gemma 2 and gpt-oss write it."""
    cap = case.softcap

    def attend(tensors: list[Tensor], tokens: Tensor | None) -> Tensor:
        return weighed(tensors, tokens).transpose(1, 2).contiguous().transpose(1, 2)

    def weighed(tensors: list[Tensor], tokens: Tensor | None) -> Tensor:
        q, k, v, *sinks = tensors
        k, v = (repeated(x, q.shape[1] // k.shape[1]) for x in (k, v))
        keep = dense(q, tokens, case.left, case.right)
        mask = torch.where(keep, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
        if q.dtype == torch.float16:  # only dry: its minimum is no proof that a key is excluded
            mask = torch.where(keep, 0.0, -math.inf).to(q.dtype)
        scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[3] ** -0.5
        if cap:
            scores = torch.tanh(scores / cap) * cap
        scores = scores + mask
        if not sinks:
            return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
        column = sinks[0].reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
        scores = torch.cat([scores, column], dim=-1)
        scores = scores - scores.max(dim=-1, keepdim=True).values
        return F.softmax(scores, dim=-1, dtype=scores.dtype)[..., :-1] @ v

    return torch.compile(attend, dynamic=False, **options)


def repeated(x: Tensor, times: int) -> Tensor:
    """Key or value heads, each as often as it serves."""
    batch, heads, length, dim = x.shape
    return x[:, :, None].expand(batch, heads, times, length, dim).reshape(batch, heads * times, length, dim)
