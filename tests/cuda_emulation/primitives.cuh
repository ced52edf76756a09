// Stands in for kernels/cuda/primitives.cuh where there is no GPU: CUDA's spelling for g++, and the primitives as
// calls into the emulator (runtime.h). The kernel's source is compiled as it is.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)
#ifndef __align__
#define __align__(n) __attribute__((aligned(n)))
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
// Set before each thread goes on.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
static const int warpSize = 32;

#define EMULATED_VECTOR2(name, T) \
  struct __attribute__((aligned(2 * sizeof(T)))) name { T x, y; }; \
  static inline name make_##name(T x, T y) { return {x, y}; }
#define EMULATED_VECTOR4(name, T, A) \
  struct __attribute__((aligned(A))) name { T x, y, z, w; }; \
  static inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTOR2(float2, float)
EMULATED_VECTOR2(int2, int)
EMULATED_VECTOR2(uint2, unsigned)
EMULATED_VECTOR2(ushort2, unsigned short)
EMULATED_VECTOR4(float4, float, 16)
EMULATED_VECTOR4(int4, int, 16)
EMULATED_VECTOR4(uint4, unsigned, 16)
EMULATED_VECTOR4(ushort4, unsigned short, 8)

// ---- what waits, or moves data (scheduler.cpp, barriers.cpp) ----
extern "C" {
unsigned char* emulated_dynamic_shared();
void emulated_fail(const char* reason);
uint64_t emulated_switches();
void emulated_pause();  // another thread may run here
uint64_t emulated_exchange(int kind, unsigned mask, uint64_t value, int source);
void emulated_group_sync(int id, int threads, bool waits);
unsigned emulated_counter_add(unsigned* counter, unsigned n, bool acquires);
void emulated_read_constant(const void* address, size_t bytes);

void mbarrier_init(uint64_t* barrier, unsigned count);
void mbarrier_fence_init();
void mbarrier_expect(uint64_t* barrier, unsigned bytes);
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_wait(uint64_t* barrier, unsigned parity);
bool emulated_done(uint64_t* barrier, unsigned parity);
void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* barrier);
void grid_wait(const unsigned* counter, unsigned goal);
const uint32_t (*emulated_operands(const uint32_t* own))[6];
}

static inline unsigned lane() { return threadIdx.x % 32; }
static inline unsigned warp() { return threadIdx.x / 32; }
static inline uint64_t now() { return emulated_switches(); }  // only grows
static inline void group_sync(int id, int threads) { emulated_group_sync(id, threads, true); }
static inline void group_arrive(int id, int threads) { emulated_group_sync(id, threads, false); }
static inline unsigned grid_add(unsigned* counter) { return emulated_counter_add(counter, 1, true); }
static inline bool mbarrier_done(uint64_t* barrier, unsigned parity) { return emulated_done(barrier, parity); }
static inline void grid_arrive(unsigned* counter) { emulated_counter_add(counter, 1, false); }

template <typename T>
static inline T load_shared_by_others(const T* address) {
  emulated_pause();
  return *address;
}
template <typename T>
static inline T load_stream(const T* address) {
  emulated_read_constant(address, sizeof(T));
  return *address;
}

// ---- CUDA's own ----
enum { EMULATED_SHUFFLE, EMULATED_BALLOT, EMULATED_SYNC, EMULATED_PRODUCT };

template <typename T>
static inline T emulated_shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = emulated_exchange(EMULATED_SHUFFLE, mask, bits, source);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
template <typename T>
static inline T __shfl_xor_sync(unsigned mask, T value, int other, int = 32) {
  return emulated_shuffle(mask, value, int(lane()) ^ other);
}
template <typename T>
static inline T __shfl_sync(unsigned mask, T value, int source, int = 32) {
  return emulated_shuffle(mask, value, source & 31);
}
template <typename T>
static inline T __shfl_down_sync(unsigned mask, T value, int by, int = 32) {
  return emulated_shuffle(mask, value, int(lane()) + by < 32 ? int(lane()) + by : int(lane()));
}
template <typename T>
static inline T __shfl_up_sync(unsigned mask, T value, int by, int = 32) {
  return emulated_shuffle(mask, value, int(lane()) >= by ? int(lane()) - by : int(lane()));
}
static inline float shuffle_xor(float value, int other) { return __shfl_xor_sync(0xffffffffu, value, other); }
static inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return unsigned(emulated_exchange(EMULATED_BALLOT, mask, predicate != 0, 0));
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
static inline void __syncwarp(unsigned mask = 0xffffffffu) { emulated_exchange(EMULATED_SYNC, mask, 0, 0); }
static inline void __syncthreads() { emulated_group_sync(0, int(blockDim.x), true); }
static inline void __threadfence() { emulated_pause(); }
static inline void __threadfence_block() { emulated_pause(); }
static inline void __nanosleep(unsigned) { emulated_pause(); }
static inline void __trap() { emulated_fail("__trap()"); }
static inline unsigned atomicAdd(unsigned* address, unsigned n) { return emulated_counter_add(address, n, false); }

template <typename T>
static inline T __ldg(const T* p) { return load_stream(p); }
template <typename T>
static inline T __ldcg(const T* p) { return *p; }
template <typename T>
static inline T __ldcs(const T* p) { return *p; }
template <typename T>
static inline void __stcg(T* p, T value) { *p = value; }

template <typename To, typename From>
static inline To emulated_bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}
static inline float __uint_as_float(unsigned v) { return emulated_bits<float>(v); }
static inline float __int_as_float(int v) { return emulated_bits<float>(v); }
static inline unsigned __float_as_uint(float v) { return emulated_bits<unsigned>(v); }
static inline int __float_as_int(float v) { return emulated_bits<int>(v); }
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned picks) {
  const uint64_t bytes = a | uint64_t(b) << 32;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; i++) result |= unsigned(bytes >> 8 * (picks >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline float emulated_rsqrt(float v) { return 1.0f / sqrtf(v); }
#define rsqrtf emulated_rsqrt  // macros, for glibc has functions of these names
#define __expf expf
#define __exp2f exp2f
#define __logf logf
#define __log2f log2f
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __frcp_rn(float v) { return 1.0f / v; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fdiv_rn(float a, float b) { return a / b; }

#define EMULATED_MIN_MAX(T) \
  static inline T min(T a, T b) { return b < a ? b : a; } \
  static inline T max(T a, T b) { return a < b ? b : a; }
EMULATED_MIN_MAX(int)
EMULATED_MIN_MAX(unsigned)
EMULATED_MIN_MAX(long)
EMULATED_MIN_MAX(unsigned long)
EMULATED_MIN_MAX(long long)
EMULATED_MIN_MAX(unsigned long long)
static inline unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
static inline unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
static inline unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
static inline unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }

// ---- 16-bit floats, rounded to the nearest, ties to even ----
static inline float bfloat_to_float(uint16_t v) { return __uint_as_float(unsigned(v) << 16); }
static inline uint16_t float_to_bfloat(float value) {
  unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
static inline float half_to_float(uint16_t v) {
  unsigned sign = unsigned(v & 0x8000u) << 16, magnitude = v & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  float scaled = __uint_as_float(magnitude << 13) * 0x1p112f;  // subnormals too
  return __uint_as_float(__float_as_uint(scaled) | sign);
}
static inline uint16_t float_to_half(float value) {
  unsigned bits = __float_as_uint(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // the sum's last place is a subnormal's unit
    float sum = __uint_as_float(magnitude) + 0.5f;
    return uint16_t(sign | (__float_as_uint(sum) - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13));
}
static inline float2 halves_to_floats(uint32_t v) { return {half_to_float(uint16_t(v)), half_to_float(v >> 16)}; }
static inline float2 bfloats_to_floats(uint32_t v) { return {bfloat_to_float(uint16_t(v)), bfloat_to_float(v >> 16)}; }
static inline uint32_t and_xor(uint32_t x, uint32_t mask, uint32_t flip) { return (x & mask) ^ flip; }
static inline uint32_t subtract_bfloats(uint32_t a, uint32_t b) {
  float2 x = bfloats_to_floats(a), y = bfloats_to_floats(b);
  return float_to_bfloat(x.x - y.x) | uint32_t(float_to_bfloat(x.y - y.y)) << 16;
}

// ---- products of a warp: the 16 terms are added up exactly, which a GPU does not promise ----
static inline void wait_for_earlier_launch() {}
static inline void allow_next_launch() {}
template <bool BF16>
static inline void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const uint32_t(*of)[6] = emulated_operands(own);
  auto two = [](uint32_t v) { return BF16 ? bfloats_to_floats(v) : halves_to_floats(v); };
  const unsigned row = lane() / 4, column = lane() % 4 * 2;
  for (unsigned i = 0; i < 4; i++) {
    double sum = c[i];
    for (unsigned t = 0; t < 4; t++)
      for (unsigned half = 0; half < 2; half++) {
        float2 x = two(of[row * 4 + t][2 * half + i / 2]), y = two(of[(column + i % 2) * 4 + t][4 + half]);
        sum += double(x.x) * y.x + double(x.y) * y.y;
      }
    c[i] = float(sum);
  }
}
