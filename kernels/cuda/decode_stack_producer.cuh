// The producer of decode_stack.cu: the block's rows of all weights, into the ring.
#pragma once

#include "decode_stack_parts.cuh"

// Rows of one weight that the block reads, or, of two weights that are read in turn, some of them.
struct Span {
  const uint16_t* weight;
  int rows, columns, chunk_rows, segment;
};

template <class W>
__device__ Span span_of(const uint16_t* weight, int first, int rows) {
  return {weight + static_cast<int64_t>(first) * W::COLUMNS, rows, W::COLUMNS, W::CHUNK_ROWS, W::SEGMENT};
}

// The block's chunks in the order in which matrix warps use them.
class Walker {
 public:
  __device__ explicit Walker(const Arguments& a) : a_(a) {}

  __device__ bool next(const void*& source, unsigned& bytes) {
    while (row_ >= span_.rows) {
      if (!next_span()) return false;
      row_ = column_ = 0;
    }
    const int rows = min(span_.chunk_rows, span_.rows - row_);
    const int columns = min(span_.segment, span_.columns - column_);
    source = span_.weight + static_cast<int64_t>(row_) * span_.columns + column_;
    bytes = static_cast<unsigned>(rows * columns) * 2;  // several rows are whole ones
    column_ += columns;
    if (column_ == span_.columns) {
      column_ = 0;
      row_ += rows;
    }
    return true;
  }

 private:
  __device__ bool next_span() {
    if (layer_ == LAYERS) {
      if (VOCAB == 0 || step_ > 0) return false;
      ++step_;
      const Range r = rows_of(VOCAB, LAYERS, SHIFT_IN);
      span_ = span_of<In>(a_.head_weight, r.first, r.count);
      return true;
    }
    const Layer& layer = a_.layers[layer_];
    constexpr int UP_STEP = PARALLEL ? PROJECTIONS : PROJECTIONS + 1;
    constexpr int OUT_STEP = PARALLEL ? PROJECTIONS + 2 : PROJECTIONS;
    if (step_ < PROJECTIONS) {
      const Range r = rows_of(in_rows(step_), layer_, shift_in(step_));
      span_ = span_of<In>(layer.in_weight[step_], r.first, r.count);
    } else if (step_ == OUT_STEP) {
      const Range r = rows_of(WIDTH, layer_, SHIFT_OUT);
      span_ = span_of<Out>(layer.out_weight, r.first, r.count);
    } else if (step_ == UP_STEP) {
      const Range r = rows_of(INNER, layer_, SHIFT_UP);
      const int done = up_ / UPS * In::ROUND_ROWS, count = max(min(In::ROUND_ROWS, r.count - done), 0);
      span_ = UPS == 1 ? span_of<In>(layer.up_weight[0], r.first, r.count)
                       : span_of<In>(layer.up_weight[up_ % UPS], r.first + done, count);
      ++up_;
      if (UPS > 1 && (up_ % UPS != 0 || done + In::ROUND_ROWS < r.count)) return true;  // the next one is of this step
      up_ = 0;
    } else {
      const Range r = rows_of(WIDTH, layer_, PARALLEL ? SHIFT_OUT : SHIFT_DOWN);
      span_ = span_of<Down>(layer.down_weight, r.first, r.count);
    }
    if (++step_ == PROJECTIONS + 3) {
      step_ = 0;
      ++layer_;
    }
    return true;
  }

  const Arguments& a_;
  Span span_ = {nullptr, 0, 0, 1, 1};
  int layer_ = 0, step_ = 0, up_ = 0, row_ = 0, column_ = 0;
};

// One thread.
__device__ void produce(const Arguments& a, unsigned char* slots, Rest& rest) {
  Walker walker(a);
  const void* source;
  unsigned bytes;
  int slot = 0;
  unsigned parity = 1;
  while (walker.next(source, bytes)) {
    mbarrier_wait(&rest.empty[slot], parity);
    mbarrier_expect(&rest.full[slot], bytes);
    bulk_load(slots + slot * SLOT_BYTES, source, bytes, &rest.full[slot]);
    if (++slot < SLOTS) continue;
    slot = 0;
    parity ^= 1;
  }
}
