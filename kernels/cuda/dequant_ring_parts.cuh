// What the warps of dequant_ring.cu share: sizes, arguments, codes as operands. Constants that are not here are the weight's
// and the device's: kernels/_dequant_ring.py gives them to the compiler.
#pragma once

#include "primitives.cuh"

constexpr int TILE = 16, PIECE = 64;                 // rows of the weight; bytes of each that a warp takes at once
constexpr int COLUMNS = PIECE * 8 / BITS;            // of a piece
constexpr int PIECES = K / COLUMNS, CHUNKS = COLUMNS / 32;  // a lane has CHUNKS times 8 columns side by side
constexpr int SEGMENT = (PIECES + SEGMENTS - 1) / SEGMENTS;  // pieces of a slot
constexpr int OWN = (SEGMENT + WARPS - 1) / WARPS, PARTS = SEGMENTS * OWN;
constexpr int GROUPS = K / GROUP, FLUSHES = GROUPS == 1 ? 1 : PARTS;
constexpr int BUFFERS = 2, WIDTH = 8 * COLUMN_TILES;
constexpr int THREADS = (WARPS + PRODUCERS + 1) * 32;
static_assert(K % COLUMNS == 0 && K % GROUP == 0 && GROUP % COLUMNS == 0, "a piece has one group");
static_assert((SEGMENTS - 1) * SEGMENT < PIECES, "no segment is empty");

enum Type { NONE, HALF, BFLOAT16, FLOAT, INT8, UINT8, INT32 };
__device__ constexpr int size_of(int type) { return type == NONE ? 0 : type == FLOAT || type == INT32 ? 4 : type >= INT8 ? 1 : 2; }
constexpr int SCALE_BYTES = TILE * GROUPS * size_of(SCALE_TYPE), ZERO_BYTES = TILE * GROUPS * size_of(ZERO_TYPE);
constexpr int CODES_AT = (SCALE_BYTES + ZERO_BYTES + 127) / 128 * 128;
constexpr int ROW_BYTES = PIECES * PIECE, SEGMENT_BYTES = SEGMENT * PIECE;
constexpr int STRIDE = SEGMENT_BYTES + (SEGMENT_BYTES % 128 == 0 ? 64 : 0);  // two rows' pieces meet in no bank
static_assert(CODES_AT + TILE * STRIDE <= SLOT_BYTES && SLOT_BYTES % 128 == 0, "a tile fits a slot");

// fp16 takes a code as the lowest bits of a number near 0, code * 2^-24, which is exact; the upper halves of bytes are 16
// times that. bf16, whose numbers near 0 are too small for products, takes 128 + code.
constexpr bool SMALL = !BFLOAT;
constexpr float UNIT = SMALL ? 0x1p-24f : 1.0f, UPPER = SMALL && BITS == 4 ? 0x1p-4f : 1.0f;
constexpr int MIDDLE = BITS == 4 ? 8 : 128;
constexpr int RAW_MIDDLE = BITS == 8 && BFLOAT ? (SIGNED ? 0 : -MIDDLE) : (SIGNED ? MIDDLE : 0) + (BFLOAT ? 128 : 0);
constexpr float CENTRE = RAW_MIDDLE + OFFSET;
constexpr bool CORRECTED = RAW_MIDDLE + OFFSET != 0 || ZERO_TYPE != NONE;

struct Arguments {
  const uint16_t* x;            // [m, K]
  const unsigned char* codes;   // [n, ROW_BYTES]
  const unsigned char* scale;   // [n, GROUPS]
  const unsigned char* zero;    // [n, GROUPS] or null
  const uint16_t* bias;         // [n] or null
  uint16_t* out;                // [m, n]
  int m, n;
};

// The shared memory behind the ring.
struct Rest {
  float partial[BUFFERS][WARPS][TILE * WIDTH];
  uint64_t full[SLOTS], empty[SLOTS], done[BUFFERS], free[BUFFERS];
  uint4 x[X_ROWS > 0 ? PIECES * CHUNKS * X_ROWS * 4 : 1];  // as lanes need it, if registers are too few
};
static_assert(sizeof(Rest) <= REST_BYTES, "what the host asks for is enough");

__device__ __forceinline__ float widened(uint16_t x) { return BFLOAT ? bfloat_to_float(x) : half_to_float(x); }
__device__ __forceinline__ uint16_t rounded(float x) { return BFLOAT ? float_to_bfloat(x) : float_to_half(x); }
__device__ __forceinline__ float2 widened_two(uint32_t x) { return BFLOAT ? bfloats_to_floats(x) : halves_to_floats(x); }

__device__ __forceinline__ int tiles_of(const Arguments& a) { return (a.n + TILE - 1) / TILE; }
// The last tile begins earlier, so that none is smaller.
__device__ __forceinline__ int first_row(const Arguments& a, int tile) { return min(tile * TILE, a.n - TILE); }

// Places in a ring of COUNT, and the parity of their present phase.
template <int COUNT>
struct Place {
  int at = 0;
  unsigned parity = 0;
  __device__ __forceinline__ void next() {
    if (++at == COUNT) {
      at = 0;
      parity ^= 1;
    }
  }
};

// Element `at` of an array of a Type, rounded to the type that the weight's source computes in.
template <int TYPE>
__device__ __forceinline__ float value(const unsigned char* array, int at) {
  float found;
  if constexpr (TYPE == HALF) found = half_to_float(reinterpret_cast<const uint16_t*>(array)[at]);
  if constexpr (TYPE == BFLOAT16) found = bfloat_to_float(reinterpret_cast<const uint16_t*>(array)[at]);
  if constexpr (TYPE == FLOAT) found = reinterpret_cast<const float*>(array)[at];
  if constexpr (TYPE == INT8) found = static_cast<float>(reinterpret_cast<const signed char*>(array)[at]);
  if constexpr (TYPE == UINT8) found = static_cast<float>(array[at]);
  if constexpr (TYPE == INT32) found = static_cast<float>(reinterpret_cast<const int*>(array)[at]);
  if constexpr (COMPUTE == HALF && TYPE != HALF) found = half_to_float(float_to_half(found));
  if constexpr (COMPUTE == BFLOAT16 && TYPE != BFLOAT16) found = bfloat_to_float(float_to_bfloat(found));
  return found;
}

// The codes of 4 bytes in rows g and g + 8 as operands, and their products with the columns that x holds in that order.
template <int AT>
__device__ __forceinline__ void codes_at(const uint32_t (&words)[2], uint32_t (&operand)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t w = words[i];
    if constexpr (BITS == 4 && SMALL) {  // AT: the lower or the upper halves
      constexpr uint32_t MASK = AT ? 0x00f000f0 : 0x000f000f, FLIP = SIGNED ? MASK & 0x00880088 : 0;
      operand[i] = and_xor(w, MASK, FLIP);
      operand[2 + i] = and_xor(w >> 8, MASK, FLIP);
    } else if constexpr (BITS == 4) {
      constexpr uint32_t MASK = 0x000f000f, FLIP = SIGNED ? 0x43084308 : 0x43004300;
      operand[i] = and_xor(w >> (4 * AT), MASK, FLIP);
      operand[2 + i] = and_xor(w >> (8 + 4 * AT), MASK, FLIP);
    } else if constexpr (SMALL) {
      constexpr uint32_t MASK = 0x00ff00ff, FLIP = SIGNED ? 0x00800080 : 0;
      operand[i] = and_xor(w, MASK, FLIP);
      operand[2 + i] = and_xor(w >> 8, MASK, FLIP);
    } else {  // 128 + the lower seven bits, less 128 or 256
      constexpr uint32_t LESS = SIGNED ? 0x43004300 : 0x43804380;
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t v = w >> (8 * pair);
        operand[2 * pair + i] =
            subtract_bfloats(and_xor(v, 0x007f007f, 0x43004300), and_xor(v, 0x00800080, LESS));
      }
    }
  }
}

__device__ __forceinline__ float activated(float x) {
  if (ACTIVATION == 1) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
  if (ACTIVATION == 2) return x / (1.0f + expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
  if (ACTIVATION == 3) return x / (1.0f + expf(-x));
  return x;
}
