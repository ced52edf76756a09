"""The emulator of CUDA kernels finds what it is there to find, and computes what a GPU would."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import EmulatedKernel, EmulationError, guarded, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

# One producer warp and two consumer warps of each CTA sum their rows of `data`, of CHUNK floats, through a ring of two
# slots; then every CTA adds up what all have written.
RING = r"""
#include "primitives.cuh"
enum { NONE, NO_WAIT, NO_SYNCWARP, NO_RELEASE, NO_GROUP, ONE_MORE, ONE_LESS };
constexpr int SLOTS = 2, CHUNK = 64, CONSUMERS = 2;
extern "C" __global__ void __launch_bounds__(96)
ring(const float* data, int rows, float* partial, unsigned* counter, float* out, int fault) {
  extern __shared__ __align__(128) unsigned char shared[];
  float* slots = reinterpret_cast<float*>(shared);
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + SLOTS * CHUNK * 4);
  uint64_t* empty = full + SLOTS;
  float* sums = reinterpret_cast<float*>(empty + SLOTS);
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; i++) {
      mbarrier_init(full + i, 1);
      mbarrier_init(empty + i, CONSUMERS);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  if (warp() == CONSUMERS) {
    if (lane() == 0)
      for (int row = 0; row < rows; row++) {
        int slot = row % SLOTS;
        mbarrier_wait(empty + slot, (row / SLOTS & 1) ^ 1);
        mbarrier_expect(full + slot, CHUNK * 4);
        bulk_load(slots + slot * CHUNK, data + (size_t(blockIdx.x) * rows + row) * CHUNK, CHUNK * 4, full + slot);
      }
    return;
  }
  float sum = 0.0f;
  for (int row = 0; row < rows; row++) {
    int slot = row % SLOTS;
    if (fault != NO_WAIT) mbarrier_wait(full + slot, row / SLOTS & 1);
    sum += slots[slot * CHUNK + warp() * 32 + lane()];
    if (fault != NO_SYNCWARP) __syncwarp();
    if (lane() == 0 && (fault != NO_RELEASE || row != 3)) mbarrier_arrive(empty + slot);
  }
  for (int other = 16; other; other >>= 1) sum += shuffle_xor(sum, other);
  if (lane() == 0) sums[warp()] = sum;
  if (fault != NO_GROUP) group_sync(1, CONSUMERS * 32);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sums[0] + sums[1];
    grid_arrive(counter);
    grid_wait(counter, gridDim.x + (fault == ONE_MORE) - (fault == ONE_LESS));
    float total = 0.0f;
    for (int i = 0; i < int(gridDim.x); i++) total += load_shared_by_others(partial + i);
    out[blockIdx.x] = total;
  }
}
"""
FAULTS = ["none", "no_wait", "no_syncwarp", "no_release", "no_group", "one_more", "one_less"]
CTAS, ROWS, SHARED = 3, 7, 2 * 64 * 4 + 4 * 8 + 8
DATA = torch.arange(CTAS * ROWS * 64, dtype=torch.float32) % 17
EXPECTED = [float(DATA.sum())] * CTAS


def ring(seed: int, fault: str = "none", races: bool = False) -> list[float]:
    out = guarded(torch.full((CTAS,), -1.0))
    counter = torch.zeros(1, dtype=torch.int32)
    arguments = [guarded(DATA), ROWS, torch.empty(CTAS), counter, out, FAULTS.index(fault)]
    EmulatedKernel(RING, "ring", races=races)(CTAS, 96, SHARED, arguments, seed)
    return out.tolist()


@pytest.mark.parametrize("seed", range(8))
def test_a_ring_and_a_grid_barrier_give_the_sum(seed: int) -> None:
    assert ring(seed) == EXPECTED


def test_a_slot_that_is_never_freed_is_a_deadlock() -> None:
    with pytest.raises(EmulationError, match=r"deadlock.*\n.*threads wait for mbarrier of parity") as raised:
        ring(0, "no_release")
    assert "0:64-64" in str(raised.value)  # the producer of the first CTA


def test_a_counter_that_never_reaches_its_goal_is_a_deadlock() -> None:
    with pytest.raises(EmulationError, match="3 threads wait for a counter in global memory"):
        ring(0, "one_more")


def test_a_missing_wait_reads_what_has_not_arrived() -> None:
    wrong = 0
    for seed in range(8):
        try:
            wrong += ring(seed, "no_wait") != EXPECTED
        except EmulationError:
            wrong += 1
    assert wrong >= 4


def test_an_order_of_all_accesses_is_found_whatever_ran_first() -> None:
    for seed in range(4):
        assert ring(seed, races=True) == EXPECTED


@pytest.mark.parametrize(
    ("fault", "one", "other"),
    [
        ("no_wait", "bulk load", "read by CTA ."),
        ("one_less", "written by CTA .", "read by CTA ."),
        ("no_syncwarp", "written by a bulk load", "read by CTA ."),
        ("no_group", "written by CTA ., warp 1", "read by CTA ., warp 0"),
    ],
)
def test_a_race_is_found_under_every_seed(fault: str, one: str, other: str) -> None:
    for seed in range(4):
        with pytest.raises(EmulationError, match=rf"race at(.|\n)*({one}(.|\n)*{other}|{other}(.|\n)*{one})"):
            ring(seed, fault, races=True)


SET_UP = "uint64_t* b = (uint64_t*)shared; if (threadIdx.x == 0) mbarrier_init(b, 1); __syncthreads();"
BROKEN = [
    ("shared[threadIdx.x] = 1.0f;", "behind the end.* byte 64 of 64"),
    ("shared[threadIdx.x + 1] += 1.0f;", "not the kernel's: shared memory of CTA ., byte 128 of 64"),
    ("a[threadIdx.x + 1] = 0.0f;", "memory that is not the kernel's"),
    ("if (lane() < 16) __syncwarp();", "deadlock|have ended"),
    ("if (lane() < 16) __syncwarp(); else shuffle_xor(1.0f, 1);", "different operations"),
    ("if (threadIdx.x) group_sync(3, 32);", "62 threads wait for named barrier 3; CTA:threads 0:1-31 1:1-31"),
    ("if (threadIdx.x == 0) mbarrier_arrive((uint64_t*)shared);", "not initialised"),
    (SET_UP + "if (threadIdx.x == 0) { mbarrier_expect(b, 16); mbarrier_arrive(b); }", "more arrivals"),
    (SET_UP + "shared[0] = 1.0f; __syncthreads(); mbarrier_wait(b, 0);", "overwritten"),
    (SET_UP + "if (threadIdx.x == 0) bulk_load(shared + 4, a + 1, 16, b);", "bulk load of 16 bytes.* 4 bytes behind"),
    (SET_UP + "if (threadIdx.x == 0) bulk_load(shared + 12, a, 32, b);", "bulk load outside"),
    (
        SET_UP + "if (threadIdx.x == 0) { mbarrier_expect(b, 16); bulk_load(shared + 4, a, 16, b); }",
        "bulk loads under way",
    ),
    ("if (threadIdx.x == 7) __trap();", "warp 0, lane 7: __trap"),
    ("a[threadIdx.x] = shared[threadIdx.x % 16];", None),
]


def small(which: int, a: torch.Tensor) -> None:
    """The `which`th of BROKEN; all in one kernel, for compiling takes longer than running."""
    bodies = "\n".join(f"if (which == {i}) {{ {body} }}" for i, (body, _) in enumerate(BROKEN))
    source = f"""#include "primitives.cuh"
    extern "C" __global__ void small(float* a, int which) {{ extern __shared__ float shared[]; {bodies} }}"""
    EmulatedKernel(source, "small")(2, 32, 64, [a, which], seed=1)


@pytest.mark.parametrize("which", range(len(BROKEN) - 1), ids=lambda which: BROKEN[which][1])
def test_broken_rules_are_named(which: int) -> None:
    with pytest.raises(EmulationError, match=BROKEN[which][1]):
        small(which, guarded(torch.zeros(32)))


def test_shared_memory_starts_as_nan() -> None:
    out = torch.zeros(32)
    small(len(BROKEN) - 1, out)
    assert out.isnan().all()


def test_sixteen_bit_floats_round_as_torch() -> None:
    source = """#include "primitives.cuh"
    extern "C" __global__ void convert(const float* x, int n, uint16_t* half, uint16_t* bfloat,
                                       float* back, float* bback) {
      for (int i = threadIdx.x; i < n; i += blockDim.x) {
        half[i] = float_to_half(x[i]); bfloat[i] = float_to_bfloat(x[i]);
        back[i] = half_to_float(half[i]); bback[i] = bfloat_to_float(bfloat[i]);
      }
    }"""
    torch.manual_seed(0)
    edges = torch.tensor(
        [
            0.0,
            -0.0,
            65504,
            65519.9,
            65520,
            1e9,
            -1e9,
            2.0**-24,
            2.0**-25,
            1.5 * 2.0**-25,
            6.1e-5,
            1 + 2.0**-11,
            1 + 3 * 2.0**-11,
        ]
    )
    x = torch.cat(
        [
            edges,
            torch.randn(4000),
            torch.randn(4000) * 2.0**-16,
            torch.tensor([float("inf"), -float("inf"), float("nan")]),
        ]
    )
    half, bfloat, back, bback = x.half().zero_(), x.bfloat16().zero_(), x.clone(), x.clone()
    EmulatedKernel(source, "convert")(1, 64, 0, [x, len(x), half, bfloat, back, bback])
    for mine, theirs in (
        (half, x.half()),
        (bfloat, x.bfloat16()),
        (back, x.half().float()),
        (bback, x.bfloat16().float()),
    ):
        assert torch.equal(mine.nan_to_num(nan=7.0), theirs.nan_to_num(nan=7.0))


PRODUCT = r"""
#include "primitives.cuh"
extern "C" __global__ void product(const uint32_t* a, const uint32_t* b, float* c) {
  const unsigned row = lane() / 4, column = lane() % 4;  // pairs of elements: a [16, 16], b's columns [8, 16]
  const uint32_t found[4] = {a[row * 8 + column], a[(row + 8) * 8 + column], a[row * 8 + column + 4],
                             a[(row + 8) * 8 + column + 4]};
  float sums[4];
  for (int i = 0; i < 4; i++) sums[i] = c[(row + i / 2 * 8) * 8 + column * 2 + i % 2];
  for (int i = 0; i < 2; i++) multiply_16x8x16<BF16>(sums, found, b[row * 8 + column], b[row * 8 + column + 4]);
  for (int i = 0; i < 4; i++) c[(row + i / 2 * 8) * 8 + column * 2 + i % 2] = sums[i];
}
"""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_warp_multiplies_matrices(dtype: torch.dtype) -> None:
    source = PRODUCT.replace("BF16", str(int(dtype == torch.bfloat16)))
    torch.manual_seed(0)
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.randn(16, 8)
    a[3] *= 2.0**-24 if dtype == torch.float16 else 1  # numbers near 0 count
    wanted = c + 2 * (a.float() @ b.float().t())
    EmulatedKernel(source, "product")(1, 32, 16, [a, b, c], seed=3)
    assert torch.allclose(c, wanted, atol=1e-5)


def test_lanes_that_leave_a_product_out_are_found() -> None:
    source = PRODUCT.replace("BF16", "false").replace("for (int i = 0; i < 2; i++) m", "if (row > 0) m")
    with pytest.raises(EmulationError, match=r"product of the warp|deadlock"):
        EmulatedKernel(source, "product")(
            1, 32, 16, [torch.zeros(16, 16).half(), torch.zeros(8, 16).half(), torch.zeros(16, 8)]
        )
