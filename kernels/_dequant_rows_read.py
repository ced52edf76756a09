"""What the kernel of `_dequant_rows` reads of a weight, in Triton's Gluon."""

# ruff: noqa: RUF005, SIM108 (Gluon has no starred lists, and compiles both sides of an expression)
# mypy: ignore-errors

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
except ImportError:  # `_dequant_rows_kernel` says so
    from ._ops import tl as gl
    from ._ops import triton as gluon


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
def _start(block, IN_ROW: gl.constexpr, TILE: gl.constexpr, SPAN: gl.constexpr, BETWEEN: gl.constexpr):
    """Where a tile's bytes begin in a row of IN_ROW of them."""
    if SPAN == IN_ROW:
        return block * TILE
    elif SPAN >= TILE:  # noqa: RET505
        return block // (SPAN // TILE) * BETWEEN + block % (SPAN // TILE) * TILE
    else:
        return block * (TILE // SPAN * BETWEEN)


@gluon.jit
def _high(block, RUN: gl.constexpr, TILE: gl.constexpr, SPAN: gl.constexpr, BETWEEN: gl.constexpr,
          BITS: gl.constexpr, HIGH_RUN: gl.constexpr, HIGH_AT: gl.constexpr):  # fmt: skip
    """Where the higher BITS of a tile's codes begin in a row, and which bits of those bytes they are.

    They are HIGH_AT bytes from a block's lower halves, in runs of HIGH_RUN bytes: those of a tile's low and of its high
    halves in the same bytes (`_dequant_planes.halves`), which tiles of other columns read too.
    """
    SIDES: gl.constexpr = 8 // BITS
    place = block % (SPAN // TILE)  # all in tiles: Triton sees what an address is a multiple of by the last factor
    run = place // (RUN // TILE)
    piece = place % (RUN // TILE)
    at = block // (SPAN // TILE) * BETWEEN + HIGH_AT + run // (HIGH_RUN * SIDES // (2 * RUN)) * HIGH_RUN
    at += piece % (HIGH_RUN // TILE) * TILE
    return at, (run * (2 * RUN // HIGH_RUN) + piece // (HIGH_RUN // TILE)) % SIDES * BITS


@gluon.jit
def _group(values, n, column, seen, ROWS: gl.constexpr, GROUP: gl.constexpr, STRIDE_N: gl.constexpr,
           STRIDE_K: gl.constexpr, COMPUTE: gl.constexpr):  # fmt: skip
    """A scale or zero point of each row, rounded as its source does; integers through fp32, as in torch."""
    at = (n // ROWS).to(gl.int64) * STRIDE_N + column // GROUP * STRIDE_K
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
           BITS: gl.constexpr, RUN: gl.constexpr, HALVES: gl.constexpr, SIDES: gl.constexpr, IN_ROW: gl.constexpr,
           TILE: gl.constexpr, SPAN: gl.constexpr, BETWEEN: gl.constexpr, ALIGNED: gl.constexpr,
           GROUPS: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr, SCALE_N: gl.constexpr,
           SCALE_K: gl.constexpr, ZERO_N: gl.constexpr, ZERO_K: gl.constexpr, COMPUTE: gl.constexpr,
           ZEROS: gl.constexpr, ADDED: gl.constexpr, HIGH_BITS: gl.constexpr, HIGH_RUN: gl.constexpr,
           HIGH_AT: gl.constexpr):  # fmt: skip
    """What a step reads of the weight: codes, and scales, zero points and offsets of bytes' first and second halves."""
    PLACES: gl.constexpr = 8 if HALVES > 0 else BITS
    block = start + warp
    inside = block < BLOCKS
    c_block = start + c_warp
    c_inside = c_block < BLOCKS
    at = rows + gl.multiple_of(_start(block, IN_ROW, TILE, SPAN, BETWEEN), [ALIGNED, ALIGNED, ALIGNED])
    if EVEN:
        tile = gl.load(at, eviction_policy="evict_first")
    else:
        tile = gl.load(at, inside, other=0, eviction_policy="evict_first")
    codes = (tile,)
    if HIGH_BITS > 0:
        at, shift = _high(block, RUN, TILE, SPAN, BETWEEN, HIGH_BITS, HIGH_RUN, HIGH_AT)
        at = rows + gl.multiple_of(at, [ALIGNED, ALIGNED, ALIGNED])
        if EVEN:
            codes = (tile, gl.load(at), shift)
        else:
            codes = (tile, gl.load(at, inside, other=0), shift)
    scales = ()
    zeros = ()
    offsets = ()
    for side in gl.static_range(SIDES):
        c_column = _column(c_block, side, PLACES, RUN, TILE)
        if GROUPS > 1:
            scales = scales + (_group(scale, c_n + side * HALVES, c_column, c_inside, ROWS, GROUP, SCALE_N, SCALE_K,
                                      COMPUTE),)  # fmt: skip
        if ADDED != 0:
            offset = _group(zero, c_n + side * HALVES, c_column, c_inside, ROWS, GROUP, ZERO_N, ZERO_K, COMPUTE)
            offsets = offsets + (offset * ADDED,)
        if ZEROS > 0:
            column = _column(block, side, PLACES, RUN, TILE)
            zeros = zeros + (_group(zero, n + side * HALVES, column, inside, ROWS, GROUP, ZERO_N, ZERO_K, COMPUTE),)
    return codes, scales, zeros, offsets
