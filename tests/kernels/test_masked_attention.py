"""masked_attention against float64, forward and backward: the reference, the interpreted kernels and, if any, a GPU.

Run with TRITON_INTERPRET=1 the same tests go through the Triton kernels; test_kernels_in_the_interpreter does so.
"""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from in_interpreter import passes_in_interpreter
from poisoning import poison_new_tensors
from torch import Tensor

from torch_fuse.kernels import _ops

module = importlib.import_module("torch_fuse.kernels.masked_attention")
op, supports, Config = module.masked_attention, module.supports, module.Config

DEVICE = "cuda" if torch.cuda.is_available() and not _ops.INTERPRETED else "cpu"
# The interpreter multiplies the bits of bfloat16 as integers.
DTYPES = [torch.float16] if _ops.INTERPRETED else [torch.bfloat16, torch.float16]


def inputs(
    batch: int = 2, heads: int = 2, kv: int = 2, length: int = 65, keys: int | None = None, dim: int = 64,
    dtype: torch.dtype = torch.float16,
) -> list[Tensor]:  # fmt: skip
    """q and k [B, S, H, D] in memory, v a view into a projection; all need gradients."""
    torch.manual_seed(0)
    keys = length if keys is None else keys
    q = torch.randn(batch, length, heads, dim).to(DEVICE, dtype).transpose(1, 2)
    k = torch.randn(batch, keys, kv, dim).to(DEVICE, dtype).transpose(1, 2)
    v = torch.randn(batch, keys, kv, 3 * dim).to(DEVICE, dtype).transpose(1, 2)[..., 2 * dim :]
    return [x.detach().requires_grad_() for x in (q, k, v)]


def keeps(kind: str, batch: int, keys: int) -> Tensor | None:
    """A padding mask by name."""
    if kind == "none":
        return None
    keep = torch.ones(batch, keys, dtype=torch.bool)
    if kind == "right":
        keep[0, keys // 3 :] = False
    elif kind == "left":
        keep[0, : keys * 2 // 3] = False
    elif kind == "holes":
        keep = torch.rand(batch, keys, generator=torch.Generator().manual_seed(1)) > 0.3
    elif kind == "one_row_for_all":
        keep = keep[:1].clone()
        keep[:, keys // 2 :] = False
    elif kind == "nothing":
        keep[0] = False
    return keep.to(DEVICE)


def exact(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, left: int | None, right: int | None, scale: float):
    """In float64, from the definition."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), *(x.double().repeat_interleave(group, 1) for x in (k, v))
    i, j = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    mask = torch.ones(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    mask = mask if keep is None else mask & keep[:, None, None, :]
    mask = mask if left is None else mask & (j >= i - left)
    mask = mask if right is None else mask & (j <= i + right)
    weights = (q @ k.mT * scale).masked_fill(~mask, -math.inf).softmax(-1)
    return weights.masked_fill(~mask.any(-1, keepdim=True), 0.0) @ v, mask


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def assert_no_worse(
    tensors: list[Tensor], keep: Tensor | None, left: int | None, right: int | None, scale: float | None = None
) -> None:
    """Result and gradients are at most twice as far from float64 as SDPA's with the dense mask."""
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    wide = [x.detach().double().requires_grad_() for x in tensors]
    wanted, mask = exact(*wide, keep, left, right, scale)
    ranges = None if keep is None else module.key_range(keep)
    ours, theirs = op(*tensors, keep, ranges, left, right, scale)[0], sdpa(*tensors, mask, scale)
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    assert ours.transpose(1, 2).is_contiguous()
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2)).half().to(DEVICE)
    results = [[wanted, ours, theirs]]
    for found, out, leaves in ((0, wanted, wide), (1, ours, tensors), (2, theirs, tensors)):
        for n, gradient in enumerate(torch.autograd.grad(out, leaves, grad.to(out.dtype))):
            results += [[]] if found == 0 else []
            results[n + 1].append(gradient)
    for name, (true, a, b) in zip(("out", "dq", "dk", "dv"), results, strict=True):
        for size in (lambda x: x.abs().max(), lambda x: x.pow(2).mean().sqrt()):
            error, floor = size(a.double() - true), size(b.double() - true).nan_to_num(0.0)  # NaN: rows without keys
            atol = torch.finfo(a.dtype).eps * float(size(true.detach()))
            assert error <= 2 * floor + atol, f"{name}: {error:.3g}, not {floor:.3g}"
    empty = ~mask.any(-1).expand(wanted.shape[:3])
    for found in (ours, results[1][1]):
        assert not found[empty].any()
    if keep is not None:
        for found in results[2][1], results[3][1]:
            assert not found[~keep[:, None, :].expand(found.shape[:3])].any()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results start as NaN: an element nobody writes shows."""
    if _ops.INTERPRETED or DEVICE == "cuda":
        poison_new_tensors(monkeypatch)


KEEPS = ["none", "all", "right", "left", "holes", "one_row_for_all", "nothing"]


def test_the_backward_op_reads_sums_in_any_strides() -> None:
    """Its kernels read them as [B, H, S] in memory; where they come from is not theirs to know."""
    q, k, v = (x.detach() for x in inputs(length=70, dim=32))
    out, lse = op(q, k, v, None, None, None, 0, 0.2)
    delta = out.float().square().sum(-1)
    sums = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (lse, delta)]
    assert sums[0].stride() != lse.stride()
    wanted = module.masked_attention_backward(out, q, k, v, lse, delta, None, None, None, 0, 0.2)
    found = module.masked_attention_backward(out, q, k, v, *sums, None, None, None, 0, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (20, 0), (9, 9)])
def test_every_padding_with_every_band(left: int | None, right: int | None, keep: str, dtype: torch.dtype) -> None:
    assert_no_worse(inputs(length=130, heads=1, kv=1, dtype=dtype), keeps(keep, 2, 130), left, right)


@pytest.mark.parametrize("dim", module.CONFIGS)
def test_every_head_dim(dim: int) -> None:
    assert_no_worse(inputs(batch=1, length=66, dim=dim, kv=1), keeps("right", 1, 66), None, 0)


@settings(max_examples=8 if _ops.INTERPRETED else 60)
@given(
    st.integers(1, 140), st.integers(64, 140), st.sampled_from([(1, 1), (2, 2), (2, 1), (6, 2)]),
    st.sampled_from([32, 48, 64]), st.sampled_from(KEEPS), st.none() | st.integers(-70, 150),
    st.none() | st.integers(-70, 150),
)  # fmt: skip
def test_any_shape_band_and_padding(
    length: int, keys: int, heads: tuple[int, int], dim: int, keep: str, left: int | None, right: int | None
) -> None:
    tensors = inputs(heads=heads[0], kv=heads[1], length=length, keys=keys, dim=dim)
    assert_no_worse(tensors, keeps(keep, 2, keys), left, right)


@pytest.mark.parametrize("tiles", [(128, 64), (32, 64), (64, 32), (32, 32)])
def test_any_configuration(tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(*tiles, 4, 2)
    monkeypatch.setitem(module.CONFIGS, 32, (config, config, config))
    for keep, left in (("left", None), ("holes", 40)):
        assert_no_worse(inputs(length=150, dim=32, kv=1), keeps(keep, 2, 150), left, 0)


def test_any_strides() -> None:
    q, k, v = (x.detach() for x in inputs(length=66, dim=32))
    for change in (
        lambda x: x.contiguous(),
        lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        lambda x: F.pad(x, (1, 2))[..., 1:-2],
    ):
        given_ = [x.requires_grad_() for x in (change(q).detach(), change(k).detach(), change(v).detach())]
        assert_no_worse(given_, keeps("right", 2, 132)[:, ::2], None, 0)


def test_gradients_are_the_same_every_time() -> None:
    tensors, keep = inputs(batch=1, length=70, heads=2, kv=1, dim=32), keeps("holes", 1, 70)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(op(*tensors, keep, None, 30, 0, 0.2)[0].square().sum(), tensors)

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_the_reference_is_exact_in_float64() -> None:
    tensors = [x.detach().double().requires_grad_() for x in inputs(length=20, kv=1)]
    assert_no_worse(tensors, keeps("nothing", 2, 20), 7, 0)


@pytest.mark.parametrize(
    ("keep", "wanted"),
    [
        ([0, 1, 1, 0, 1, 0], [1, 5, 1]),
        ([1, 1, 1, 1, 1, 1], [0, 6, 0]),
        ([0, 0, 1, 1, 1, 0], [2, 5, 0]),
        ([0, 0, 0, 0, 0, 1], [5, 6, 0]),
    ],
)
def test_the_range_of_kept_keys(keep: list[int], wanted: list[int]) -> None:
    found = module.key_range(torch.tensor([keep, [1] * 6], dtype=torch.bool, device=DEVICE))
    assert found.dtype == torch.int32 and found.tolist() == [wanted, [0, 6, 0]]


def test_the_range_is_empty_where_nothing_is_kept() -> None:
    first, end, holes = module.key_range(torch.zeros(1, 6, dtype=torch.bool, device=DEVICE))[0].tolist()
    assert first >= end and holes <= 0


@pytest.mark.parametrize(("batch", "length"), [(0, 70), (2, 0)])
def test_empty_inputs_give_empty_results(batch: int, length: int) -> None:
    tensors = inputs(batch=batch, length=length, keys=70)
    out, _ = op(*tensors, None, None, None, 0, 1.0)
    assert out.shape == tensors[0].shape
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("keep", ["none", "right"])
def test_opcheck(dtype: torch.dtype, keep: str) -> None:
    tensors, mask = inputs(length=65, dtype=dtype, kv=1, dim=32), keeps(keep, 2, 65)
    torch.library.opcheck(op, (*tensors, mask, None, 5, 0, 0.1), rtol=1e-3, atol=1e-3)
    if mask is not None:
        torch.library.opcheck(module.key_range, (mask,))
    out, lse = op(*tensors, mask, None, 5, 0, 0.1)
    grad = torch.ones_like(out)
    plain = [x.detach() for x in (grad, *tensors, lse, (out * grad).float().sum(-1))]
    torch.library.opcheck(module.masked_attention_backward, (*plain, mask, None, 5, 0, 0.1))


def test_gradcheck_of_the_reference() -> None:
    tensors = [x.detach().double().requires_grad_() for x in inputs(length=6, kv=1, dim=4)]
    keep = keeps("left", 2, 6)
    assert torch.autograd.gradcheck(lambda *x: op(*x, keep, None, 3, 0, 0.4)[0], tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 65, 64)}, r"q.shape is \(2, 65, 64\); allowed: four dimensions"),
        ({"v": torch.ones(2, 2, 65, 64, dtype=torch.float64)}, "v.dtype is torch.float64; allowed: q's torch.float16"),
        ({"k": torch.ones(2, 3, 65, 64).half()}, r"k.shape is \(2, 3, 65, 64\); allowed: .* divisor of q's H"),
        ({"keep": torch.ones(2, 65)}, "key_keep.dtype is torch.float32; allowed: torch.bool"),
        ({"keep": torch.ones(3, 65).bool()}, r"key_keep.shape is \(3, 65\); allowed: \[2 or 1, 65\]"),
    ],
)
def test_errors_name_argument_value_and_what_is_allowed(change: dict[str, Tensor], message: str) -> None:
    named = dict(zip(("q", "k", "v", "keep"), (*inputs(), None), strict=True))
    named |= {name: x.to(DEVICE) for name, x in change.items()}
    with pytest.raises(ValueError, match=message):
        op(*named.values(), None, None, 0, 0.1)


def test_supports_says_why_not() -> None:
    q, k, v = (x.detach() for x in inputs())
    if DEVICE == "cpu" and not _ops.INTERPRETED:
        assert supports(q, k, v, 0.1) == "Triton has no backend for device 'cpu'"
        return
    assert supports(q, k, v, 0.1) is None
    assert supports(q.double(), k, v, 0.1) == "dtype is torch.float64; allowed: bfloat16, float16"
    assert "head_dim is 63" in supports(q[..., :63], k, v, 0.1)
    assert "scale is -1.0" in supports(q, k, v, -1.0)
    assert "there are 63 keys" in supports(q, k[:, :, :63], v, 0.1)
    assert "v.stride(3) is 65" in supports(q, k, v.mT.contiguous().mT, 0.1)


@pytest.mark.skipif(not _ops.HAS_TRITON or _ops.INTERPRETED, reason="starts the interpreter")
def test_kernels_in_the_interpreter() -> None:
    """The kernels' arithmetic on a machine without a GPU: this file again, in a process that interprets them."""
    passes_in_interpreter(__file__, select="not opcheck and not gradcheck")
