"""A consistency model compiled by `torch.compile(model, backend="fuse")`: what its boundary conditions promise.

out = c_skip(t) * x + c_out(t) * Attn(x), in each layer, through Inductor on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

import torch_fuse

OPTIONS = {"unmeasured": True, "kernels": "reference", "on_error": "raise"}
WIDTH, HEADS = 16, 2
Combine = Callable[["Layer", Tensor, Tensor, Tensor], Tensor]


def edm(t: Tensor, sigma: float = 0.5) -> tuple[Tensor, Tensor]:
    """c_skip = s^2 / (t^2 + s^2) and c_out = s * t / sqrt(s^2 + t^2), for each sample; s is `sigma_data`."""
    c_skip, c_out = sigma**2 / (t**2 + sigma**2), sigma * t / (sigma**2 + t**2).sqrt()
    return c_skip[:, None, None], c_out[:, None, None]


def trigflow(t: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cos(t) + torch.sin(t)
    return (1 / both)[:, None, None], (-torch.sin(t) / both)[:, None, None]


def scaled(layer: Layer, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    c_skip, c_out = edm(t, layer.sigma)
    return c_skip * x + c_out * y


def scaled_by_trigflow(layer: Layer, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    c_skip, c_out = trigflow(t)
    return (c_skip * x + c_out * y).type_as(x)


def interpolated(layer: Layer, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return torch.lerp(x, y, edm(t)[1].type_as(x))


def added_in_one_call(layer: Layer, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return torch.addcmul(x, y, edm(t)[1].type_as(x))


def dropped_at_rate_0(layer: Layer, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return (x.float() + F.dropout(y, 0.0).float() * edm(t)[1]).type_as(x)


def of_each_token(layer: Layer, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return x + torch.sigmoid(layer.gate(x)) * y


def of_each_channel(layer: Layer, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return x + y * layer.scale


SPELLINGS: list[Combine] = [
    scaled, scaled_by_trigflow, interpolated, added_in_one_call, dropped_at_rate_0, of_each_token, of_each_channel,
]  # fmt: skip


class Layer(nn.Module):
    """Attention and its projection, combined with what went in."""

    def __init__(self, combine: Combine, sigma: float = 0.5) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate, self.scale = nn.Linear(WIDTH, 1), nn.Parameter(torch.randn(WIDTH))
        self.combine, self.sigma = combine, sigma

    def attend(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).reshape(x.shape))

    def forward(self, x: Tensor, t: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.combine(self, x, self.attend(x, keep), t)


class Network(nn.Module):
    """A layer of each spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(combine) for combine in SPELLINGS)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, t)
        return x


def fused(model: nn.Module, sites: int, *inputs: Tensor) -> Callable[..., Tensor]:
    """The model compiled with `inputs`, after its first call has shown that all combinations were replaced."""
    torch._dynamo.reset()
    torch_fuse.reset_reports()
    compiled = torch.compile(model, backend="fuse", options=OPTIONS, dynamic=False)
    compiled(*inputs)
    found = [site.status for site in torch_fuse.reports().sites if site.pattern == "attention_skip"]
    assert found == ["fused"] * sites, str(torch_fuse.reports())
    return compiled


Compiled = tuple[Layer, Callable[..., Tensor]]


@pytest.fixture(scope="module")
def layer() -> Compiled:
    """An EDM layer with sigma_data = 1, as it is and compiled with a mask."""
    torch.manual_seed(0)
    model = Layer(scaled, sigma=1.0)
    with torch.no_grad():
        return model, fused(model, 1, torch.randn(4, 6, WIDTH), torch.rand(4), torch.ones(6, 6, dtype=torch.bool))


def test_each_sample_has_its_own_time_and_at_zero_the_result_is_x_bit_for_bit(layer: Compiled) -> None:
    model, compiled = layer
    x, keep = torch.randn(4, 6, WIDTH), torch.ones(6, 6, dtype=torch.bool)
    with torch.no_grad():
        out = compiled(x, torch.tensor([0.0, 1e7, 0.7, 0.0]), keep)
        attended, plain = model.attend(x, keep), model(x, torch.tensor([0.0, 1e7, 0.7, 0.0]), keep)
    assert torch.equal(out[0], x[0]) and torch.equal(out[3], x[3])
    torch.testing.assert_close(out[1], attended[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[2], plain[2], rtol=1e-5, atol=1e-5)
    assert (out[2] - attended[2]).abs().max() > 0.1 and (out[2] - x[2]).abs().max() > 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinities_come_out_where_the_unfused_layer_has_them(value: float, layer: Compiled) -> None:
    model, compiled = layer
    x, t, keep = torch.randn(4, 6, WIDTH), torch.tensor([0.0, 0.5, 1e7, 1.0]), torch.ones(6, 6, dtype=torch.bool)
    x[0, 1, 2] = x[1, 3, 4] = value
    with torch.no_grad():
        out, wanted = compiled(x, t, keep), model(x, t, keep)
    assert bool(wanted.isnan().any()) and torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.isinf(), wanted.isinf())
    torch.testing.assert_close(out, wanted, equal_nan=True)


def test_a_fully_masked_row_is_what_the_unfused_layer_makes_of_it(layer: Compiled) -> None:
    model, compiled = layer
    x, t, keep = torch.randn(4, 6, WIDTH), torch.tensor([0.0, 0.5, 1e7, 1.0]), torch.ones(6, 6, dtype=torch.bool)
    keep[2] = False
    with torch.no_grad():
        out, wanted = compiled(x, t, keep), model(x, t, keep)
    assert torch.equal(out.isnan(), wanted.isnan())
    torch.testing.assert_close(out, wanted, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_gradients_of_x_the_weights_and_the_time_are_those_of_the_unfused_layer_through_inductor() -> None:
    torch.manual_seed(0)
    check_training(Layer(scaled_by_trigflow), sites=1)


def test_every_spelling_is_fused_and_forward_and_gradients_are_those_of_the_unfused_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The backend hands its graph to what Inductor is in: Inductor itself takes seconds a layer."""
    monkeypatch.setattr("torch_fuse.backend.compile_with_inductor", lambda gm, inputs, patches: aot_eager(gm, inputs))
    torch.manual_seed(0)
    check_training(Network(), sites=len(SPELLINGS))


def check_training(model: nn.Module, sites: int) -> None:
    """In fp32, forward within 1e-5 and gradients of x, t and the weights within 1e-4."""
    x, t = torch.randn(3, 6, WIDTH, requires_grad=True), torch.tensor([0.1, 0.6, 1.4], requires_grad=True)
    compiled, seed = fused(model, sites, x, t), torch.randn(x.shape)
    leaves = {"x": x, "t": t, **dict(model.named_parameters())}
    found = []
    for call in (compiled, model):
        out = call(x, t)
        found.append([out, *torch.autograd.grad(out, list(leaves.values()), seed, allow_unused=True)])
    for name, mine, plain in zip(["output", *leaves], *found, strict=True):
        assert (mine is None) == (plain is None), name
        if mine is not None:  # a gate may be another spelling's
            tolerance = 1e-5 if name == "output" else 1e-4
            torch.testing.assert_close(mine, plain, rtol=tolerance, atol=tolerance, msg=f"{name} differs")
