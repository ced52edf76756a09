// The attention warps of decode_stack.cu.
#pragma once

#include "decode_stack_softmax.cuh"

__device__ __forceinline__ float table_value(const void* table, int at) {
  if (TABLE_BYTES == 4) return static_cast<const float*>(table)[at];
  const uint16_t x = static_cast<const uint16_t*>(table)[at];
  return TABLE_BFLOAT ? bfloat_to_float(x) : half_to_float(x);
}

// Eight lanes of a projected head as they are, and, where they are turned, the other lanes of their pairs.
struct Lanes {
  uint4 own, pairs;
  uint16_t other[8];
};

constexpr bool PAIRS_TOGETHER = ROTARY > 0 && !INTERLEAVED && PAIRS % 8 == 0;

__device__ __forceinline__ Lanes lanes_of(const uint16_t* head, int chunk) {
  Lanes found;
  found.own = load_shared_by_others(reinterpret_cast<const uint4*>(head + chunk * 8));
  found.pairs = {0, 0, 0, 0};
  const int first = chunk * 8;
  if (PAIRS_TOGETHER) {
    if (first < ROTARY) {
      head += first < PAIRS ? first + PAIRS : first - PAIRS;
      found.pairs = load_shared_by_others(reinterpret_cast<const uint4*>(head));
    }
  } else if (ROTARY > 0 && !INTERLEAVED) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int d = first + e;
      found.other[e] = d < ROTARY ? load_shared_by_others(head + (d < PAIRS ? d + PAIRS : d - PAIRS)) : uint16_t(0);
    }
  }
  return found;
}

__device__ __forceinline__ void widen(const Lanes& found, float* own, float* other) {
  widen(found.own, own);
  widen(found.pairs, other);
#pragma unroll
  for (int e = 0; e < 8 && !INTERLEAVED && !PAIRS_TOGETHER && ROTARY > 0; ++e) other[e] = widened(found.other[e]);
}

// What the RMSNorm of a head multiplies it with, besides the weight; all lanes of a warp.
__device__ __forceinline__ float rstd_of(const Lanes& found, const Arguments& a) {
  if (!HEAD_NORM) return 1.0f;
  float own[8], squares = 0.0f;
  widen(found.own, own);
#pragma unroll
  for (int e = 0; e < 8; ++e) squares = fmaf(own[e], own[e], squares);
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2) squares += shuffle_xor(squares, offset);
  return rsqrtf(squares / HEAD_DIM + a.head_eps);
}

// The lanes normalised, turned by the step's angles, rounded.
__device__ __forceinline__ void turned(const Lanes& found, const Lanes& norm, float rstd, int chunk,
                                       const Arguments& a, const Rest& rest, float* out) {
  float other[8];
  widen(found, out, other);
  if (HEAD_NORM) {
    float weight[8], other_weight[8];
    widen(norm, weight, other_weight);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      out[e] *= rstd * (weight[e] + a.head_weight_offset);
      other[e] *= rstd * (other_weight[e] + a.head_weight_offset);
    }
  }
  if (INTERLEAVED) {
#pragma unroll
    for (int e = 0; e < 8; ++e) other[e] = out[e ^ 1];
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int d = chunk * 8 + e;
    if (ROTARY == 0 || d >= ROTARY) {
      if (HEAD_NORM) out[e] = widened(rounded(out[e]));
      continue;
    }
    const int pair = INTERLEAVED ? d / 2 : d % PAIRS, second = INTERLEAVED ? d % 2 : d / PAIRS;
    const float c = rest.table[second][pair], s = rest.table[2 + second][pair];
    out[e] = widened(rounded(second ? out[e] * c + other[e] * s : out[e] * c - other[e] * s));
  }
}

__device__ __forceinline__ uint4 packed(const float* x) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = rounded(x[2 * i]) | static_cast<uint32_t>(rounded(x[2 * i + 1])) << 16;
  }
  return {words[0], words[1], words[2], words[3]};
}

// A task's keys: where they are, and which of them are attended to.
struct Cache {
  const uint16_t *keys, *values;
  const uint8_t* mask;
  int64_t mask_step;
  int position, end, holes;

  // Of the warp's tile from `begin` on, bit i: key i of this thread's lanes.
  __device__ __forceinline__ unsigned kept(int begin) const {
    uint8_t keep[DEEP];
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
      const int j = begin + i * KEYS_AT_ONCE + static_cast<int>(lane()) / LANES;
      keep[i] = j < end && j != position;
      if (holes && keep[i] != 0) keep[i] = load_stream(mask + j * mask_step);
    }
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < DEEP; ++i) bits |= keep[i] != 0 ? 1u << i : 0u;
    return bits;
  }
};

// A warp's keys of one tile, on their way.
struct Tile {
  uint4 keys[DEEP], values[DEEP];
  unsigned kept;

  __device__ __forceinline__ void load(const Arguments& a, const Cache& cache, int begin) {
    const int chunk = static_cast<int>(lane()) % LANES;
    kept = cache.kept(begin);
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
      const int j = begin + i * KEYS_AT_ONCE + static_cast<int>(lane()) / LANES;
      keys[i] = values[i] = {0, 0, 0, 0};
      if (j < cache.end && j != cache.position && chunk < CHUNKS) {
        keys[i] = load_stream(reinterpret_cast<const uint4*>(cache.keys + j * a.key_row + chunk * 8));
        values[i] = load_stream(reinterpret_cast<const uint4*>(cache.values + j * a.value_row + chunk * 8));
      }
    }
  }
};

// What the producer's copies are taken from, in their order.
class KeySlots {
 public:
  __device__ KeySlots(const unsigned char* slots, Rest& rest) : slots_(slots), rest_(rest) {}

  // All keys of a task.
  __device__ __forceinline__ void add(Softmax (&state)[QUERIES], const float (&query)[QUERIES][8], const Cache& cache,
                                      const Part& part, int own, unsigned kept) {
    const int chunk = static_cast<int>(lane()) % LANES;
    const int at = (own * TILE + static_cast<int>(lane()) / LANES) * HEAD_DIM + chunk * 8;
#pragma unroll 1
    for (int begin = part.begin; begin < part.end; begin += BLOCK_TILE) {
      const unsigned following = cache.kept(begin + BLOCK_TILE + own * TILE);
      mbarrier_wait(&rest_.keys_full[slot_], parity_);
      const uint16_t* tile = reinterpret_cast<const uint16_t*>(slots_ + slot_ * KEY_SLOT_BYTES) + at;
      auto found = [&](int i, int behind) {
        const bool there = chunk < CHUNKS && (kept >> i & 1);
        return there ? *reinterpret_cast<const uint4*>(tile + i * KEYS_AT_ONCE * HEAD_DIM + behind) : uint4{0, 0, 0, 0};
      };
      add_tile(
          state, query, kept, [&](int i) { return found(i, 0); },
          [&](int i) { return found(i, BLOCK_TILE * HEAD_DIM); });
      __syncwarp();
      if (lane() == 0) mbarrier_arrive(&rest_.keys_empty[slot_]);
      kept = following;
      if (++slot_ < KEY_SLOTS) continue;
      slot_ = 0;
      parity_ ^= 1;
    }
  }

 private:
  const unsigned char* slots_;
  Rest& rest_;
  int slot_ = 0;
  unsigned parity_ = 0;
};

// What the token of this step adds, after it was appended to the cache by the first of the heads that share its key.
__device__ __forceinline__ void add_new(Softmax (&state)[QUERIES], const float (&query)[QUERIES][8],
                                        const float (&key)[8], const uint4& projected, const Part& part, int position, bool kept,
                                        const Arguments& a, const Layer& layer) {
  const int chunk = static_cast<int>(lane()) % LANES;
  float value[8];
  widen(projected, value);
  if (part.head % GROUP == 0 && lane() < CHUNKS) {
    uint16_t* keys = layer.keys + part.kv * a.key_head + position * a.key_row + chunk * 8;
    *reinterpret_cast<uint4*>(keys) = packed(key);
    uint16_t* values = layer.values + part.kv * a.value_head + position * a.value_row + chunk * 8;
    *reinterpret_cast<uint4*>(values) = projected;
  }
#pragma unroll
  for (int r = 0; r < QUERIES; ++r) {
    float score = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) score = fmaf(key[e], query[r][e], score);
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) score += shuffle_xor(score, offset);
    if (lane() < LANES && kept) add_one(state[r], score, value);
  }
}

// Keys and values that were there before the step do not wait for it.
__device__ void attend(const Arguments& a, const unsigned char* key_slots, Rest& rest) {
  const int thread = static_cast<int>(threadIdx.x) - MATRIX_THREADS, own = thread / 32;
  const int chunk = static_cast<int>(lane()) % LANES;
  if (blockIdx.x >= TASKS) return;
  for (int i = thread; i < ROTARY / 2; i += ATTENTION_THREADS) {
    rest.table[0][i] = table_value(a.cos, COS_FIRST + COS_STEP * i);
    rest.table[1][i] = table_value(a.cos, COS_SECOND + COS_STEP * i);
    rest.table[2][i] = table_value(a.sin, SIN_FIRST + SIN_STEP * i);
    rest.table[3][i] = table_value(a.sin, SIN_SECOND + SIN_STEP * i);
  }
  for (int i = thread; i < LAYERS; i += ATTENTION_THREADS) rest.positions[i] = position_of(a, a.layers[i]);
  find_live(a, 0, rest);
  const uint16_t* projected = reinterpret_cast<const uint16_t*>(a.workspace + PROJECTED_AT);
  const unsigned* ready = reinterpret_cast<const unsigned*>(a.workspace) + COUNTER_PROJECTED * 32;
  KeySlots slots(key_slots, rest);
#pragma unroll 1
  for (int index = 0; index < LAYERS; ++index) {
    const Layer& layer = a.layers[index];
    if (MASKS > 1 && index + 1 < LAYERS) find_live(a, index + 1, rest);
    const Live live = rest.live[MASKS > 1 ? index : 0];
    const int position = rest.positions[index];
    const bool within = live.first <= position && position < live.first + live.count;  // then it is not negative
    const bool kept_new = within && (!live.holes || load_stream(layer.mask + position * a.mask_step) != 0);
    Lanes query_norm = {}, key_norm = {};
    if (HEAD_NORM && chunk < CHUNKS) {
      query_norm = lanes_of(layer.head_norm[0], chunk);
      key_norm = lanes_of(layer.head_norm[1], chunk);
    }
    bool waited = false;
#pragma unroll 1
    for (int task = blockIdx.x; task < TASKS; task += CTAS) {
      const Part part = part_of(task, live, position);
      const Cache cache = {layer.keys + part.kv * a.key_head, layer.values + part.kv * a.value_head,
                           layer.mask, a.mask_step, position, part.end, live.holes};
      int begin = part.begin + own * TILE;
      Tile tile;
      if (KEYS_RING) {
        tile.kept = cache.kept(begin);
      } else {
        tile.load(a, cache, begin);
      }
      if (!waited && BARRIERS && thread == 0) grid_wait(ready, (index + 1) * CTAS);
      waited = true;
      group_sync(ATTENTION_GROUP, ATTENTION_THREADS);  // and the task before has been written
      if (thread == 0) trace(a, index, AT_QUERY);
      const bool appends = part.split == 0 && own == 0 && position >= 0;
      float query[QUERIES][8] = {}, key[8] = {};
      Lanes found[QUERIES] = {}, found_key = {};
      uint4 value = {0, 0, 0, 0};
      if (chunk < CHUNKS) {
#pragma unroll
        for (int r = 0; r < QUERIES; ++r) found[r] = lanes_of(projected + Q_FIRST + (part.head + r) * Q_STEP, chunk);
        if (appends) {
          found_key = lanes_of(projected + K_FIRST + part.kv * K_STEP, chunk);
          value = load_shared_by_others(
              reinterpret_cast<const uint4*>(projected + V_FIRST + part.kv * V_STEP + chunk * 8));
        }
      }
#pragma unroll
      for (int r = 0; r < QUERIES; ++r) {
        const float rstd = rstd_of(found[r], a);
        if (chunk < CHUNKS) turned(found[r], query_norm, rstd, chunk, a, rest, query[r]);
#pragma unroll
        for (int e = 0; e < 8; ++e) query[r][e] *= a.scale;
      }
      Softmax state[QUERIES];
#pragma unroll
      for (int r = 0; r < QUERIES; ++r) state[r] = {minus_infinity(), 0.0f, {}};
      if (appends) {
        const float rstd = rstd_of(found_key, a);
        if (chunk < CHUNKS) turned(found_key, key_norm, rstd, chunk, a, rest, key);
        add_new(state, query, key, value, part, position, kept_new, a, layer);
      }
      if constexpr (KEYS_RING) {
        slots.add(state, query, cache, part, own, tile.kept);
      } else {
        while (true) {
          add_tile(state, query, tile.kept, [&](int i) { return tile.keys[i]; }, [&](int i) { return tile.values[i]; });
          begin += BLOCK_TILE;
          if (begin >= part.end) break;
          tile.load(a, cache, begin);
        }
      }
#pragma unroll
      for (int r = 0; r < QUERIES; ++r) join_lanes(state[r]);
      join_warps(state, part.head, part.split, a, rest);
    }
    if (thread == 0) trace(a, index, AT_TASKS);
  }
}
