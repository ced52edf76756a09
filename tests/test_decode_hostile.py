"""Decoding steps that look like those that are fused: what is written, where a number lies, whose tensors they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Rewriter, rewritten
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only


class Counted(nn.Module):
    """A decoding step whose counter nothing but the positions reads."""

    def forward(self, q: Tensor, k: Tensor, keys: Tensor, values: Tensor, length: Tensor, mask: Tensor) -> Tensor:
        positions = torch.arange(1, device=q.device) + length
        length.add_(1)
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, k)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


@pytest.mark.parametrize(("device", "counted"), [("cpu", True), ("meta", False)])
def test_a_counter_on_the_cpu_is_no_ops_to_read(device: str, counted: bool) -> None:
    """Positions of a GPU may be counted from a number on the CPU, whose address means nothing there."""
    rewriter = Rewriter()
    new, caches = torch.randn(1, 2, 1, 8, device=device), [torch.zeros(1, 2, 16, 8, device=device) for _ in range(2)]
    mask = torch.ones(1, 1, 1, 16, dtype=torch.bool, device=device)
    length = torch.tensor(3)
    rewritten(Counted(), rewriter)(new, new, *caches, length, mask)
    (call,) = (n for n in rewriter.graphs[0].graph.nodes if str(n.target) == "torch_fuse.decode_attention.default")
    assert (call.args[7] is not None, call.args[8] is None) == (counted, counted)
    assert length == 4


WRITES: dict[str, Any] = {
    "embedding": lambda w, ids, x: F.embedding(ids, w, max_norm=0.1),
    "embedding_bag": lambda w, ids, x: F.embedding_bag(ids[None], w, max_norm=0.1),
    "batch_norm": lambda w, ids, x: F.batch_norm(x[:, 0], w[0], w[1], training=True),
    "instance_norm": lambda w, ids, x: F.instance_norm(x.mT, w[0], w[1]),
    "no max_norm": lambda w, ids, x: F.embedding(ids, w),
    "not training": lambda w, ids, x: F.batch_norm(x[:, 0], w[0], w[1].abs()),
}


@pytest.mark.parametrize("name", WRITES)
def test_functions_that_write_without_saying_so_are_seen(name: str) -> None:
    """An embedding with `max_norm` scales the rows of a table that the lm_head may share; statistics are updated."""

    def model(x: Tensor, norm: Tensor, first: Tensor, tied: Tensor) -> tuple[Tensor, ...]:
        y = F.layer_norm(x, (16,), norm)
        ids = F.linear(y, first).flatten()[:2].abs().long() % 8
        return WRITES[name](tied, ids, x), F.linear(y, tied)

    torch.manual_seed(0)
    x, norm, first = torch.randn(2, 3, 16), torch.rand(16), torch.randn(8, 16)
    rewriter = Rewriter()
    given, same = torch.randn(8, 16), rewritten(model, rewriter)
    found, wanted = same(x, norm, first, given.clone()), model(x, norm, first, given.clone())
    torch.testing.assert_close(found, wanted)
    fused = ("decode_norm_linear", "fused") in rewriter.statuses
    assert fused == name.startswith("no"), rewriter.report


class Halved(Tensor):
    """A tensor that is stored at half of its value, and knows PyTorch's operators only, as a DTensor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)  # type: ignore[attr-defined]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], _meta: None, _size: Any, _stride: Any) -> Halved:
        return Halved(parts["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace == "aten"
        return func(*tree_map_only(Halved, lambda x: x.inner * 2, args), **(kwargs or {}))


SUBCLASSES: dict[str, tuple[Callable[..., Tensor], int]] = {
    "decode_norm_linear": (lambda x, w, norm: F.linear(F.layer_norm(x, (16,), norm), w), 1),
    "decode_norm_linear of a norm": (lambda x, w, norm: F.linear(F.layer_norm(x, (16,), norm), w), 2),
    "decode_linear_residual": (lambda x, w, norm: x + F.linear(x, w), 1),
}


@pytest.mark.parametrize("name", SUBCLASSES)
def test_a_tensor_subclass_does_its_own_products(name: str) -> None:
    """DTensor has a rule for each of PyTorch's operators, and none for ours: the whole graph would go unfused."""
    model, which = SUBCLASSES[name]
    given = [torch.randn(1, 1, 16), torch.randn(16, 16), torch.rand(16)]
    for plain in (True, False):
        if not plain:
            given[which] = Halved(given[which])
        rewriter = Rewriter()
        torch.testing.assert_close(rewritten(model, rewriter)(*given), model(*given))
        (site,) = (site for site in rewriter.report.sites if site.pattern == name.split(" ")[0])
        assert site.status == ("fused" if plain else "kept"), site.reason
        assert plain or "tensor subclass" in site.reason
