"""The gradient of the queries for `_hopper_flash_backward`, in Triton's Gluon."""

# ruff: noqa: RUF005 (Gluon has no starred lists)

from ._hopper_flash_backward_kernel import fetch, place, start
from ._hopper_flash_tiles import (
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
def _query_step(s, dq, q, grad, lse, delta, seen, k_s, v_s, full, stage, phase, after_stage, after_phase, log2_scale,
                masked, layout: gl.constexpr, out_layout: gl.constexpr, D: gl.constexpr, N: gl.constexpr,
                NEXT: gl.constexpr):  # fmt: skip
    """What a tile of keys adds to dq, and with NEXT the scores of the tile after it."""
    operand: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    dp = start(grad, v_s, stage, layout, N, D)
    p = gl.exp2(gl.fma(s, log2_scale, -lse[:, None]))
    if masked:
        p = gl.where(seen, p, 0.0)
    if NEXT:
        mbarrier.wait(full.index(after_stage), after_phase)
        scores = start(q, k_s, after_stage, layout, N, D)
        dp = warpgroup_mma_wait(1, deps=[dp])
    else:
        mbarrier.wait(full.index(stage), phase)  # it is: without it the compiler waits before the exponentials
        dp = warpgroup_mma_wait(0, deps=[dp])
    ds = p * (dp - delta[:, None])
    rounded = gl.convert_layout(ds.to(k_s.dtype), operand)
    dq = warpgroup_mma(rounded, k_s.index(stage).reshape([N, D]), dq, is_async=True)
    if NEXT:
        s, dq, rounded = warpgroup_mma_wait(0, deps=[scores, dq, rounded])
    else:
        dq, rounded = warpgroup_mma_wait(0, deps=[dq, rounded])
    return s, dq


@gluon.jit
def _consume_keys(GROUP: gl.constexpr, rows, buffers, barriers, sizes, log2_scale, scale, H: gl.constexpr,
                  CAUSAL: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
                  EARLY: gl.constexpr):  # fmt: skip
    """The gradients of 64 queries of one item after the other."""
    dq_out, lse_in, delta_in = rows
    q_s, grad_s, k_s, v_s = buffers
    q_full, q_empty, full, empty = barriers
    first_item, items, step, batch, q_length, length, together = sizes
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    dtype: gl.constexpr = k_s.dtype
    column = gl.arange(0, N, gl.SliceLayout(0, layout))
    q = q_s.index(GROUP).reshape([64, D])
    grad = grad_s.index(GROUP).reshape([64, D])
    stage = 0
    phase = 0
    q_phase = 0
    for item in range(first_item, items, step):
        b, h, tile = place(item, batch, gl.cdiv(q_length, 64 * GROUPS), together, H, CAUSAL)
        first = (tile * GROUPS + GROUP) * 64
        query = first + gl.arange(0, 64, gl.SliceLayout(1, layout))
        end = length
        if CAUSAL:
            end = gl.minimum(length, (tile + 1) * 64 * GROUPS)
        tiles = gl.cdiv(end, N)
        at = (b.to(gl.int64) * H + h) * q_length + query
        lse = gl.load(lse_in + at, query < q_length, other=float("inf"))
        delta = gl.load(delta_in + at, query < q_length, other=0.0)
        mbarrier.wait(q_full.index(GROUP), q_phase)
        q_phase ^= 1
        dq = gl.zeros([64, D], gl.float32, layout=out_layout)
        s = gl.zeros([64, N], gl.float32, layout=layout)
        if EARLY:
            mbarrier.wait(full.index(stage), phase)
            s = warpgroup_mma_wait(0, deps=[start(q, k_s, stage, layout, N, D)])
        for t in range(tiles - 1 if EARLY else tiles):
            after_stage, after_phase = next_stage(stage, phase, STAGES)
            if not EARLY:
                mbarrier.wait(full.index(stage), phase)
                s = warpgroup_mma_wait(0, deps=[start(q, k_s, stage, layout, N, D)])
            key = t * N + column
            seen = (key < length)[None, :]
            masked = (t + 1) * N > length
            if CAUSAL:
                seen = seen & (key[None, :] <= query[:, None])
                masked = (t + 1) * N > gl.minimum(length, first + 1)
            s, dq = _query_step(s, dq, q, grad, lse, delta, seen, k_s, v_s, full, stage, phase, after_stage,
                                after_phase, log2_scale, masked, layout, out_layout, D, N, EARLY)  # fmt: skip
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = after_stage, after_phase
        if EARLY:
            key = (tiles - 1) * N + column
            seen = (key < length)[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= query[:, None])
            s, dq = _query_step(s, dq, q, grad, lse, delta, seen, k_s, v_s, full, stage, phase, stage, phase,
                                log2_scale, True, layout, out_layout, D, N, False)  # fmt: skip
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
        mbarrier.arrive(q_empty.index(GROUP), count=1)
        row = first + gl.arange(0, 64, gl.SliceLayout(1, out_layout))
        lane = gl.arange(0, D, gl.SliceLayout(0, out_layout))
        out = ((b.to(gl.int64) * q_length + row.to(gl.int64)) * H + h)[:, None] * D + lane[None, :]
        gl.store(dq_out + out, (dq * scale).to(dtype), row[:, None] < q_length)


@gluon.jit
def _produce_keys(tensors, buffers, barriers, sizes, H: gl.constexpr, HEADS_OF_KEY: gl.constexpr,
                  CAUSAL: gl.constexpr, GROUPS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Moves queries and their gradients of an item, then the keys and values that they see."""
    q, k, v, grad = tensors
    q_s, grad_s, k_s, v_s = buffers
    q_full, q_empty, full, empty = barriers
    first_item, items, step, batch, q_length, length, together = sizes
    stage = 0
    phase = 1
    q_phase = 1
    for item in range(first_item, items, step):
        b, h, tile = place(item, batch, gl.cdiv(q_length, 64 * GROUPS), together, H, CAUSAL)
        for i in gl.static_range(GROUPS):
            fetch(q, grad, b, h, (tile * GROUPS + i) * 64, q_s, grad_s, i, q_full, q_empty, q_phase)
        q_phase ^= 1
        end = length
        if CAUSAL:
            end = gl.minimum(length, (tile + 1) * 64 * GROUPS)
        for t in range(gl.cdiv(end, N)):
            fetch(k, v, b, h // HEADS_OF_KEY, t * N, k_s, v_s, stage, full, empty, phase)
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _work(ROLE: gl.constexpr, tensors, rows, buffers, barriers, sizes, log2_scale, scale, H: gl.constexpr,
          HEADS_OF_KEY: gl.constexpr, CAUSAL: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr, N: gl.constexpr,
          STAGES: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    """What a group of warps does."""
    if ROLE < GROUPS:
        _consume_keys(ROLE, rows, buffers, barriers, sizes, log2_scale, scale, H, CAUSAL, D, GROUPS, N, STAGES, EARLY)
    else:
        _produce_keys(tensors, buffers, barriers, sizes, H, HEADS_OF_KEY, CAUSAL, GROUPS, N, STAGES)


@gluon.jit
def query_kernel(q, k, v, grad, lse, delta, dq, batch, q_length, length, together, log2_scale, scale, H: gl.constexpr,
                 HEADS_OF_KEY: gl.constexpr, CAUSAL: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr,
                 ROWS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, EARLY: gl.constexpr):  # fmt: skip
    """Gradients of queries: tiles of 64 * GROUPS queries of one head each, one after the other."""
    items = gl.cdiv(q_length, 64 * GROUPS) * batch * H
    first_item = gl.program_id(0)
    step = gl.num_programs(0)
    q_s = gl.allocate_shared_memory(k.dtype, [GROUPS] + q.block_type.shape, q.layout)
    grad_s = gl.allocate_shared_memory(k.dtype, [GROUPS] + grad.block_type.shape, grad.layout)
    k_s = gl.allocate_shared_memory(k.dtype, [STAGES] + k.block_type.shape, k.layout)
    v_s = gl.allocate_shared_memory(k.dtype, [STAGES] + v.block_type.shape, v.layout)
    barriers = (barrier_ring(GROUPS, 1), barrier_ring(GROUPS, 1), barrier_ring(STAGES, 1), barrier_ring(STAGES, GROUPS))
    fence_async_shared()
    sizes = (first_item, items, step, batch, q_length, length, together)
    gl.warp_specialize(
        [
            (_work, (role, (q, k, v, grad), (dq, lse, delta), (q_s, grad_s, k_s, v_s), barriers, sizes, log2_scale,
                     scale, H, HEADS_OF_KEY, CAUSAL, D, GROUPS, ROWS, STAGES, EARLY))
            for role in (0, 1, 2, 3)[: GROUPS + 1]
        ],
        [4] * (GROUPS - 1) + [1],
        [REGISTERS] * (GROUPS - 1) + [24],
    )  # fmt: skip
