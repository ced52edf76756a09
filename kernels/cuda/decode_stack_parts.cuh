// What the warps of decode_stack.cu share: sizes, arguments, the block's rows, arithmetic. Constants that are not here
// are the model's and the device's: kernels/_decode_stack_plan.py gives them to the compiler.
#pragma once

#include "primitives.cuh"

#ifndef BARRIERS  // 0 to measure what they cost: the result is then wrong
#define BARRIERS 1
#endif
#ifndef ATTENTION
#define ATTENTION 1
#endif
#ifndef TRACE  // 1 to leave the times at which each block came to each EVENT behind the workspace
#define TRACE 0
#endif

constexpr int MATRIX_THREADS = MATRIX_WARPS * 32, ATTENTION_THREADS = ATTENTION_WARPS * 32;
constexpr bool KEYS_RING = KEY_SLOTS > 0;  // else attention warps load keys and values themselves
constexpr int THREADS = MATRIX_THREADS + ATTENTION_THREADS + (KEYS_RING ? 64 : 32);
constexpr int MATRIX_GROUP = 1, ATTENTION_GROUP = 2, WRITERS_GROUP = 3;
constexpr int UPS = GATED ? 2 : 1;
constexpr int STRIDE = MATRIX_WARPS | 1;  // of sums: threads that read rows side by side meet in no bank
enum Counter {
  COUNTER_STREAM, COUNTER_PROJECTED, COUNTER_INNER, COUNTER_ATTENDED, COUNTER_MIDDLE, HEAD_COUNTERS, NO_COUNTER = -1
};

enum Event {
  AT_BEGIN, AT_STREAM, AT_PROJECTED, AT_UP, AT_INNER, AT_FIRST, AT_ATTENDED, AT_OUT, AT_QUERY, AT_TASKS, EVENTS = 16
};

struct Layer {
  const uint16_t* norm_weight[2];
  const uint16_t* norm_bias[2];
  const uint16_t* in_weight[PROJECTIONS];
  const uint16_t* in_bias[PROJECTIONS];
  const uint16_t* up_weight[UPS];
  const uint16_t* up_bias[UPS];
  const uint16_t* out_weight;
  const uint16_t* out_bias;
  const uint16_t* down_weight;
  const uint16_t* down_bias;
  const uint16_t* head_norm[2];  // of queries and keys
  uint16_t* keys;
  uint16_t* values;
  int64_t* length;
  const uint8_t* mask;
};

struct Arguments {
  const uint16_t* x;
  uint16_t* result;
  const void* cos;
  const void* sin;
  const void* positions;
  const uint16_t* head_norm_weight;
  const uint16_t* head_norm_bias;
  const uint16_t* head_weight;
  const uint16_t* head_bias;
  unsigned char* workspace;
  int64_t key_head, key_row, value_head, value_row, mask_step;  // strides in elements
  float eps, weight_offset, scale, head_eps, head_weight_offset, unused;  // scale: with log2(e)
  Layer layers[LAYERS];
};

__device__ __forceinline__ void trace(const Arguments& a, int layer, Event event) {
#if TRACE
  reinterpret_cast<uint64_t*>(a.workspace + TRACE_AT)[(blockIdx.x * LAYERS + layer) * EVENTS + event] = now();
#endif
}

// How a weight [N, COLUMNS] is read: by chunks of ROWS * GROUPS rows, or, where a row is too long, by its SEGMENTS.
// A slice of 256 columns is what a warp reads at once. WARPS share a row, each with PIECES slices of a segment.
template <int COLUMNS_, int ROWS_, int SEGMENTS_>
struct Weight {
  static constexpr int COLUMNS = COLUMNS_, ROWS = ROWS_, SEGMENTS = SEGMENTS_;
  static constexpr int SLICES = (COLUMNS + 255) / 256, SEGMENT_SLICES = (SLICES + SEGMENTS - 1) / SEGMENTS;
  static constexpr int SEGMENT = SEGMENT_SLICES * 256 < COLUMNS ? SEGMENT_SLICES * 256 : COLUMNS;
  static constexpr int WARPS = SEGMENT_SLICES < MATRIX_WARPS ? SEGMENT_SLICES : MATRIX_WARPS;
  static constexpr int GROUPS = SEGMENTS == 1 ? MATRIX_WARPS / WARPS : 1;
  static constexpr int PIECES = (SEGMENT_SLICES + WARPS - 1) / WARPS, PARTS = SEGMENTS * PIECES;
  static constexpr int CHUNK_ROWS = ROWS * GROUPS, ROUND_ROWS = ROUND / CHUNK_ROWS * CHUNK_ROWS;
  static constexpr bool EXACT = COLUMNS % 256 == 0 && SLICES % SEGMENTS == 0 && SEGMENT_SLICES % WARPS == 0;
  static_assert(SEGMENTS == 1 || ROWS == 1, "a chunk is rows or a part of one");
  static_assert((SEGMENTS - 1) * SEGMENT_SLICES < SLICES && COLUMNS % 8 == 0, "no segment is empty");
  static_assert(ROUND <= MATRIX_THREADS && ROUND_ROWS > 0, "a thread finishes a row");
  static_assert(CHUNK_ROWS * SEGMENT * 2 <= SLOT_BYTES, "a chunk fits a slot");

  static __device__ __forceinline__ int column(int segment, int piece, int part) {
    return segment * SEGMENT + (part + piece * WARPS) * 256 + static_cast<int>(lane()) * 8;
  }
  static __device__ __forceinline__ bool there(int segment, int piece, int part) {
    return EXACT || (part + piece * WARPS < SEGMENT_SLICES && column(segment, piece, part) < COLUMNS);
  }
  // How many a warp has, of all segments' but the first none: for rows that are read in one piece.
  static __device__ __forceinline__ float columns_of_warp(int part) {
    int count = 0;
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) count += max(0, min(256, COLUMNS - (part + piece * WARPS) * 256));
    return static_cast<float>(count);
  }
};

using In = Weight<WIDTH, IN_ROWS_OF_CHUNK, 1>;
using Out = Weight<HEADS * HEAD_DIM, OUT_ROWS_OF_CHUNK, OUT_SEGMENTS>;
using Down = Weight<INNER, DOWN_ROWS_OF_CHUNK, DOWN_SEGMENTS>;

struct Range {
  int first, count;
};

// Each block has N / CTAS rows or one more. Who has more is another one each time, so that blocks have alike in all.
__device__ __forceinline__ Range rows_of(int n, int layer, int shift) {
  int place = (static_cast<int>(blockIdx.x) + shift + layer * SHIFT_OF_LAYER) % CTAS;
  const int base = n / CTAS, more = n % CTAS;
  return {place * base + min(place, more), base + (place < more ? 1 : 0)};
}
__device__ __forceinline__ int in_rows(int i) { return i == 0 ? IN_ROWS_0 : i == 1 ? IN_ROWS_1 : IN_ROWS_2; }
__device__ __forceinline__ int projected_at(int i) {
  return i == 0 ? 0 : i == 1 ? IN_ROWS_0_PADDED : IN_ROWS_0_PADDED + IN_ROWS_1_PADDED;
}
__device__ __forceinline__ int shift_in(int i) { return i == 0 ? SHIFT_IN : i == 1 ? SHIFT_IN_1 : SHIFT_IN_2; }

constexpr int PAIRS = ROTARY > 0 ? ROTARY / 2 : 1;

// The keys that a mask keeps: `count` from `first` on; with holes, only some of them.
struct Live {
  int first, count, holes;
};

// The shared memory behind the rings.
struct Rest {
  uint64_t full[SLOTS], empty[SLOTS];
  uint64_t keys_full[KEYS_RING ? KEY_SLOTS : 1], keys_empty[KEYS_RING ? KEY_SLOTS : 1];
  uint64_t known[MASKS];  // positions and a mask's live keys
  Live live[MASKS];
  int positions[LAYERS];  // of the token in the cache, or -1
  float sums[2][UPS][ROUND * STRIDE];  // of the rows of a round, and of the next
  float kept[KEPT_ROWS * STRIDE];      // of the MLP, until attention is there
  float statistics[2 * MATRIX_WARPS];
  float table[4][PAIRS];  // cos of a pair's first and second lane, sin of both
  float merge[QUERIES][ATTENTION_WARPS][HEAD_DIM + 2];
  float parts[QUERIES * SPLITS][2];  // top score and sum of weights
  int range[ATTENTION_WARPS][3];
  int last;
};
static_assert(!PARALLEL || KEPT_ROWS * CTAS >= WIDTH, "all of a block's rows are kept");
static_assert(!PARALLEL || (KEPT_ROWS <= Out::ROUND_ROWS && KEPT_ROWS <= Down::ROUND_ROWS), "in one round");
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the host's struct is the same");
static_assert(sizeof(Rest) <= REST_BYTES, "what the host asks for is enough");

__device__ __forceinline__ float widened(uint16_t x) { return BFLOAT ? bfloat_to_float(x) : half_to_float(x); }
__device__ __forceinline__ uint16_t rounded(float x) { return BFLOAT ? float_to_bfloat(x) : float_to_half(x); }
__device__ __forceinline__ float2 widened_two(uint32_t x) {
  return BFLOAT ? bfloats_to_floats(x) : halves_to_floats(x);
}
__device__ __forceinline__ float square(float x) { return x * x; }

__device__ __forceinline__ void widen(const uint4& x, float* y) {
  const float2 a = widened_two(x.x), b = widened_two(x.y), c = widened_two(x.z), d = widened_two(x.w);
  y[0] = a.x, y[1] = a.y, y[2] = b.x, y[3] = b.y, y[4] = c.x, y[5] = c.y, y[6] = d.x, y[7] = d.y;
}

__device__ __forceinline__ float dot(const uint4& x, const float* y, float acc) {
  float wide[8];
  widen(x, wide);
#pragma unroll
  for (int e = 0; e < 8; ++e) acc = fmaf(wide[e], y[e], acc);
  return acc;
}

__device__ __forceinline__ float or_zero(const uint16_t* vector, int at) {
  return vector == nullptr ? 0.0f : widened(load_stream(vector + at));
}

__device__ __forceinline__ float activated(float x) {
  if (ACTIVATION == 0) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
  if (ACTIVATION == 1) return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
  return x / (1.0f + expf(-x));
}

__device__ __forceinline__ float over_warp(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += shuffle_xor(x, offset);
  return x;
}

// The sums over lanes of N values: of value i in the lanes [i * 32 / N, (i + 1) * 32 / N). Lanes that meet exchange
// half of what they have.
template <int N, int OFFSET = 16>
__device__ __forceinline__ float over_lanes(const float* values) {
  if constexpr (N == 1) {
    float x = values[0];
#pragma unroll
    for (int offset = OFFSET; offset > 0; offset /= 2) x += shuffle_xor(x, offset);
    return x;
  } else {
    const bool upper = (lane() & OFFSET) != 0;
    float half[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float kept = upper ? values[i + N / 2] : values[i], sent = upper ? values[i] : values[i + N / 2];
      half[i] = kept + shuffle_xor(sent, OFFSET);
    }
    return over_lanes<N / 2, OFFSET / 2>(half);
  }
}
