"""What changes after compilation: sizes, adapters, weights. No wrong answer, and no more graphs than Dynamo makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from harness import Rewriter, rewritten
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter


def results(model: nn.Module, compiled: Callable[..., Any], calls: list[dict[str, Any]]) -> list[tuple[Tensor, Tensor]]:
    """Eager and compiled outputs of each call."""
    with torch.no_grad():
        return [(model(**call)[0], compiled(**call)[0]) for call in calls]


def close(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.allclose(eager, fused, rtol=1e-4, atol=1e-5) for eager, fused in pairs)


def graphs_of_dynamo(model: nn.Module, calls: list[dict[str, Any]], **options: Any) -> int:
    """How many graphs Dynamo makes of these calls when nothing is rewritten."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, **options)
    with torch.no_grad():
        for call in calls:
            compiled(**call)
    return counter.frame_count


@pytest.mark.parametrize(("name", "dynamic"), [("GPTNeoX", None), ("Llama", True), ("Wan", None)])
def test_batch_and_length_change(name: str, dynamic: bool | None) -> None:
    calls = [models.inputs(name, batch=b, length=s) for b, s in ((2, 12), (2, 20), (3, 33))]
    model = models.build(name)
    expected = graphs_of_dynamo(model, calls, dynamic=dynamic)
    rewriter = Rewriter()
    pairs = results(model, rewritten(model, rewriter, dynamic=dynamic), calls)
    assert close(pairs)
    assert ("norm_qkv_rope_attention", "fused") in rewriter.statuses
    assert len(rewriter.graphs) <= expected


def test_resolution_changes() -> None:
    """More pixels at the same number of frames, and the other way round."""
    model = models.build("Wan")
    generator = torch.Generator().manual_seed(0)
    calls = [
        {**models.inputs("Wan"), "hidden_states": torch.randn(2, 4, frames, height, width, generator=generator)}
        for frames, height, width in ((2, 4, 4), (2, 8, 6), (4, 4, 4))
    ]
    expected = graphs_of_dynamo(model, calls)
    rewriter = Rewriter()
    assert close(results(model, rewritten(model, rewriter), calls))
    assert len(rewriter.graphs) <= expected


class LowRank(nn.Module):
    """A linear layer with a low-rank adapter that can be switched off, as adapter libraries write it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base, self.enabled = base, True
        self.down, self.up = nn.Linear(base.in_features, rank, False), nn.Linear(rank, base.out_features, False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + 2.0 * self.up(self.down(x)) if self.enabled else y


def adapted(name: str, layers: dict[str, str]) -> tuple[nn.Module, list[LowRank]]:
    model = models.build(name)
    adapters = []
    for parent in [m for m in model.modules() if any(hasattr(m, child) for child in layers)]:
        for child in layers:
            adapter = LowRank(getattr(parent, child))
            setattr(parent, child, adapter)
            adapters.append(adapter)
    return model, adapters


@pytest.mark.parametrize(
    ("name", "layers"),
    [("GPTNeoX", {"query_key_value": ""}), ("Llama", {"q_proj": "", "v_proj": ""}), ("Llama", {"k_proj": ""})],
)
def test_adapters_go_on_and_off(name: str, layers: dict[str, str]) -> None:
    model, adapters = adapted(name, layers)
    rewriter = Rewriter()
    compiled = rewritten(model, rewriter)
    call = models.inputs(name)
    seen = []
    for enabled in (True, False, True):
        for adapter in adapters:
            adapter.enabled = enabled
        ((eager, fused),) = results(model, compiled, [call])
        assert close([(eager, fused)])
        seen.append(fused)
    assert not torch.allclose(seen[0], seen[1], rtol=1e-3)
    assert torch.equal(seen[0], seen[2])
    assert len(rewriter.graphs) == 2  # with and without; the third call finds the first again


def test_a_merged_adapter_is_noticed() -> None:
    model, adapters = adapted("Llama", {"q_proj": "", "v_proj": ""})
    compiled = rewritten(model, Rewriter())
    call = models.inputs("Llama")
    ((before, _),) = results(model, compiled, [call])
    with torch.no_grad():
        for adapter in adapters:
            adapter.base.weight += 2.0 * adapter.up.weight @ adapter.down.weight
            adapter.enabled = False
    pairs = results(model, compiled, [call])
    assert close(pairs)
    assert torch.allclose(pairs[0][1], before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("name", ["GPTNeoX", "Qwen3"])
def test_a_state_dict_loaded_after_compiling_is_used(name: str, assign: bool) -> None:
    model = models.build(name)
    rewriter = Rewriter()
    compiled = rewritten(model, rewriter)
    call = models.inputs(name)
    ((before, _),) = results(model, compiled, [call])
    generator = torch.Generator().manual_seed(7)
    changed = {
        key: value + 0.1 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(changed, assign=assign)
    pairs = results(model, compiled, [call])
    assert close(pairs)
    assert not torch.allclose(pairs[0][1], before, rtol=1e-2)
    if not assign:
        assert len(rewriter.graphs) == 1


def test_weights_change_between_training_steps() -> None:
    model = models.build("Llama").train()
    compiled = rewritten(model, Rewriter(executor="aot_eager"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    call = models.inputs("Llama")
    losses = []
    for _ in range(3):
        loss = compiled(**call, labels=call["input_ids"])[0]
        eager = model(**call, labels=call["input_ids"])[0]
        assert torch.allclose(loss, eager, rtol=1e-5)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]
