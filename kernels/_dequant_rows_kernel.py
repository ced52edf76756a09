"""The device code of `_dequant_rows`, in Triton's Gluon; what it reads is in `_dequant_rows_read`."""

# ruff: noqa: RUF005, SIM108 (Gluon has no starred lists, and compiles both sides of an expression)
# mypy: ignore-errors

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2

    MISSING = ""
except ImportError as error:  # no Triton, or one before or after this language
    from ._ops import tl as gl
    from ._ops import triton as gluon

    MISSING = f"Triton's Gluon language is not there: {error}"

from ._dequant_rows_read import _column, _fetch, _group, _table


@gluon.jit
def _both(pair, SECOND: gl.constexpr):
    """The second of two, where there are two."""
    if SECOND and len(pair) == 2:
        return pair[1]
    else:  # noqa: RET505
        return pair[0]


@gluon.jit
def _activations(columns, block, BITS: gl.constexpr, SPLIT: gl.constexpr, SPLIT_OPERANDS: gl.constexpr,
                 HIGH_FIRST: gl.constexpr, RUN: gl.constexpr, HALVES: gl.constexpr, DTYPE: gl.constexpr,
                 TILE: gl.constexpr, BLOCKS: gl.constexpr, EVEN: gl.constexpr):  # fmt: skip
    """x at a tile's columns, those of bytes' low and of their high halves, in the order of the converted codes."""
    PAIRS: gl.constexpr = BITS == 4 and RUN == 0 and HALVES == 0
    if PAIRS or HALVES > 0:
        at = columns + block * TILE
    else:
        at = columns + _column(block, 0, BITS, RUN, TILE)
    if EVEN:
        low_x = gl.load(at)
    else:
        low_x = gl.load(at, block < BLOCKS, other=0)
    high_x = low_x
    if RUN > 0:
        if EVEN:
            high_x = gl.load(at + RUN)
        else:
            high_x = gl.load(at + RUN, block < BLOCKS, other=0)
    if PAIRS:
        low_x, high_x = gl.inline_asm_elementwise(SPLIT, SPLIT_OPERANDS, [low_x], (DTYPE.value, DTYPE.value), True, 4)
    elif SPLIT != "":
        low_x = gl.inline_asm_elementwise(SPLIT, SPLIT_OPERANDS, [low_x], DTYPE.value, True, 4)
        if RUN > 0:
            high_x = gl.inline_asm_elementwise(SPLIT, SPLIT_OPERANDS, [high_x], DTYPE.value, True, 4)
        else:
            high_x = low_x
    if HIGH_FIRST:
        low_x, high_x = high_x, low_x
    return low_x, high_x


@gluon.jit
def _step(acc, other, zeros, ones, fetched, start, columns, planes, b_warp, BITS: gl.constexpr,
          CONVERT: gl.constexpr, CONVERT_OPERANDS: gl.constexpr, SPLIT: gl.constexpr, SPLIT_OPERANDS: gl.constexpr,
          HIGH_FIRST: gl.constexpr, RUN: gl.constexpr, HALVES: gl.constexpr, GROUPS: gl.constexpr,
          ZEROS: gl.constexpr, ADDED: gl.constexpr, DTYPE: gl.constexpr, TILE: gl.constexpr, BLOCKS: gl.constexpr,
          EVEN: gl.constexpr):  # fmt: skip
    """Adds a tile of the weight, of each warp, times its activations to acc, and to other what the second rows have."""
    codes, scales, zero_points, offsets = fetched
    low_x, high_x = _activations(columns, start + b_warp, BITS, SPLIT, SPLIT_OPERANDS, HIGH_FIRST, RUN, HALVES, DTYPE,
                                 TILE, BLOCKS, EVEN)  # fmt: skip
    operands = codes + planes
    for zero_part in gl.static_range(ZEROS):
        for side in gl.static_range(8 // BITS):
            # the low halves of bytes are the second ones if the high ones come first
            z = _both(zero_points, (side == 1) != HIGH_FIRST)
            rounded = z.to(DTYPE)
            if zero_part == 1:
                rounded = (z - rounded.to(gl.float32)).to(DTYPE)
            operands = operands + (rounded,)
    if BITS == 8:
        low = gl.inline_asm_elementwise(CONVERT, CONVERT_OPERANDS, operands, DTYPE.value, True, 4)
        high = low
    else:
        low, high = gl.inline_asm_elementwise(CONVERT, CONVERT_OPERANDS, operands, (DTYPE.value, DTYPE.value),
                                              True, 4)  # fmt: skip
    if HALVES > 0:
        first, second = low, high
        if HIGH_FIRST:
            first, second = high, low
        if GROUPS == 1:
            acc = mma_v2(first, low_x, acc)
            other = mma_v2(second, low_x, other)
        else:
            acc += mma_v2(first, low_x, zeros) * scales[0]
            other += mma_v2(second, low_x, zeros) * scales[1]
        if ADDED != 0:
            total = mma_v2(ones, low_x, zeros)
            acc += total * offsets[0]
            other += total * offsets[1]
    elif len(scales) < 2:  # one scale for all of the tile, or for all of the row
        product = mma_v2(low, low_x, acc if GROUPS == 1 else zeros)
        if BITS == 4:
            product = mma_v2(high, high_x, product)
        if GROUPS == 1:
            acc = product
        else:
            acc += product * scales[0]
        if ADDED != 0:
            total = mma_v2(ones, low_x, zeros)
            if BITS == 4:
                total = mma_v2(ones, high_x, total)
            acc += total * offsets[0]
    else:
        acc += mma_v2(low, low_x, zeros) * _both(scales, HIGH_FIRST)
        acc += mma_v2(high, high_x, zeros) * _both(scales, not HIGH_FIRST)
        if ADDED != 0:
            acc += mma_v2(ones, low_x, zeros) * _both(offsets, HIGH_FIRST)
            acc += mma_v2(ones, high_x, zeros) * _both(offsets, not HIGH_FIRST)
    return acc, other


@gluon.jit
def _activated(x, ACTIVATION: gl.constexpr):
    """fp32 x through an activation: a few values a program, so no instruction is spared."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + gl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # noqa: RET505  # a jit function's other branch must not be compiled
        return x / (1.0 + gl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "silu":
        return x / (1.0 + gl.exp(-x))
    else:
        return x


@gluon.jit
def _store(acc, out, scale, bias, n, m, part, M, N, inside, SCALED: gl.constexpr, ROWS: gl.constexpr,
           GROUP: gl.constexpr, SCALE_N: gl.constexpr, COMPUTE: gl.constexpr, BIASED: gl.constexpr,
           ACTIVATION: gl.constexpr):  # fmt: skip
    """Writes the sums of rows n of the weight and m of x, through an activation."""
    result = gl.sum(acc, 0)
    if SCALED:
        result *= _group(scale, n, 0, inside, ROWS, GROUP, SCALE_N, 0, COMPUTE)
    if BIASED:
        result += gl.load(bias + n, inside & (part == 0), other=0.0).to(gl.float32)
    result = _activated(result, ACTIVATION)
    at = (part * M + m).to(gl.int64) * N + n
    gl.store(out + at, result.to(out.dtype.element_ty), inside & (m < M))


@gluon.jit
def kernel(x, codes, scale, zero, lut, bias, out, M, N, BITS: gl.constexpr, TABLE: gl.constexpr,
           CONVERT: gl.constexpr, CONVERT_OPERANDS: gl.constexpr, SPLIT: gl.constexpr, SPLIT_OPERANDS: gl.constexpr,
           HIGH_FIRST: gl.constexpr, RUN: gl.constexpr, HALVES: gl.constexpr, SIDES: gl.constexpr, K: gl.constexpr,
           ROWS: gl.constexpr, GROUP: gl.constexpr, SCALE_N: gl.constexpr, SCALE_K: gl.constexpr,
           ZERO_N: gl.constexpr, ZERO_K: gl.constexpr, COMPUTE: gl.constexpr, ZEROS: gl.constexpr,
           ADDED: gl.constexpr, BIASED: gl.constexpr, DTYPE: gl.constexpr, BLOCK_M: gl.constexpr,
           BLOCK_N: gl.constexpr, TILE: gl.constexpr, SPAN: gl.constexpr, BETWEEN: gl.constexpr, ROW: gl.constexpr,
           LEAD: gl.constexpr, ALIGNED: gl.constexpr, HIGH_BITS: gl.constexpr, HIGH_RUN: gl.constexpr,
           HIGH_AT: gl.constexpr, WARPS: gl.constexpr, PARTS: gl.constexpr, AHEAD: gl.constexpr,
           UNROLL: gl.constexpr, ACTIVATION: gl.constexpr):  # fmt: skip
    """BLOCK_N columns of the result (and as many HALVES later), or one of PARTS parts of their sums.

    The WARPS warps take blocks of columns in turns: a batch of products, added up at the end. The layouts of the
    products' operands have TILE / 8 bytes side by side in a lane, so codes and activations go from memory into the
    registers that they are multiplied from, without a pass through shared memory.

    x is int32, two activations each, for 4-bit codes that lie beside each other (RUN and HALVES are 0).
    HALVES: a byte [n, k] is of rows n and n + HALVES; or 0. SIDES: scales that the weights of a tile's row have.
    ADDED: 1 or -1 where the zero point, times that, is added to codes times scale: it multiplies sums of x, the
    product with a matrix of ones. Codes lie as `_dequant_layout.Bytes` says, LEAD bytes behind `codes`, and all pieces
    of a lane at multiples of ALIGNED. HIGH_BITS: of each code that lie elsewhere (see `_high`); or 0.
    ACTIVATION: of a whole result.
    """
    IN_ROW: gl.constexpr = K // 2 if BITS == 4 and HALVES == 0 else K
    BLOCKS: gl.constexpr = IN_ROW // TILE
    GROUPS: gl.constexpr = (K + GROUP - 1) // GROUP
    STEPS: gl.constexpr = ((BLOCKS + WARPS - 1) // WARPS + PARTS - 1) // PARTS
    EVEN: gl.constexpr = STEPS * WARPS * PARTS == BLOCKS and STEPS % UNROLL == 0
    PAIRS: gl.constexpr = BITS == 4 and RUN == 0 and HALVES == 0
    c_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, c_layout, TILE // 8)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, c_layout, TILE // 8)

    part = gl.program_id(0) % PARTS
    first_n = gl.program_id(0) // PARTS * BLOCK_N
    first_block = part * (STEPS * WARPS)

    # rows past the end are read as the last one, and not written
    end = HALVES if HALVES > 0 else N
    n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, gl.SliceLayout(2, a_layout)))
    n = gl.minimum(n, end - 1)[None, :, None]
    c_n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, gl.SliceLayout(2, c_layout)))
    c_n = gl.minimum(c_n, end - 1)[None, :, None]
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, a_layout)))[:, None, None]
    b_warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, b_layout)))[:, None, None]
    c_warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, c_layout)))[:, None, None]
    byte = gl.arange(0, TILE, gl.SliceLayout(0, gl.SliceLayout(1, a_layout)))[None, None, :]
    b_byte = gl.arange(0, TILE, gl.SliceLayout(0, gl.SliceLayout(2, b_layout)))[None, :, None]
    m = gl.minimum(gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(1, b_layout))), M - 1)[None, None, :]

    rows = codes + gl.multiple_of(n.to(gl.int64) * ROW + LEAD, [ALIGNED, ALIGNED, ALIGNED])
    if SPAN < TILE:  # neighbours are SPAN bytes side by side
        rows += gl.max_contiguous(byte // SPAN * BETWEEN + byte % SPAN, [1, 1, SPAN])
    else:
        rows += byte
    columns = x + m * (K // 2 if PAIRS else K) + b_byte
    planes = ()
    if TABLE:
        planes = _table(lut, DTYPE)
    zeros = gl.zeros([WARPS, BLOCK_N, BLOCK_M], gl.float32, layout=c_layout)
    ones = gl.full([WARPS, BLOCK_N, TILE], 1.0, DTYPE, layout=a_layout)
    acc = zeros
    other = zeros

    for chunk in range(0, STEPS, UNROLL):
        # No tile is carried around the loop: a byte of one would have a register of its own.
        ahead = ()
        for i in gl.static_range(AHEAD + UNROLL):
            if i < UNROLL:  # the weight is read AHEAD steps before it is needed
                fetched = _fetch(rows, scale, zero, n, warp, c_n, c_warp, first_block + (chunk + i) * WARPS, BLOCKS,
                                 EVEN, BITS, RUN, HALVES, SIDES, IN_ROW, TILE, SPAN, BETWEEN, ALIGNED, GROUPS, ROWS,
                                 GROUP, SCALE_N, SCALE_K, ZERO_N, ZERO_K, COMPUTE, ZEROS, ADDED, HIGH_BITS,
                                 HIGH_RUN, HIGH_AT)  # fmt: skip
                ahead = ahead + (fetched,)
            if i >= AHEAD:
                acc, other = _step(acc, other, zeros, ones, ahead[0], first_block + (chunk + i - AHEAD) * WARPS,
                                   columns, planes, b_warp, BITS, CONVERT, CONVERT_OPERANDS, SPLIT, SPLIT_OPERANDS,
                                   HIGH_FIRST, RUN, HALVES, GROUPS, ZEROS, ADDED, DTYPE, TILE, BLOCKS,
                                   EVEN)  # fmt: skip
                ahead = ahead[1:]

    out_n = (first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, gl.SliceLayout(0, c_layout))))[:, None]
    out_m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(0, c_layout)))[None, :]
    inside = out_n < end
    _store(acc, out, scale, bias, out_n, out_m, part, M, N, inside, GROUPS == 1, ROWS, GROUP, SCALE_N, COMPUTE, BIASED,
           ACTIVATION)  # fmt: skip
    if HALVES > 0:
        _store(other, out, scale, bias, out_n + HALVES, out_m, part, M, N, inside, GROUPS == 1, ROWS, GROUP, SCALE_N,
               COMPUTE, BIASED, ACTIVATION)  # fmt: skip
