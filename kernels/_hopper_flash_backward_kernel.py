"""The device code of `_hopper_flash_backward`, in Triton's Gluon."""

# ruff: noqa: RUF005 (Gluon has no starred lists)

from ._hopper_flash_tiles import (
    async_load,
    barrier_ring,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    next_stage,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def place(item, batch, tiles, together, HEADS: gl.constexpr, LAST_FIRST: gl.constexpr):
    """Batch, head and tile of an item; heads of which `together` fit in the cache run side by side."""
    pair = item // (together * tiles) * together
    within = item % (together * tiles)
    width = gl.minimum(together, batch * HEADS - pair)
    tile = within // width
    if LAST_FIRST:
        tile = tiles - 1 - tile
    pair += within % width
    return pair // HEADS, pair % HEADS, tile


@gluon.jit
def fetch(first, second, b, h, row, first_s, second_s, slot, full, empty, phase):
    """Moves a tile of two tensors once its place is free."""
    size: gl.constexpr = 2 * first.block_type.nbytes
    mbarrier.wait(empty.index(slot), phase)
    mbarrier.expect(full.index(slot), size)
    async_load(first, [b, h, row, 0], full.index(slot), first_s.index(slot))
    async_load(second, [b, h, row, 0], full.index(slot), second_s.index(slot))


@gluon.jit
def start(a, b_s, slot, layout: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr):
    """Starts a @ b.T for a tile b of a ring."""
    zero = gl.zeros([64, ROWS], gl.float32, layout=layout)
    b = b_s.index(slot).reshape([ROWS, D]).permute((1, 0))
    return warpgroup_mma(a, b, zero, use_acc=False, is_async=True)


@gluon.jit
def _key_step(s, dk, dv, v, k, lse, delta, seen, q_s, grad_s, full, stage, phase, after_stage, after_phase, log2_scale,
              masked, layout: gl.constexpr, out_layout: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
              NEXT: gl.constexpr):  # fmt: skip
    """What a tile of queries adds to dk and dv, and with NEXT the scores of the tile after it."""
    operand: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    dtype: gl.constexpr = q_s.dtype
    dp = start(v, grad_s, stage, layout, M, D)
    p = gl.exp2(gl.fma(s, log2_scale, -lse[None, :]))
    if masked:
        p = gl.where(seen, p, 0.0)
    p_rounded = gl.convert_layout(p.to(dtype), operand)
    dv = warpgroup_mma(p_rounded, grad_s.index(stage).reshape([M, D]), dv, is_async=True)
    if NEXT:
        mbarrier.wait(full.index(after_stage), after_phase)
        scores = start(k, q_s, after_stage, layout, M, D)
        dp = warpgroup_mma_wait(2, deps=[dp])
    else:
        mbarrier.wait(full.index(stage), phase)  # it is: without it the compiler waits before the exponentials
        dp = warpgroup_mma_wait(1, deps=[dp])
    ds = p * (dp - delta[None, :])
    ds_rounded = gl.convert_layout(ds.to(dtype), operand)
    dk = warpgroup_mma(ds_rounded, q_s.index(stage).reshape([M, D]), dk, is_async=True)
    if NEXT:
        s, dk, dv, p_rounded, ds_rounded = warpgroup_mma_wait(0, deps=[scores, dk, dv, p_rounded, ds_rounded])
    else:
        dk, dv, p_rounded, ds_rounded = warpgroup_mma_wait(0, deps=[dk, dv, p_rounded, ds_rounded])
    return s, dk, dv


@gluon.jit
def _row_values(lse, delta, at, query, q_length, exists):
    """What is known of queries: those that do not exist give weights of zero."""
    valid = (query < q_length) & exists
    return gl.load(lse + at, valid, other=float("inf")), gl.load(delta + at, valid, other=0.0)


@gluon.jit
def _consume_queries(GROUP: gl.constexpr, rows, buffers, barriers, sizes, log2_scale, scale, H: gl.constexpr,
                     HEADS_OF_KEY: gl.constexpr, CAUSAL: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr,
                     M: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    """The gradients of 64 keys and values of one item after the other."""
    dk_out, dv_out, lse_in, delta_in = rows
    k_s, v_s, q_s, grad_s = buffers
    kv_full, kv_empty, full, empty = barriers
    first_item, items, step, batch, q_length, length, together = sizes
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    KV: gl.constexpr = H // HEADS_OF_KEY
    dtype: gl.constexpr = q_s.dtype
    column = gl.arange(0, M, gl.SliceLayout(0, layout))
    k = k_s.index(GROUP).reshape([64, D])
    v = v_s.index(GROUP).reshape([64, D])
    stage = 0
    phase = 0
    kv_phase = 0
    q_tiles = gl.cdiv(q_length, M)
    for item in range(first_item, items, step):
        b, h, tile = place(item, batch, gl.cdiv(length, 64 * GROUPS), together, KV, False)
        first_key = (tile * GROUPS + GROUP) * 64
        key = first_key + gl.arange(0, 64, gl.SliceLayout(1, layout))
        low = 0
        if CAUSAL:
            low = tile * 64 * GROUPS // M
        each = q_tiles - low
        steps = each * HEADS_OF_KEY
        row = (b.to(gl.int64) * H + h * HEADS_OF_KEY) * q_length
        query = low * M + column
        lse, delta = _row_values(lse_in, delta_in, row + query, query, q_length, steps > 0)
        mbarrier.wait(kv_full.index(GROUP), kv_phase)
        kv_phase ^= 1
        dk = gl.zeros([64, D], gl.float32, layout=out_layout)
        dv = gl.zeros([64, D], gl.float32, layout=out_layout)
        s = gl.zeros([64, M], gl.float32, layout=layout)
        if EARLY:
            mbarrier.wait(full.index(stage), phase)
            s = warpgroup_mma_wait(0, deps=[start(k, q_s, stage, layout, M, D)])
        for n in range(steps - 1 if EARLY else steps):
            after = n + 1
            next_query = (low + after % each) * M + column
            next_row = row + (after // each) * q_length
            next_lse, next_delta = _row_values(lse_in, delta_in, next_row + next_query, next_query, q_length,
                                               after < steps)  # fmt: skip
            after_stage, after_phase = next_stage(stage, phase, STAGES)
            if not EARLY:
                mbarrier.wait(full.index(stage), phase)
                s = warpgroup_mma_wait(0, deps=[start(k, q_s, stage, layout, M, D)])
            masked = False
            if CAUSAL:
                masked = (low + n % each) * M < first_key + 63
            s, dk, dv = _key_step(s, dk, dv, v, k, lse, delta, key[:, None] <= query[None, :], q_s, grad_s, full, stage,
                                  phase, after_stage, after_phase, log2_scale, masked, layout, out_layout, D, M,
                                  EARLY)  # fmt: skip
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = after_stage, after_phase
            lse, delta, query = next_lse, next_delta, next_query
        if EARLY:
            masked = False
            if CAUSAL:
                masked = (low + (steps - 1) % each) * M < first_key + 63
            s, dk, dv = _key_step(s, dk, dv, v, k, lse, delta, key[:, None] <= query[None, :], q_s, grad_s, full, stage,
                                  phase, stage, phase, log2_scale, masked, layout, out_layout, D, M, False)  # fmt: skip
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
        mbarrier.arrive(kv_empty.index(GROUP), count=1)
        key = first_key + gl.arange(0, 64, gl.SliceLayout(1, out_layout))
        lane = gl.arange(0, D, gl.SliceLayout(0, out_layout))
        at = ((b.to(gl.int64) * length + key.to(gl.int64)) * KV + h)[:, None] * D + lane[None, :]
        gl.store(dk_out + at, (dk * scale).to(dtype), key[:, None] < length)
        gl.store(dv_out + at, dv.to(dtype), key[:, None] < length)


@gluon.jit
def _produce_queries(tensors, buffers, barriers, sizes, H: gl.constexpr, HEADS_OF_KEY: gl.constexpr,
                     CAUSAL: gl.constexpr, GROUPS: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Moves keys and values of an item, then the queries that see them and their gradients."""
    q, k, v, grad = tensors
    k_s, v_s, q_s, grad_s = buffers
    kv_full, kv_empty, full, empty = barriers
    first_item, items, step, batch, q_length, length, together = sizes
    stage = 0
    phase = 1
    kv_phase = 1
    q_tiles = gl.cdiv(q_length, M)
    for item in range(first_item, items, step):
        b, h, tile = place(item, batch, gl.cdiv(length, 64 * GROUPS), together, H // HEADS_OF_KEY, False)
        for i in gl.static_range(GROUPS):
            fetch(k, v, b, h, (tile * GROUPS + i) * 64, k_s, v_s, i, kv_full, kv_empty, kv_phase)
        kv_phase ^= 1
        low = 0
        if CAUSAL:
            low = tile * 64 * GROUPS // M
        each = q_tiles - low
        for n in range(each * HEADS_OF_KEY):
            head = h * HEADS_OF_KEY + n // each
            fetch(q, grad, b, head, (low + n % each) * M, q_s, grad_s, stage, full, empty, phase)
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _work(ROLE: gl.constexpr, tensors, rows, buffers, barriers, sizes, log2_scale, scale, H: gl.constexpr,
          HEADS_OF_KEY: gl.constexpr, CAUSAL: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr, M: gl.constexpr,
          STAGES: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    """What a group of warps does."""
    if ROLE < GROUPS:
        _consume_queries(ROLE, rows, buffers, barriers, sizes, log2_scale, scale, H, HEADS_OF_KEY, CAUSAL, D, GROUPS, M,
                         STAGES, EARLY)  # fmt: skip
    else:
        _produce_queries(tensors, buffers, barriers, sizes, H, HEADS_OF_KEY, CAUSAL, GROUPS, M, STAGES)


@gluon.jit
def key_kernel(q, k, v, grad, lse, delta, dk, dv, batch, q_length, length, together, log2_scale, scale,
               H: gl.constexpr, HEADS_OF_KEY: gl.constexpr, CAUSAL: gl.constexpr, D: gl.constexpr,
               GROUPS: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
               EARLY: gl.constexpr):  # fmt: skip
    """Gradients of keys and values: tiles of 64 * GROUPS keys of one head each, one after the other."""
    items = gl.cdiv(length, 64 * GROUPS) * batch * (H // HEADS_OF_KEY)
    first_item = gl.program_id(0)
    step = gl.num_programs(0)
    k_s = gl.allocate_shared_memory(k.dtype, [GROUPS] + k.block_type.shape, k.layout)
    v_s = gl.allocate_shared_memory(k.dtype, [GROUPS] + v.block_type.shape, v.layout)
    q_s = gl.allocate_shared_memory(k.dtype, [STAGES] + q.block_type.shape, q.layout)
    grad_s = gl.allocate_shared_memory(k.dtype, [STAGES] + grad.block_type.shape, grad.layout)
    barriers = (barrier_ring(GROUPS, 1), barrier_ring(GROUPS, 1), barrier_ring(STAGES, 1), barrier_ring(STAGES, GROUPS))
    fence_async_shared()
    sizes = (first_item, items, step, batch, q_length, length, together)
    gl.warp_specialize(
        [
            (_work, (role, (q, k, v, grad), (dk, dv, lse, delta), (k_s, v_s, q_s, grad_s), barriers, sizes, log2_scale,
                     scale, H, HEADS_OF_KEY, CAUSAL, D, GROUPS, ROWS, STAGES, EARLY))
            for role in (0, 1, 2, 3)[: GROUPS + 1]
        ],
        [4] * (GROUPS - 1) + [1],
        [REGISTERS] * (GROUPS - 1) + [24],
    )  # fmt: skip
