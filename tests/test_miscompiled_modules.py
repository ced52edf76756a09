"""Modules whose weights, parts or shapes change after they are compiled; see test_miscompiles."""

from __future__ import annotations

import copy

import torch
from harness import Rewriter, compare, rewritten
from rotated_attention import PATTERN, B, D, H, S, agrees, attend, heads_first, plain, qkv, rope, rotate_half, tables
from torch import Tensor, nn

# -- modules over time -----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(H * D, H * D, bias=False) for _ in range(3))
        self.norm = nn.RMSNorm(D, eps=1e-5)
        cos, sin = tables()
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (projection(x).view(*x.shape[:2], H, D) for projection in (self.q, self.k, self.v))
        return plain(self.norm(q), self.norm(k), v, self.cos, self.sin)


def _module() -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    return Attention(), torch.randn(B, S, H * D)


def test_tied_weights_sum_their_gradients() -> None:
    module, x = _module()
    module.k.weight = module.q.weight
    result = compare(module, (x,), executor="aot_eager")
    assert result.fused(PATTERN) == 1, result.reasons
    assert not result.problems


def test_weights_loaded_after_compilation_are_used() -> None:
    module, x = _module()
    other = Attention()
    with torch.no_grad():
        other.cos.mul_(0.5)
        other.norm.weight.mul_(3.0)
    rewriter = Rewriter(executor="aot_eager")
    compiled = rewritten(module, rewriter)
    compiled(x)
    module.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(x), other(x))
    assert len(rewriter.report.graphs) == 1
    assert (PATTERN, "fused") in rewriter.statuses


class LowRank(nn.Module):
    """LoRA: a linear layer plus a product of two thin ones."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(H * D, 2, bias=False), nn.Linear(2, H * D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


def test_an_adapter_put_in_after_compilation_is_used() -> None:
    module, x = _module()
    rewriter = Rewriter(executor="aot_eager")
    compiled = rewritten(module, rewriter)
    compiled(x)
    module.q = LowRank(module.q)
    torch.testing.assert_close(compiled(x), module(x))
    assert [site.status for site in rewriter.report.sites if site.pattern == PATTERN] == ["fused", "fused"]


def test_a_graph_break_leaves_two_graphs_that_agree() -> None:
    def model(q, k, v, cos, sin):
        first = plain(q, k, v, cos, sin)
        torch._dynamo.graph_break()
        return first + plain(2 * q, k, v, cos, sin)

    result = agrees(model)
    assert len(result.report.graphs) == 2
    assert result.fused(PATTERN) == 2


def test_a_graph_break_inside_a_rotation_agrees() -> None:
    def model(q, k, v, cos, sin):
        first = heads_first(q) * cos
        torch._dynamo.graph_break()
        query = first + rotate_half(heads_first(q)) * sin
        return attend(query, rope(heads_first(k), cos, sin), heads_first(v))

    agrees(model)


def test_one_dynamic_graph_serves_all_shapes() -> None:
    def model(q, k, v, cos, sin):
        q, k, v = (x.view(*x.shape[:2], H, D) for x in (q, k, v))
        return plain(q, k, v, cos, sin)

    rewriter = Rewriter()
    compiled = rewritten(model, rewriter, dynamic=True)
    for batch, length in ((3, 5), (4, 9), (6, 7)):  # none is equal to another size
        args = (*(x.detach().flatten(2) for x in qkv(batch=batch, length=length)), *tables(length))
        torch.testing.assert_close(compiled(*args), model(*args))
    assert len(rewriter.report.graphs) == 1
    assert (PATTERN, "fused") in rewriter.statuses, str(rewriter.report)


def test_a_length_of_one_after_others_agrees() -> None:
    compiled = rewritten(plain, Rewriter())
    for length in (5, 1, 7):
        args = (*qkv(length=length), *tables(length))
        torch.testing.assert_close(compiled(*args), plain(*args))


def test_a_deep_copy_of_a_compiled_module_is_independent() -> None:
    module, x = _module()
    compiled = rewritten(module, Rewriter())
    before = compiled(x)
    clone = copy.deepcopy(module)
    with torch.no_grad():
        clone.q.weight.zero_()
    torch.testing.assert_close(compiled(x), before)
