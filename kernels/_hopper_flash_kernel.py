"""The device code of `_hopper_flash`, in Triton's Gluon."""

# ruff: noqa: RUF005 (Gluon has no starred lists)

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

    # Triton 3.6 calls it async_copy_global_to_shared; later versions keep that name only to refuse it.
    async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    MISSING = ""
except ImportError as error:  # no Triton, or one before or after this language
    from ._ops import tl as gl
    from ._ops import triton as gluon

    MISSING = f"Triton's Gluon language is not there: {error}"


@gluon.jit
def _place(item, batch, q_length, length, together, H: gl.constexpr, CAUSAL: gl.constexpr, GROUPS: gl.constexpr,
           N: gl.constexpr):  # fmt: skip
    """Batch, head and tile of queries of an item, and how many tiles of keys it sees."""
    q_tiles = gl.cdiv(q_length, 64 * GROUPS)
    pair = item // (together * q_tiles) * together
    within = item % (together * q_tiles)
    width = gl.minimum(together, batch * H - pair)
    tile = q_tiles - 1 - within // width
    pair += within % width
    end = length
    if CAUSAL:
        end = gl.minimum(length, (tile + 1) * 64 * GROUPS)
    return pair // H, pair % H, tile, gl.cdiv(end, N)


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """The next place in a ring, and the parity of its barrier."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _produce(q1, q2, k1, k2, v1, v2, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full, k_empty, v_full,
             v_empty, first_item, items, step, batch, q_length, length, together, H: gl.constexpr,
             HEADS_OF_KEY: gl.constexpr, CAUSAL: gl.constexpr, D2: gl.constexpr, GROUPS: gl.constexpr,
             N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Moves queries, then keys and values, last tile first, of one item after the other."""
    q_bytes: gl.constexpr = q1.block_type.nbytes + (q2.block_type.nbytes if D2 > 0 else 0)
    k_bytes: gl.constexpr = k1.block_type.nbytes + (k2.block_type.nbytes if D2 > 0 else 0)
    stage = 0
    phase = 1
    q_phase = 1
    for item in range(first_item, items, step):
        b, h, tile, tiles = _place(item, batch, q_length, length, together, H, CAUSAL, GROUPS, N)
        kv = h // HEADS_OF_KEY
        for i in gl.static_range(GROUPS):
            row = (tile * GROUPS + i) * 64
            mbarrier.wait(q_empty.index(i), q_phase)
            mbarrier.expect(q_full.index(i), q_bytes)
            async_load(q1, [b, h, row, 0], q_full.index(i), q1_s.index(i))
            if D2 > 0:
                async_load(q2, [b, h, row, 0], q_full.index(i), q2_s.index(i))
        q_phase ^= 1
        for t in range(tiles):
            row = (tiles - 1 - t) * N
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k_bytes)
            async_load(k1, [b, kv, row, 0], k_full.index(stage), k1_s.index(stage))
            if D2 > 0:
                async_load(k2, [b, kv, row, 0], k_full.index(stage), k2_s.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), k_bytes)
            async_load(v1, [b, kv, row, 0], v_full.index(stage), v1_s.index(stage))
            if D2 > 0:
                async_load(v2, [b, kv, row, 0], v_full.index(stage), v2_s.index(stage))
            stage, phase = _next(stage, phase, STAGES)


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
def _weights(s, shift, log2_scale):
    """exp(scores - largest), in fp32: one rounding, large scores lose nothing."""
    return gl.exp2(gl.fma(s, log2_scale, -shift[:, None]))


@gluon.jit
def _consume(GROUP: gl.constexpr, out, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full, k_empty, v_full,
             v_empty, first_item, items, step, batch, q_length, length, together, log2_scale, H: gl.constexpr,
             CAUSAL: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr, GROUPS: gl.constexpr, N: gl.constexpr,
             STAGES: gl.constexpr):  # fmt: skip
    """64 queries of one item after the other against all their keys."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    layout1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 16])
    layout2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2 if D2 > 0 else D1, 16])
    p_layout1: gl.constexpr = gl.DotOperandLayout(0, layout1, 2)
    p_layout2: gl.constexpr = gl.DotOperandLayout(0, layout2, 2)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows1: gl.constexpr = gl.SliceLayout(1, layout1)
    rows2: gl.constexpr = gl.SliceLayout(1, layout2)
    dtype: gl.constexpr = v1_s.dtype
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
    for item in range(first_item, items, step):
        b, h, tile, tiles = _place(item, batch, q_length, length, together, H, CAUSAL, GROUPS, N)
        first = (tile * GROUPS + GROUP) * 64
        index = first + gl.arange(0, 64, rows)
        mbarrier.wait(q_full.index(GROUP), q_phase)
        q_phase ^= 1
        mbarrier.wait(k_full.index(k_stage), k_phase)
        s = warpgroup_mma_wait(0, deps=[_multiply_scores(q1, q2, k1_s, k2_s, k_stage, s_layout, D1, D2, N)])
        mbarrier.arrive(k_empty.index(k_stage), count=1)
        k_stage, k_phase = _next(k_stage, k_phase, STAGES)
        key = (tiles - 1) * N + col
        seen = key[None, :] < length
        if CAUSAL:
            seen = seen & (key[None, :] <= index[:, None])
        s = gl.where(seen, s, -float("inf"))
        top = gl.max(s, 1)
        shift = gl.where(top == -float("inf"), 0.0, top * log2_scale)  # no inf - inf before the first score
        p = _weights(s, shift, log2_scale)
        total = gl.sum(p, 1)
        p1 = gl.convert_layout(p.to(dtype), p_layout1)
        p2 = p1
        acc1 = gl.zeros([64, D1], gl.float32, layout=layout1)
        if D2 > 0:
            acc2 = gl.zeros([64, D2], gl.float32, layout=layout2)
            p2 = gl.convert_layout(p.to(dtype), p_layout2)
        for t in range(1, tiles):
            mbarrier.wait(k_full.index(k_stage), k_phase)
            scores = _multiply_scores(q1, q2, k1_s, k2_s, k_stage, s_layout, D1, D2, N)
            mbarrier.wait(v_full.index(v_stage), v_phase)
            sums1 = warpgroup_mma(p1, v1_s.index(v_stage).reshape([N, D1]), acc1, is_async=True)
            if D2 > 0:
                sums2 = warpgroup_mma(p2, v2_s.index(v_stage).reshape([N, D2]), acc2, is_async=True)
                s = warpgroup_mma_wait(2, deps=[scores])
            else:
                s = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(k_empty.index(k_stage), count=1)
            k_stage, k_phase = _next(k_stage, k_phase, STAGES)
            if CAUSAL and GROUPS * 64 > N:  # noqa: SIM102 (known when it is compiled)
                if (tiles - t) * N > first + 1:
                    s = gl.where(((tiles - 1 - t) * N + col)[None, :] <= index[:, None], s, -float("inf"))
            new_top = gl.maximum(top, gl.max(s, 1))
            shift = gl.where(new_top == -float("inf"), 0.0, new_top * log2_scale)
            p = _weights(s, shift, log2_scale)
            decay = gl.exp2(gl.fma(top, log2_scale, -shift))
            total = total * decay + gl.sum(p, 1)
            top = new_top
            mbarrier.wait(v_full.index(v_stage), v_phase)
            if D2 > 0:
                acc1, acc2, p1, p2 = warpgroup_mma_wait(0, deps=[sums1, sums2, p1, p2])
                acc2 = acc2 * gl.convert_layout(decay, rows2)[:, None]
                p2 = gl.convert_layout(p.to(dtype), p_layout2)
            else:
                acc1, p1 = warpgroup_mma_wait(0, deps=[sums1, p1])
            mbarrier.arrive(v_empty.index(v_stage), count=1)
            v_stage, v_phase = _next(v_stage, v_phase, STAGES)
            acc1 = acc1 * gl.convert_layout(decay, rows1)[:, None]
            p1 = gl.convert_layout(p.to(dtype), p_layout1)
        mbarrier.arrive(q_empty.index(GROUP), count=1)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        sums1 = warpgroup_mma(p1, v1_s.index(v_stage).reshape([N, D1]), acc1, is_async=True)
        inverse = 1.0 / total
        at = out + (b.to(gl.int64) * q_length * H + h) * (D1 + D2)
        if D2 > 0:
            sums2 = warpgroup_mma(p2, v2_s.index(v_stage).reshape([N, D2]), acc2, is_async=True)
            acc1, acc2, p1, p2 = warpgroup_mma_wait(0, deps=[sums1, sums2, p1, p2])
        else:
            acc1, p1 = warpgroup_mma_wait(0, deps=[sums1, p1])
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        v_stage, v_phase = _next(v_stage, v_phase, STAGES)
        if D2 > 0:
            row = first + gl.arange(0, 64, rows2)
            lane = D1 + gl.arange(0, D2, gl.SliceLayout(0, layout2))
            acc2 = acc2 * gl.convert_layout(inverse, rows2)[:, None]
            at2 = at + row.to(gl.int64)[:, None] * (H * (D1 + D2)) + lane[None, :]
            gl.store(at2, acc2.to(dtype), row[:, None] < q_length)
        row = first + gl.arange(0, 64, rows1)
        lane = gl.arange(0, D1, gl.SliceLayout(0, layout1))
        acc1 = acc1 * gl.convert_layout(inverse, rows1)[:, None]
        at1 = at + row.to(gl.int64)[:, None] * (H * (D1 + D2)) + lane[None, :]
        gl.store(at1, acc1.to(dtype), row[:, None] < q_length)


@gluon.jit
def kernel(q1, q2, k1, k2, v1, v2, out, batch, q_length, length, log2_scale, together, H: gl.constexpr,
           HEADS_OF_KEY: gl.constexpr, CAUSAL: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
           GROUPS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr):  # fmt: skip
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
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    fence_async_shared()

    # The constants have to be named in each call: a variable would make numbers of the program of them.
    if GROUPS == 1:
        gl.warp_specialize([
            (_consume, (0, out, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full, k_empty, v_full,
                        v_empty, first_item, items, step, batch, q_length, length, together, log2_scale, H, CAUSAL,
                        D1, D2, GROUPS, N, STAGES)),
            (_produce, (q1, q2, k1, k2, v1, v2, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full,
                        k_empty, v_full, v_empty, first_item, items, step, batch, q_length, length, together, H,
                        HEADS_OF_KEY, CAUSAL, D2, GROUPS, N, STAGES)),
        ], [1], [24])  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize([
            (_consume, (0, out, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full, k_empty, v_full,
                        v_empty, first_item, items, step, batch, q_length, length, together, log2_scale, H, CAUSAL,
                        D1, D2, GROUPS, N, STAGES)),
            (_consume, (1, out, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full, k_empty, v_full,
                        v_empty, first_item, items, step, batch, q_length, length, together, log2_scale, H, CAUSAL,
                        D1, D2, GROUPS, N, STAGES)),
            (_produce, (q1, q2, k1, k2, v1, v2, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full,
                        k_empty, v_full, v_empty, first_item, items, step, batch, q_length, length, together, H,
                        HEADS_OF_KEY, CAUSAL, D2, GROUPS, N, STAGES)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (0, out, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full, k_empty, v_full,
                        v_empty, first_item, items, step, batch, q_length, length, together, log2_scale, H, CAUSAL,
                        D1, D2, GROUPS, N, STAGES)),
            (_consume, (1, out, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full, k_empty, v_full,
                        v_empty, first_item, items, step, batch, q_length, length, together, log2_scale, H, CAUSAL,
                        D1, D2, GROUPS, N, STAGES)),
            (_consume, (2, out, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full, k_empty, v_full,
                        v_empty, first_item, items, step, batch, q_length, length, together, log2_scale, H, CAUSAL,
                        D1, D2, GROUPS, N, STAGES)),
            (_produce, (q1, q2, k1, k2, v1, v2, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full,
                        k_empty, v_full, v_empty, first_item, items, step, batch, q_length, length, together, H,
                        HEADS_OF_KEY, CAUSAL, D2, GROUPS, N, STAGES)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
