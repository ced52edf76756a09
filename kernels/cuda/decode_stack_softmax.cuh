// Softmax of parts of the keys in decode_stack.cu, and how the parts are joined: flash decoding (Dao et al. 2023).
#pragma once

#include "decode_stack_keys.cuh"

constexpr int PART_FLOATS = HEAD_DIM + 4;  // of a head's part in the workspace: values, top score, sum of weights

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// Softmax of some keys so far: top score, sum of weights, weighted sum of values; of this thread's lanes.
struct Softmax {
  float top, sum, values[8];
};

// The exponents' base for a top score: where all are minus infinity, their weights are 0.
__device__ __forceinline__ float base_of(float top) { return top == minus_infinity() ? 0.0f : top; }

// Adds DEEP keys for each of this thread's lanes; bit i of `kept`: key i is attended to, else it may be anything.
template <class Keys, class Values>
__device__ __forceinline__ void add_tile(Softmax (&state)[QUERIES], const float (&query)[QUERIES][8], unsigned kept,
                                         Keys keys, Values values) {
  float scores[QUERIES][DEEP];
#pragma unroll
  for (int i = 0; i < DEEP; ++i) {
    float wide[8];
    widen(keys(i), wide);
#pragma unroll
    for (int r = 0; r < QUERIES; ++r) {
      scores[r][i] = 0.0f;
#pragma unroll
      for (int e = 0; e < 8; ++e) scores[r][i] = fmaf(wide[e], query[r][e], scores[r][i]);
    }
  }
#pragma unroll
  for (int r = 0; r < QUERIES; ++r) {
    float top = state[r].top;
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
#pragma unroll
      for (int offset = LANES / 2; offset > 0; offset /= 2) scores[r][i] += shuffle_xor(scores[r][i], offset);
      scores[r][i] = kept >> i & 1 ? scores[r][i] : minus_infinity();
      top = fmaxf(top, scores[r][i]);
    }
    const float base = base_of(top), factor = exp2f(state[r].top - base);
    state[r].top = top;
    state[r].sum *= factor;
#pragma unroll
    for (int e = 0; e < 8; ++e) state[r].values[e] *= factor;
#pragma unroll
    for (int i = 0; i < DEEP; ++i) scores[r][i] = exp2f(scores[r][i] - base);
  }
#pragma unroll
  for (int i = 0; i < DEEP; ++i) {
    if (!(kept >> i & 1)) continue;
    float wide[8];
    widen(values(i), wide);
#pragma unroll
    for (int r = 0; r < QUERIES; ++r) {
      state[r].sum += scores[r][i];
#pragma unroll
      for (int e = 0; e < 8; ++e) state[r].values[e] = fmaf(scores[r][i], wide[e], state[r].values[e]);
    }
  }
}

// Adds one key, of the lanes below LANES.
__device__ __forceinline__ void add_one(Softmax& state, float score, const float* value) {
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

// Adds the parts of QUERIES heads up, in order, and writes the heads' results.
__device__ void join_parts(const float* parts, uint16_t* attended, Rest& rest) {
  const int thread = static_cast<int>(threadIdx.x) - MATRIX_THREADS;
  uint4 found[SPLITS];
  auto load = [&](int at) {
    const float* part = parts + at / (HEAD_DIM / 4) * SPLITS * PART_FLOATS + at % (HEAD_DIM / 4) * 4;
#pragma unroll
    for (int i = 0; i < SPLITS; ++i) {
      found[i] = load_shared_by_others(reinterpret_cast<const uint4*>(part + i * PART_FLOATS));
    }
  };
  if (thread < QUERIES * HEAD_DIM / 4) load(thread);
  for (int i = thread; i < QUERIES * SPLITS; i += ATTENTION_THREADS) {
    const uint4 last = load_shared_by_others(reinterpret_cast<const uint4*>(parts + i * PART_FLOATS + HEAD_DIM));
    rest.parts[i][0] = __uint_as_float(last.x);
    rest.parts[i][1] = __uint_as_float(last.y);
  }
  group_sync(ATTENTION_GROUP, ATTENTION_THREADS);
  for (int at = thread; at < QUERIES * HEAD_DIM / 4; at += ATTENTION_THREADS) {
    if (at != thread) load(at);
    const float(*part)[2] = rest.parts + at / (HEAD_DIM / 4) * SPLITS;
    float top = minus_infinity(), sum = 0.0f, values[4] = {};
#pragma unroll
    for (int i = 0; i < SPLITS; ++i) top = fmaxf(top, part[i][0]);
#pragma unroll
    for (int i = 0; i < SPLITS; ++i) {
      const float share = exp2f(part[i][0] - base_of(top));
      sum += share * part[i][1];
      values[0] += share * __uint_as_float(found[i].x);
      values[1] += share * __uint_as_float(found[i].y);
      values[2] += share * __uint_as_float(found[i].z);
      values[3] += share * __uint_as_float(found[i].w);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) attended[at * 4 + e] = rounded(sum == 0.0f ? 0.0f : values[e] / sum);
  }
}

// Adds the warps' states up and writes the heads' results, or their parts, which the last one adds up.
__device__ void join_warps(const Softmax (&state)[QUERIES], int head, int split, const Arguments& a, Rest& rest) {
  const int thread = static_cast<int>(threadIdx.x) - MATRIX_THREADS, own = thread / 32;
#pragma unroll
  for (int r = 0; r < QUERIES; ++r) {
    if (lane() < CHUNKS) {
#pragma unroll
      for (int e = 0; e < 8; ++e) rest.merge[r][own][lane() * 8 + e] = state[r].values[e];
    }
    if (lane() == 0) {
      rest.merge[r][own][HEAD_DIM] = state[r].top;
      rest.merge[r][own][HEAD_DIM + 1] = state[r].sum;
    }
  }
  group_sync(ATTENTION_GROUP, ATTENTION_THREADS);
  uint16_t* attended = reinterpret_cast<uint16_t*>(a.workspace + ATTENDED_AT) + head * HEAD_DIM;
  float* parts = reinterpret_cast<float*>(a.workspace + PARTIAL_AT) + head * SPLITS * PART_FLOATS;
  for (int at = thread; at < QUERIES * HEAD_DIM; at += ATTENTION_THREADS) {
    const int r = at / HEAD_DIM, d = at % HEAD_DIM;
    const auto& merge = rest.merge[r];
    float all = minus_infinity(), total = 0.0f, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < ATTENTION_WARPS; ++i) all = fmaxf(all, merge[i][HEAD_DIM]);
#pragma unroll
    for (int i = 0; i < ATTENTION_WARPS; ++i) {
      const float share = exp2f(merge[i][HEAD_DIM] - base_of(all));
      total += share * merge[i][HEAD_DIM + 1];
      sum += share * merge[i][d];
    }
    if (SPLITS == 1) {
      attended[at] = rounded(total == 0.0f ? 0.0f : sum / total);
    } else {
      float* part = parts + (r * SPLITS + split) * PART_FLOATS;
      part[d] = sum;
      if (d == 0) {
        part[HEAD_DIM] = all;
        part[HEAD_DIM + 1] = total;
      }
    }
  }
  unsigned* counters = reinterpret_cast<unsigned*>(a.workspace);
  group_sync(ATTENTION_GROUP, ATTENTION_THREADS);
  if (SPLITS > 1) {
    if (thread == 0) rest.last = grid_add(counters + HEAD_COUNTERS * 32 + head) % SPLITS == SPLITS - 1;
    group_sync(ATTENTION_GROUP, ATTENTION_THREADS);
    if (!rest.last) return;
    join_parts(parts, attended, rest);
    group_sync(ATTENTION_GROUP, ATTENTION_THREADS);
  }
  if (thread == 0) grid_arrive(counters + COUNTER_ATTENDED * 32);
}
