"""The device code of `_hopper_flash`, in Triton's Gluon."""

# ruff: noqa: RUF005 (Gluon has no starred lists)

from ._hopper_flash_tiles import (
    MISSING,
    barrier_ring,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
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
def _weights(s, top, log2_scale):
    """exp(scores - largest), in fp32: one rounding, large scores lose nothing; and the largest, scaled."""
    shift = gl.where(top == -float("inf"), 0.0, top * log2_scale)  # no inf - inf before the first score
    return gl.exp2(gl.fma(s, log2_scale, -shift[:, None])), shift


@gluon.jit
def _sums(p, N: gl.constexpr):
    """Of each row four sums, each of one thread's columns: the threads add theirs up once, at the end."""
    return gl.sum(gl.sum(p.reshape([64, N // 8, 4, 2]), 3), 1)


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
             TURNS: gl.constexpr, AHEAD: gl.constexpr):  # fmt: skip
    """64 queries of one item after the other against all their keys.

    TURNS: the groups start their products in turn, so that one's exponentials run under the others' products.
    AHEAD: the first scores of the next item are multiplied under the end of this one.

    That nobody waits for ever is proved in docs/notes/attention.md.
    """
    q1_s, q2_s, k1_s, k2_s, v1_s, v2_s = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = barriers
    first_item, items, step, batch, q_length, length, together = sizes
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    layout1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    layout2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2 if D2 > 0 else D1, 16])
    p_layout1: gl.constexpr = gl.DotOperandLayout(0, layout1, 2)
    p_layout2: gl.constexpr = gl.DotOperandLayout(0, layout2, 2)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows1: gl.constexpr = gl.SliceLayout(1, layout1)
    rows2: gl.constexpr = gl.SliceLayout(1, layout2)
    dtype: gl.constexpr = v1_s.dtype
    PRODUCTS: gl.constexpr = 2 if D2 > 0 else 1  # one for each part of the lanes
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
    turn_phase = 1 if GROUP == 0 else 0  # the first turn is the first group's
    if AHEAD:
        mbarrier.wait(q_full.index(GROUP), q_phase)
        q_phase ^= 1
        mbarrier.wait(k_full.index(k_stage), k_phase)
        s = warpgroup_mma_wait(0, deps=[_multiply_scores(q1, q2, k1_s, k2_s, k_stage, s_layout, D1, D2, N)])
        mbarrier.arrive(k_empty.index(k_stage), count=1)
        k_stage, k_phase = next_stage(k_stage, k_phase, STAGES)
    for item in range(first_item, items, step):
        b, h, tile, tiles = place(item, batch, q_length, length, together, H, CAUSAL, GROUPS, N)
        first = (tile * GROUPS + GROUP) * 64
        index = first + gl.arange(0, 64, rows)
        if not AHEAD:
            mbarrier.wait(q_full.index(GROUP), q_phase)
            q_phase ^= 1
            mbarrier.wait(k_full.index(k_stage), k_phase)
            s = warpgroup_mma_wait(0, deps=[_multiply_scores(q1, q2, k1_s, k2_s, k_stage, s_layout, D1, D2, N)])
            mbarrier.arrive(k_empty.index(k_stage), count=1)
            k_stage, k_phase = next_stage(k_stage, k_phase, STAGES)
        key = (tiles - 1) * N + col
        if CAUSAL:
            s = gl.where((key[None, :] < length) & (key[None, :] <= index[:, None]), s, -float("inf"))
        elif tiles * N > length:
            s = gl.where(key[None, :] < length, s, -float("inf"))
        top = gl.max(s, 1)
        p, shift = _weights(s, top, log2_scale)
        total = _sums(p, N)
        p1 = gl.convert_layout(p.to(dtype), p_layout1)
        p2 = p1
        acc1 = gl.zeros([64, D1], gl.float32, layout=layout1)
        if D2 > 0:
            acc2 = gl.zeros([64, D2], gl.float32, layout=layout2)
            p2 = gl.convert_layout(p.to(dtype), p_layout2)
        for t in range(1, tiles):
            mbarrier.wait(v_full.index(v_stage), v_phase)
            mbarrier.wait(k_full.index(k_stage), k_phase)
            if TURNS:
                mbarrier.wait(turn.index(GROUP), turn_phase)
                turn_phase ^= 1
            scores = _multiply_scores(q1, q2, k1_s, k2_s, k_stage, s_layout, D1, D2, N)
            sums1 = warpgroup_mma(p1, v1_s.index(v_stage).reshape([N, D1]), acc1, is_async=True)
            if D2 > 0:
                sums2 = warpgroup_mma(p2, v2_s.index(v_stage).reshape([N, D2]), acc2, is_async=True)
            if TURNS:
                mbarrier.arrive(turn.index((GROUP + 1) % GROUPS), count=1)
            s = warpgroup_mma_wait(PRODUCTS, deps=[scores])
            mbarrier.arrive(k_empty.index(k_stage), count=1)
            k_stage, k_phase = next_stage(k_stage, k_phase, STAGES)
            if CAUSAL and GROUPS * 64 > N:  # noqa: SIM102 (known when it is compiled)
                if (tiles - t) * N > first + 1:
                    s = gl.where(((tiles - 1 - t) * N + col)[None, :] <= index[:, None], s, -float("inf"))
            new_top = gl.maximum(top, gl.max(s, 1))
            p, shift = _weights(s, new_top, log2_scale)
            decay = gl.exp2(gl.fma(top, log2_scale, -shift))
            sums = _sums(p, N)
            total = total * gl.convert_layout(decay, gl.SliceLayout(1, total.type.layout))[:, None] + sums
            top = new_top
            # Met since the item began. Without a branch here ptxas moves the products' end before the exponentials.
            mbarrier.wait(q_full.index(GROUP), q_phase ^ 1)
            if D2 > 0:
                acc1, acc2, p1, p2 = warpgroup_mma_wait(0, deps=[sums1, sums2, p1, p2])
                acc2 = acc2 * gl.convert_layout(decay, rows2)[:, None]
                p2 = gl.convert_layout(p.to(dtype), p_layout2)
            else:
                acc1, p1 = warpgroup_mma_wait(0, deps=[sums1, p1])
            mbarrier.arrive(v_empty.index(v_stage), count=1)
            v_stage, v_phase = next_stage(v_stage, v_phase, STAGES)
            acc1 = acc1 * gl.convert_layout(decay, rows1)[:, None]
            p1 = gl.convert_layout(p.to(dtype), p_layout1)
        mbarrier.arrive(q_empty.index(GROUP), count=1)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        sums1 = warpgroup_mma(p1, v1_s.index(v_stage).reshape([N, D1]), acc1, is_async=True)
        if D2 > 0:
            sums2 = warpgroup_mma(p2, v2_s.index(v_stage).reshape([N, D2]), acc2, is_async=True)
        inverse = gl.convert_layout(1.0 / gl.sum(total, 1), rows)
        if AHEAD:
            more = item + step < items
            if more:
                mbarrier.wait(q_full.index(GROUP), q_phase)
                mbarrier.wait(k_full.index(k_stage), k_phase)
            q_phase ^= 1
            # After the last item, of tiles that nobody needs: a product must not depend on a condition.
            scores = _multiply_scores(q1, q2, k1_s, k2_s, k_stage, s_layout, D1, D2, N)
        if D2 > 0:
            acc1, acc2, p1, p2 = warpgroup_mma_wait(PRODUCTS if AHEAD else 0, deps=[sums1, sums2, p1, p2])
        else:
            acc1, p1 = warpgroup_mma_wait(PRODUCTS if AHEAD else 0, deps=[sums1, p1])
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        v_stage, v_phase = next_stage(v_stage, v_phase, STAGES)
        at = out + (b.to(gl.int64) * q_length * H + h) * (D1 + D2)
        if D2 > 0:
            _store(at, acc2, inverse, first, q_length, H, D1, D2, D1 + D2, dtype, layout2)
        _store(at, acc1, inverse, first, q_length, H, 0, D1, D1 + D2, dtype, layout1)
        if AHEAD:
            s = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(k_stage), count=1, pred=more)
            k_stage, k_phase = next_stage(k_stage, k_phase, STAGES)


@gluon.jit
def _work(ROLE: gl.constexpr, tensors, out, log2_scale, buffers, barriers, sizes, H: gl.constexpr,
          HEADS_OF_KEY: gl.constexpr, CAUSAL: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, GROUPS: gl.constexpr,
          N: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, AHEAD: gl.constexpr):  # fmt: skip
    """What a group of warps does."""
    if ROLE < GROUPS:
        _consume(ROLE, out, log2_scale, buffers, barriers, sizes, H, CAUSAL, D1, D2, GROUPS, N, STAGES, TURNS, AHEAD)
    else:
        produce(tensors, buffers, barriers, sizes, H, HEADS_OF_KEY, CAUSAL, D2, GROUPS, N, STAGES)


@gluon.jit
def kernel(q1, q2, k1, k2, v1, v2, out, batch, q_length, length, log2_scale, together, H: gl.constexpr,
           HEADS_OF_KEY: gl.constexpr, CAUSAL: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
           GROUPS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
           TURNS: gl.constexpr, AHEAD: gl.constexpr):  # fmt: skip
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
    q_full, q_empty, turn = barrier_ring(GROUPS, 1), barrier_ring(GROUPS, 1), barrier_ring(GROUPS, 1)
    k_full, v_full = barrier_ring(STAGES, 1), barrier_ring(STAGES, 1)
    k_empty, v_empty = barrier_ring(STAGES, GROUPS), barrier_ring(STAGES, GROUPS)
    fence_async_shared()

    buffers = (q1_s, q2_s, k1_s, k2_s, v1_s, v2_s)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turn)
    tensors = (q1, q2, k1, k2, v1, v2)
    sizes = (first_item, items, step, batch, q_length, length, together)
    gl.warp_specialize(
        [
            (_work, (role, tensors, out, log2_scale, buffers, barriers, sizes, H, HEADS_OF_KEY, CAUSAL, D1, D2, GROUPS,
                     N, STAGES, TURNS, AHEAD))
            for role in (0, 1, 2, 3)[: GROUPS + 1]
        ],
        [4] * (GROUPS - 1) + [1],
        [REGISTERS] * (GROUPS - 1) + [24],
    )  # fmt: skip
