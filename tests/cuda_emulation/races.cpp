// Happens-before: every access of the kernel's memory is checked against the last write and the reads since, by
// vector clocks, whatever order the seed chose. Bulk loads write as agents of their own, one an mbarrier. g++'s
// instrumentation for its thread sanitizer calls the functions below; nothing of the sanitizer itself is used.
#include "runtime.h"

#include <cstdio>
#include <dlfcn.h>
#include <memory>
#include <unordered_map>

struct dim3;
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr unsigned AGENTS = 128;  // mbarriers of a CTA
constexpr uintptr_t CELL = 2, SHADOWED = 4096;

struct Access {
  uint32_t who, when;
  const void* code;
};
struct Cell {
  Access write = {0, 0, nullptr};
  bool asynchronous = false;  // the write, or a read that goes around the caches' order, was not an ordinary one
  bool constant = false;
  std::vector<Access> reads;
};

static std::vector<Clock> clocks;
static std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> pages;
static uintptr_t ignored_from, ignored_to, last_page;
static Cell* last_cells;

void start_races(const void* stacks, size_t bytes) {
  pages.clear(), clocks.clear();
  last_cells = nullptr, last_page = 0;
  if (!machine.races) return;
  unsigned threads = machine.grid * machine.block;
  clocks.assign(threads, Clock(threads + AGENTS * machine.grid, 0));
  for (unsigned i = 0; i < threads; i++) clocks[i][i] = 1;
  ignored_from = uintptr_t(stacks), ignored_to = ignored_from + bytes;
}

static uint32_t self() { return machine.current->cta * machine.block + machine.current->thread; }

static void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) into[i] = from[i] > into[i] ? from[i] : into[i];
}

void release(Clock& clock) {
  if (!machine.races) return;
  Clock& mine = clocks[self()];
  join(clock, mine);
  mine[self()]++;
}

void acquire(const Clock& clock) {
  if (machine.races) join(clocks[self()], clock);
}

static std::string described(const char* what, const Access& access) {
  char text[200];
  unsigned threads = machine.grid * machine.block;
  Dl_info library = {};
  dladdr(access.code, &library);
  size_t code = size_t(access.code) - size_t(library.dli_fbase);
  if (access.who >= threads) {
    snprintf(text, sizeof text, "%s by a bulk load of CTA %u, issued at <+%#zx>", what,
             (access.who - threads) / AGENTS, code);
  } else {
    unsigned thread = access.who % machine.block;
    snprintf(text, sizeof text, "%s by CTA %u, warp %u, lane %u at <+%#zx>", what, access.who / machine.block,
             thread / 32, thread % 32, code);
  }
  return text;
}

static Cell& cell_of(uintptr_t address) {
  uintptr_t page = address / SHADOWED;
  if (page != last_page || !last_cells) {
    auto& cells = pages[page];
    if (!cells) cells.reset(new Cell[SHADOWED / CELL]);
    last_page = page, last_cells = cells.get();
  }
  return last_cells[address % SHADOWED / CELL];
}

static bool ordered(const Access& access, const Clock& clock) {
  return access.when == 0 || clock[access.who] >= access.when;
}

[[noreturn]] static void race(const char* how, const Access& before, const char* now, const Access& access,
                              uintptr_t address) {
  fail("race at " + shared_place(reinterpret_cast<void*>(address)) + ":\n  " + described(how, before) + "\n  " +
       described(now, access));
}

static void read(uintptr_t address, Cell& cell, const Access& access, const Clock& clock, bool around) {
  if (!ordered(cell.write, clock)) race("written", cell.write, "read", access, address);
  if (around && cell.write.when && !cell.asynchronous)
    race("written", cell.write, "read as constant, or by a bulk load without a proxy fence,", access, address);
  cell.constant |= around;
  for (Access& other : cell.reads)
    if (other.who == access.who) {
      other = access;
      return;
    }
  cell.reads.push_back(access);
}

static void write(uintptr_t address, Cell& cell, const Access& access, const Clock& clock, bool asynchronous) {
  if (!ordered(cell.write, clock)) race("written", cell.write, "written", access, address);
  for (const Access& other : cell.reads)
    if (!ordered(other, clock)) race("read", other, "written", access, address);
  if (cell.constant && !asynchronous) race("read as constant", cell.reads.back(), "written", access, address);
  if (asynchronous && cell.write.when && !cell.asynchronous)
    race("written", cell.write, "overwritten without a proxy fence", access, address);
  cell.write = access;
  cell.asynchronous = asynchronous;
  cell.reads.clear();
}

static void accessed(const void* at, size_t bytes, bool writes, bool around, const void* code) {
  auto address = uintptr_t(at);
  if (!machine.races || !machine.current || (address >= ignored_from && address < ignored_to)) return;
  for (const dim3* own : {&threadIdx, &blockIdx, &blockDim, &gridDim})
    if (address - uintptr_t(own) < 12) return;
  uint32_t who = self();
  const Clock& clock = clocks[who];
  Access access = {who, clock[who], code};
  for (uintptr_t cell = address / CELL * CELL; cell < address + bytes; cell += CELL)
    writes ? write(cell, cell_of(cell), access, clock, false) : read(cell, cell_of(cell), access, clock, around);
}

// The agent of an mbarrier writes from now on, until the phase that `release_load` ends is acquired.
void issue_load(const Load& load, unsigned agent, const void* code) {
  if (!machine.races) return;
  uint32_t who = machine.grid * machine.block + machine.current->cta * AGENTS + agent % AGENTS;
  Clock seen = clocks[self()];
  Access access = {who, uint32_t(load.number), code};
  seen[who] = access.when;  // loads of one phase of an mbarrier do not overlap: bulk_load has seen to it
  Access reading = {self(), clocks[self()][self()], code};
  for (uintptr_t i = 0; i < load.bytes; i += CELL) {
    uintptr_t to = uintptr_t(load.shared) + i, from = uintptr_t(load.global) + i;
    write(to, cell_of(to), access, seen, true);
    read(from, cell_of(from), reading, seen, true);
  }
}

void release_load(Clock& clock, unsigned cta, unsigned agent, uint64_t number) {
  if (!machine.races) return;
  size_t who = machine.grid * machine.block + cta * AGENTS + agent % AGENTS;
  if (clock.size() <= who) clock.resize(who + 1);
  if (clock[who] < number) clock[who] = uint32_t(number);
}

}  // namespace emulated

using emulated::accessed;

#define CALLER __builtin_return_address(0)
#define ACCESS(bytes) \
  void __tsan_read##bytes(void* at) { accessed(at, bytes, false, false, CALLER); } \
  void __tsan_write##bytes(void* at) { accessed(at, bytes, true, false, CALLER); } \
  void __tsan_unaligned_read##bytes(void* at) { accessed(at, bytes, false, false, CALLER); } \
  void __tsan_unaligned_write##bytes(void* at) { accessed(at, bytes, true, false, CALLER); }
extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_read_range(void* at, size_t bytes) { accessed(at, bytes, false, false, CALLER); }
void __tsan_write_range(void* at, size_t bytes) { accessed(at, bytes, true, false, CALLER); }
void emulated_read_constant(const void* at, size_t bytes) { accessed(at, bytes, false, true, CALLER); }
}
