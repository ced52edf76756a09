// A CUDA grid on one CPU thread: one fiber a CUDA thread, which goes on until it would wait. What runs next is random,
// by seed. Weaker memory orders than a sequentially consistent one are not modelled.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace emulated {

constexpr unsigned FULL = 0xffffffffu;
using Clock = std::vector<uint32_t>;  // of each thread, and of each mbarrier's loads: what has happened before
struct Warp;

struct Fiber {
  void* stack_pointer = nullptr;
  Warp* warp = nullptr;
  unsigned cta = 0, thread = 0;
  bool done = false;
  const char* waits = "";  // for what; these three are read when nothing can run
  const void* at = nullptr;
  uint64_t value = 0;
  unsigned bit() const { return 1u << (thread % 32); }
};

// Lanes meet here for shuffles, ballots and __syncwarp.
struct Meeting {
  unsigned arrived = 0, mask = 0, generation = 0;
  int kind = -1;
  uint64_t values[2][32];
  unsigned lanes[2] = {0, 0};
  Clock clock[2];
};

struct Warp {
  unsigned cta = 0, index = 0, runnable = 0, present = 0;
  bool queued = false;
  Fiber* lanes[32] = {};
  Meeting meeting;
  uint32_t operands[2][32][6];  // of a product
};

struct Barrier {  // an mbarrier
  unsigned count = 0, pending = 0;
  long bytes = 0;
  uint64_t phase = 0;
  unsigned agent = 0;
  std::vector<Fiber*> waiting;
  Clock arriving, complete;
};

struct Group {  // a named barrier
  int threads = 0, arrived = 0;
  unsigned generation = 0;
  std::vector<Fiber*> waiting;
  Clock arriving, complete;
};

struct Load {
  void* shared;
  const void* global;
  unsigned bytes;
  uint64_t* barrier;
  uint64_t number;  // of the loads of the grid, from 1
};

struct Cta {
  unsigned char* shared = nullptr;
  std::map<uint64_t*, Barrier> barriers;
  Group groups[16];
};

struct Waiter {
  const unsigned* counter;
  unsigned goal;
  Fiber* fiber;
};

struct Machine {
  unsigned grid = 0, block = 0, shared_bytes = 0, live = 0, budget = 0, seed = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Cta> ctas;
  std::vector<Warp*> ready;
  std::vector<Load> loads;
  std::vector<Waiter> waiters;
  std::map<const unsigned*, Clock> counters;
  uint64_t issued = 0;
  bool races = false;
  Fiber* current = nullptr;
  void (*kernel)(void**) = nullptr;
  void** arguments = nullptr;
  std::string failure;
  uint64_t random = 1;  // the state of splitmix64
  unsigned late = 0;  // one in so many decisions completes a load
  uint64_t switches = 0, limit = 0;
};
extern Machine machine;

// scheduler.cpp
[[noreturn]] void fail(const std::string& reason);  // names the thread that runs
std::string name(const Fiber& fiber);
void make_ready(Fiber* fiber);
void block(const char* waits, const void* at, uint64_t value);
uint32_t draw();
bool chance(unsigned one_in);

// barriers.cpp
void complete(const Load& load);
bool wake_counter_waiters();
Cta& here();
std::string shared_place(const void* address);


// races.cpp
void start_races(const void* stacks, size_t bytes);
void release(Clock& clock);
void acquire(const Clock& clock);
void issue_load(const Load& load, unsigned agent, const void* code);
void release_load(Clock& clock, unsigned cta, unsigned agent, uint64_t number);

}  // namespace emulated
