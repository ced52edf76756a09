// Fibers, and who runs next.
#include "runtime.h"
#include "fibers.h"

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

Machine machine;
constexpr size_t PAGE = 4096;
static unsigned char* stacks = nullptr;
static sigjmp_buf escape;
static void* main_stack = nullptr;

uint32_t draw() {
  uint64_t mixed = machine.random += 0x9e3779b97f4a7c15u;
  mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9u;
  return uint32_t((mixed ^ mixed >> 27) * 0x94d049bb133111ebu >> 32);
}
bool chance(unsigned one_in) { return one_in && draw() % one_in == 0; }

std::string name(const Fiber& fiber) {
  char text[96];
  snprintf(text, sizeof text, "CTA %u, warp %u, lane %u", fiber.cta, fiber.thread / 32, fiber.thread % 32);
  return text;
}

[[noreturn]] void fail(const std::string& reason) {
  machine.failure = machine.current ? name(*machine.current) + ": " + reason : reason;
  siglongjmp(escape, 1);
}

void make_ready(Fiber* fiber) {
  Warp& warp = *fiber->warp;
  warp.runnable |= fiber->bit();
  if (!warp.queued) {
    warp.queued = true;
    machine.ready.push_back(&warp);
  }
}

static std::string deadlock() {
  std::map<std::string, std::vector<std::pair<unsigned, unsigned>>> places;  // what is waited for -> (CTA, thread)
  for (const Fiber& fiber : machine.fibers) {
    if (fiber.done) continue;
    char text[200];
    std::string at = fiber.at ? shared_place(fiber.at) + ", " : "";
    snprintf(text, sizeof text, "%s %s%llu", fiber.waits, at.c_str(), static_cast<unsigned long long>(fiber.value));
    places[text].push_back({fiber.cta, fiber.thread});
  }
  std::string report = "deadlock: no thread can run";
  for (auto& [place, threads] : places) {
    std::string who;
    size_t listed = 0;
    for (size_t i = 0; i < threads.size(); listed++) {
      size_t end = i + 1;
      auto follows = [&](size_t at) {
        return threads[at].first == threads[i].first && threads[at].second == threads[at - 1].second + 1;
      };
      while (end < threads.size() && follows(end)) end++;
      char text[96];
      snprintf(text, sizeof text, " %u:%u-%u", threads[i].first, threads[i].second, threads[end - 1].second);
      if (listed < 24) who += text;
      i = end;
    }
    report += "\n  " + std::to_string(threads.size()) + " threads wait for " + place + "; CTA:threads" + who;
    if (listed > 24) report += " ...";
  }
  return report;
}

// Of half of the seeds one CTA, of half of them one warp of each CTA is behind the others.
static bool slow(const Warp& warp) {
  unsigned warps = (machine.block + 31) / 32;
  return (machine.seed & 4 && warp.cta == machine.seed / 16 % machine.grid) ||
         (machine.seed & 8 && warp.index == machine.seed / 16 % warps);
}

static Warp* choose() {
  for (;;) {
    if (!machine.loads.empty() && (machine.ready.empty() || chance(machine.late))) {
      size_t i = draw() % machine.loads.size();
      Load load = machine.loads[i];
      machine.loads[i] = machine.loads.back();
      machine.loads.pop_back();
      complete(load);
      continue;
    }
    if (machine.ready.empty()) {
      if (wake_counter_waiters()) continue;
      return nullptr;
    }
    size_t i = draw() % machine.ready.size();
    for (int again = 0; again < 8 && slow(*machine.ready[i]); again++) i = draw() % machine.ready.size();
    Warp* warp = machine.ready[i];
    if (warp->runnable) return warp;
    warp->queued = false;
    machine.ready[i] = machine.ready.back();
    machine.ready.pop_back();
  }
}

static Fiber* next() {
  static unsigned from = 0;
  if (++machine.switches > machine.limit) {
    machine.current = nullptr;
    fail("no end in sight after " + std::to_string(machine.limit) + " switches between threads");
  }
  if (!machine.live) return nullptr;
  Warp* warp = machine.current ? machine.current->warp : nullptr;
  if (!warp || !warp->runnable || machine.budget == 0) {
    warp = choose();
    if (!warp) return nullptr;
    machine.budget = 1 + draw() % 256;  // a warp mostly goes on for a while
    from = draw() % 32;
  }
  machine.budget--;
  unsigned after = warp->runnable & (FULL << from);
  unsigned lane = __builtin_ctz(after ? after : warp->runnable);
  from = (lane + 1) % 32;
  warp->runnable &= ~(1u << lane);
  return warp->lanes[lane];
}

static void go() {
  Fiber* before = machine.current;
  Fiber* fiber = next();
  if (fiber == before && fiber) return;
  machine.current = fiber;
  if (fiber) {
    ::threadIdx.x = fiber->thread;
    ::blockIdx.x = fiber->cta;
  }
  void** save = before ? &before->stack_pointer : &main_stack;
  change(save, fiber ? fiber->stack_pointer : main_stack);
}

void block(const char* waits, const void* at, uint64_t value) {
  Fiber* fiber = machine.current;
  fiber->waits = waits;
  fiber->at = at;
  fiber->value = value;
  go();
}

static void run_fiber() {
  machine.kernel(machine.arguments);
  Fiber* fiber = machine.current;
  fiber->done = true;
  fiber->warp->present &= ~fiber->bit();
  machine.live--;
  go();
  __builtin_trap();
}

static void on_fault(int, siginfo_t* info, void*) {
  auto* at = static_cast<unsigned char*>(info->si_addr);
  bool stack = at >= stacks && at < stacks + STACK * machine.fibers.size();
  std::string text = "access of memory that is not the kernel's: " + shared_place(at);
  if (stack) text = "more than 124 KiB of stack";
  machine.failure = machine.current ? name(*machine.current) + ": " + text : text;
  siglongjmp(escape, 1);
}

// `bytes` whose end, and start if it is a multiple of 128, is followed (preceded) by a page that nobody may touch.
static unsigned char* guarded(size_t bytes, size_t alignment) {
  size_t used = (bytes + alignment - 1) / alignment * alignment, pages = (used + PAGE - 1) / PAGE * PAGE;
  void* mapped = mmap(nullptr, pages + 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  auto* base = static_cast<unsigned char*>(mapped);
  if (mapped == MAP_FAILED) {
    perror("emulator: no memory");
    abort();
  }
  mprotect(base, PAGE, PROT_NONE);
  mprotect(base + PAGE + pages, PAGE, PROT_NONE);
  memset(base + PAGE, 0xff, pages);
  return base + PAGE + pages - used;
}
static void release(unsigned char* memory, size_t bytes, size_t alignment) {
  size_t used = (bytes + alignment - 1) / alignment * alignment, pages = (used + PAGE - 1) / PAGE * PAGE;
  munmap(memory + used - pages - PAGE, pages + 2 * PAGE);
}

static void prepare(unsigned grid, unsigned block, unsigned shared_bytes, unsigned seed) {
  machine.grid = grid, machine.block = block, machine.shared_bytes = shared_bytes;
  machine.live = grid * block, machine.budget = 0, machine.switches = 0, machine.current = nullptr;
  machine.ready.clear(), machine.loads.clear(), machine.waiters.clear(), machine.failure.clear();
  machine.counters.clear(), machine.issued = 0;
  machine.random = machine.seed = seed;
  static const unsigned lateness[] = {2, 0, 32, 8};  // 0: only once nothing else can run
  machine.late = lateness[seed % 4];
  machine.fibers.assign(grid * block, {});
  machine.warps.assign(grid * ((block + 31) / 32), {});
  machine.ctas.assign(grid, {});
  for (unsigned i = 0; i < grid * block; i++) {
    Fiber& fiber = machine.fibers[i];
    fiber.cta = i / block, fiber.thread = i % block;
    Warp& warp = machine.warps[fiber.cta * ((block + 31) / 32) + fiber.thread / 32];
    warp.cta = fiber.cta, warp.index = fiber.thread / 32;
    warp.lanes[fiber.thread % 32] = &fiber;
    warp.present |= fiber.bit();
    fiber.warp = &warp;
    if (grid * block < 16000) mprotect(stacks + STACK * i, PAGE, PROT_NONE);  // a process may have 65530 mappings
    memset(stacks + STACK * (i + 1) - 2 * PAGE, 0xff, 2 * PAGE);
    start(fiber, stacks + STACK * i);
    make_ready(&fiber);
  }
  for (Cta& cta : machine.ctas) cta.shared = guarded(shared_bytes, 128);
  ::gridDim.x = grid, ::blockDim.x = block;
  start_races(stacks, STACK * machine.fibers.size());
}

}  // namespace emulated

using namespace emulated;

// 0, or 1 with what went wrong in `message`.
extern "C" int emulated_run(unsigned grid, unsigned block, unsigned shared_bytes, unsigned seed, int races,
                            uint64_t limit, void (*kernel)(void**), void** arguments, char* message, size_t room) {
  size_t bytes = STACK * grid * block, signal_bytes = 64 << 10;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* mapped = mmap(nullptr, bytes + signal_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (mapped == MAP_FAILED) {
    snprintf(message, room, "no memory for the stacks of %u threads", grid * block);
    return 1;
  }
  stacks = static_cast<unsigned char*>(mapped);
  machine.limit = limit;
  machine.races = races;
  machine.kernel = kernel, machine.arguments = arguments;
  prepare(grid, block, shared_bytes, seed);
  stack_t aside = {}, aside_before;
  aside.ss_sp = stacks + bytes, aside.ss_size = signal_bytes;
  sigaltstack(&aside, &aside_before);
  struct sigaction action = {}, segv_before, bus_before;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &segv_before);
  sigaction(SIGBUS, &action, &bus_before);
  if (sigsetjmp(escape, 1) == 0) {
    go();
    machine.current = nullptr;
    if (machine.live) machine.failure = deadlock();
    else if (!machine.loads.empty())
      machine.failure = "the grid ends with " + std::to_string(machine.loads.size()) + " bulk loads under way";
    for (Cta& cta : machine.ctas)
      for (unsigned i = shared_bytes; i % 128; i++)
        if (cta.shared[i] != 0xff && machine.failure.empty())
          machine.failure = "written behind the end: " + shared_place(cta.shared + i);
  }
  machine.current = nullptr;
  sigaction(SIGSEGV, &segv_before, nullptr);
  sigaction(SIGBUS, &bus_before, nullptr);
  sigaltstack(&aside_before, nullptr);
  for (Cta& cta : machine.ctas) release(cta.shared, shared_bytes, 128);
  for (Fiber& fiber : machine.fibers) discard(fiber);
  munmap(mapped, bytes + signal_bytes);
  snprintf(message, room, "%s", machine.failure.c_str());
  return machine.failure.empty() ? 0 : 1;
}

extern "C" uint64_t emulated_switches() { return machine.switches; }
extern "C" void* emulated_guarded(size_t bytes, size_t alignment) { return guarded(bytes, alignment); }
extern "C" void emulated_release(void* memory, size_t bytes, size_t alignment) {
  release(static_cast<unsigned char*>(memory), bytes, alignment);
}
