// Which keys the attention warps of decode_stack.cu take, and the producer that copies keys and values for them.
#pragma once

#include "decode_stack_parts.cuh"

constexpr int CHUNKS = HEAD_DIM / 8;  // 16 bytes a lane
constexpr int LANES = CHUNKS <= 1 ? 1 : CHUNKS <= 2 ? 2 : CHUNKS <= 4 ? 4 : CHUNKS <= 8 ? 8 : CHUNKS <= 16 ? 16 : 32;
constexpr int KEYS_AT_ONCE = 32 / LANES, DEEP = KEYS_RING ? 4 : 8, TILE = KEYS_AT_ONCE * DEEP;  // of a warp
constexpr int BLOCK_TILE = TILE * ATTENTION_WARPS;                                               // what a slot holds
constexpr int GROUP = HEADS / KV_HEADS, ROWS = HEADS / QUERIES;
static_assert(GROUP % QUERIES == 0, "the queries of a task share their keys");
static_assert(!KEYS_RING || BLOCK_TILE * HEAD_DIM * 4 <= KEY_SLOT_BYTES, "a tile fits a slot");

// A task: QUERIES heads from `head` on, and the keys in the cache from `begin` to `end`.
constexpr int TASKS = ROWS * SPLITS;
struct Part {
  int head, kv, split, begin, end;
};

// The token's own key is not read from the cache. It is the last one as a rule, then it has no place in a task either.
__device__ __forceinline__ Part part_of(int task, const Live& live, int position) {
  const int head = task / SPLITS * QUERIES, split = task % SPLITS;
  const int count = live.count - (position >= 0 && position == live.first + live.count - 1 ? 1 : 0);
  const int share = (count + SPLITS - 1) / SPLITS;
  return {head, head / GROUP, split, live.first + min(split * share, count), live.first + min((split + 1) * share, count)};
}

__device__ __forceinline__ int position_of(const Arguments& a, const Layer& layer) {
  const int64_t position = COUNTED ? load_shared_by_others(layer.length)
                           : POSITION_BYTES == 8 ? static_cast<const int64_t*>(a.positions)[0]
                                                 : static_cast<const int*>(a.positions)[0];
  return position < 0 || position >= SIZE ? -1 : static_cast<int>(position);
}

// The attention warps, for themselves and for the producer: the keys that a mask keeps.
__device__ void find_live(const Arguments& a, int index, Rest& rest) {
  const int thread = static_cast<int>(threadIdx.x) - MATRIX_THREADS;
  const uint8_t* mask = a.layers[index].mask;
  int first = SIZE, last = -1, kept = 0;
#pragma unroll 8
  for (int j = thread; j < SIZE; j += ATTENTION_THREADS) {
    if (load_stream(mask + j * a.mask_step) != 0) {
      first = min(first, j);
      last = j;
      ++kept;
    }
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    first = min(first, static_cast<int>(__shfl_xor_sync(0xffffffffu, first, offset)));
    last = max(last, static_cast<int>(__shfl_xor_sync(0xffffffffu, last, offset)));
    kept += static_cast<int>(__shfl_xor_sync(0xffffffffu, kept, offset));
  }
  if (lane() == 0) {
    rest.range[thread / 32][0] = first;
    rest.range[thread / 32][1] = last;
    rest.range[thread / 32][2] = kept;
  }
  group_sync(ATTENTION_GROUP, ATTENTION_THREADS);
  if (thread == 0) {
    for (int i = 1; i < ATTENTION_WARPS; ++i) {
      first = min(first, rest.range[i][0]);
      last = max(last, rest.range[i][1]);
      kept += rest.range[i][2];
    }
    const int count = kept == 0 ? 0 : last - first + 1;
    rest.live[index] = {kept == 0 ? 0 : first, count, kept != count};
    mbarrier_arrive(&rest.known[index]);
  }
  group_sync(ATTENTION_GROUP, ATTENTION_THREADS);
}

// Rows of a cache to rows side by side.
__device__ __forceinline__ void copy_rows(uint16_t* to, const uint16_t* from, int64_t step, int count, uint64_t* full) {
  if (count <= 0) return;
  if (step == HEAD_DIM) {
    bulk_load(to, from, static_cast<unsigned>(count) * HEAD_DIM * 2, full);
  } else {
    for (int i = 0; i < count; ++i) bulk_load(to + i * HEAD_DIM, from + i * step, HEAD_DIM * 2, full);
  }
}

// One thread. What the cache held before the step does not depend on it, so this runs ahead through the layers. The
// token's own place, which another block writes, is left out.
__device__ void produce_keys(const Arguments& a, unsigned char* slots, Rest& rest) {
  int slot = 0;
  unsigned parity = 1;
  for (int index = 0; index < LAYERS && blockIdx.x < TASKS; ++index) {
    const Layer& layer = a.layers[index];
    mbarrier_wait(&rest.known[MASKS > 1 ? index : 0], 0);
    const Live live = rest.live[MASKS > 1 ? index : 0];
    const int position = rest.positions[index];
    for (int task = blockIdx.x; task < TASKS; task += CTAS) {
      const Part part = part_of(task, live, position);
      const uint16_t *keys = layer.keys + part.kv * a.key_head, *values = layer.values + part.kv * a.value_head;
      for (int begin = part.begin; begin < part.end; begin += BLOCK_TILE) {
        const int end = min(begin + BLOCK_TILE, part.end);
        const bool within = begin <= position && position < end;
        const int middle = within ? position : end, after = position + 1;
        uint16_t* to = reinterpret_cast<uint16_t*>(slots + slot * KEY_SLOT_BYTES);
        uint64_t* full = &rest.keys_full[slot];
        mbarrier_wait(&rest.keys_empty[slot], parity);
        mbarrier_expect(full, static_cast<unsigned>(end - begin - (within ? 1 : 0)) * HEAD_DIM * 4);
        copy_rows(to, keys + begin * a.key_row, a.key_row, middle - begin, full);
        copy_rows(to + BLOCK_TILE * HEAD_DIM, values + begin * a.value_row, a.value_row, middle - begin, full);
        if (within) {
          uint16_t* behind = to + (after - begin) * HEAD_DIM;
          copy_rows(behind, keys + after * a.key_row, a.key_row, end - after, full);
          copy_rows(behind + BLOCK_TILE * HEAD_DIM, values + after * a.value_row, a.value_row, end - after, full);
        }
        if (++slot < KEY_SLOTS) continue;
        slot = 0;
        parity ^= 1;
      }
    }
  }
}
