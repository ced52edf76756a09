"""The device code of `_hopper_flash`, in Triton's Gluon."""

# ruff: noqa: RUF005 (Gluon has no starred lists)

from ._hopper_flash_softmax import add_before, decayed, masked, shifted, weights
from ._hopper_flash_tiles import (
    FIRST_NAME,
    MISSING,
    arrive,
    barrier_ring,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    meet,
    next_stage,
    place,
    produce,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = ["MISSING", "gl", "kernel"]


@gluon.jit
def _multiply_scores(q1, q2, k1_s, k2_s, stage, layout: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
                     N: gl.constexpr):  # fmt: skip
    """Starts q @ k.T."""
    zero = gl.zeros([64, N], gl.float32, layout=layout)
    k1 = k1_s.index(stage).reshape([N, D1]).permute((1, 0))
    scores = warpgroup_mma(q1, k1, zero, use_acc=False, is_async=True)
    if D2 > 0:
        k2 = k2_s.index(stage).reshape([N, D2]).permute((1, 0))
        scores = warpgroup_mma(q2, k2, scores, is_async=True)
    return scores


@gluon.jit
def _store(at, acc, inverse, first, q_length, H: gl.constexpr, FROM: gl.constexpr, LANES: gl.constexpr,
           D: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Lanes FROM to FROM + LANES of 64 rows of the result."""
    row = first + gl.arange(0, 64, gl.SliceLayout(1, layout))
    lane = FROM + gl.arange(0, LANES, gl.SliceLayout(0, layout))
    acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, layout))[:, None]
    gl.store(at + row.to(gl.int64)[:, None] * (H * D) + lane[None, :], acc.to(dtype), row[:, None] < q_length)


@gluon.jit
def _consume(GROUP: gl.constexpr, out, log2_scale, buffers, barriers, sizes, H: gl.constexpr, CAUSAL: gl.constexpr,
             D1: gl.constexpr, D2: gl.constexpr, GROUPS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
             TURNS: gl.constexpr, LAZY: gl.constexpr, ORDER: gl.constexpr):  # fmt: skip
    """64 queries of one item after the other against all their keys.

    LAZY, ORDER: see `shifted` and `add_before`. TURNS: the groups start their products in turn, so that one's
    exponentials run under the others' products.

    That nobody waits for ever is proved in docs/notes/attention.md.
    """
    q1_s, q2_s, k1_s, k2_s, v1_s, v2_s = buffers
    q_full, q_empty, k_full, v_full = barriers
    first_item, items, step, batch, q_length, length, together = sizes
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    layout1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    layout2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2 if D2 > 0 else D1, 16])
    p_layout1: gl.constexpr = gl.DotOperandLayout(0, layout1, 2)
    p_layout2: gl.constexpr = gl.DotOperandLayout(0, layout2, 2)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    dtype: gl.constexpr = v1_s.dtype
    PRODUCTS: gl.constexpr = 2 if D2 > 0 else 1  # one for each part of the lanes
    THREADS: gl.constexpr = 128 * GROUPS + 32
    K_EMPTY: gl.constexpr = FIRST_NAME
    V_EMPTY: gl.constexpr = FIRST_NAME + STAGES
    TURN: gl.constexpr = FIRST_NAME + 2 * STAGES
    col = gl.arange(0, N, gl.SliceLayout(0, s_layout))
    q1 = q1_s.index(GROUP).reshape([64, D1])
    q2 = q1
    if D2 > 0:
        q2 = q2_s.index(GROUP).reshape([64, D2])
    k_stage = 0
    k_phase = 0
    v_stage = 0
    v_phase = 0
    q_phase = 0
    for i in gl.static_range(2 * STAGES):
        arrive(FIRST_NAME + i, THREADS, 4)
    if TURNS and GROUP == GROUPS - 1:
        arrive(TURN, 256, 4)
    for item in range(first_item, items, step):
        b, h, tile, tiles = place(item, batch, q_length, length, together, H, CAUSAL, GROUPS, N)
        first = (tile * GROUPS + GROUP) * 64
        index = first + gl.arange(0, 64, rows)
        mbarrier.wait(q_full.index(GROUP), q_phase)
        mbarrier.wait(k_full.index(k_stage), k_phase)
        s = warpgroup_mma_wait(0, deps=[_multiply_scores(q1, q2, k1_s, k2_s, k_stage, s_layout, D1, D2, N)])
        arrive(K_EMPTY + k_stage, THREADS, 4)
        k_stage, k_phase = next_stage(k_stage, k_phase, STAGES)
        key = (tiles - 1) * N + col
        if CAUSAL:
            s = gl.where((key[None, :] < length) & (key[None, :] <= index[:, None]), s, -float("inf"))
        elif tiles * N > length:
            s = gl.where(key[None, :] < length, s, -float("inf"))
        x, shift, decay = shifted(s, gl.full([64], -float("inf"), gl.float32, rows), log2_scale, N, LAZY)
        p, total = weights(x, N)
        p1 = gl.convert_layout(p.to(dtype), p_layout1)
        p2 = p1
        acc1 = gl.zeros([64, D1], gl.float32, layout=layout1)
        if D2 > 0:
            acc2 = gl.zeros([64, D2], gl.float32, layout=layout2)
            p2 = gl.convert_layout(p.to(dtype), p_layout2)
        for t in range(1, tiles):
            mbarrier.wait(k_full.index(k_stage), k_phase)
            mbarrier.wait(v_full.index(v_stage), v_phase)
            if TURNS:
                meet(TURN + GROUP, 256, 4)
            scores = _multiply_scores(q1, q2, k1_s, k2_s, k_stage, s_layout, D1, D2, N)
            sums1 = warpgroup_mma(p1, v1_s.index(v_stage).reshape([N, D1]), acc1, is_async=True)
            if D2 > 0:
                sums2 = warpgroup_mma(p2, v2_s.index(v_stage).reshape([N, D2]), acc2, is_async=True)
            if TURNS:
                arrive(TURN + (GROUP + 1) % GROUPS, 256, 4)
            s = warpgroup_mma_wait(PRODUCTS, deps=[scores])
            arrive(K_EMPTY + k_stage, THREADS, 4)
            k_stage, k_phase = next_stage(k_stage, k_phase, STAGES)
            if CAUSAL and GROUPS * 64 > N:
                s = masked(s, tiles, t, first, index, col, N)
            x, shift, decay = shifted(s, shift, log2_scale, N, LAZY)
            p, sums = weights(x, N)
            if ORDER:
                total = add_before(total, decay, sums)
            else:
                total = total * gl.convert_layout(decay, gl.SliceLayout(1, total.type.layout))[:, None] + sums
            if D2 > 0:
                acc1, acc2, p1, p2 = warpgroup_mma_wait(0, deps=[sums1, sums2, p1, p2])
                acc2 = decayed(acc2, decay, D2 // 2, LAZY)
                p2 = gl.convert_layout(p.to(dtype), p_layout2)
            else:
                acc1, p1 = warpgroup_mma_wait(0, deps=[sums1, p1])
            arrive(V_EMPTY + v_stage, THREADS, 4)
            v_stage, v_phase = next_stage(v_stage, v_phase, STAGES)
            p1 = gl.convert_layout(p.to(dtype), p_layout1)
            acc1 = decayed(acc1, decay, D1 // 2, LAZY)
        q_phase ^= 1
        mbarrier.arrive(q_empty.index(GROUP), count=1)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        sums1 = warpgroup_mma(p1, v1_s.index(v_stage).reshape([N, D1]), acc1, is_async=True)
        if D2 > 0:
            sums2 = warpgroup_mma(p2, v2_s.index(v_stage).reshape([N, D2]), acc2, is_async=True)
        inverse = gl.convert_layout(1.0 / gl.sum(total, 1), rows)
        if D2 > 0:
            acc1, acc2, p1, p2 = warpgroup_mma_wait(0, deps=[sums1, sums2, p1, p2])
        else:
            acc1, p1 = warpgroup_mma_wait(0, deps=[sums1, p1])
        arrive(V_EMPTY + v_stage, THREADS, 4)
        v_stage, v_phase = next_stage(v_stage, v_phase, STAGES)
        at = out + (b.to(gl.int64) * q_length * H + h) * (D1 + D2)
        if D2 > 0:
            _store(at, acc2, inverse, first, q_length, H, D1, D2, D1 + D2, dtype, layout2)
        _store(at, acc1, inverse, first, q_length, H, 0, D1, D1 + D2, dtype, layout1)
    if TURNS and GROUP == 0:
        meet(TURN, 256, 4)


@gluon.jit
def _work(ROLE: gl.constexpr, tensors, out, log2_scale, buffers, barriers, sizes, H: gl.constexpr,
          HEADS_OF_KEY: gl.constexpr, CAUSAL: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, GROUPS: gl.constexpr,
          N: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, LAZY: gl.constexpr,
          ORDER: gl.constexpr):  # fmt: skip
    """What a group of warps does."""
    if ROLE < GROUPS:
        _consume(
            ROLE, out, log2_scale, buffers, barriers, sizes, H, CAUSAL, D1, D2, GROUPS, N, STAGES, TURNS, LAZY, ORDER
        )
    else:
        produce(tensors, buffers, barriers, sizes, H, HEADS_OF_KEY, CAUSAL, D2, GROUPS, N, STAGES)


@gluon.jit
def kernel(q1, q2, k1, k2, v1, v2, out, batch, q_length, length, log2_scale, together, H: gl.constexpr,
           HEADS_OF_KEY: gl.constexpr, CAUSAL: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
           GROUPS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
           TURNS: gl.constexpr, LAZY: gl.constexpr, ORDER: gl.constexpr):  # fmt: skip
    """Tiles of 64 * GROUPS queries of one head each, one after the other."""
    items = gl.cdiv(q_length, 64 * GROUPS) * batch * H
    first_item = gl.program_id(0)
    step = gl.num_programs(0)

    q1_s = gl.allocate_shared_memory(q1.dtype, [GROUPS] + q1.block_type.shape, q1.layout)
    k1_s = gl.allocate_shared_memory(q1.dtype, [STAGES] + k1.block_type.shape, k1.layout)
    v1_s = gl.allocate_shared_memory(q1.dtype, [STAGES] + v1.block_type.shape, v1.layout)
    q2_s, k2_s, v2_s = q1_s, k1_s, v1_s
    if D2 > 0:
        q2_s = gl.allocate_shared_memory(q1.dtype, [GROUPS] + q2.block_type.shape, q2.layout)
        k2_s = gl.allocate_shared_memory(q1.dtype, [STAGES] + k2.block_type.shape, k2.layout)
        v2_s = gl.allocate_shared_memory(q1.dtype, [STAGES] + v2.block_type.shape, v2.layout)
    gl.static_assert(FIRST_NAME + 2 * STAGES + (GROUPS if TURNS else 0) <= 16, "a processor has 16 barriers")
    gl.static_assert(GROUPS > 1 or not TURNS, "a group of its own has no turns")
    q_full, q_empty = barrier_ring(GROUPS, 1), barrier_ring(GROUPS, 1)
    k_full, v_full = barrier_ring(STAGES, 1), barrier_ring(STAGES, 1)
    fence_async_shared()

    buffers = (q1_s, q2_s, k1_s, k2_s, v1_s, v2_s)
    barriers = (q_full, q_empty, k_full, v_full)
    tensors = (q1, q2, k1, k2, v1, v2)
    sizes = (first_item, items, step, batch, q_length, length, together)
    gl.warp_specialize(
        [
            (_work, (role, tensors, out, log2_scale, buffers, barriers, sizes, H, HEADS_OF_KEY, CAUSAL, D1, D2, GROUPS,
                     N, STAGES, TURNS, LAZY, ORDER))
            for role in (0, 1, 2, 3)[: GROUPS + 1]
        ],
        [4] * (GROUPS - 1) + [1],
        [REGISTERS] * (GROUPS - 1) + [24],
    )  # fmt: skip
