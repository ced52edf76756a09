// 1 to 8 * COLUMN_TILES rows of x times a weight of 4-bit or 8-bit codes; see kernels/_dequant_ring.py for what it takes.
//
//   out[m, n] = act(sum over groups of scale[n, group] * (x[m] . raw[n] - (CENTRE + zero[n, group]) * sum of x[m])
//                   + bias[n])
//
// raw: the code as it comes out of its bits, CENTRE away from the number that it stands for.
//
// A block a multiprocessor takes tiles of 16 rows of the weight, of three kinds of warps:
// - PRODUCERS warps copy a tile's codes, scales and zero points into a ring in shared memory. They wait for free slots only.
// - WARPS warps share the columns, always the same ones: so each holds its part of x in registers (X_ROWS > 0: in shared
//   memory), in the order in which codes come out, and nothing is permuted in the loop.
// - one warp adds up the parts of a tile, always in the same order, and writes it.
#include "dequant_ring_parts.cuh"

// ---- Producer

// A part of 16 rows, as soon as the slot is empty. Lanes copy a row each.
__device__ __forceinline__ void fill(const Arguments& a, unsigned char* to, uint64_t* full, uint64_t* empty,
                                     unsigned parity, int first, int segment) {
  const int row = static_cast<int>(lane()), bytes = min(SEGMENT_BYTES, ROW_BYTES - segment * SEGMENT_BYTES);
  const bool scales = segment == 0;
  mbarrier_wait(empty, parity);
  if (row == 0) mbarrier_expect(full, TILE * bytes + (scales ? SCALE_BYTES + ZERO_BYTES : 0));
  __syncwarp();
  if (row < TILE) {
    const unsigned char* from = a.codes + static_cast<int64_t>(first + row) * ROW_BYTES + segment * SEGMENT_BYTES;
    bulk_load(to + CODES_AT + row * STRIDE, from, bytes, full);
  } else if (row == TILE && scales) {
    bulk_load(to, a.scale + static_cast<int64_t>(first) * (SCALE_BYTES / TILE), SCALE_BYTES, full);
  } else if (row == TILE + 1 && scales && ZERO_BYTES > 0) {
    bulk_load(to + SCALE_BYTES, a.zero + static_cast<int64_t>(first) * (ZERO_BYTES / TILE), ZERO_BYTES, full);
  }
}

// With more warps than slots, one could take a slot's phase for that of two turns before.
static_assert(PRODUCERS <= SLOTS, "whoever fills a slot knows that all turns up to its last but one were read");

// One of PRODUCERS warps: each fills every PRODUCERS-th slot, as issuing a copy takes a while.
__device__ void produce(const Arguments& a, unsigned char* slots, Rest& rest, int producer) {
  Place<SLOTS> slot;
  const int tiles = tiles_of(a);
  int turn = producer;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    for (int segment = 0; segment < SEGMENTS; ++segment) {
      if (turn == 0) fill(a, slots + slot.at * SLOT_BYTES, &rest.full[slot.at], &rest.empty[slot.at], slot.parity ^ 1,
                          first_row(a, tile), segment);
      turn = turn == 0 ? PRODUCERS - 1 : turn - 1;
      slot.next();
    }
  }
}

// ---- Products

class Consumer {
 public:
  __device__ Consumer(const Arguments& a, unsigned char* slots, Rest& rest) : a_(a), slots_(slots), rest_(rest) {}

  __device__ void run() {
    if (EARLY) wait_for_earlier_launch();
    load_x();
    if (EARLY) allow_next_launch();
    const int tiles = tiles_of(a_);
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) one_tile();
  }

 private:
  using Operands = uint32_t[CHUNKS][COLUMN_TILES][4];

  struct Sums {
    float lower[COLUMN_TILES][4], upper[COLUMN_TILES][4];
  };

  static __device__ __forceinline__ int row() { return static_cast<int>(lane()) / 4; }
  static __device__ __forceinline__ int quarter() { return static_cast<int>(lane()) % 4; }
  // This warp's piece `own` of a segment, among the segment's.
  static __device__ __forceinline__ int piece(int own) { return static_cast<int>(warp()) * OWN + own; }
  static __device__ __forceinline__ bool there(int segment, int own) {
    constexpr bool ALL = SEGMENT * SEGMENTS == PIECES && OWN * WARPS == SEGMENT;
    return ALL || (piece(own) < SEGMENT && segment * SEGMENT + piece(own) < PIECES);
  }

  __device__ void load_x() {
#pragma unroll
    for (int i = 0; i < FLUSHES; ++i) {
#pragma unroll
      for (int tile = 0; tile < COLUMN_TILES; ++tile) sums_[i][tile][0] = sums_[i][tile][1] = 0.0f;
    }
    float sums[FLUSHES][COLUMN_TILES] = {};
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const int segment = part / OWN, own = part % OWN;
      const int column = (segment * SEGMENT + piece(own)) * COLUMNS + quarter() * (COLUMNS / 4);
#pragma unroll
      for (int tile = 0; tile < COLUMN_TILES; ++tile) {
        const int m = tile * 8 + row();
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
          uint4 found = {0, 0, 0, 0};
          if (m < a_.m && there(segment, own)) {
            found = load_shared_by_others(
                reinterpret_cast<const uint4*>(a_.x + static_cast<int64_t>(m) * K + column + chunk * 8));
          }
          if constexpr (X_ROWS == 0) {
            arrange(found, x_[part][chunk][tile]);
          } else if (m < X_ROWS && there(segment, own)) {
            uint32_t arranged[4];
            arrange(found, arranged);
            rest_.x[place_of_x(segment, own, chunk, m)] = {arranged[0], arranged[1], arranged[2], arranged[3]};
          }
          if (CORRECTED) sums[GROUPS == 1 ? 0 : part][tile] += sum(found);
        }
      }
    }
    if (X_ROWS > 0) __syncwarp();  // a warp reads what it wrote
    if (!CORRECTED) return;
#pragma unroll
    for (int i = 0; i < FLUSHES; ++i) {
#pragma unroll
      for (int tile = 0; tile < COLUMN_TILES; ++tile) {
        float all = sums[i][tile];  // of row m = lane / 4; its products are in other lanes
        all += shuffle_xor(all, 1);
        all += shuffle_xor(all, 2);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          sums_[i][tile][e] = UNIT * __shfl_sync(0xffffffffu, all, (quarter() * 2 + e) * 4);
        }
      }
    }
  }

  // Of row m's 8 columns that this lane multiplies.
  static __device__ __forceinline__ int place_of_x(int segment, int own, int chunk, int m) {
    return (((segment * SEGMENT + piece(own)) * CHUNKS + chunk) * X_ROWS + m) * 4 + quarter();
  }

  // What a piece is multiplied with.
  __device__ __forceinline__ const Operands& x_of(int segment, int own, Operands& found) const {
    if constexpr (X_ROWS == 0) return x_[segment * OWN + own];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
      for (int tile = 0; tile < COLUMN_TILES; ++tile) {  // columns of rows that are not there are not used
        const uint4 v = rest_.x[place_of_x(segment, own, chunk, min(tile * 8 + row(), X_ROWS - 1))];
        found[chunk][tile][0] = v.x, found[chunk][tile][1] = v.y, found[chunk][tile][2] = v.z, found[chunk][tile][3] = v.w;
      }
    }
    return found;
  }

  // 8 columns in the order in which their codes come out.
  static __device__ __forceinline__ void arrange(const uint4& v, uint32_t (&to)[4]) {
    constexpr uint32_t LOWER = 0x5410, UPPER_HALVES = 0x7632;
    if constexpr (BITS == 8) {
      to[0] = __byte_perm(v.x, v.y, LOWER), to[1] = __byte_perm(v.x, v.y, UPPER_HALVES);
      to[2] = __byte_perm(v.z, v.w, LOWER), to[3] = __byte_perm(v.z, v.w, UPPER_HALVES);
    } else {
      constexpr uint32_t FIRST = HIGH_FIRST ? UPPER_HALVES : LOWER, SECOND = HIGH_FIRST ? LOWER : UPPER_HALVES;
      to[0] = __byte_perm(v.x, v.z, FIRST), to[1] = __byte_perm(v.y, v.w, FIRST);
      to[2] = __byte_perm(v.x, v.z, SECOND), to[3] = __byte_perm(v.y, v.w, SECOND);
    }
  }

  static __device__ __forceinline__ float sum(const uint4& v) {
    const float2 a = widened_two(v.x), b = widened_two(v.y), c = widened_two(v.z), d = widened_two(v.w);
    return ((a.x + a.y) + (b.x + b.y)) + ((c.x + c.y) + (d.x + d.y));
  }

  __device__ __forceinline__ void one_tile() {
    float total[COLUMN_TILES][4] = {}, scale[FLUSHES][2], zero[FLUSHES][2];
    Sums sums = {};
#pragma unroll
    for (int segment = 0; segment < SEGMENTS; ++segment) {
      const unsigned char* slot = slots_ + slot_.at * SLOT_BYTES;
      mbarrier_wait(&rest_.full[slot_.at], slot_.parity);
      if (segment == 0) read_scales(slot, scale, zero);
      uint4 codes[OWN][2];
#pragma unroll
      for (int own = 0; own < OWN; ++own) {
        if (!there(segment, own)) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          codes[own][i] = *reinterpret_cast<const uint4*>(slot + CODES_AT + (row() + 8 * i) * STRIDE +
                                                          piece(own) * PIECE + quarter() * 16);
        }
      }
      __syncwarp();
      if (lane() == 0) mbarrier_arrive(&rest_.empty[slot_.at]);
      slot_.next();
#pragma unroll
      for (int own = 0; own < OWN; ++own) {
        if (!there(segment, own)) continue;
        const int part = segment * OWN + own;
        Operands loaded;
        multiply(codes[own], x_of(segment, own, loaded), sums);
        if (GROUPS > 1) flush(sums, sums_[part], scale[part], zero[part], total);
      }
    }
    if (GROUPS == 1) flush(sums, sums_[0], scale[0], zero[0], total);
    hand_over(total);
  }

  __device__ __forceinline__ void read_scales(const unsigned char* slot, float (&scale)[FLUSHES][2],
                                              float (&zero)[FLUSHES][2]) const {
#pragma unroll
    for (int i = 0; i < FLUSHES; ++i) {
      const int segment = i / OWN, own = i % OWN;
      const int group = GROUPS == 1 ? 0 : (segment * SEGMENT + piece(own)) * COLUMNS / GROUP;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scale[i][r] = zero[i][r] = 0.0f;
        if (GROUPS > 1 && !there(segment, own)) continue;
        const int at = (row() + 8 * r) * GROUPS + group;
        scale[i][r] = value<SCALE_TYPE>(slot, at);
        if constexpr (ZERO_TYPE != NONE) zero[i][r] = value<ZERO_TYPE>(slot + SCALE_BYTES, at);
      }
    }
  }

  static __device__ __forceinline__ void multiply(const uint4 (&codes)[2], const Operands& x, Sums& sums) {
    const uint32_t words[4][2] = {
        {codes[0].x, codes[1].x}, {codes[0].y, codes[1].y}, {codes[0].z, codes[1].z}, {codes[0].w, codes[1].w}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t operand[4];
      codes_at<0>(words[i], operand);
#pragma unroll
      for (int tile = 0; tile < COLUMN_TILES; ++tile) {
        if constexpr (BITS == 4) {
          multiply_16x8x16<BFLOAT>(sums.lower[tile], operand, x[i][tile][0], x[i][tile][1]);
        } else {
          multiply_16x8x16<BFLOAT>(i % 2 ? sums.upper[tile] : sums.lower[tile], operand, x[i / 2][tile][i % 2 * 2],
                                   x[i / 2][tile][i % 2 * 2 + 1]);
        }
      }
      if constexpr (BITS == 4) {
        codes_at<1>(words[i], operand);
#pragma unroll
        for (int tile = 0; tile < COLUMN_TILES; ++tile) {
          multiply_16x8x16<BFLOAT>(sums.upper[tile], operand, x[i][tile][2], x[i][tile][3]);
        }
      }
    }
  }

  // Adds a group's products, corrected and scaled, to total.
  static __device__ __forceinline__ void flush(Sums& sums, const float (&of_x)[COLUMN_TILES][2], const float (&scale)[2],
                                               const float (&zero)[2], float (&total)[COLUMN_TILES][4]) {
#pragma unroll
    for (int tile = 0; tile < COLUMN_TILES; ++tile) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float v = fmaf(sums.upper[tile][e], UPPER, sums.lower[tile][e]);
        if (CORRECTED) v = fmaf(-(zero[e / 2] + CENTRE), of_x[tile][e % 2], v);
        total[tile][e] = fmaf(scale[e / 2], v, total[tile][e]);
        sums.lower[tile][e] = sums.upper[tile][e] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void hand_over(const float (&total)[COLUMN_TILES][4]) {
    mbarrier_wait(&rest_.free[buffer_.at], buffer_.parity ^ 1);
    float* to = rest_.partial[buffer_.at][warp()];
#pragma unroll
    for (int tile = 0; tile < COLUMN_TILES; ++tile) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        *reinterpret_cast<float2*>(to + (row() + 8 * r) * WIDTH + tile * 8 + quarter() * 2) = {total[tile][2 * r],
                                                                                              total[tile][2 * r + 1]};
      }
    }
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(&rest_.done[buffer_.at]);
    buffer_.next();
  }

  const Arguments& a_;
  unsigned char* slots_;
  Rest& rest_;
  Place<SLOTS> slot_;
  Place<BUFFERS> buffer_;
  Operands x_[X_ROWS == 0 ? PARTS : 1];
  float sums_[FLUSHES][COLUMN_TILES][2];  // of x, in UNITs
};

// ---- Results

__device__ void finish(const Arguments& a, Rest& rest) {
  Place<BUFFERS> buffer;
  const int row = static_cast<int>(lane()) % TILE, half = static_cast<int>(lane()) / TILE, tiles = tiles_of(a);
  if (EARLY) wait_for_earlier_launch();
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int n = first_row(a, tile) + row;
    const float bias = BIASED ? widened(load_stream(a.bias + n)) : 0.0f;
    mbarrier_wait(&rest.done[buffer.at], buffer.parity);
#pragma unroll
    for (int columns = 0; columns < COLUMN_TILES; ++columns) {
      const int first = columns * 8 + half * 4;
      float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
      for (int part = 0; part < WARPS; ++part) {
        const float4 v = *reinterpret_cast<const float4*>(rest.partial[buffer.at][part] + row * WIDTH + first);
        sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
      }
      const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (n >= tile * TILE && first + e < a.m) {
          a.out[static_cast<int64_t>(first + e) * a.n + n] = rounded(activated(fmaf(sums[e], 1.0f / UNIT, bias)));
        }
      }
    }
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(&rest.free[buffer.at]);
    buffer.next();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) dequant_ring(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) unsigned char shared[];
  Rest& rest = *reinterpret_cast<Rest*>(shared + SLOTS * SLOT_BYTES);
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; ++i) {
      mbarrier_init(&rest.full[i], 1);
      mbarrier_init(&rest.empty[i], WARPS);
    }
    for (int i = 0; i < BUFFERS; ++i) {
      mbarrier_init(&rest.done[i], WARPS);
      mbarrier_init(&rest.free[i], 1);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  if (warp() < WARPS) {
    Consumer(a, shared, rest).run();
  } else if (warp() < WARPS + PRODUCERS) {
    produce(a, shared, rest, static_cast<int>(warp()) - WARPS);
  } else {
    finish(a, rest);
  }
}
