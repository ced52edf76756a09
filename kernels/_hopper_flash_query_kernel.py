"""The gradient of the queries for `_hopper_flash_backward`, in Triton's Gluon."""

# ruff: noqa: RUF005 (Gluon has no starred lists)

from ._hopper_flash_backward_kernel import _fetch, _place, _start
from ._hopper_flash_kernel import MISSING, _next, gl, gluon

if not MISSING:
    from ._hopper_flash_kernel import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def _query_step(s, dq, q, grad, lse, delta, seen, k_s, v_s, full, stage, next_stage, next_phase, log2_scale, masked,
                layout: gl.constexpr, out_layout: gl.constexpr, D: gl.constexpr, N: gl.constexpr,
                NEXT: gl.constexpr):  # fmt: skip
    """What a tile of keys adds to dq, and with NEXT the scores of the tile after it."""
    operand: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    dp = _start(grad, v_s, stage, layout, N, D)
    p = gl.exp2(gl.fma(s, log2_scale, -lse[:, None]))
    if masked:
        p = gl.where(seen, p, 0.0)
    if NEXT:
        mbarrier.wait(full.index(next_stage), next_phase)
        scores = _start(q, k_s, next_stage, layout, N, D)
        dp = warpgroup_mma_wait(1, deps=[dp])
    else:
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
def _consume_keys(GROUP: gl.constexpr, dq_out, lse_in, delta_in, q_s, grad_s, k_s, v_s, q_full, q_empty, full, empty,
                  first_item, items, step, batch, q_length, length, together, log2_scale, scale, H: gl.constexpr,
                  CAUSAL: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
                  EARLY: gl.constexpr):  # fmt: skip
    """The gradients of 64 queries of one item after the other."""
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
        b, h, tile = _place(item, batch, gl.cdiv(q_length, 64 * GROUPS), together, H, CAUSAL)
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
            s = warpgroup_mma_wait(0, deps=[_start(q, k_s, stage, layout, N, D)])
        for t in range(tiles - 1 if EARLY else tiles):
            next_stage, next_phase = _next(stage, phase, STAGES)
            if not EARLY:
                mbarrier.wait(full.index(stage), phase)
                s = warpgroup_mma_wait(0, deps=[_start(q, k_s, stage, layout, N, D)])
            key = t * N + column
            seen = (key < length)[None, :]
            masked = (t + 1) * N > length
            if CAUSAL:
                seen = seen & (key[None, :] <= query[:, None])
                masked = (t + 1) * N > gl.minimum(length, first + 1)
            s, dq = _query_step(s, dq, q, grad, lse, delta, seen, k_s, v_s, full, stage, next_stage, next_phase,
                                log2_scale, masked, layout, out_layout, D, N, EARLY)  # fmt: skip
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_stage, next_phase
        if EARLY:
            key = (tiles - 1) * N + column
            seen = (key < length)[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= query[:, None])
            s, dq = _query_step(s, dq, q, grad, lse, delta, seen, k_s, v_s, full, stage, stage, phase, log2_scale,
                                True, layout, out_layout, D, N, False)  # fmt: skip
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = _next(stage, phase, STAGES)
        mbarrier.arrive(q_empty.index(GROUP), count=1)
        row = first + gl.arange(0, 64, gl.SliceLayout(1, out_layout))
        lane = gl.arange(0, D, gl.SliceLayout(0, out_layout))
        out = ((b.to(gl.int64) * q_length + row.to(gl.int64)) * H + h)[:, None] * D + lane[None, :]
        gl.store(dq_out + out, (dq * scale).to(dtype), row[:, None] < q_length)


@gluon.jit
def _produce_keys(q, k, v, grad, q_s, grad_s, k_s, v_s, q_full, q_empty, full, empty, first_item, items, step, batch,
                  q_length, length, together, H: gl.constexpr, HEADS_OF_KEY: gl.constexpr, CAUSAL: gl.constexpr,
                  GROUPS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Moves queries and their gradients of an item, then the keys and values that they see."""
    stage = 0
    phase = 1
    q_phase = 1
    for item in range(first_item, items, step):
        b, h, tile = _place(item, batch, gl.cdiv(q_length, 64 * GROUPS), together, H, CAUSAL)
        for i in gl.static_range(GROUPS):
            _fetch(q, grad, b, h, (tile * GROUPS + i) * 64, q_s, grad_s, i, q_full, q_empty, q_phase)
        q_phase ^= 1
        end = length
        if CAUSAL:
            end = gl.minimum(length, (tile + 1) * 64 * GROUPS)
        for t in range(gl.cdiv(end, N)):
            _fetch(k, v, b, h // HEADS_OF_KEY, t * N, k_s, v_s, stage, full, empty, phase)
            stage, phase = _next(stage, phase, STAGES)


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
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()

    # The constants have to be named in each call: a variable would make numbers of the program of them.
    if GROUPS == 2:
        gl.warp_specialize([
            (_consume_keys, (0, dq, lse, delta, q_s, grad_s, k_s, v_s, q_full, q_empty, full, empty, first_item, items,
                             step, batch, q_length, length, together, log2_scale, scale, H, CAUSAL, D, GROUPS, ROWS,
                             STAGES, EARLY)),
            (_consume_keys, (1, dq, lse, delta, q_s, grad_s, k_s, v_s, q_full, q_empty, full, empty, first_item, items,
                             step, batch, q_length, length, together, log2_scale, scale, H, CAUSAL, D, GROUPS, ROWS,
                             STAGES, EARLY)),
            (_produce_keys, (q, k, v, grad, q_s, grad_s, k_s, v_s, q_full, q_empty, full, empty, first_item, items,
                             step, batch, q_length, length, together, H, HEADS_OF_KEY, CAUSAL, GROUPS, ROWS, STAGES)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume_keys, (0, dq, lse, delta, q_s, grad_s, k_s, v_s, q_full, q_empty, full, empty, first_item, items,
                             step, batch, q_length, length, together, log2_scale, scale, H, CAUSAL, D, GROUPS, ROWS,
                             STAGES, EARLY)),
            (_consume_keys, (1, dq, lse, delta, q_s, grad_s, k_s, v_s, q_full, q_empty, full, empty, first_item, items,
                             step, batch, q_length, length, together, log2_scale, scale, H, CAUSAL, D, GROUPS, ROWS,
                             STAGES, EARLY)),
            (_consume_keys, (2, dq, lse, delta, q_s, grad_s, k_s, v_s, q_full, q_empty, full, empty, first_item, items,
                             step, batch, q_length, length, together, log2_scale, scale, H, CAUSAL, D, GROUPS, ROWS,
                             STAGES, EARLY)),
            (_produce_keys, (q, k, v, grad, q_s, grad_s, k_s, v_s, q_full, q_empty, full, empty, first_item, items,
                             step, batch, q_length, length, together, H, HEADS_OF_KEY, CAUSAL, GROUPS, ROWS, STAGES)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
