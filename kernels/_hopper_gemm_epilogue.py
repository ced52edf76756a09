"""The epilogues of `_hopper_gemm_kernel`, in Triton's Gluon."""

from ._hopper_flash_tiles import MISSING, gl, gluon
from ._hopper_pointwise import function

if not MISSING:
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

    # Triton 3.6 has other names for both.
    async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    synchronize = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def _towards(start, end, weight, LERP: gl.constexpr):
    """start + weight * (end - start); LERP: as torch.lerp has it, infinities included."""
    step = end - start
    result = start + weight * step
    if LERP:
        result = gl.where(gl.abs(weight) < 0.5, result, end - step * (1.0 - weight))
    return result


@gluon.jit
def per_row(pointer, stride_b, stride_s, row, length, keep, KIND: gl.constexpr, OF: gl.constexpr):
    """A coefficient's numbers of the rows, or zeros where it has none of its own for them."""
    result = (row * 0).to(gl.float32)
    if KIND == "row":
        at = (row // length).to(gl.int64) * stride_b + (row % length).to(gl.int64) * stride_s
        result = function(gl.load(pointer + at, keep, other=0.0).to(gl.float32), OF)
    return result


@gluon.jit
def per_lane(pointer, stride, n, BLOCK_N: gl.constexpr, N: gl.constexpr, OF: gl.constexpr):
    """A vector's numbers of the tile's columns."""
    layout: gl.constexpr = gl.BlockedLayout([BLOCK_N // 128 if BLOCK_N > 128 else 1], [32], [4], [0])
    col = n + gl.arange(0, BLOCK_N, layout)
    return function(gl.load(pointer + col.to(gl.int64) * stride, col < N, other=0.0).to(gl.float32), OF)


@gluon.jit
def _factor(pointer, stride_b, stride_s, stride_n, of_rows, of_lanes, at, keep, KIND: gl.constexpr,
            layout: gl.constexpr):  # fmt: skip
    """A coefficient of a part in fp32: one number a row, one a lane, or all of them."""
    if KIND == "row":
        return gl.convert_layout(of_rows, gl.SliceLayout(1, layout), assert_trivial=True)[:, None]
    elif KIND == "lane":  # noqa: RET505  # a jit function's other branches must not be compiled
        return of_lanes.load(gl.SliceLayout(0, layout))[None, :]
    else:
        batch, position, col = at
        from_ = (batch * stride_b + position * stride_s)[:, None] + col[None, :] * stride_n
        return gl.load(pointer + from_, keep, other=0.0).to(gl.float32)


@gluon.jit
def _cdf(x, TANH: gl.constexpr):
    """What gelu multiplies with: `gelu` has the formulas and where they come from."""
    if TANH:
        e = gl.exp2(x * gl.fma(x * x, -0.10294324, -2.3022082))
        return 1.0 / (1.0 + e)
    t = 1.0 / gl.fma(gl.abs(x), 0.36048660, 1.0)
    q = gl.fma(t, -0.09902890, 0.25451642)
    q = gl.fma(t, q, 0.03494386)
    q = gl.fma(t, q, 0.16910969)
    q = gl.fma(t, q, 0.14025630)
    q = gl.fma(t, q, 0.00019704403)
    y = x * 0.84932180
    h = q * gl.exp2(-(y * y))
    return gl.where(x < 0, h, 1.0 - h)


@gluon.jit
def _finish_part(acc, FIRST: gl.constexpr, m, n, tensors, strides, numbers, of_a, of_b, x_s, l_s, v_s, N: gl.constexpr,
                 A: gl.constexpr, B: gl.constexpr, MODE: gl.constexpr, ONE_A: gl.constexpr, ONE_B: gl.constexpr,
                 BLOCK_M: gl.constexpr, PART: gl.constexpr, RING: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """The epilogue of PART columns from FIRST on of a group's tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    out, linear, x, bias, a, b = tensors
    alpha, beta, rows, length = numbers
    LANES: gl.constexpr = 1 + (A == "lane") + (B == "lane")
    place = x_s.index(GROUP * RING + FIRST // PART % RING)
    row = m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    col = n + FIRST + gl.arange(0, PART, gl.SliceLayout(0, layout))
    at = (row // length).to(gl.int64), (row % length).to(gl.int64), col.to(gl.int64)
    keep = (row < rows)[:, None] & (col < N)[None, :]
    if bias is not None:
        acc += v_s.index(GROUP * LANES).slice(FIRST, PART).load(gl.SliceLayout(0, layout))[None, :]
    if linear is not None:
        # Behind the store of the part before from here there is one of the result only.
        tma.store_wait(1)
        synchronize()
        l_s.index(GROUP).store(acc.to(linear.dtype))
        fence_async_shared()
        async_store(linear, [m, n + FIRST], l_s.index(GROUP))
    if MODE == "gelu" or MODE == "gelu_tanh":
        acc = acc * _cdf(acc, MODE == "gelu_tanh")
    else:
        skip = place.load(layout).to(gl.float32)
        a_lanes = v_s.index(GROUP * LANES + (1 if A == "lane" else 0)).slice(FIRST, PART)
        b_lanes = v_s.index(GROUP * LANES + LANES - 1).slice(FIRST, PART)
        if MODE == "sum":
            if A != "none":
                skip *= _factor(a, strides[0], strides[1], strides[2], of_a, a_lanes, at, keep, A, layout)
            if not ONE_A:
                skip *= alpha
            if B != "none":
                acc *= _factor(b, strides[3], strides[4], strides[5], of_b, b_lanes, at, keep, B, layout)
            if not ONE_B:
                acc *= beta
            acc += skip
        else:
            mix = gl.zeros([BLOCK_M, PART], gl.float32, layout=layout) + beta
            if B != "none":
                mix = mix * _factor(b, strides[3], strides[4], strides[5], of_b, b_lanes, at, keep, B, layout)
            if MODE == "lerp" or MODE == "step":
                acc = _towards(skip, acc, mix, MODE == "lerp")
            else:
                acc = _towards(acc, skip, mix, MODE == "lerp_back")
    if x is None:  # the place is free when the store from it has read it: RING parts ago, the last with its product
        tma.store_wait(RING - 1 if linear is None else 2 * RING - 1)
        synchronize()
    place.store(acc.to(out.dtype))
    fence_async_shared()
    async_store(out, [m, n + FIRST], place)


@gluon.jit
def finish(acc, FIRST: gl.constexpr, m, n, tensors, strides, numbers, of_a, of_b, x_s, l_s, v_s, N: gl.constexpr,
           A: gl.constexpr, B: gl.constexpr, MODE: gl.constexpr, ONE_A: gl.constexpr, ONE_B: gl.constexpr,
           BLOCK_M: gl.constexpr, WIDTH: gl.constexpr, PART: gl.constexpr, RING: gl.constexpr,
           GROUP: gl.constexpr):  # fmt: skip
    """The epilogue of WIDTH columns from FIRST on of a group's tile, in parts: fewer registers, earlier stores."""
    if WIDTH == PART:
        _finish_part(acc, FIRST, m, n, tensors, strides, numbers, of_a, of_b, x_s, l_s, v_s, N, A, B, MODE, ONE_A,
                     ONE_B, BLOCK_M, PART, RING, GROUP)  # fmt: skip
    else:
        half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH // 2, 16])
        left, right = acc.reshape([BLOCK_M, 2, WIDTH // 2]).permute((0, 2, 1)).split()
        left = gl.convert_layout(left, half, assert_trivial=True)
        right = gl.convert_layout(right, half, assert_trivial=True)
        finish(left, FIRST, m, n, tensors, strides, numbers, of_a, of_b, x_s, l_s, v_s, N, A, B, MODE, ONE_A, ONE_B,
               BLOCK_M, WIDTH // 2, PART, RING, GROUP)  # fmt: skip
        finish(right, FIRST + WIDTH // 2, m, n, tensors, strides, numbers, of_a, of_b, x_s, l_s, v_s, N, A, B, MODE,
               ONE_A, ONE_B, BLOCK_M, WIDTH // 2, PART, RING, GROUP)  # fmt: skip
