// One token through all layers of a decoder in one cooperative launch; see kernels/decode_stack.py for the equation.
//
// A block a multiprocessor, of three kinds of warps:
// - the producer copies the block's rows of all weights, in the order of their use, into a ring in shared memory. It
//   waits for free slots only, so the memory is read also while the others wait for other blocks.
// - matrix warps multiply rows with a vector that they hold in registers: columns are split over warps, and the parts
//   of a row are added in one order. All blocks meet where a vector is complete: after the MLP's activation and after
//   the layer (parallel residual), and twice more otherwise.
// - attention warps take (head, part of the keys) tasks beside them. Who ends a head's last part adds the parts up.
// - a second producer copies the tasks' keys and values into another ring, also ahead of the layers.
//
// Nothing is added by atomics but counters, which only grow; the launch begins with zeros there.

#include "decode_stack_attention.cuh"
#include "decode_stack_matrix.cuh"
#include "decode_stack_producer.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_stack(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) unsigned char shared[];
  unsigned char* key_slots = shared + SLOTS * SLOT_BYTES;
  Rest& rest = *reinterpret_cast<Rest*>(key_slots + KEY_SLOTS * KEY_SLOT_BYTES);
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; ++i) {
      mbarrier_init(&rest.full[i], 1);
      mbarrier_init(&rest.empty[i], MATRIX_WARPS);
    }
    for (int i = 0; i < KEY_SLOTS; ++i) {
      mbarrier_init(&rest.keys_full[i], 1);
      mbarrier_init(&rest.keys_empty[i], ATTENTION_WARPS);
    }
    for (int i = 0; i < MASKS; ++i) mbarrier_init(&rest.known[i], 1);
    mbarrier_fence_init();
  }
  __syncthreads();
  if (warp() < MATRIX_WARPS) {
    Matrix(a, shared, rest).run();
  } else if (warp() < MATRIX_WARPS + ATTENTION_WARPS) {
    if (ATTENTION) attend(a, key_slots, rest);
  } else if (warp() == MATRIX_WARPS + ATTENTION_WARPS) {
    if (lane() == 0) produce(a, shared, rest);
  } else if (lane() == 0 && ATTENTION) {
    produce_keys(a, key_slots, rest);
  }
}
