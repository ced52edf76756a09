"""The device code of `_dequant_rows`, in Triton's Gluon."""

# ruff: noqa: RUF005, SIM108 (Gluon has no starred lists, and compiles both sides of an expression)
# mypy: ignore-errors

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    MISSING = ""
except ImportError as error:  # no Triton, or one before or after this language
    from ._ops import tl as gl
    from ._ops import triton as gluon

    MISSING = f"Triton's Gluon language is not there: {error}"


@gluon.jit
def _column(block, SECOND: gl.constexpr, BITS: gl.constexpr, RUN: gl.constexpr, TILE: gl.constexpr):
    """The weight's first column of a tile, or of its bytes' second halves."""
    if BITS == 8:
        return block * TILE
    elif RUN == 0:  # noqa: RET505  # a jit function's other branch must not be compiled
        return block * (2 * TILE)
    else:
        return block // (RUN // TILE) * (2 * RUN) + block % (RUN // TILE) * TILE + SECOND * RUN


@gluon.jit
def _group(values, n, column, seen, GROUPS: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr,
           COMPUTE: gl.constexpr):  # fmt: skip
    """A scale or zero point of each row, rounded as its source does; integers through fp32, as in torch."""
    at = (n // ROWS).to(gl.int64) * GROUPS + column // GROUP
    return gl.load(values + at, seen, other=0).to(gl.float32).to(COMPUTE).to(gl.float32)


@gluon.jit
def _table(lut, dtype: gl.constexpr):
    """The lower bytes of a table's 16 entries in four numbers, then the upper ones in four."""
    planes = ()
    for plane in gl.static_range(2):
        for word in gl.static_range(4):
            found = gl.to_tensor(0)
            for i in gl.static_range(4):
                entry = gl.load(lut + (word * 4 + i)).to(dtype).to(gl.int16, bitcast=True).to(gl.int32)
                found = found | (((entry >> (8 * plane)) & 255) << (8 * i))
            planes = planes + (found,)
    return planes


@gluon.jit
def _fetch(rows, scale, zero, n, warp, c_n, c_warp, start, BLOCKS: gl.constexpr, EVEN: gl.constexpr,
           BITS: gl.constexpr, RUN: gl.constexpr, TILE: gl.constexpr, GROUPS: gl.constexpr, ROWS: gl.constexpr,
           GROUP: gl.constexpr, COMPUTE: gl.constexpr, ZERO: gl.constexpr):  # fmt: skip
    """What a step reads of the weight: codes, and a scale and zero point of the first and second halves of bytes."""
    block = start + warp
    inside = block < BLOCKS
    c_block = start + c_warp
    c_inside = c_block < BLOCKS
    if EVEN:
        tile = gl.load(rows + block * TILE, eviction_policy="evict_first")
    else:
        tile = gl.load(rows + block * TILE, inside, other=0, eviction_policy="evict_first")
    scales = ()
    zeros = ()
    for side in gl.static_range(2 if RUN > 0 and GROUPS > 1 else 1):
        if GROUPS > 1:
            column = _column(c_block, side, BITS, RUN, TILE)
            scales = scales + (_group(scale, c_n, column, c_inside, GROUPS, ROWS, GROUP, COMPUTE),)
        if ZERO:
            column = _column(block, side, BITS, RUN, TILE)
            zeros = zeros + (_group(zero, n, column, inside, GROUPS, ROWS, GROUP, COMPUTE),)
    return tile, scales, zeros


@gluon.jit
def _both(pair, SECOND: gl.constexpr):
    """The second of two, where there are two."""
    if SECOND and len(pair) == 2:
        return pair[1]
    else:  # noqa: RET505
        return pair[0]


@gluon.jit
def _step(acc, zeros, fetched, start, columns, planes, b_warp, BITS: gl.constexpr, CONVERT: gl.constexpr,
          CONVERT_OPERANDS: gl.constexpr, SPLIT: gl.constexpr, SPLIT_OPERANDS: gl.constexpr,
          HIGH_FIRST: gl.constexpr, RUN: gl.constexpr, GROUPS: gl.constexpr, ZEROS: gl.constexpr,
          DTYPE: gl.constexpr, TILE: gl.constexpr, BLOCKS: gl.constexpr, EVEN: gl.constexpr):  # fmt: skip
    """Adds a tile of the weight, of each warp, times its activations to acc."""
    PER_BYTE: gl.constexpr = 8 // BITS
    PAIRS: gl.constexpr = BITS == 4 and RUN == 0
    TABLE: gl.constexpr = len(planes) > 0
    tile, scales, zero_points = fetched
    block = start + b_warp
    if PAIRS:
        at = columns + block * TILE
    else:
        at = columns + _column(block, 0, BITS, RUN, TILE)
    if EVEN:
        first_x = gl.load(at)
    else:
        first_x = gl.load(at, block < BLOCKS, other=0)
    second_x = first_x
    if RUN > 0:
        if EVEN:
            second_x = gl.load(at + RUN)
        else:
            second_x = gl.load(at + RUN, block < BLOCKS, other=0)
        if not TABLE:
            first_x = gl.inline_asm_elementwise(SPLIT, SPLIT_OPERANDS, [first_x], DTYPE.value, True, 4)
            second_x = gl.inline_asm_elementwise(SPLIT, SPLIT_OPERANDS, [second_x], DTYPE.value, True, 4)
    if PAIRS:
        first_x, second_x = gl.inline_asm_elementwise(SPLIT, SPLIT_OPERANDS, [first_x],
                                                      (DTYPE.value, DTYPE.value), True, 4)  # fmt: skip
    if HIGH_FIRST:
        first_x, second_x = second_x, first_x

    operands = (tile,) + planes
    for zero_part in gl.static_range(ZEROS):
        for side in gl.static_range(PER_BYTE):
            # the low halves of bytes are the second ones if the high ones come first
            z = _both(zero_points, (side == 1) != HIGH_FIRST)
            rounded = z.to(DTYPE)
            if zero_part == 1:
                rounded = (z - rounded.to(gl.float32)).to(DTYPE)
            operands = operands + (rounded,)
    if BITS == 8:
        a = gl.inline_asm_elementwise(CONVERT, CONVERT_OPERANDS, operands, DTYPE.value, True, 4)
        if GROUPS == 1:
            acc = mma_v2(a, first_x, acc)
        else:
            acc += mma_v2(a, first_x, zeros) * scales[0]
    else:
        low, high = gl.inline_asm_elementwise(CONVERT, CONVERT_OPERANDS, operands, (DTYPE.value, DTYPE.value),
                                              True, 4)  # fmt: skip
        if GROUPS == 1:
            acc = mma_v2(high, second_x, mma_v2(low, first_x, acc))
        elif RUN == 0:
            acc += mma_v2(high, second_x, mma_v2(low, first_x, zeros)) * scales[0]
        else:
            acc += mma_v2(low, first_x, zeros) * _both(scales, HIGH_FIRST)
            acc += mma_v2(high, second_x, zeros) * _both(scales, not HIGH_FIRST)
    return acc


@gluon.jit
def _steps(acc, zeros, first, rows, columns, scale, zero, planes, n, warp, b_warp, c_n, c_warp,
           BITS: gl.constexpr, CONVERT: gl.constexpr, CONVERT_OPERANDS: gl.constexpr, SPLIT: gl.constexpr,
           SPLIT_OPERANDS: gl.constexpr, HIGH_FIRST: gl.constexpr, RUN: gl.constexpr, ROWS: gl.constexpr,
           GROUP: gl.constexpr, GROUPS: gl.constexpr, COMPUTE: gl.constexpr, ZEROS: gl.constexpr,
           DTYPE: gl.constexpr, TILE: gl.constexpr, WARPS: gl.constexpr, BLOCKS: gl.constexpr, EVEN: gl.constexpr,
           AHEAD: gl.constexpr, UNROLL: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    """Adds UNROLL steps from block `first` on to acc; the weight is read AHEAD steps before it is needed.

    No tile is carried around a loop: a byte of one would have a register of its own.
    EARLY: before the first step x may still be at work in the launch before.
    """
    ahead = ()
    for i in gl.static_range(AHEAD + UNROLL):
        if i < UNROLL:
            fetched = _fetch(rows, scale, zero, n, warp, c_n, c_warp, first + i * WARPS, BLOCKS, EVEN, BITS, RUN, TILE,
                             GROUPS, ROWS, GROUP, COMPUTE, ZEROS > 0)  # fmt: skip
            ahead = ahead + (fetched,)
        if EARLY and i == AHEAD:
            gdc_wait()
            gdc_launch_dependents()
        if i >= AHEAD:
            acc = _step(acc, zeros, ahead[0], first + (i - AHEAD) * WARPS, columns, planes, b_warp, BITS, CONVERT,
                        CONVERT_OPERANDS, SPLIT, SPLIT_OPERANDS, HIGH_FIRST, RUN, GROUPS, ZEROS, DTYPE, TILE, BLOCKS,
                        EVEN)  # fmt: skip
            ahead = ahead[1:]
    return acc


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
def kernel(x, codes, scale, zero, lut, bias, out, M, N, BITS: gl.constexpr, TABLE: gl.constexpr,
           CONVERT: gl.constexpr, CONVERT_OPERANDS: gl.constexpr, SPLIT: gl.constexpr, SPLIT_OPERANDS: gl.constexpr,
           HIGH_FIRST: gl.constexpr, RUN: gl.constexpr, K: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr,
           COMPUTE: gl.constexpr, ZEROS: gl.constexpr, BIASED: gl.constexpr, DTYPE: gl.constexpr,
           BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, TILE: gl.constexpr, WARPS: gl.constexpr,
           PARTS: gl.constexpr, AHEAD: gl.constexpr, UNROLL: gl.constexpr, ACTIVATION: gl.constexpr,
           EARLY: gl.constexpr):  # fmt: skip
    """BLOCK_N columns of the result, through ACTIVATION, or one of PARTS parts of their sums.

    The WARPS warps take blocks of columns in turns: a batch of products, added up at the end. The layouts of the
    products' operands have TILE / 8 bytes side by side in a lane, so codes and activations go from memory into the
    registers that they are multiplied from, without a pass through shared memory.

    x is int32, two activations each, for 4-bit codes that lie beside each other (RUN is 0).
    EARLY: the launch before may be at work still, on x alone of what is read (programmatic dependent launch).
    """
    PER_BYTE: gl.constexpr = 8 // BITS
    BLOCKS: gl.constexpr = K // PER_BYTE // TILE
    GROUPS: gl.constexpr = (K + GROUP - 1) // GROUP
    STEPS: gl.constexpr = ((BLOCKS + WARPS - 1) // WARPS + PARTS - 1) // PARTS
    EVEN: gl.constexpr = STEPS * WARPS * PARTS == BLOCKS and STEPS % UNROLL == 0
    PAIRS: gl.constexpr = BITS == 4 and RUN == 0
    c_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, c_layout, TILE // 8)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, c_layout, TILE // 8)

    part = gl.program_id(0) % PARTS
    first_n = gl.program_id(0) // PARTS * BLOCK_N
    first_block = part * (STEPS * WARPS)

    # rows past the end are read as the last one, and not written
    n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, gl.SliceLayout(2, a_layout)))
    n = gl.minimum(n, N - 1)[None, :, None]
    c_n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, gl.SliceLayout(2, c_layout)))
    c_n = gl.minimum(c_n, N - 1)[None, :, None]
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, a_layout)))[:, None, None]
    b_warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, b_layout)))[:, None, None]
    c_warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, c_layout)))[:, None, None]
    byte = gl.arange(0, TILE, gl.SliceLayout(0, gl.SliceLayout(1, a_layout)))[None, None, :]
    b_byte = gl.arange(0, TILE, gl.SliceLayout(0, gl.SliceLayout(2, b_layout)))[None, :, None]
    m = gl.minimum(gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(1, b_layout))), M - 1)[None, None, :]

    rows = codes + n.to(gl.int64) * (K // PER_BYTE) + byte
    if PAIRS:
        columns = x + m * (K // 2) + b_byte
    else:
        columns = x + m * K + b_byte
    planes = ()
    if TABLE:
        planes = _table(lut, DTYPE)
    zeros = gl.zeros([WARPS, BLOCK_N, BLOCK_M], gl.float32, layout=c_layout)
    acc = zeros

    for chunk in range(0, STEPS, UNROLL):
        acc = _steps(acc, zeros, first_block + chunk * WARPS, rows, columns, scale, zero, planes, n, warp, b_warp, c_n,
                     c_warp, BITS, CONVERT, CONVERT_OPERANDS, SPLIT, SPLIT_OPERANDS, HIGH_FIRST, RUN, ROWS, GROUP,
                     GROUPS, COMPUTE, ZEROS, DTYPE, TILE, WARPS, BLOCKS, EVEN, AHEAD, UNROLL, EARLY)  # fmt: skip

    result = gl.sum(acc, 0)
    out_n = (first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, gl.SliceLayout(0, c_layout))))[:, None]
    out_m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, gl.SliceLayout(0, c_layout)))[None, :]
    if GROUPS == 1:
        result *= _group(scale, out_n, 0, out_n < N, GROUPS, ROWS, GROUP, COMPUTE)
    if BIASED:
        result += gl.load(bias + out_n, (out_n < N) & (part == 0), other=0.0).to(gl.float32)
    result = _activated(result, ACTIVATION)
    at = (part * M + out_m).to(gl.int64) * N + out_n
    gl.store(out + at, result.to(out.dtype.element_ty), (out_n < N) & (out_m < M))
