"""partial_rope against the rotation spelled out in float64: reference, interpreted kernel and GPU."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_qk_norm_rope import ATOL, DEVICE, LANES, strided

from torch_fuse.kernels import _ops
from torch_fuse.kernels.partial_rope import partial_rope, reference, supports


def rotated(x, cos, sin, offsets, rotary, interleaved, cos_lanes, sin_lanes, transposed=False):
    """Lane by lane, as the docstring has it; the transposed matrix comes from autograd."""
    if transposed:
        at = torch.zeros_like(x, requires_grad=True)
        rotated(at, cos, sin, offsets, rotary, interleaved, cos_lanes, sin_lanes).backward(x)
        return at.grad
    lanes = list(x.unbind(-1))
    for offset in offsets:
        for p in range(rotary // 2):
            i, j = (2 * p, 2 * p + 1) if interleaved else (p, p + rotary // 2)
            c1, c2 = (cos[..., cos_lanes[0] * p + at].unsqueeze(-1) for at in cos_lanes[1:])
            s1, s2 = (sin[..., sin_lanes[0] * p + at].unsqueeze(-1) for at in sin_lanes[1:])
            a, b = x[..., offset + i], x[..., offset + j]
            lanes[offset + i], lanes[offset + j] = a * c1 - b * s1, b * c2 + a * s2
    return torch.stack(lanes, -1)


def arguments(lanes="half", batch=2, length=3, heads=4, dim=16, rotary=8, parts=3, axis=3, step=1, seed=0):
    """x with query, key and value side by side (parts=3) or one of them, tables, options."""
    torch.manual_seed(seed)
    x = strided(batch, length, heads, dim * parts, axis=axis, step=step)
    interleaved, cos_lanes, sin_lanes = LANES[lanes]
    pairs = rotary // 2
    cos = strided(batch, length, 3 * pairs, axis=1 + axis % 2, step=step)
    sin = strided(1, length, 3 * pairs, axis=2, step=step)
    offsets = [0, dim] if parts == 3 else [dim * (parts - 1)]
    return [x, cos, sin], [offsets, rotary, interleaved, list(cos_lanes(pairs)), list(sin_lanes(pairs))]


def drawn(draw):
    dim = draw(st.sampled_from((2, 7, 16, 20)))
    return arguments(
        draw(st.sampled_from(sorted(LANES))), draw(st.integers(1, 3)), draw(st.integers(1, 5)),
        draw(st.sampled_from((1, 3, 12))), dim, 2 * draw(st.integers(1, dim // 2)), draw(st.integers(1, 3)),
        draw(st.integers(0, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 2**31)),
    )  # fmt: skip


cases = st.composite(drawn)


@pytest.mark.interpreter
@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from(list(ATOL)), st.booleans())
def test_agrees_with_the_rotation_in_float64(case, dtype, transposed):
    tensors, options = case
    x, cos, sin = (t.to(DEVICE, dtype) for t in tensors)
    want = rotated(x.double(), cos.double(), sin.double(), *options, transposed)
    got = partial_rope(x, cos, sin, *options, transposed)
    assert got.dtype == dtype and got.shape == x.shape
    assert got.stride() == torch.empty_like(x).stride()
    epsilon = torch.finfo(dtype).eps
    assert torch.allclose(got.double(), want, rtol=epsilon, atol=ATOL[dtype] + 2 * epsilon)


@settings(max_examples=20, deadline=None)
@given(cases())
def test_lanes_that_do_not_rotate_keep_their_bits_and_the_input_stays(case):
    tensors, options = case
    x, cos, sin = (t.to(DEVICE).float() for t in tensors)
    before = x.clone()
    got = partial_rope(x, cos, sin, *options, False)
    still = torch.ones(x.shape[3], dtype=torch.bool)
    for offset in options[0]:
        still[offset : offset + options[1]] = False
    assert torch.equal(got[..., still], x[..., still])
    assert torch.equal(x, before)
    assert got.data_ptr() != x.data_ptr()


@pytest.mark.interpreter
@pytest.mark.parametrize("lanes", LANES)
def test_gradient_is_the_transposed_rotation(lanes):
    tensors, options = arguments(lanes)
    x, cos, sin = (t.to(DEVICE).float() for t in tensors)
    x.requires_grad_()
    out = partial_rope(x, cos, sin, *options, False)
    cotangent = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, x, cotangent)
    wide = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(rotated(wide, cos.double(), sin.double(), *options), wide, cotangent.double())
    assert torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_reference_has_the_right_gradient(transposed):
    tensors, options = arguments("half, every third", length=2, heads=2)
    x, cos, sin = tensors
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference(x, cos, sin, *options, transposed), (x,))


def test_is_a_well_behaved_op():
    tensors, options = arguments()
    x, cos, sin = (t.to(DEVICE).float() for t in tensors)
    torch.library.opcheck(partial_rope, (x.requires_grad_(), cos, sin, *options, False))


@pytest.mark.parametrize("shape", [(0, 3, 4, 48), (2, 0, 4, 48), (2, 3, 0, 48)])
def test_nothing_to_rotate(shape):
    x = torch.ones(shape, device=DEVICE)
    table = torch.ones(1, shape[1], 8, device=DEVICE)
    assert partial_rope(x, table, table, [0, 16], 8, False, [1, 0, 4], [1, 0, 4], False).shape == shape


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0: torch.ones(2, 3, 4)}, r"x.shape is \(2, 3, 4\); allowed: four dimensions"),
        ({0: torch.ones(2, 3, 4, 48).int()}, "x.dtype is torch.int32; allowed: fp32"),
        ({1: torch.ones(1, 5, 12)}, r"cos.shape\[1\] is 5; allowed: the heads' length 3"),
        ({2: torch.ones(3, 12)}, r"sin.shape is \(3, 12\); allowed: three dimensions"),
        ({3: [0, 4]}, r"offsets is \[0, 4\]; allowed: places for 8 lanes each in L = 48"),
        ({3: [44]}, r"offsets is \[44\]; allowed: places for 8 lanes"),
        ({3: []}, r"offsets is \[\]; allowed: places"),
        ({4: 7}, "rotary_dim is 7; allowed: an even number from 2 on"),
        ({6: [1, 0, 20]}, r"cos_lanes is \[1, 0, 20\]; allowed: lanes below cos.shape\[2\] = 12"),
    ],
)
def test_bad_arguments_are_named(changes, words):
    tensors, options = arguments()
    given = [*(t.float() for t in tensors), *options, False]
    for at, wrong in changes.items():
        given[at] = wrong
    with pytest.raises(ValueError, match=words):
        partial_rope(*given)


@pytest.mark.skipif(DEVICE == "cuda" or _ops.INTERPRETED, reason="says what a CPU cannot do")
def test_supports_names_the_reason():
    assert "no backend for device 'cpu'" in supports(torch.ones(1, 1, 1, 8)) or not _ops.HAS_TRITON


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_inductor_rotates_in_place():
    """No kernel copies the projection, and the result is right."""
    linear = torch.nn.Linear(64, 4 * 48, device="cuda", dtype=torch.bfloat16)
    (_, cos, sin), options = arguments(batch=1, length=128)
    cos, sin = cos.cuda().bfloat16(), sin.cuda().bfloat16()
    x = torch.randn(1, 128, 64, device="cuda", dtype=torch.bfloat16)

    def model(x: torch.Tensor, op=partial_rope) -> torch.Tensor:
        return op(linear(x).view(1, 128, 4, 48), cos, sin, *options, False)

    with torch.no_grad():
        compiled = torch.compile(model)
        assert torch.equal(compiled(x), model(x, reference))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
            compiled(x)
    assert not [event.key for event in profiled.key_averages() if event.key.startswith("triton_")]


@pytest.mark.skipif(_ops.INTERPRETED or not _ops.HAS_TRITON, reason="is what it starts")
def test_kernels_in_the_interpreter():
    """The tests above again in a process where Triton interprets its kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "-m", "interpreter", "-p", "no:cacheprovider", "-n0"],
        env=environment, capture_output=True, text=True, timeout=570, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
