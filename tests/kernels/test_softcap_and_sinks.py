"""Soft caps and sinks of masked_attention against float64, forward and backward; see test_masked_attention."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_interpreter import passes_in_interpreter
from test_masked_attention import DEVICE, DTYPES, KEEPS, inputs, keeps, poisoned  # noqa: F401
from torch import Tensor

from torch_fuse.kernels import _ops

module = importlib.import_module("torch_fuse.kernels.masked_attention")
op = module.masked_attention
Features = dict[str, Any]


def written(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, left: int | None, right: int | None, scale: float,
    softcap: float, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """As models write it, in the dtype of its inputs, but with zeros where there is neither key nor sink."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    mask = module.dense_mask(q, k, keep, left, right)
    scores = q @ k.mT * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -math.inf)
    if sinks is None:
        weights = scores.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    else:
        column = sinks.to(q.dtype).reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return weights @ v


def sinks_of(heads: int, dtype: torch.dtype = torch.float32, at: float = 0.0) -> Tensor:
    made = torch.randn(heads, generator=torch.Generator().manual_seed(3)) + at
    return made.to(DEVICE, dtype).requires_grad_()


def assert_no_worse(
    tensors: list[Tensor], keep: Tensor | None, left: int | None, right: int | None, *, softcap: float = 0.0,
    sinks: Tensor | None = None, scale: float | None = None,
) -> None:  # fmt: skip
    """Result and gradients are at most twice as far from float64 as the written-out attention's in their dtype."""
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    leaves = [*tensors, *([] if sinks is None else [sinks])]
    wide = [x.detach().double().requires_grad_() for x in leaves]

    def run(attend: Any, xs: list[Tensor]) -> list[Tensor]:
        out = attend(*xs[:3], xs[3] if len(xs) > 3 else None)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).half().to(DEVICE, out.dtype)
        return [out.detach(), *torch.autograd.grad(out, xs, grad)]

    def ours(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None) -> Tensor:
        ranges = None if keep is None else module.key_range(keep)
        return op(q, k, v, keep, ranges, left, right, scale, softcap, s)[0]

    def theirs(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None) -> Tensor:
        return written(q, k, v, keep, left, right, scale, softcap, s)

    names = ("out", "dq", "dk", "dv", "dsinks")
    for name, a, b, true in zip(names, run(ours, leaves), run(theirs, leaves), run(theirs, wide), strict=False):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.isfinite().all(), name
        for size in (lambda x: x.abs().max(), lambda x: x.pow(2).mean().sqrt()):
            error, floor = size(a.double() - true), size(b.double() - true)
            atol = torch.finfo(tensors[0].dtype).eps * max(float(size(true)), 1e-3)
            assert error <= 2 * floor + atol, f"{name}: {error:.3g}, not {floor:.3g}"


FEATURES: dict[str, Features] = {
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": sinks_of(2)},
    "both": {"softcap": 1.5, "sinks": sinks_of(2, torch.float16)},
}


# The interpreter takes a second for each.
PADDINGS = ["left", "holes", "nothing"] if _ops.INTERPRETED else ["none", "right", "left", "holes", "nothing"]
BANDS = [(None, 0), (20, 0)] if _ops.INTERPRETED else [(None, None), (None, 0), (20, 0)]


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("keep", PADDINGS)
@pytest.mark.parametrize(("left", "right"), BANDS)
def test_every_padding_with_every_band(left: int | None, right: int | None, keep: str, features: Features) -> None:
    assert_no_worse(inputs(length=70, heads=2, kv=1, dim=32), keeps(keep, 2, 70), left, right, **features)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [48, 64, 256])
def test_head_dims_in_one_and_two_parts(dim: int, dtype: torch.dtype) -> None:
    tensors = inputs(batch=1, length=66, dim=dim, kv=1, dtype=dtype)
    assert_no_worse(tensors, None, None, 0, softcap=1.0, sinks=sinks_of(2, dtype))


@settings(max_examples=6 if _ops.INTERPRETED else 40)
@given(
    st.integers(1, 140), st.integers(64, 140), st.sampled_from([(1, 1), (2, 1), (6, 2)]), st.sampled_from(KEEPS),
    st.none() | st.integers(-70, 150), st.none() | st.integers(-70, 150), st.sampled_from([0.0, 0.5, 50.0]),
    st.booleans(),
)  # fmt: skip
def test_any_shape_band_and_padding(
    length: int, keys: int, heads: tuple[int, int], keep: str, left: int | None, right: int | None, cap: float,
    with_sinks: bool,
) -> None:  # fmt: skip
    tensors = inputs(heads=heads[0], kv=heads[1], length=length, keys=keys, dim=32)
    sinks = sinks_of(heads[0]) if with_sinks else None
    assert_no_worse(tensors, keeps(keep, 2, keys), left, right, softcap=cap, sinks=sinks)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4], ids=["straight", "curved", "saturated"])
def test_caps_where_tanh_is_straight_and_where_it_saturates(scale: float) -> None:
    assert_no_worse(inputs(length=66, dim=32, kv=1), None, None, 0, softcap=4.0, scale=scale)


@pytest.mark.parametrize("at", [-100.0, -math.inf, 12.0, 300.0])
def test_sinks_far_from_the_scores(at: float) -> None:
    """At 300 the sink takes all: results are zero."""
    tensors = inputs(length=66, dim=32, kv=1)
    keep = keeps("none" if at == -math.inf else "right", 2, 66)  # written out, -inf and no key give NaN
    assert_no_worse(tensors, keep, 9, 0, sinks=sinks_of(2, at=at))


def test_a_query_without_key_gives_zeros_to_a_sink_of_minus_infinity() -> None:
    tensors = inputs(length=66, dim=32)
    sinks = torch.full((2,), -math.inf, device=DEVICE, requires_grad=True)
    out, lse = op(*tensors, keeps("nothing", 2, 66), None, None, 0, 0.2, 0.0, sinks)
    assert not out[0].any() and (lse[0] == math.inf).all() and lse[1].isfinite().all()
    assert not any(g[0].any() or not g.isfinite().all() for g in torch.autograd.grad(out.sum(), [*tensors, sinks]))


def test_the_sum_of_the_scores_says_where_there_is_no_key() -> None:
    """What `attention_softcap_sinks` reads it for."""
    tensors = inputs(length=66, dim=32)
    _, lse = op(*tensors, keeps("left", 2, 66), None, None, 0, 0.2, 3.0)
    empty = torch.zeros(2, 2, 66, dtype=torch.bool, device=DEVICE)
    empty[0, :, :44] = True
    assert torch.equal(lse == math.inf, empty)
    _, lse = op(*tensors, keeps("left", 2, 66), None, None, 0, 0.2, 3.0, sinks_of(2))
    assert lse.isfinite().all()


def test_sinks_that_need_no_gradient_and_strided_ones() -> None:
    tensors = inputs(length=66, dim=32, heads=2)
    sinks = torch.randn(4, device=DEVICE)[::2]
    assert not sinks.is_contiguous()
    out = op(*tensors, None, None, None, 0, 0.2, 0.0, sinks)[0]
    torch.testing.assert_close(out, op(*tensors, None, None, None, 0, 0.2, 0.0, sinks.clone())[0])
    assert all(g is not None for g in torch.autograd.grad(out.sum(), tensors))


@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradcheck_of_the_reference(softcap: float, with_sinks: bool) -> None:
    tensors = [x.detach().double().requires_grad_() for x in inputs(length=6, kv=1, dim=4)]
    tensors += [torch.randn(2, dtype=torch.float64, device=DEVICE, requires_grad=True)] if with_sinks else []
    keep = keeps("left", 2, 6)
    for attend in (op, module.reference):
        assert torch.autograd.gradcheck(
            lambda q, k, v, *s, run=attend: run(q, k, v, keep, None, 3, 0, 0.4, softcap, *s)[0], tensors
        )


def test_opcheck() -> None:
    tensors, keep, sinks = inputs(length=65, kv=1, dim=32), keeps("right", 2, 65), sinks_of(2)
    torch.library.opcheck(op, (*tensors, keep, None, 5, 0, 0.1, 2.0, sinks), rtol=1e-3, atol=1e-3)
    out, lse = op(*tensors, keep, None, 5, 0, 0.1, 2.0, sinks)
    plain = [x.detach() for x in (torch.ones_like(out), *tensors, out, lse)]
    torch.library.opcheck(module.masked_attention_backward, (*plain, keep, None, 5, 0, 0.1, 2.0, sinks.detach()))


@pytest.mark.parametrize(
    ("softcap", "sinks", "message"),
    [
        (-1.0, None, "softcap is -1.0; allowed: 0 and more"),
        (math.inf, None, "softcap is inf; allowed"),
        (0.0, torch.ones(3), r"sinks.shape is \(3,\); allowed: \[2\]"),
        (0.0, torch.ones(2).long(), "sinks.dtype is torch.int64; allowed: floating-point numbers"),
    ],
)
def test_errors_name_argument_value_and_what_is_allowed(softcap: float, sinks: Any, message: str) -> None:
    sinks = None if sinks is None else sinks.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        op(*inputs(), None, None, None, 0, 0.1, softcap, sinks)


def test_a_cap_that_leaves_nothing_of_the_kernels_precision_is_left_to_the_reference() -> None:
    q, k, v = (x.detach() for x in inputs())
    if DEVICE == "cuda" or _ops.INTERPRETED:
        assert module.supports(q, k, v, 0.1, 50.0) is None
        assert module.supports(q, k, v, 0.1, 2000.0) == "softcap is 2000.0; allowed: up to 1000"
    capped = op(q, k, v, None, None, None, 0, 0.1, 1e30)[0]  # tanh(0) = 0 in float32, if not for the kernel's error
    torch.testing.assert_close(capped, op(q, k, v, None, None, None, 0, 0.1, 100.0)[0], rtol=0.01, atol=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_inductor_launches_the_kernels_with_caps_and_sinks() -> None:
    tensors = [*inputs(length=130, kv=1, dtype=torch.bfloat16), sinks_of(2, torch.bfloat16)]

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return op(q, k, v, None, None, 70, 0, 0.2, 5.0, sinks)[0]

    def run(call: Any) -> list[Tensor]:
        out = call(*tensors)
        return [out, *torch.autograd.grad(out.float().square().sum(), tensors)]

    for a, b in zip(run(torch.compile(attend)), run(attend), strict=True):
        # a sum that Inductor takes in another order may round the other way
        torch.testing.assert_close(a, b, rtol=2e-2, atol=4e-3 * float(b.abs().max()))


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter() -> None:
    passes_in_interpreter(__file__, select="not opcheck and not gradcheck")
