"""Which tiles `_hopper_flash` multiplies, and how they get to shared memory, in Triton's Gluon."""

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
    FIRST_NAME = gl.constexpr(6)  # of 16 barriers in hardware; Triton's roles use those before
    MISSING = ""
except ImportError as error:  # no Triton, or one before or after this language
    from ._ops import tl as gl
    from ._ops import triton as gluon

    fence_async_shared = mbarrier = warpgroup_mma = warpgroup_mma_wait = async_load = FIRST_NAME = None
    MISSING = f"Triton's Gluon language is not there: {error}"

constexpr_function = getattr(gluon, "constexpr_function", gluon.jit)


@gluon.jit
def place(item, batch, q_length, length, together, H: gl.constexpr, CAUSAL: gl.constexpr, GROUPS: gl.constexpr,
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
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The next place in a ring, and the parity of its barrier."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def produce(tensors, buffers, barriers, sizes, H: gl.constexpr, HEADS_OF_KEY: gl.constexpr, CAUSAL: gl.constexpr,
            D2: gl.constexpr, GROUPS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Moves queries, then keys and values, last tile first, of one item after the other."""
    q1, q2, k1, k2, v1, v2 = tensors
    first_item, items, step, batch, q_length, length, together = sizes
    q1_s, q2_s, k1_s, k2_s, v1_s, v2_s = buffers
    q_full, q_empty, k_full, v_full = barriers
    THREADS: gl.constexpr = 128 * GROUPS + 32
    q_bytes: gl.constexpr = q1.block_type.nbytes + (q2.block_type.nbytes if D2 > 0 else 0)
    k_bytes: gl.constexpr = k1.block_type.nbytes + (k2.block_type.nbytes if D2 > 0 else 0)
    stage = 0
    q_phase = 1
    for item in range(first_item, items, step):
        b, h, tile, tiles = place(item, batch, q_length, length, together, H, CAUSAL, GROUPS, N)
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
            meet(FIRST_NAME + stage, THREADS, 1)
            mbarrier.expect(k_full.index(stage), k_bytes)
            async_load(k1, [b, kv, row, 0], k_full.index(stage), k1_s.index(stage))
            if D2 > 0:
                async_load(k2, [b, kv, row, 0], k_full.index(stage), k2_s.index(stage))
            meet(FIRST_NAME + STAGES + stage, THREADS, 1)
            mbarrier.expect(v_full.index(stage), k_bytes)
            async_load(v1, [b, kv, row, 0], v_full.index(stage), v1_s.index(stage))
            if D2 > 0:
                async_load(v2, [b, kv, row, 0], v_full.index(stage), v2_s.index(stage))
            stage = (stage + 1) % STAGES
    for i in gl.static_range(2 * STAGES):  # what the groups gave back last
        meet(FIRST_NAME + i, THREADS, 1)


@gluon.jit
def meet(name, THREADS: gl.constexpr, WARPS: gl.constexpr):
    """Waits until so many threads, its own among them, are at a barrier of the processor's (FIRST_NAME to 15)."""
    each = gl.arange(0, 32 * WARPS, gl.BlockedLayout([1], [32], [WARPS], [0])) * 0
    gl.inline_asm_elementwise("bar.sync $1, $2; mov.b32 $0, 0;", "=r,r,r", [each + name, each + THREADS], gl.int32,
                              is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def arrive(name, THREADS: gl.constexpr, WARPS: gl.constexpr):
    """Is counted by such a barrier without waiting: of `mbarrier.arrive` the warps of a group wait for each other."""
    each = gl.arange(0, 32 * WARPS, gl.BlockedLayout([1], [32], [WARPS], [0])) * 0
    gl.inline_asm_elementwise("bar.arrive $1, $2; mov.b32 $0, 0;", "=r,r,r", [each + name, each + THREADS], gl.int32,
                              is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def barrier_ring(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """A ring of barriers, each of which so many have to arrive at."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers
