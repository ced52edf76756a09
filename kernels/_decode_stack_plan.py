"""How the persistent kernel of `decode_stack` divides a decoder over a device: the constants of the compiler."""

from __future__ import annotations

import math
from typing import NamedTuple

SLICE = 256  # columns that a warp reads at once
ROUND = 128  # rows of a block whose sums are kept at a time
MAX_CHUNK = 24576  # bytes of a slot
MAX_VECTOR = 64  # fp32 registers of a thread for the vector that is multiplied
MAX_SPLITS = 16
MAX_SLOTS = 64
ATTENTION_WARPS = 4
MATRIX_WARPS = (8, 9, 10)  # of which one is chosen: with the others, 16 warps may have 128 registers each
KEYS = 61440  # bytes of the ring of keys and values; 0: none
KEYS_EXPOSED = 32768  # where the next weight waits for attention, what is read ahead of it matters more
KEYS_DEEP = 4  # keys of a slot for each of a warp's lanes
MAX_QUERIES = 2  # heads of a task; more need more than 128 registers
EVENTS = 16  # of a block and layer whose times are kept
COUNTERS = 5  # lines of 128 bytes before the heads' counters


class Device(NamedTuple):
    """What a launch is sized for."""

    multiprocessors: int
    shared_bytes: int  # of a block, at most


class Sizes(NamedTuple):
    """A decoder's sizes. in_rows: of each projection. vocabulary: 0 where there is no head."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    in_rows: tuple[int, ...]
    inner: int
    vocabulary: int
    parallel: bool
    gated: bool
    rotary_dim: int


class Plan(NamedTuple):
    """constants: of the compiler. workspace: bytes, of which the first `counters` start as zeros."""

    constants: dict[str, int]
    threads: int
    shared_bytes: int
    workspace: int
    counters: int


def _slices(columns: int) -> int:
    return -(-columns // SLICE)


def _matrix_warps(columns: list[tuple[int, int]]) -> int:
    """The number that leaves the least undone, weighted with each weight's bytes: (columns, rows)."""

    def spent(warps: int) -> float:
        total = 0.0
        for width, rows in columns:
            slices = _slices(width)
            groups = max(warps // slices, 1)
            total += rows * -(-slices // warps) / groups
        return total * (1 + 0.02 * warps)

    return min(MATRIX_WARPS, key=spent)


def _chunk(columns: int, warps: int, limit: int) -> tuple[int, int]:
    """Rows of a warp in a chunk, and into how many parts a row is divided."""
    groups, row = max(warps // _slices(columns), 1), 2 * columns
    for rows in (4, 2, 1):
        if rows * groups * row <= limit:
            return rows, 1
    segments = -(-_slices(columns) // (limit // (2 * SLICE)))
    while (segments - 1) * -(-_slices(columns) // segments) >= _slices(columns):
        segments += 1
    return 1, segments


def _key_slot(head_dim: int) -> int:
    """Bytes of a tile of keys and values."""
    lanes = 1 << (head_dim // 8 - 1).bit_length()
    return ATTENTION_WARPS * KEYS_DEEP * (32 // lanes) * head_dim * 4


def plan(sizes: Sizes, device: Device, matrix_warps: int | None = None, max_chunk: int = MAX_CHUNK,
         splits: int | None = None, round_rows: int = ROUND, max_slots: int = MAX_SLOTS, trace: bool = False,
         keys: int | None = None, queries: int | None = None) -> Plan | str:  # fmt: skip
    """The constants of the kernel, or why it cannot be used. keys: bytes of their ring. queries: heads of a task."""
    blocks, attended = device.multiprocessors, sizes.heads * sizes.head_dim
    rows = sum(sizes.in_rows) + sizes.inner * (2 if sizes.gated else 1)
    warps = matrix_warps or _matrix_warps([(sizes.width, rows), (attended, sizes.width), (sizes.inner, sizes.width)])
    if round_rows > warps * 32:
        return f"{round_rows} rows at a time need as many threads; there are {warps * 32}"
    chunks = {name: _chunk(columns, warps, max_chunk) for name, columns in
              (("IN", sizes.width), ("OUT", attended), ("DOWN", sizes.inner))}  # fmt: skip
    if chunks["IN"][1] > 1:
        return f"a row of {sizes.width} columns does not fit a slot of {max_chunk} bytes"
    slot, in_chunk = 0, dict[str, int]()
    for name, columns in (("IN", sizes.width), ("OUT", attended), ("DOWN", sizes.inner)):
        per_warp, segments = chunks[name]
        groups = max(warps // _slices(columns), 1) if segments == 1 else 1
        part = min(-(-_slices(columns) // segments) * SLICE, columns)
        in_chunk[name] = per_warp * groups
        slot = max(slot, per_warp * groups * part * 2)
        vector = segments * -(-min(-(-_slices(columns) // segments), _slices(columns)) // warps) * 8
        if vector > MAX_VECTOR:
            return f"rows of {columns} columns need {vector} registers a thread; allowed: {MAX_VECTOR}"
    slot = -(-slot // 128) * 128
    kept = -(-sizes.width // blocks)
    rounds = {name: round_rows // rows * rows for name, rows in in_chunk.items()}
    if min(rounds.values()) == 0:
        return f"a chunk has {max(in_chunk.values())} rows; allowed: {round_rows}"
    if sizes.parallel and kept > min(rounds["OUT"], rounds["DOWN"]):
        return f"{sizes.width} rows on {blocks} multiprocessors are over {min(rounds['OUT'], rounds['DOWN'])} each"
    keys = keys if keys is not None else KEYS if sizes.parallel else KEYS_EXPOSED
    group = sizes.heads // sizes.kv_heads
    queries = queries or next(n for n in range(MAX_QUERIES if keys else 1, 0, -1) if group % n == 0)
    parts = splits or max(1, min(blocks * queries // sizes.heads, MAX_SPLITS))
    rest = _rest_bytes(sizes, warps, round_rows, kept, queries, parts)
    key_slot = _key_slot(sizes.head_dim)
    key_slots = max(2, keys // key_slot) if keys else 0
    room = device.shared_bytes - rest - max(key_slots, 1) * 16
    slots = min((room - key_slots * key_slot) // (slot + 16), max_slots)
    if slots < 3:
        return f"{device.shared_bytes} bytes of shared memory hold {slots} chunks of {slot} bytes; needed: 3"
    if key_slots and max_slots == MAX_SLOTS:  # what is too little for a slot
        key_slots += (room - slots * (slot + 16) - key_slots * key_slot) // (key_slot + 16)
    rest += 16 * (slots + max(key_slots, 1))
    padded = [-(-n // 64) * 64 for n in (*sizes.in_rows, 0, 0)][:3]
    constants = {
        "CTAS": blocks, "LAYERS": sizes.layers, "WIDTH": sizes.width, "HEADS": sizes.heads,
        "KV_HEADS": sizes.kv_heads, "HEAD_DIM": sizes.head_dim, "INNER": sizes.inner, "VOCAB": sizes.vocabulary,
        "PROJECTIONS": len(sizes.in_rows), "PARALLEL": int(sizes.parallel), "GATED": int(sizes.gated),
        "ROTARY": sizes.rotary_dim, "MATRIX_WARPS": warps, "ATTENTION_WARPS": ATTENTION_WARPS, "ROUND": round_rows,
        "KEPT_ROWS": kept if sizes.parallel else 1, "SLOTS": slots, "SLOT_BYTES": slot, "REST_BYTES": rest,
        "SPLITS": parts, "QUERIES": queries, "KEY_SLOTS": key_slots, "KEY_SLOT_BYTES": key_slot,
    }  # fmt: skip
    for i, (count, with_padding) in enumerate(zip((*sizes.in_rows, 0, 0), padded, strict=False)):
        constants |= {f"IN_ROWS_{i}": count, f"IN_ROWS_{i}_PADDED": with_padding}
    for name, (per_warp, segments) in chunks.items():
        constants[f"{name}_ROWS_OF_CHUNK"] = per_warp
        if name != "IN":
            constants[f"{name}_SEGMENTS"] = segments
    constants |= _shifts(sizes, blocks)
    counters = COUNTERS * 128 + -(-sizes.heads // 32) * 128
    at = counters
    for name, size in (("STREAM", 4 * sizes.width + 256), ("PROJECTED", 2 * sum(padded)), ("INNER", 2 * sizes.inner),
                       ("ATTENDED", 2 * attended),
                       ("PARTIAL", 4 * sizes.heads * parts * (sizes.head_dim + 4))):  # fmt: skip
        constants[f"{name}_AT"] = at
        at += -(-size // 128) * 128
    if trace:
        constants |= {"TRACE": 1, "TRACE_AT": at}
        at += blocks * sizes.layers * EVENTS * 8
    constants["STREAM_BYTES"] = -(-2 * sizes.width // 128) * 128
    threads = (warps + ATTENTION_WARPS + (2 if key_slots else 1)) * 32
    return Plan(constants, threads, slots * slot + key_slots * key_slot + rest, at, counters)


def _rest_bytes(sizes: Sizes, warps: int, round_rows: int, kept: int, queries: int, parts: int) -> int:
    """Shared memory behind the rings, but for their barriers; the kernel asserts that it is enough."""
    stride = warps | 1
    sums = 2 * (2 if sizes.gated else 1) * round_rows * stride + (kept if sizes.parallel else 1) * stride
    tables = 4 * max(sizes.rotary_dim // 2, 1)
    joined = queries * (ATTENTION_WARPS * (sizes.head_dim + 2) + 2 * parts) + 3 * ATTENTION_WARPS
    return 4 * (sums + 2 * warps + tables + joined + 1) + 24 * sizes.layers + 64


def _shifts(sizes: Sizes, blocks: int) -> dict[str, int]:
    """Where counting the blocks of each weight begins: behind the last one that had one more of the weight before."""
    found, at = {}, 0
    order = [(f"SHIFT_IN_{i}", n) for i, n in enumerate(sizes.in_rows)]
    order += [("SHIFT_UP", sizes.inner), ("SHIFT_OUT", sizes.width)]
    order += [] if sizes.parallel else [("SHIFT_DOWN", sizes.width)]
    for name, rows in order:
        found[name] = -at % blocks
        at += rows % blocks
    found["SHIFT_OF_LAYER"] = -at % blocks
    found["SHIFT_IN"] = found.pop("SHIFT_IN_0")
    return {"SHIFT_IN_1": 0, "SHIFT_IN_2": 0, "SHIFT_DOWN": 0, **found}


def softmax_scale(scale: float) -> float:
    """The kernel's exponents are of two."""
    return scale * math.log2(math.e)
