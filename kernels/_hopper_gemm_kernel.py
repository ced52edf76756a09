"""The device code of `_hopper_gemm`, in Triton's Gluon."""

# ruff: noqa: RUF005 (Gluon has no starred lists)

from ._hopper_flash_tiles import MISSING, async_load, gl, gluon, next_stage

if not MISSING:
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.language.extra.cuda import gdc_wait

    from ._hopper_gemm_epilogue import finish, per_lane, per_row, synchronize


@gluon.jit
def _place(item, rows, N: gl.constexpr, TILE_M: gl.constexpr, BLOCK_N: gl.constexpr, TOGETHER: gl.constexpr):
    """First row and column of a tile: TOGETHER tiles of rows take turns with the columns and share L2."""
    tiles_m = gl.cdiv(rows, TILE_M)
    tiles_n: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = item // (TOGETHER * tiles_n) * TOGETHER
    size = gl.minimum(tiles_m - first, TOGETHER)
    within = item % (TOGETHER * tiles_n)
    return (first + within % size) * TILE_M, within // size * BLOCK_N


@gluon.jit
def _skip_tile(stage, phase, STEPS: gl.constexpr, STAGES: gl.constexpr):
    """The place in the ring behind a tile of the other group."""
    stage += STEPS % STAGES
    phase ^= (STEPS // STAGES) % 2
    if stage >= STAGES:
        stage -= STAGES
        phase ^= 1
    return stage, phase


@gluon.jit
def _stage_before(stage, STAGES: gl.constexpr):
    """The place in the ring before this one.

    Not kept in a variable of the loop: `last = stage` before a loop and in it is the same value to Triton's search for
    what a loop carries, which then takes `last` for one that no step changes.
    """
    if stage == 0:
        stage += STAGES
    return stage - 1


@gluon.jit
def _produce(y, w, x, places, barriers, items, rows, N: gl.constexpr, STEPS: gl.constexpr, W_ROWS: gl.constexpr,
             SHARED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
             PART: gl.constexpr, STAGES: gl.constexpr, TOGETHER: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    """Moves the steps of one tile after the other, and x's tile when the place for it is free."""
    if EARLY:
        gdc_wait()
    PARTS: gl.constexpr = BLOCK_N // PART
    # Not before the groups have begun the tile: until then they read the one before. They free the place earlier.
    X_AT: gl.constexpr = STAGES if STAGES < STEPS else STEPS - 1
    y_s, w_s, x_s, _, _ = places
    full, empty, x_full, x_empty, _ = barriers
    stage = 0
    phase = 1
    x_phase = 1
    group = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        m, n = _place(item, rows, N, BLOCK_M * SHARED, BLOCK_N, TOGETHER)
        for k in range(STEPS):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), SHARED * y.block_type.nbytes + w.block_type.nbytes)
            for i in gl.static_range(SHARED):
                async_load(y, [m + i * BLOCK_M, k * BLOCK_K], full.index(stage), y_s.index(stage * SHARED + i))
            if W_ROWS:
                async_load(w, [n, k * BLOCK_K], full.index(stage), w_s.index(stage))
            else:
                async_load(w, [k * BLOCK_K, n], full.index(stage), w_s.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
            if x is not None:  # noqa: SIM102 (known when it is compiled)
                if k == X_AT:
                    for i in gl.static_range(SHARED):
                        at = group + i
                        mbarrier.wait(x_empty.index(at), x_phase)
                        mbarrier.expect(x_full.index(at), PARTS * x.block_type.nbytes)
                        for part in gl.static_range(PARTS):
                            async_load(x, [m + i * BLOCK_M, n + part * PART], x_full.index(at),
                                       x_s.index(at * PARTS + part))  # fmt: skip
        if SHARED == 1:
            x_phase ^= group  # each group has had one
            group ^= 1
        else:
            x_phase ^= 1


@gluon.jit
def _consume(GROUP: gl.constexpr, tensors, strides, numbers, places, barriers, items, N: gl.constexpr,
             STEPS: gl.constexpr, A: gl.constexpr, B: gl.constexpr, MODE: gl.constexpr, ONE_A: gl.constexpr,
             ONE_B: gl.constexpr, A_OF: gl.constexpr, B_OF: gl.constexpr, W_ROWS: gl.constexpr,
             SHARED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, PART: gl.constexpr,
             RING: gl.constexpr, STAGES: gl.constexpr, TOGETHER: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    """A group's rows of each tile, or, where only one group has it, every other tile."""
    PING_PONG: gl.constexpr = SHARED == 1
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    LANES: gl.constexpr = 1 + (A == "lane") + (B == "lane")
    FREED: gl.constexpr = 2 if STEPS > 2 else STEPS - 1  # by then the stores of the tile before are done
    _, _, x, bias, a, b = tensors
    _, _, rows, length = numbers
    y_s, w_s, x_s, l_s, v_s = places
    full, empty, x_full, x_empty, turn = barriers
    if EARLY:
        gdc_wait()
    step = gl.num_programs(0)
    begun = gl.program_id(0)
    stage = 0
    phase = 0
    x_phase = 0
    turn_phase = 1 - GROUP
    if PING_PONG:
        begun += GROUP * step
        if GROUP == 1:
            stage, phase = _skip_tile(stage, phase, STEPS, STAGES)
    for item in range(begun, items, step * (2 if PING_PONG else 1)):
        m, n = _place(item, rows, N, BLOCK_M * SHARED, BLOCK_N, TOGETHER)
        if not PING_PONG:
            m += GROUP * BLOCK_M
        # What the epilogue reads begins its way before the product.
        row = m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
        of_a = per_row(a, strides[0], strides[1], row, length, row < rows, A, A_OF)
        of_b = per_row(b, strides[3], strides[4], row, length, row < rows, B, B_OF)
        if bias is not None:
            bias_lanes = per_lane(bias, 1, n, BLOCK_N, N, "x")
        if A == "lane":
            a_lanes = per_lane(a, strides[2], n, BLOCK_N, N, A_OF)
        if B == "lane":
            b_lanes = per_lane(b, strides[5], n, BLOCK_N, N, B_OF)
        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=layout)
        if PING_PONG:
            # Until the other group has seen its last step, a stage's barrier may be two rounds behind, and then its
            # parity says that the step has come.
            mbarrier.wait(turn.index(GROUP), turn_phase)
            turn_phase ^= 1
        for k in range(STEPS):
            mbarrier.wait(full.index(stage), phase)
            left = y_s.index(stage if PING_PONG else stage * SHARED + GROUP)
            right = w_s.index(stage)
            if W_ROWS:
                right = right.permute((1, 0))
            acc = warpgroup_mma(left, right, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index(_stage_before(stage, STAGES)), count=1, pred=k > 0)
            stage, phase = next_stage(stage, phase, STAGES)
            if k == FREED:
                if bias is not None:
                    v_s.index(GROUP * LANES).store(bias_lanes)
                if A == "lane":
                    v_s.index(GROUP * LANES + 1).store(a_lanes)
                if B == "lane":
                    v_s.index(GROUP * LANES + LANES - 1).store(b_lanes)
                if x is not None:
                    tma.store_wait(0)
                    synchronize()
                    mbarrier.arrive(x_empty.index(GROUP), count=1, pred=item > begun)
        if PING_PONG:
            mbarrier.arrive(turn.index(1 - GROUP), count=1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(_stage_before(stage, STAGES)), count=1)
        if PING_PONG:
            stage, phase = _skip_tile(stage, phase, STEPS, STAGES)
        if x is not None:
            mbarrier.wait(x_full.index(GROUP), x_phase)
            x_phase ^= 1
        finish(acc, 0, m, n, tensors, strides, numbers, of_a, of_b, x_s, l_s, v_s, N, A, B, MODE, ONE_A, ONE_B,
               BLOCK_M, BLOCK_N, PART, RING, GROUP)  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def hopper_gemm(y, w, x, out, linear, bias, a, a_b, a_s, a_n, b, b_b, b_s, b_n, alpha, beta, rows, length,
                N: gl.constexpr, K: gl.constexpr, A: gl.constexpr, B: gl.constexpr, MODE: gl.constexpr,
                ONE_A: gl.constexpr, ONE_B: gl.constexpr, A_OF: gl.constexpr, B_OF: gl.constexpr,
                W_ROWS: gl.constexpr, SHARED: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
                BLOCK_K: gl.constexpr, PART: gl.constexpr, RING: gl.constexpr, STAGES: gl.constexpr,
                TOGETHER: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    """Tiles of [SHARED * BLOCK_M, BLOCK_N] by SHARED groups, or of [BLOCK_M, BLOCK_N] by two in turns for one.

    A and B: what a and b have numbers for, "row", "lane", "full" or "none"; ONE_A, ONE_B: alpha and beta are 1;
    A_OF, B_OF: functions of them, for rows and lanes.
    """
    GROUPS: gl.constexpr = 2 if SHARED == 1 else SHARED
    STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    items = gl.cdiv(rows, BLOCK_M * SHARED) * ((N + BLOCK_N - 1) // BLOCK_N)

    y_s = gl.allocate_shared_memory(y.dtype, [STAGES * SHARED, BLOCK_M, BLOCK_K], y.layout)
    w_s = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)
    x_s = gl.allocate_shared_memory(out.dtype, [GROUPS * RING, BLOCK_M, PART], out.layout)
    l_s = x_s
    if linear is not None:
        l_s = gl.allocate_shared_memory(linear.dtype, [GROUPS, BLOCK_M, PART], linear.layout)
    LANES: gl.constexpr = 1 + (A == "lane") + (B == "lane")  # vectors over the columns, with the bias
    v_s = gl.allocate_shared_memory(gl.float32, [GROUPS * LANES, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=SHARED)
    for i in gl.static_range(GROUPS):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()

    # Tuples of what is no constant; those have to be named in each call, or they became numbers of the program.
    tensors = (out, linear, x, bias, a, b)
    strides = (a_b, a_s, a_n, b_b, b_s, b_n)
    numbers = (alpha, beta, rows, length)
    places = (y_s, w_s, x_s, l_s, v_s)
    barriers = (full, empty, x_full, x_empty, turn)
    gl.warp_specialize(
        [
            (_work, (role, y, w, x, tensors, strides, numbers, places, barriers, items, N, STEPS, A, B, MODE, ONE_A,
                     ONE_B, A_OF, B_OF, W_ROWS, SHARED, BLOCK_M, BLOCK_N, BLOCK_K, PART, RING, STAGES, TOGETHER,
                     EARLY))
            for role in (0, 1, 2, 3)[: GROUPS + 1]
        ],
        [4] * (GROUPS - 1) + [1],
        [240 if GROUPS == 2 else 160] * (GROUPS - 1) + [24],
    )  # fmt: skip


@gluon.jit
def _work(ROLE: gl.constexpr, y, w, x, tensors, strides, numbers, places, barriers, items, N: gl.constexpr,
          STEPS: gl.constexpr, A: gl.constexpr, B: gl.constexpr, MODE: gl.constexpr, ONE_A: gl.constexpr,
          ONE_B: gl.constexpr, A_OF: gl.constexpr, B_OF: gl.constexpr, W_ROWS: gl.constexpr, SHARED: gl.constexpr,
          BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, PART: gl.constexpr,
          RING: gl.constexpr, STAGES: gl.constexpr, TOGETHER: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    """What a group of warps does."""
    if (2 if SHARED == 1 else SHARED) > ROLE:
        _consume(ROLE, tensors, strides, numbers, places, barriers, items, N, STEPS, A, B, MODE, ONE_A, ONE_B, A_OF,
                 B_OF, W_ROWS, SHARED, BLOCK_M, BLOCK_N, PART, RING, STAGES, TOGETHER, EARLY)  # fmt: skip
    else:
        _produce(y, w, x, places, barriers, items, numbers[2], N, STEPS, W_ROWS, SHARED, BLOCK_M, BLOCK_N,
                 BLOCK_K, PART, STAGES, TOGETHER, EARLY)  # fmt: skip
