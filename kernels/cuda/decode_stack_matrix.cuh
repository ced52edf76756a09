// The matrix warps of decode_stack.cu: norms, projections, the MLP, the head.
#pragma once

#include "decode_stack_parts.cuh"

class Matrix {
 public:
  __device__ Matrix(const Arguments& a, unsigned char* slots, Rest& rest) : a_(a), slots_(slots), rest_(rest) {}

  __device__ void run() {
    for (int layer = 0; layer < LAYERS; ++layer) {
      if constexpr (PARALLEL) {
        parallel_layer(layer);
      } else {
        sequential_layer(layer);
      }
    }
    head();
  }

 private:
  // The vector that multiplies a weight's rows: this thread's columns.
  template <class W>
  using Vector = float[W::PARTS * 8];
  template <class W>
  using Packed = uint4[W::PARTS];

  struct Norm {
    Packed<In> weight, bias;
    bool weighted, biased;
  };

  __device__ void parallel_layer(int layer) {
    const Layer& l = a_.layers[layer];
    const Norm first = norm_of(l.norm_weight[0], l.norm_bias[0]), second = norm_of(l.norm_weight[1], l.norm_bias[1]);
    const uint16_t* x = layer == 0 ? a_.x : stream((layer - 1) % 2);
    mark(layer, AT_BEGIN);
    if (layer > 0) wait(COUNTER_STREAM, layer * CTAS);
    mark(layer, AT_STREAM);
    Vector<In> normal, scaled;
    normalised(x, normal);
    scale(normal, first, scaled);
    projections(layer, scaled);
    mark(layer, AT_PROJECTED);
    scale(normal, second, scaled);
    up(layer, scaled);
    mark(layer, AT_UP);

    // The MLP's second weight, then the output projection, for which attention has had all that time.
    const Range r = rows_of(WIDTH, layer, SHIFT_OUT);
    const bool own = static_cast<int>(threadIdx.x) < r.count;
    const float bias = own ? or_zero(l.down_bias, r.first + threadIdx.x) : 0.0f;
    {
      Vector<Down> h;
      inner(layer, h);
      product<Down>(h, r.count, rest_.kept);
      mark(layer, AT_FIRST);
    }
    Vector<Out> vector;
    attended(layer, vector);
    uint16_t* y = layer == LAYERS - 1 && VOCAB == 0 ? a_.result : stream(layer % 2);
    rows<1, Out>(vector, r, {l.out_bias}, x, COUNTER_STREAM, [&](int row, const float(&total)[1], float residual) {
      y[row] = rounded(residual + total[0] + (added<Down>(rest_.kept) + bias));
    });
    mark(layer, AT_OUT);
  }

  // What the output projection multiplies.
  __device__ void attended(int layer, Vector<Out>& vector) {
    if (ATTENTION) wait(COUNTER_ATTENDED, (layer + 1) * (HEADS / QUERIES));
    mark(layer, AT_ATTENDED);
    widen_own<Out>(workspace(ATTENDED_AT), vector);
  }

  // What the MLP's second weight multiplies.
  __device__ void inner(int layer, Vector<Down>& vector) {
    wait(COUNTER_INNER, (layer + 1) * CTAS);
    mark(layer, AT_INNER);
    widen_own<Down>(workspace(INNER_AT), vector);
  }

  __device__ void sequential_layer(int layer) {
    const Layer& l = a_.layers[layer];
    const uint16_t* x = layer == 0 ? a_.x : stream(0);
    Vector<In> vector;
    {
      const Norm norm = norm_of(l.norm_weight[0], l.norm_bias[0]);
      mark(layer, AT_BEGIN);
      if (layer > 0) wait(COUNTER_STREAM, layer * CTAS);
      mark(layer, AT_STREAM);
      normalised(x, vector);
      scale(vector, norm, vector);
    }
    projections(layer, vector);
    mark(layer, AT_PROJECTED);
    uint16_t* y = stream(1);
    {
      Vector<Out> vector;
      attended(layer, vector);
      rows<1, Out>(vector, rows_of(WIDTH, layer, SHIFT_OUT), {l.out_bias}, x, COUNTER_MIDDLE,
                   [&](int row, const float(&total)[1], float residual) { y[row] = rounded(residual + total[0]); });
    }
    mark(layer, AT_OUT);
    {
      const Norm norm = norm_of(l.norm_weight[1], l.norm_bias[1]);
      wait(COUNTER_MIDDLE, (layer + 1) * CTAS);
      normalised(y, vector);
      scale(vector, norm, vector);
    }
    up(layer, vector);
    mark(layer, AT_UP);
    Vector<Down> h;
    inner(layer, h);
    uint16_t* z = layer == LAYERS - 1 && VOCAB == 0 ? a_.result : stream(0);
    rows<1, Down>(h, rows_of(WIDTH, layer, SHIFT_DOWN), {l.down_bias}, y, COUNTER_STREAM,
                  [&](int row, const float(&total)[1], float residual) { z[row] = rounded(residual + total[0]); });
    mark(layer, AT_FIRST);
  }

  // The first block counts the lengths up when the last layer is complete: then no task reads them any more.
  __device__ void head() {
    if (VOCAB == 0 && blockIdx.x > 0) return;
    const Norm norm = norm_of(a_.head_norm_weight, a_.head_norm_bias);
    wait(COUNTER_STREAM, LAYERS * CTAS);
    if (COUNTED && blockIdx.x == 0) {
      for (int layer = threadIdx.x; layer < LAYERS; layer += MATRIX_THREADS) *a_.layers[layer].length += 1;
    }
    if constexpr (VOCAB > 0) {
      Vector<In> vector;
      normalised(stream(PARALLEL ? (LAYERS - 1) % 2 : 0), vector);
      scale(vector, norm, vector);
      rows<1, In>(vector, rows_of(VOCAB, LAYERS, SHIFT_IN), {a_.head_bias}, nullptr, NO_COUNTER,
                  [&](int row, const float(&total)[1], float) { a_.result[row] = rounded(total[0]); });
    }
  }

  __device__ void projections(int layer, const Vector<In>& vector) {
    const Layer& l = a_.layers[layer];
#pragma unroll 1
    for (int i = 0; i < PROJECTIONS; ++i) {
      uint16_t* out = workspace(PROJECTED_AT) + projected_at(i);
      rows<1, In>(vector, rows_of(in_rows(i), layer, shift_in(i)), {l.in_bias[i]}, nullptr,
                  i == PROJECTIONS - 1 ? COUNTER_PROJECTED : NO_COUNTER,
                  [&](int row, const float(&total)[1], float) { out[row] = rounded(total[0]); });
    }
  }

  __device__ void up(int layer, const Vector<In>& vector) {
    const Layer& l = a_.layers[layer];
    uint16_t* out = workspace(INNER_AT);
    const Range r = rows_of(INNER, layer, SHIFT_UP);
    if constexpr (UPS == 1) {
      rows<1, In>(vector, r, {l.up_bias[0]}, nullptr, COUNTER_INNER,
                  [&](int row, const float(&total)[1], float) { out[row] = rounded(activated(total[0])); });
    } else {
      rows<2, In>(vector, r, {l.up_bias[0], l.up_bias[1]}, nullptr, COUNTER_INNER,
                  [&](int row, const float(&total)[2], float) { out[row] = rounded(activated(total[0]) * total[1]); });
    }
  }

  // The block's rows of COUNT weights, as many at a time as there is room for: emit(row, sums with biases, residual).
  template <int COUNT, class W, class Emit>
  __device__ void rows(const Vector<W>& vector, Range r, const uint16_t* const (&bias)[COUNT], const uint16_t* residual,
                       int counter, Emit emit) {
    int done = 0, count;
    do {
      count = min(W::ROUND_ROWS, r.count - done);
      const int row = r.first + done + threadIdx.x;
      const bool own = static_cast<int>(threadIdx.x) < count;
      float total[COUNT], kept = 0.0f;  // asked for before they are needed
      for (int i = 0; i < COUNT; ++i) total[i] = own ? or_zero(bias[i], row) : 0.0f;
      if (own && residual != nullptr) kept = widened(load_shared_by_others(residual + row));
      float(&sums)[UPS][ROUND * STRIDE] = rest_.sums[buffer_];
      for (int i = 0; i < COUNT; ++i) product<W>(vector, count, sums[i]);
      meet();
      if (own) {
        for (int i = 0; i < COUNT; ++i) total[i] += added<W>(sums[i]);
        emit(row, total, kept);
      }
      buffer_ ^= 1;
      done += W::ROUND_ROWS;
    } while (done < r.count);
    if (counter != NO_COUNTER) arrive(counter, count);
  }

  // The parts of `count` rows of a weight that this thread's warp is for, into sums [rows, STRIDE].
  template <class W>
  __device__ void product(const Vector<W>& vector, int count, float* sums) {
    const int group = static_cast<int>(warp()) / W::WARPS, part = static_cast<int>(warp()) % W::WARPS;
    const bool active = group < W::GROUPS;
#pragma unroll 1
    for (int row = 0; row < count; row += W::CHUNK_ROWS) {
      float acc[W::ROWS][W::PIECES] = {};
#pragma unroll
      for (int segment = 0; segment < W::SEGMENTS; ++segment) {
        mbarrier_wait(&rest_.full[slot_], parity_);
        if (active) {
          const uint16_t* tile = reinterpret_cast<const uint16_t*>(slots_ + slot_ * SLOT_BYTES);
          uint4 found[W::ROWS][W::PIECES];
#pragma unroll
          for (int i = 0; i < W::ROWS; ++i) {
#pragma unroll
            for (int piece = 0; piece < W::PIECES; ++piece) {
              const int column = W::column(0, piece, part);
              found[i][piece] = {0, 0, 0, 0};
              if (W::there(segment, piece, part)) {
                found[i][piece] = *reinterpret_cast<const uint4*>(
                    tile + (i * W::GROUPS + group) * W::SEGMENT + column);
              }
            }
          }
#pragma unroll
          for (int piece = 0; piece < W::PIECES; ++piece) {
#pragma unroll
            for (int i = 0; i < W::ROWS; ++i) {
              acc[i][piece] = dot(found[i][piece], vector + (segment * W::PIECES + piece) * 8, acc[i][piece]);
            }
          }
        }
        release_slot();
      }
      if (active) {
        float total[W::ROWS];
#pragma unroll
        for (int i = 0; i < W::ROWS; ++i) {
          total[i] = acc[i][0];
#pragma unroll
          for (int piece = 1; piece < W::PIECES; ++piece) total[i] += acc[i][piece];
        }
        const float sum = over_lanes<W::ROWS>(total);
        const int at = row + static_cast<int>(lane()) / (32 / W::ROWS) * W::GROUPS + group;
        if (lane() % (32 / W::ROWS) == 0 && at < count) sums[at * STRIDE + part] = sum;
      }
    }
  }

  // The sum of this thread's row.
  template <class W>
  __device__ float added(const float* sums) const {
    float total = 0.0f;
#pragma unroll
    for (int part = 0; part < W::WARPS; ++part) total += sums[threadIdx.x * STRIDE + part];
    return total;
  }

  __device__ void release_slot() {
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(&rest_.empty[slot_]);
    if (++slot_ == SLOTS) {
      slot_ = 0;
      parity_ ^= 1;
    }
  }

  // (x - mean) / sqrt(var + eps), without the mean for rms. Each warp's mean and squares are joined (Chan et al. 1983).
  __device__ void normalised(const uint16_t* x, Vector<In>& normal) {
    static_assert(In::SEGMENTS == 1, "a row that is normalised is read in one piece");
    widen_own<In>(x, normal);
    const int part = static_cast<int>(warp()) % In::WARPS;
    float mean = 0.0f, squares = 0.0f;
    if constexpr (!RMS) {
#pragma unroll
      for (int i = 0; i < In::PARTS * 8; ++i) mean += normal[i];
      mean = over_warp(mean) / In::columns_of_warp(part);
    }
#pragma unroll
    for (int piece = 0; piece < In::PIECES; ++piece) {
      if (In::there(0, piece, part)) {
#pragma unroll
        for (int e = 0; e < 8; ++e) squares += square(normal[piece * 8 + e] - mean);
      }
    }
    squares = over_warp(squares);
    if (lane() == 0 && warp() < In::WARPS) {
      rest_.statistics[2 * warp()] = mean;
      rest_.statistics[2 * warp() + 1] = squares;
    }
    meet();
    float all_mean = 0.0f, all_squares = 0.0f;
#pragma unroll
    for (int i = 0; i < In::WARPS; ++i) all_mean += rest_.statistics[2 * i] * (In::columns_of_warp(i) / WIDTH);
#pragma unroll
    for (int i = 0; i < In::WARPS; ++i) {
      all_squares += rest_.statistics[2 * i + 1] + In::columns_of_warp(i) * square(rest_.statistics[2 * i] - all_mean);
    }
    const float rstd = rsqrtf(all_squares / WIDTH + a_.eps);
#pragma unroll
    for (int i = 0; i < In::PARTS * 8; ++i) normal[i] = (normal[i] - all_mean) * rstd;
  }

  __device__ Norm norm_of(const uint16_t* weight, const uint16_t* bias) const {
    Norm norm;
    norm.weighted = weight != nullptr;
    norm.biased = bias != nullptr;
    const int part = static_cast<int>(warp()) % In::WARPS;
#pragma unroll
    for (int piece = 0; piece < In::PIECES; ++piece) {
      const int column = In::column(0, piece, part);
      norm.weight[piece] = norm.bias[piece] = {0, 0, 0, 0};
      if (!In::there(0, piece, part)) continue;
      if (weight != nullptr) norm.weight[piece] = load_stream(reinterpret_cast<const uint4*>(weight + column));
      if (bias != nullptr) norm.bias[piece] = load_stream(reinterpret_cast<const uint4*>(bias + column));
    }
    return norm;
  }

  __device__ void scale(const Vector<In>& normal, const Norm& norm, Vector<In>& scaled) const {
#pragma unroll
    for (int piece = 0; piece < In::PIECES; ++piece) {
      float weight[8], bias[8];
      widen(norm.weight[piece], weight);
      widen(norm.bias[piece], bias);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float factor = norm.weighted ? weight[e] + a_.weight_offset : 1.0f;
        scaled[piece * 8 + e] = fmaf(normal[piece * 8 + e], factor, bias[e]);
      }
    }
  }

  // This thread's columns of a vector that other blocks wrote.
  template <class W>
  __device__ void widen_own(const uint16_t* source, Vector<W>& vector) const {
    const int part = static_cast<int>(warp()) % W::WARPS;
    Packed<W> found;
#pragma unroll
    for (int i = 0; i < W::PARTS; ++i) {
      const int segment = i / W::PIECES, piece = i % W::PIECES;
      found[i] = {0, 0, 0, 0};
      if (W::there(segment, piece, part)) {
        found[i] = load_shared_by_others(reinterpret_cast<const uint4*>(source + W::column(segment, piece, part)));
      }
    }
#pragma unroll
    for (int i = 0; i < W::PARTS; ++i) widen(found[i], vector + i * 8);
  }

  __device__ uint16_t* workspace(int at) const { return reinterpret_cast<uint16_t*>(a_.workspace + at); }
  __device__ uint16_t* stream(int which) const { return workspace(STREAM_AT + which * STREAM_BYTES); }
  __device__ unsigned* counter(int which) const { return reinterpret_cast<unsigned*>(a_.workspace) + which * 32; }

  __device__ void mark(int layer, Event event) const {
    if (threadIdx.x == 0) trace(a_, layer, event);
  }

  __device__ void meet() const { group_sync(MATRIX_GROUP, MATRIX_THREADS); }

  __device__ void wait(int which, unsigned goal) const {
    if (threadIdx.x == 0 && BARRIERS) grid_wait(counter(which), goal);
    meet();
  }

  // The warps of the last `count` rows meet; what others wrote before is behind the last `meet`.
  __device__ void arrive(int which, int count) const {
    const int threads = (count + 31) / 32 * 32;
    if (static_cast<int>(threadIdx.x) >= max(threads, 32)) return;
    if (threads > 32) {
      group_sync(WRITERS_GROUP, threads);
    } else {
      __syncwarp();
    }
    if (threadIdx.x == 0) grid_arrive(counter(which));
  }

  const Arguments& a_;
  unsigned char* slots_;
  Rest& rest_;
  int slot_ = 0, buffer_ = 0;
  unsigned parity_ = 0;
};
