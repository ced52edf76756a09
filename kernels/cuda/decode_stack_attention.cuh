// The attention warps of decode_stack.cu: flash decoding (Dao et al. 2023) of one query a head.
#pragma once

#include "decode_stack_parts.cuh"

constexpr int CHUNKS = HEAD_DIM / 8;  // 16 bytes a lane
constexpr int LANES = CHUNKS <= 1 ? 1 : CHUNKS <= 2 ? 2 : CHUNKS <= 4 ? 4 : CHUNKS <= 8 ? 8 : CHUNKS <= 16 ? 16 : 32;
constexpr int KEYS_AT_ONCE = 32 / LANES, DEEP = 8, TILE = KEYS_AT_ONCE * DEEP;  // of a warp
constexpr int GROUP = HEADS / KV_HEADS;

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// Softmax of some keys so far: top score, sum of weights, weighted sum of values; of this thread's lanes.
struct Softmax {
  float top, sum, values[8];
};

// The exponents' base for a top score: where all are minus infinity, their weights are 0.
__device__ __forceinline__ float base_of(float top) { return top == minus_infinity() ? 0.0f : top; }

__device__ __forceinline__ float table_value(const void* table, int at) {
  if (TABLE_BYTES == 4) return static_cast<const float*>(table)[at];
  const uint16_t x = static_cast<const uint16_t*>(table)[at];
  return TABLE_BFLOAT ? bfloat_to_float(x) : half_to_float(x);
}

// Eight lanes of a projected head, from chunk * 8 on, turned by the step's angles and rounded.
__device__ __forceinline__ void turned(const uint16_t* head, int chunk, const Rest& rest, float* out) {
  widen(load_shared_by_others(reinterpret_cast<const uint4*>(head + chunk * 8)), out);
  if (ROTARY == 0 || chunk * 8 >= ROTARY) return;
  float other[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int d = chunk * 8 + e;
    if (INTERLEAVED) {
      other[e] = out[e ^ 1];
    } else {
      other[e] = d < ROTARY ? widened(load_shared_by_others(head + (d < PAIRS ? d + PAIRS : d - PAIRS))) : 0.0f;
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int d = chunk * 8 + e;
    if (d >= ROTARY) continue;
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

// The first and the last key that the mask keeps; none: 0 and -1.
__device__ Range live_range(const uint8_t* mask, int64_t step, Rest& rest) {
  const int thread = static_cast<int>(threadIdx.x) - MATRIX_THREADS;
  int first = SIZE, last = -1;
#pragma unroll 8
  for (int j = thread; j < SIZE; j += ATTENTION_THREADS) {
    if (load_stream(mask + j * step) != 0) {
      first = min(first, j);
      last = j;
    }
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    first = min(first, static_cast<int>(__shfl_xor_sync(0xffffffffu, first, offset)));
    last = max(last, static_cast<int>(__shfl_xor_sync(0xffffffffu, last, offset)));
  }
  group_sync(ATTENTION_GROUP, ATTENTION_THREADS);  // the range before has been read
  if (lane() == 0) {
    rest.range[thread / 32][0] = first;
    rest.range[thread / 32][1] = last;
  }
  group_sync(ATTENTION_GROUP, ATTENTION_THREADS);
  for (int i = 0; i < ATTENTION_WARPS; ++i) {
    first = min(first, rest.range[i][0]);
    last = max(last, rest.range[i][1]);
  }
  return {min(first, last + 1), last - min(first, last + 1) + 1};
}

// A head's keys and values in the cache.
struct Cache {
  const uint16_t *keys, *values;
  const uint8_t* mask;
  int64_t position;  // of the token of this step: it is not read from the cache
};

// A warp's keys of one tile, on their way.
struct Tile {
  uint4 keys[DEEP], values[DEEP];
  unsigned kept;  // bit i: the key of this thread's lanes is attended to

  __device__ __forceinline__ void load(const Arguments& a, const Cache& cache, int begin, int end) {
    const int chunk = static_cast<int>(lane()) % LANES, own = static_cast<int>(lane()) / LANES;
    uint8_t mask[DEEP];
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
      const int j = begin + i * KEYS_AT_ONCE + own;
      const bool there = j < end && j != cache.position;
      mask[i] = there ? load_stream(cache.mask + j * a.mask_step) : 0;
      keys[i] = values[i] = {0, 0, 0, 0};
      if (there && chunk < CHUNKS) {
        keys[i] = load_stream(reinterpret_cast<const uint4*>(cache.keys + j * a.key_row + chunk * 8));
        values[i] = load_stream(reinterpret_cast<const uint4*>(cache.values + j * a.value_row + chunk * 8));
      }
    }
    kept = 0;
#pragma unroll
    for (int i = 0; i < DEEP; ++i) kept |= mask[i] != 0 ? 1u << i : 0u;
  }

  __device__ __forceinline__ void add_to(Softmax& state, const float* query) const {
    float scores[DEEP], top = state.top;
#pragma unroll
    for (int i = 0; i < DEEP; ++i) scores[i] = dot(keys[i], query, 0.0f);
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
#pragma unroll
      for (int offset = LANES / 2; offset > 0; offset /= 2) scores[i] += shuffle_xor(scores[i], offset);
      scores[i] = kept >> i & 1 ? scores[i] : minus_infinity();
      top = fmaxf(top, scores[i]);
    }
    const float base = base_of(top), factor = exp2f(state.top - base);
    state.top = top;
    state.sum *= factor;
#pragma unroll
    for (int e = 0; e < 8; ++e) state.values[e] *= factor;
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
      if (!(kept >> i & 1)) continue;  // its value may be anything
      const float weight = exp2f(scores[i] - base);
      float wide[8];
      widen(values[i], wide);
      state.sum += weight;
#pragma unroll
      for (int e = 0; e < 8; ++e) state.values[e] = fmaf(weight, wide[e], state.values[e]);
    }
  }
};

// What the token of this step adds, after it was appended to the cache.
__device__ __forceinline__ void add_new(Softmax& state, const float* query, const uint16_t* projected, int head,
                                        int64_t position, const Arguments& a, const Layer& layer, const Rest& rest) {
  const int chunk = static_cast<int>(lane()) % LANES, kv = head / GROUP;
  if (position < 0 || position >= SIZE) return;
  float key[8] = {}, value[8] = {};
  if (chunk < CHUNKS) {
    turned(projected + K_FIRST + kv * K_STEP, chunk, rest, key);
    widen(load_shared_by_others(reinterpret_cast<const uint4*>(projected + V_FIRST + kv * V_STEP + chunk * 8)), value);
    if (head % GROUP == 0 && lane() < LANES) {
      *reinterpret_cast<uint4*>(layer.keys + kv * a.key_head + position * a.key_row + chunk * 8) = packed(key);
      *reinterpret_cast<uint4*>(layer.values + kv * a.value_head + position * a.value_row + chunk * 8) = packed(value);
    }
  }
  float score = 0.0f;
#pragma unroll
  for (int e = 0; e < 8; ++e) score = fmaf(key[e], query[e], score);
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2) score += shuffle_xor(score, offset);
  if (lane() >= LANES || load_stream(layer.mask + position * a.mask_step) == 0) return;
  const float top = fmaxf(state.top, score), base = base_of(top);
  const float factor = exp2f(state.top - base), weight = exp2f(score - base);
  state.top = top;
  state.sum = state.sum * factor + weight;
#pragma unroll
  for (int e = 0; e < 8; ++e) state.values[e] = fmaf(weight, value[e], state.values[e] * factor);
}

// Joins the states of the keys that a warp's lanes have side by side.
__device__ __forceinline__ void join_lanes(Softmax& state) {
#pragma unroll
  for (int offset = LANES; offset < 32; offset *= 2) {
    const float top = fmaxf(state.top, shuffle_xor(state.top, offset));
    const float factor = exp2f(state.top - base_of(top));
    state.top = top;
    state.sum *= factor;
    state.sum += shuffle_xor(state.sum, offset);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      state.values[e] *= factor;
      state.values[e] += shuffle_xor(state.values[e], offset);
    }
  }
}

// Adds the warps' states up and writes the head's result, or its part, which the last one adds up.
__device__ void join_warps(const Softmax& state, int head, int split, const Arguments& a, Rest& rest) {
  const int thread = static_cast<int>(threadIdx.x) - MATRIX_THREADS, own = thread / 32;
  if (lane() < CHUNKS) {
#pragma unroll
    for (int e = 0; e < 8; ++e) rest.merge[own][lane() * 8 + e] = state.values[e];
  }
  if (lane() == 0) {
    rest.merge[own][HEAD_DIM] = state.top;
    rest.merge[own][HEAD_DIM + 1] = state.sum;
  }
  group_sync(ATTENTION_GROUP, ATTENTION_THREADS);
  float all = minus_infinity(), shares[ATTENTION_WARPS], total = 0.0f;
  for (int i = 0; i < ATTENTION_WARPS; ++i) all = fmaxf(all, rest.merge[i][HEAD_DIM]);
#pragma unroll
  for (int i = 0; i < ATTENTION_WARPS; ++i) {
    shares[i] = exp2f(rest.merge[i][HEAD_DIM] - base_of(all));
    total += shares[i] * rest.merge[i][HEAD_DIM + 1];
  }
  uint16_t* attended = reinterpret_cast<uint16_t*>(a.workspace + ATTENDED_AT) + head * HEAD_DIM;
  float* partial = reinterpret_cast<float*>(a.workspace + PARTIAL_AT) + head * SPLITS * (HEAD_DIM + 2);
  for (int d = thread; d < HEAD_DIM; d += ATTENTION_THREADS) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < ATTENTION_WARPS; ++i) sum += shares[i] * rest.merge[i][d];
    if (SPLITS == 1) {
      attended[d] = rounded(total == 0.0f ? 0.0f : sum / total);
    } else {
      partial[split * (HEAD_DIM + 2) + d] = sum;
    }
  }
  unsigned* counters = reinterpret_cast<unsigned*>(a.workspace);
  if (SPLITS > 1) {
    if (thread == 0) {
      partial[split * (HEAD_DIM + 2) + HEAD_DIM] = all;
      partial[split * (HEAD_DIM + 2) + HEAD_DIM + 1] = total;
    }
    group_sync(ATTENTION_GROUP, ATTENTION_THREADS);
    if (thread == 0) rest.last = grid_add(counters + HEAD_COUNTERS * 32 + head) % SPLITS == SPLITS - 1;
    group_sync(ATTENTION_GROUP, ATTENTION_THREADS);
    if (!rest.last) return;
    for (int d = thread; d < HEAD_DIM; d += ATTENTION_THREADS) {
      float tops[SPLITS], sums[SPLITS], values[SPLITS];
#pragma unroll
      for (int i = 0; i < SPLITS; ++i) {
        tops[i] = load_shared_by_others(partial + i * (HEAD_DIM + 2) + HEAD_DIM);
        sums[i] = load_shared_by_others(partial + i * (HEAD_DIM + 2) + HEAD_DIM + 1);
        values[i] = load_shared_by_others(partial + i * (HEAD_DIM + 2) + d);
      }
      float top = minus_infinity(), sum = 0.0f, value = 0.0f;
#pragma unroll
      for (int i = 0; i < SPLITS; ++i) top = fmaxf(top, tops[i]);
#pragma unroll
      for (int i = 0; i < SPLITS; ++i) {
        const float share = exp2f(tops[i] - base_of(top));
        sum += share * sums[i];
        value += share * values[i];
      }
      attended[d] = rounded(sum == 0.0f ? 0.0f : value / sum);
    }
  }
  group_sync(ATTENTION_GROUP, ATTENTION_THREADS);
  if (thread == 0) grid_arrive(counters + COUNTER_ATTENDED * 32);
}

// A task is a head and a part of the keys. Keys and values that were there before the step do not wait for it.
__device__ void attend(const Arguments& a, Rest& rest) {
  const int thread = static_cast<int>(threadIdx.x) - MATRIX_THREADS, own = thread / 32;
  const int chunk = static_cast<int>(lane()) % LANES;
  for (int i = thread; i < ROTARY / 2; i += ATTENTION_THREADS) {
    rest.table[0][i] = table_value(a.cos, COS_FIRST + COS_STEP * i);
    rest.table[1][i] = table_value(a.cos, COS_SECOND + COS_STEP * i);
    rest.table[2][i] = table_value(a.sin, SIN_FIRST + SIN_STEP * i);
    rest.table[3][i] = table_value(a.sin, SIN_SECOND + SIN_STEP * i);
  }
  const uint16_t* projected = reinterpret_cast<const uint16_t*>(a.workspace + PROJECTED_AT);
  const unsigned* ready = reinterpret_cast<const unsigned*>(a.workspace) + COUNTER_PROJECTED * 32;
  Range live = {0, 0};
#pragma unroll 1
  for (int index = 0; index < LAYERS; ++index) {
    const Layer& layer = a.layers[index];
    if (index == 0 || MASKS > 1) live = live_range(layer.mask, a.mask_step, rest);
    bool waited = false;
#pragma unroll 1
    for (int task = blockIdx.x; task < HEADS * SPLITS; task += CTAS) {
      const int head = task / SPLITS, split = task % SPLITS, kv = head / GROUP;
      const int64_t position = COUNTED ? load_shared_by_others(layer.length)
                               : POSITION_BYTES == 8 ? static_cast<const int64_t*>(a.positions)[0]
                                                     : static_cast<const int*>(a.positions)[0];
      const int count = live.count - (position == live.first + live.count - 1 ? 1 : 0);  // of keys in the cache
      const int share = (count + SPLITS - 1) / SPLITS;
      const int end = min(live.first + (split + 1) * share, live.first + count);
      int begin = live.first + split * share + own * TILE;
      const Cache cache = {layer.keys + kv * a.key_head, layer.values + kv * a.value_head, layer.mask, position};
      Tile tile;
      tile.load(a, cache, begin, end);
      if (!waited && BARRIERS && thread == 0) grid_wait(ready, (index + 1) * CTAS);
      waited = true;
      group_sync(ATTENTION_GROUP, ATTENTION_THREADS);  // and the task before has been written
      if (thread == 0) trace(a, index, AT_QUERY);
      float query[8] = {};
      if (chunk < CHUNKS) turned(projected + Q_FIRST + head * Q_STEP, chunk, rest, query);
#pragma unroll
      for (int e = 0; e < 8; ++e) query[e] *= a.scale;
      Softmax state = {minus_infinity(), 0.0f, {}};
      while (true) {
        tile.add_to(state, query);
        begin += ATTENTION_WARPS * TILE;
        if (begin >= end) break;
        tile.load(a, cache, begin, end);
      }
      if (split == 0 && own == 0) add_new(state, query, projected, head, position, a, layer, rest);
      join_lanes(state);
      join_warps(state, head, split, a, rest);
    }
    if (thread == 0) trace(a, index, AT_TASKS);
  }
}
