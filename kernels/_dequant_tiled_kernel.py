"""The device code of `_dequant_tiled`, in Triton's Gluon."""

# ruff: noqa: RUF005 (Gluon has no starred lists)
# mypy: ignore-errors

from ._dequant_rows_kernel import _both, _column, _group, _table
from ._hopper_flash_tiles import MISSING, async_load, barrier_ring, gl, gluon, next_stage

if not MISSING:
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.language.extra.cuda import gdc_wait

    from ._hopper_gemm_epilogue import synchronize

__all__ = ["MISSING", "gl", "kernel"]


@gluon.jit
def _fetch(codes, place, barrier, first_n, step, at, bytes, TEAMS: gl.constexpr, TILE: gl.constexpr):  # fmt: skip
    """Announces `bytes` of a stage, and begins to move a step's bytes of the weight, of all rows."""
    mbarrier.expect(barrier, bytes)
    for i in gl.static_range(TEAMS):
        async_load(codes, [first_n + i * 64, step * TILE], barrier, place.index(at * TEAMS + i))


@gluon.jit
def _produce(x, codes, places, barriers, m, first_n, first, steps, TEAMS: gl.constexpr, BLOCK_M: gl.constexpr,
             WIDTH: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    """Moves a step's bytes of the weight and the two tiles that they are multiplied with."""
    BYTES: gl.constexpr = TEAMS * codes.block_type.nbytes + 2 * x.block_type.nbytes
    x_s, w_s = places
    full, empty = barriers
    if EARLY:  # the launch before may still be at work on x
        for step in range(gl.minimum(steps, STAGES)):
            _fetch(codes, w_s, full.index(step), first_n, first + step, step, BYTES, TEAMS, TILE)
        gdc_wait()
    stage = 0
    phase = 1
    for step in range(steps):
        if not EARLY or step >= STAGES:
            mbarrier.wait(empty.index(stage), phase)
            _fetch(codes, w_s, full.index(stage), first_n, first + step, stage, BYTES, TEAMS, TILE)
        for half in gl.static_range(2):
            async_load(x, [m * BLOCK_M, ((first + step) * 2 + half) * WIDTH], full.index(stage),
                       x_s.index(stage * 2 + half))  # fmt: skip
        stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _scales(values, n, n_inside, step, K: gl.constexpr, BITS: gl.constexpr, RUN: gl.constexpr, TILE: gl.constexpr,
            GROUPS: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr, COMPUTE: gl.constexpr):  # fmt: skip
    """Scales or zero points of a step's rows, of the first and second halves of bytes where they may differ."""
    found = ()
    for side in gl.static_range(2 if RUN > 0 and GROUPS > 1 else 1):
        column = _column(step, side, BITS, RUN, TILE)
        found = found + (_group(values, n, column, n_inside, ROWS, GROUP, GROUPS, 1, COMPUTE),)
    return found


@gluon.jit
def _halves(tile, layout: gl.constexpr, TILE: gl.constexpr):
    """Each lane's first and second halves of a step's bytes [64, TILE]."""
    one, other = tile.reshape([64, 4, 2, TILE // 8]).permute((0, 1, 3, 2)).split()
    one = gl.convert_layout(one.reshape([64, TILE // 2]), layout, assert_trivial=True)
    other = gl.convert_layout(other.reshape([64, TILE // 2]), layout, assert_trivial=True)
    return one, other


@gluon.jit
def _scaled(value, scale, MULTIPLY: gl.constexpr, SCALED: gl.constexpr, DTYPE: gl.constexpr,
            HALF: gl.constexpr):  # fmt: skip
    """Weights [64, HALF], their columns in the product's order: 16 of them are four bytes of each of four lanes."""
    if SCALED == "same":
        rounded = scale.to(DTYPE)[:, None]
        value = gl.inline_asm_elementwise(MULTIPLY, "=r,=r,r,r,r,r", [value, rounded], DTYPE.value, True, 4)
    elif SCALED == "wide":
        value = (value.to(gl.float32) * scale[:, None]).to(DTYPE)
    return value.reshape([64, 4, HALF // 16, 2, 2]).permute((0, 2, 3, 1, 4)).reshape([64, HALF])


@gluon.jit
def _consume(TEAM: gl.constexpr, pointers, places, barriers, planes, M, N, m, first_n, first, steps, part,
             BITS: gl.constexpr, CONVERT: gl.constexpr, CONVERT_OPERANDS: gl.constexpr, MULTIPLY: gl.constexpr,
             SCALED: gl.constexpr, HIGH_FIRST: gl.constexpr, RUN: gl.constexpr, K: gl.constexpr, ROWS: gl.constexpr,
             GROUP: gl.constexpr, COMPUTE: gl.constexpr, ZEROS: gl.constexpr, BIASED: gl.constexpr,
             DTYPE: gl.constexpr, CODES: gl.constexpr, HALVES: gl.constexpr, TEAMS: gl.constexpr,
             BLOCK_M: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """64 rows of the weight times x.T."""
    scale, zero, bias, out = pointers
    x_s, w_s = places
    full, empty = barriers
    PER_BYTE: gl.constexpr = 8 // BITS
    GROUPS: gl.constexpr = (K + GROUP - 1) // GROUP
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    n = first_n + TEAM * 64 + gl.arange(0, 64, gl.SliceLayout(1, HALVES))
    n_inside = n < N
    acc = gl.zeros([64, BLOCK_M], gl.float32, layout=layout)
    stage = 0
    phase = 0
    for step in range(steps):
        # What is read of memory begins its way before the wait.
        scales = ()
        zeros = ()
        if SCALED != "after":
            scales = _scales(scale, n, n_inside, first + step, K, BITS, RUN, TILE, GROUPS, ROWS, GROUP, COMPUTE)
        if ZEROS > 0:
            zeros = _scales(zero, n, n_inside, first + step, K, BITS, RUN, TILE, GROUPS, ROWS, GROUP, COMPUTE)
        mbarrier.wait(full.index(stage), phase)
        halves = _halves(w_s.index(stage * TEAMS + TEAM).load(CODES), HALVES, TILE)
        for half in gl.static_range(2):
            operands = (halves[half],) + planes
            for zero_part in gl.static_range(ZEROS):
                for side in gl.static_range(PER_BYTE):
                    z = _both(zeros, (side == 1) != HIGH_FIRST)
                    rounded = z.to(DTYPE)
                    if zero_part == 1:
                        rounded = (z - rounded.to(gl.float32)).to(DTYPE)
                    operands = operands + (rounded[:, None],)
            if SCALED == "after":
                scales = (n,)
            if BITS == 8:
                value = gl.inline_asm_elementwise(CONVERT, CONVERT_OPERANDS, operands, DTYPE.value, True, 4)
                a = _scaled(value, scales[0], MULTIPLY, SCALED, DTYPE, TILE // 2)
            else:
                low, high = gl.inline_asm_elementwise(CONVERT, CONVERT_OPERANDS, operands, (DTYPE.value, DTYPE.value),
                                                      True, 4)  # fmt: skip
                low = _scaled(low, _both(scales, HIGH_FIRST), MULTIPLY, SCALED, DTYPE, TILE // 2)
                high = _scaled(high, _both(scales, not HIGH_FIRST), MULTIPLY, SCALED, DTYPE, TILE // 2)
                a = gl.join(low, high).permute((0, 2, 1)).reshape([64, TILE])
            a = gl.convert_layout(a, a_layout, assert_trivial=True)
            acc = warpgroup_mma(a, x_s.index(stage * 2 + half).permute((1, 0)), acc, is_async=True)
            # The second half is decoded beside the first one's products. Products that are under way from one turn of
            # the loop to the next would be serialised by ptxas.
            acc = warpgroup_mma_wait(1 if half == 0 else 0, deps=[acc])
        synchronize()  # all warps have read the stage
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)

    out_n = first_n + TEAM * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
    out_m = m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
    inside = out_n < N
    if SCALED == "after":
        acc = acc * _group(scale, out_n, 0, inside, ROWS, GROUP, GROUPS, 1, COMPUTE)[:, None]
    if BIASED:
        acc = acc + gl.load(bias + out_n, inside & (part == 0), other=0.0).to(gl.float32)[:, None]
    at = (part * M + out_m).to(gl.int64)[None, :] * N + out_n[:, None]
    gl.store(out + at, acc.to(out.dtype.element_ty), inside[:, None] & (out_m < M)[None, :])


@gluon.jit
def _work(ROLE: gl.constexpr, x, codes, pointers, places, barriers, planes, M, N, m, first_n, first, steps, part,
          BITS: gl.constexpr, CONVERT: gl.constexpr, CONVERT_OPERANDS: gl.constexpr, MULTIPLY: gl.constexpr,
          SCALED: gl.constexpr, HIGH_FIRST: gl.constexpr, RUN: gl.constexpr, K: gl.constexpr, ROWS: gl.constexpr,
          GROUP: gl.constexpr, COMPUTE: gl.constexpr, ZEROS: gl.constexpr, BIASED: gl.constexpr, DTYPE: gl.constexpr,
          CODES: gl.constexpr, HALVES: gl.constexpr, TEAMS: gl.constexpr, BLOCK_M: gl.constexpr, TILE: gl.constexpr,
          STAGES: gl.constexpr, WIDTH: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    """What a group of warps does."""
    if ROLE < TEAMS:
        _consume(ROLE, pointers, places, barriers, planes, M, N, m, first_n, first, steps, part, BITS, CONVERT,
                 CONVERT_OPERANDS, MULTIPLY, SCALED, HIGH_FIRST, RUN, K, ROWS, GROUP, COMPUTE, ZEROS, BIASED, DTYPE,
                 CODES, HALVES, TEAMS, BLOCK_M, TILE, STAGES)  # fmt: skip
    else:
        _produce(x, codes, places, barriers, m, first_n, first, steps, TEAMS, BLOCK_M, WIDTH, TILE, STAGES, EARLY)


@gluon.jit
def kernel(x, codes, scale, zero, lut, bias, out, M, N, BITS: gl.constexpr, TABLE: gl.constexpr,
           CONVERT: gl.constexpr, CONVERT_OPERANDS: gl.constexpr, MULTIPLY: gl.constexpr, SCALED: gl.constexpr,
           HIGH_FIRST: gl.constexpr, RUN: gl.constexpr, K: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr,
           COMPUTE: gl.constexpr, ZEROS: gl.constexpr, BIASED: gl.constexpr, DTYPE: gl.constexpr,
           CODES: gl.constexpr, HALVES: gl.constexpr, TEAMS: gl.constexpr, BLOCK_M: gl.constexpr,
           TILE: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, EARLY: gl.constexpr,
           REGISTERS: gl.constexpr):  # fmt: skip
    """A tile [BLOCK_M, 64 * TEAMS] of the result, or one of PARTS parts of its sums.

    x has its columns in the order that `_dequant_tiled.arranged` gives them. One warp moves tiles to shared memory;
    TEAMS groups of four warps decode 64 rows of the weight each into the registers that they multiply from.

    SCALED: "after" the sum; or each weight, in x's dtype ("same") or in fp32 ("wide").
    EARLY: x may not have been written yet, by the launch before; nothing else that is read is written there.
    """
    PER_BYTE: gl.constexpr = 8 // BITS
    WIDTH: gl.constexpr = TILE * PER_BYTE // 2  # columns of half a step
    STEPS: gl.constexpr = K // PER_BYTE // TILE
    EACH: gl.constexpr = (STEPS + PARTS - 1) // PARTS
    x_s = gl.allocate_shared_memory(x.dtype, [STAGES * 2, BLOCK_M, WIDTH], x.layout)
    w_s = gl.allocate_shared_memory(codes.dtype, [STAGES * TEAMS, 64, TILE], codes.layout)
    full = barrier_ring(STAGES, 1)
    empty = barrier_ring(STAGES, TEAMS)
    fence_async_shared()

    # tiles of x take turns with the same rows of the weight, which L2 then has
    tiles_m = gl.cdiv(M, BLOCK_M)
    tiles_n = gl.cdiv(N, 64 * TEAMS)
    m = gl.program_id(0) % tiles_m
    first_n = gl.program_id(0) // tiles_m % tiles_n * (64 * TEAMS)
    part = gl.program_id(0) // (tiles_m * tiles_n)
    first = part * EACH
    steps = gl.minimum(STEPS - first, EACH)
    planes = ()
    if TABLE:
        planes = _table(lut, DTYPE)
    places = (x_s, w_s)
    barriers = (full, empty)
    pointers = (scale, zero, bias, out)
    gl.warp_specialize(
        [
            (_work, (role, x, codes, pointers, places, barriers, planes, M, N, m, first_n, first, steps, part, BITS,
                     CONVERT, CONVERT_OPERANDS, MULTIPLY, SCALED, HIGH_FIRST, RUN, K, ROWS, GROUP, COMPUTE, ZEROS,
                     BIASED, DTYPE, CODES, HALVES, TEAMS, BLOCK_M, TILE, STAGES, WIDTH, EARLY))
            for role in (0, 1, 2, 3, 4)[: TEAMS + 1]
        ],
        [4] * (TEAMS - 1) + [1],
        [REGISTERS] * (TEAMS - 1) + [24],
    )  # fmt: skip
