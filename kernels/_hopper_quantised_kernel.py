"""The device code of `_hopper_quantised`, in Triton's Gluon."""

# ruff: noqa: RUF005 (Gluon has no starred lists)

from ._hopper_flash_tiles import (
    async_load,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    next_stage,
    place,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from ._hopper_weights import after, before_products, keep, largest_of_rows, operand, pack, sums_of_threads


@gluon.jit
def _produce(q1, q2, k1, k2, v1, v2, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full, k_empty, v_full,
             v_empty, first_item, items, step, batch, q_length, length, q_rows, k_rows, together, H: gl.constexpr,
             HEADS_OF_KEY: gl.constexpr, CAUSAL: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
             GROUPS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Moves queries, then keys and values, last tile first, of one item after the other."""
    q_bytes: gl.constexpr = q1.block_type.nbytes + (q2.block_type.nbytes if D2 > 0 else 0)
    k_bytes: gl.constexpr = k1.block_type.nbytes + (k2.block_type.nbytes if D2 > 0 else 0)
    v_bytes: gl.constexpr = v1.block_type.nbytes + (v2.block_type.nbytes if D2 > 0 else 0)
    stage = 0
    phase = 1
    q_phase = 1
    for item in range(first_item, items, step):
        b, h, tile, tiles = place(item, batch, q_length, length, together, H, CAUSAL, GROUPS, N)
        kv = b * (H // HEADS_OF_KEY) + h // HEADS_OF_KEY
        for i in gl.static_range(GROUPS):
            row = (b * H + h) * q_rows + (tile * GROUPS + i) * 64
            mbarrier.wait(q_empty.index(i), q_phase)
            mbarrier.expect(q_full.index(i), q_bytes)
            async_load(q1, [row, 0], q_full.index(i), q1_s.index(i))
            if D2 > 0:
                async_load(q2, [row, D1], q_full.index(i), q2_s.index(i))
        q_phase ^= 1
        for t in range(tiles):
            row = (tiles - 1 - t) * N
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k_bytes)
            async_load(k1, [kv * k_rows + row, 0], k_full.index(stage), k1_s.index(stage))
            if D2 > 0:
                async_load(k2, [kv * k_rows + row, D1], k_full.index(stage), k2_s.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), v_bytes)
            async_load(v1, [kv * (D1 + D2), row], v_full.index(stage), v1_s.index(stage))
            if D2 > 0:
                async_load(v2, [kv * (D1 + D2) + D1, row], v_full.index(stage), v2_s.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _multiply_scores(q1, q2, k1_s, k2_s, stage, layout: gl.constexpr, D2: gl.constexpr, N: gl.constexpr):
    """Starts q @ k.T, in int32."""
    zero = gl.zeros([64, N], gl.int32, layout=layout)
    scores = warpgroup_mma(q1, k1_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    if D2 > 0:
        scores = warpgroup_mma(q2, k2_s.index(stage).permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def _multiply_values(p, v_s, stage, layout: gl.constexpr, D: gl.constexpr):
    """Starts p @ v from zero: what the tensor cores sum is one tile, the rest of the sum is fp32's."""
    zero = gl.zeros([64, D], gl.float32, layout=layout)
    return warpgroup_mma(p, v_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _consume(GROUP: gl.constexpr, out, q_scale, kv_scale, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full,
             k_empty, v_full, v_empty, first_item, items, step, batch, q_length, length, q_rows, k_rows, together,
             H: gl.constexpr, HEADS_OF_KEY: gl.constexpr, CAUSAL: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
             GROUPS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """64 queries of one item after the other against all their keys."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 32])
    layout1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D1, 32])
    layout2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D2 if D2 > 0 else D1, 32])
    p_layout1: gl.constexpr = gl.DotOperandLayout(0, layout1, 4)
    p_layout2: gl.constexpr = gl.DotOperandLayout(0, layout2, 4)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows1: gl.constexpr = gl.SliceLayout(1, layout1)
    rows2: gl.constexpr = gl.SliceLayout(1, layout2)
    dtype: gl.constexpr = out.dtype.element_ty
    col = gl.arange(0, N, gl.SliceLayout(0, s_layout))
    nothing = length >> 31  # 0, which the compiler does not know
    k_stage = 0
    k_phase = 0
    v_stage = 0
    v_phase = 0
    q_phase = 0
    for item in range(first_item, items, step):
        b, h, tile, tiles = place(item, batch, q_length, length, together, H, CAUSAL, GROUPS, N)
        first = (tile * GROUPS + GROUP) * 64
        index = first + gl.arange(0, 64, rows)
        row_scale = gl.load(q_scale + (b * H + h).to(gl.int64) * q_rows + index)
        kv = b * (H // HEADS_OF_KEY) + h // HEADS_OF_KEY
        scales = kv_scale + (kv.to(gl.int64) * (k_rows // N) + tiles - 1) * 2
        scale = row_scale * gl.load(scales)
        v_log = gl.load(scales + 1)
        mbarrier.wait(q_full.index(GROUP), q_phase)
        q_phase ^= 1
        mbarrier.wait(k_full.index(k_stage), k_phase)
        scores = _multiply_scores(q1_s.index(GROUP), q2_s.index(GROUP), k1_s, k2_s, k_stage, s_layout, D2, N)
        s = warpgroup_mma_wait(0, deps=[scores]).to(gl.float32)
        mbarrier.arrive(k_empty.index(k_stage), count=1)
        k_stage, k_phase = next_stage(k_stage, k_phase, STAGES)
        key = (tiles - 1) * N + col
        seen = key[None, :] < length
        if CAUSAL:
            seen = seen & (key[None, :] <= index[:, None])
        s = gl.where(seen, s, -float("inf"))
        unit = gl.max(s, 1) * scale  # the scores' largest, of which the weights are fractions
        top = unit
        shift = gl.where(unit == -float("inf"), 0.0, unit - 8.807354922057604)  # the largest weight is 448
        p = gl.exp2(gl.fma(s, gl.expand_dims(scale, 1), -shift[:, None]))
        total = sums_of_threads(p, N)
        packed = pack(p, N)
        acc1 = gl.zeros([64, D1], gl.float32, layout=layout1)
        if D2 > 0:
            acc2 = gl.zeros([64, D2], gl.float32, layout=layout2)
        decay = shift * 0.0
        next_scale = gl.load(scales - 2, mask=tiles > 1, other=0.0)
        next_v_log = gl.load(scales - 1, mask=tiles > 1, other=0.0)
        for t in range(1, tiles):
            scale = row_scale * next_scale
            new_v_log = next_v_log
            scales -= 2
            next_scale = gl.load(scales - 2, mask=t + 1 < tiles, other=0.0)
            next_v_log = gl.load(scales - 1, mask=t + 1 < tiles, other=0.0)
            mbarrier.wait(k_full.index(k_stage), k_phase)
            p1 = operand(packed, p_layout1, N)
            p2 = operand(packed, p_layout2, N)
            scores = _multiply_scores(q1_s.index(GROUP), q2_s.index(GROUP), k1_s, k2_s, k_stage, s_layout, D2, N)
            mbarrier.wait(v_full.index(v_stage), v_phase)
            sums1 = _multiply_values(p1, v1_s, v_stage, layout1, D1)
            if D2 > 0:
                sums2 = _multiply_values(p2, v2_s, v_stage, layout2, D2)
                s = warpgroup_mma_wait(2, deps=[scores])
            else:
                s = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(k_empty.index(k_stage), count=1)
            k_stage, k_phase = next_stage(k_stage, k_phase, STAGES)
            if CAUSAL and GROUPS * 64 > N:
                s = s.to(gl.float32)
                if (tiles - t) * N > first + 1:
                    s = gl.where(((tiles - 1 - t) * N + col)[None, :] <= index[:, None], s, -float("inf"))
            largest = gl.convert_layout(largest_of_rows(s, N).to(gl.float32), rows) * scale
            s = s.to(gl.float32)  # after the maximum: under the exponentials
            top = gl.maximum(top, largest)
            new_unit = gl.maximum(largest, top - 24.0)  # sums stay finite: no tile's unit is far below another's
            safe = gl.where(new_unit == -float("inf"), 0.0, new_unit)
            p = gl.exp2(gl.fma(s, gl.expand_dims(scale, 1), 8.807354922057604 - safe[:, None]))
            new_decay = gl.exp2(unit - safe)
            sums = sums_of_threads(p, N)
            row_decay = gl.convert_layout(new_decay, gl.SliceLayout(1, sums.type.layout))
            total = before_products(gl.fma(total, gl.expand_dims(row_decay, 1), sums))
            new_packed = pack(p, N)
            if D2 > 0:
                sums1, sums2 = warpgroup_mma_wait(0, deps=[sums1, sums2])
                keep(packed)
                acc2 = gl.fma(acc2, gl.convert_layout(decay, rows2)[:, None], sums2)
            else:
                sums1 = warpgroup_mma_wait(0, deps=[sums1])
                keep(packed)
            mbarrier.arrive(v_empty.index(v_stage), count=1)
            v_stage, v_phase = next_stage(v_stage, v_phase, STAGES)
            acc1 = gl.fma(acc1, gl.convert_layout(decay, rows1)[:, None], sums1)
            packed = after(new_packed, nothing)
            decay = new_decay * gl.exp2(v_log - new_v_log)
            unit = new_unit
            v_log = new_v_log
        mbarrier.arrive(q_empty.index(GROUP), count=1)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        p1 = operand(packed, p_layout1, N)
        p2 = operand(packed, p_layout2, N)
        sums1 = _multiply_values(p1, v1_s, v_stage, layout1, D1)
        factor = gl.exp2(gl.zeros([64], gl.float32, layout=rows) + v_log) / gl.convert_layout(gl.sum(total, 1), rows)
        at = out + (b.to(gl.int64) * q_length * H + h) * (D1 + D2)
        if D2 > 0:
            sums2 = _multiply_values(p2, v2_s, v_stage, layout2, D2)
            sums1, sums2 = warpgroup_mma_wait(0, deps=[sums1, sums2])
            keep(packed)
        else:
            sums1 = warpgroup_mma_wait(0, deps=[sums1])
            keep(packed)
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        v_stage, v_phase = next_stage(v_stage, v_phase, STAGES)
        if D2 > 0:
            row = first + gl.arange(0, 64, rows2)
            lane = D1 + gl.arange(0, D2, gl.SliceLayout(0, layout2))
            acc2 = gl.fma(acc2, gl.convert_layout(decay, rows2)[:, None], sums2)
            acc2 = acc2 * gl.convert_layout(factor, rows2)[:, None]
            at2 = at + row.to(gl.int64)[:, None] * (H * (D1 + D2)) + lane[None, :]
            gl.store(at2, acc2.to(dtype), row[:, None] < q_length)
        row = first + gl.arange(0, 64, rows1)
        lane = gl.arange(0, D1, gl.SliceLayout(0, layout1))
        acc1 = gl.fma(acc1, gl.convert_layout(decay, rows1)[:, None], sums1)
        acc1 = acc1 * gl.convert_layout(factor, rows1)[:, None]
        at1 = at + row.to(gl.int64)[:, None] * (H * (D1 + D2)) + lane[None, :]
        gl.store(at1, acc1.to(dtype), row[:, None] < q_length)


# A length of 1 as a constant makes several weights one register, and ptxas (of Triton 3.6) then leaves two bytes of
# `pack`'s results unwritten.
@gluon.jit(do_not_specialize=["length"])
def kernel(q1, q2, k1, k2, v1, v2, q_scale, kv_scale, out, batch, q_length, length, q_rows, k_rows, together,
           H: gl.constexpr, HEADS_OF_KEY: gl.constexpr, CAUSAL: gl.constexpr, D1: gl.constexpr, D2: gl.constexpr,
           GROUPS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr):  # fmt: skip
    """Tiles of 64 * GROUPS queries of one head each, one after the other."""
    items = gl.cdiv(q_length, 64 * GROUPS) * batch * H
    first_item = gl.program_id(0)
    step = gl.num_programs(0)

    q1_s = gl.allocate_shared_memory(q1.dtype, [GROUPS] + q1.block_type.shape, q1.layout)
    k1_s = gl.allocate_shared_memory(k1.dtype, [STAGES] + k1.block_type.shape, k1.layout)
    v1_s = gl.allocate_shared_memory(v1.dtype, [STAGES] + v1.block_type.shape, v1.layout)
    q2_s, k2_s, v2_s = q1_s, k1_s, v1_s
    if D2 > 0:
        q2_s = gl.allocate_shared_memory(q1.dtype, [GROUPS] + q2.block_type.shape, q2.layout)
        k2_s = gl.allocate_shared_memory(k1.dtype, [STAGES] + k2.block_type.shape, k2.layout)
        v2_s = gl.allocate_shared_memory(v1.dtype, [STAGES] + v2.block_type.shape, v2.layout)
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
            (_consume, (0, out, q_scale, kv_scale, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full,
                        k_empty, v_full, v_empty, first_item, items, step, batch, q_length, length, q_rows, k_rows,
                        together, H, HEADS_OF_KEY, CAUSAL, D1, D2, GROUPS, N, STAGES)),
            (_produce, (q1, q2, k1, k2, v1, v2, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full, k_empty,
                        v_full, v_empty, first_item, items, step, batch, q_length, length, q_rows, k_rows, together,
                        H, HEADS_OF_KEY, CAUSAL, D1, D2, GROUPS, N, STAGES)),
        ], [1], [24])  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize([
            (_consume, (0, out, q_scale, kv_scale, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full,
                        k_empty, v_full, v_empty, first_item, items, step, batch, q_length, length, q_rows, k_rows,
                        together, H, HEADS_OF_KEY, CAUSAL, D1, D2, GROUPS, N, STAGES)),
            (_consume, (1, out, q_scale, kv_scale, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full,
                        k_empty, v_full, v_empty, first_item, items, step, batch, q_length, length, q_rows, k_rows,
                        together, H, HEADS_OF_KEY, CAUSAL, D1, D2, GROUPS, N, STAGES)),
            (_produce, (q1, q2, k1, k2, v1, v2, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full, k_empty,
                        v_full, v_empty, first_item, items, step, batch, q_length, length, q_rows, k_rows, together,
                        H, HEADS_OF_KEY, CAUSAL, D1, D2, GROUPS, N, STAGES)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (0, out, q_scale, kv_scale, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full,
                        k_empty, v_full, v_empty, first_item, items, step, batch, q_length, length, q_rows, k_rows,
                        together, H, HEADS_OF_KEY, CAUSAL, D1, D2, GROUPS, N, STAGES)),
            (_consume, (1, out, q_scale, kv_scale, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full,
                        k_empty, v_full, v_empty, first_item, items, step, batch, q_length, length, q_rows, k_rows,
                        together, H, HEADS_OF_KEY, CAUSAL, D1, D2, GROUPS, N, STAGES)),
            (_consume, (2, out, q_scale, kv_scale, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full,
                        k_empty, v_full, v_empty, first_item, items, step, batch, q_length, length, q_rows, k_rows,
                        together, H, HEADS_OF_KEY, CAUSAL, D1, D2, GROUPS, N, STAGES)),
            (_produce, (q1, q2, k1, k2, v1, v2, q1_s, q2_s, k1_s, k2_s, v1_s, v2_s, q_full, q_empty, k_full, k_empty,
                        v_full, v_empty, first_item, items, step, batch, q_length, length, q_rows, k_rows, together,
                        H, HEADS_OF_KEY, CAUSAL, D1, D2, GROUPS, N, STAGES)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
