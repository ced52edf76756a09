// The primitives: what a thread waits for, and what wakes it.
#include "runtime.h"

#include <cstdio>
#include <cstring>

namespace emulated {

Cta& here() { return machine.ctas[machine.current->cta]; }

std::string shared_place(const void* address) {
  auto* byte = static_cast<const unsigned char*>(address);
  char text[96];
  for (size_t i = 0; i < machine.ctas.size(); i++) {
    long offset = byte - machine.ctas[i].shared;
    if (offset >= -8192 && offset < long(machine.shared_bytes) + 8192) {
      snprintf(text, sizeof text, "shared memory of CTA %zu, byte %ld of %u", i, offset, machine.shared_bytes);
      return text;
    }
  }
  snprintf(text, sizeof text, "address %p", address);
  return text;
}

// Wakes, at random, all that wait there.
static void wake(std::vector<Fiber*>& waiting) {
  for (Fiber* fiber : waiting) make_ready(fiber);
  waiting.clear();
}

static Barrier& find(uint64_t* address) {
  auto& barriers = here().barriers;
  auto found = barriers.find(address);
  if (found == barriers.end()) fail("mbarrier used that this CTA has not initialised: " + shared_place(address));
  if (*address != reinterpret_cast<uint64_t>(address)) fail("mbarrier overwritten: " + shared_place(address));
  return found->second;
}

static void settle(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.phase++;
    barrier.pending = barrier.count;
    barrier.complete = barrier.arriving;
    wake(barrier.waiting);
  }
}

static void arrive(uint64_t* address, unsigned bytes) {
  Barrier& barrier = find(address);
  if (barrier.pending == 0) fail("more arrivals than the count at an mbarrier: " + shared_place(address));
  barrier.pending--;
  barrier.bytes += bytes;
  release(barrier.arriving);
  settle(barrier);
}

void complete(const Load& load) {
  memcpy(load.shared, load.global, load.bytes);
  for (size_t i = 0; i < machine.ctas.size(); i++) {
    auto& barriers = machine.ctas[i].barriers;
    auto found = barriers.find(load.barrier);
    if (found == barriers.end()) continue;
    found->second.bytes -= load.bytes;
    release_load(found->second.arriving, i, found->second.agent, load.number);
    settle(found->second);
  }
}

bool wake_counter_waiters() {
  bool any = false;
  auto& waiters = machine.waiters;
  for (size_t i = 0; i < waiters.size();) {
    if (*waiters[i].counter >= waiters[i].goal) {
      make_ready(waiters[i].fiber);
      waiters[i] = waiters.back();
      waiters.pop_back();
      any = true;
    } else {
      i++;
    }
  }
  return any;
}

static void maybe_pause(unsigned one_in) {
  if (!chance(one_in)) return;
  make_ready(machine.current);
  machine.budget = 0;
  block("its turn", nullptr, 0);
}

}  // namespace emulated

using namespace emulated;

extern "C" {

unsigned char* emulated_dynamic_shared() { return here().shared; }
void emulated_fail(const char* reason) { fail(reason); }
void emulated_pause() { maybe_pause(4); }

uint64_t emulated_exchange(int kind, unsigned mask, uint64_t value, int source) {
  static const char* const names[] = {"a shuffle of all lanes in its mask", "a ballot of all lanes in its mask",
                                      "__syncwarp", "a product of the warp"};
  Fiber* self = machine.current;
  Warp& warp = *self->warp;
  Meeting& meeting = warp.meeting;
  if (!(mask & self->bit())) fail("a lane that its own mask leaves out, in " + std::string(names[kind]));
  if (mask & ~warp.present) fail("the mask names lanes that have ended, in " + std::string(names[kind]));
  if (meeting.arrived && (meeting.kind != kind || meeting.mask != mask))
    fail("lanes of a warp meet in different operations: " + std::string(names[kind]) + " and " + names[meeting.kind]);
  if (kind == 0 && !(mask >> source & 1)) fail("a shuffle from a lane that the mask leaves out");
  unsigned generation = meeting.generation, side = generation & 1;
  meeting.kind = kind;
  meeting.mask = mask;
  meeting.values[side][self->thread % 32] = value;
  if (meeting.arrived == 0) meeting.lanes[side] = 0;
  if (kind == 1 && value) meeting.lanes[side] |= self->bit();
  if (meeting.arrived == 0) meeting.clock[side].clear();
  meeting.arrived |= self->bit();
  if (kind == 2) release(meeting.clock[side]);  // shuffles and ballots order no memory
  if (meeting.arrived == mask) {
    meeting.generation++;
    meeting.arrived = 0;
    for (unsigned rest = mask & ~self->bit(); rest; rest &= rest - 1) make_ready(warp.lanes[__builtin_ctz(rest)]);
  } else {
    while (meeting.generation == generation) block(names[kind], nullptr, mask);
  }
  if (kind == 2) acquire(meeting.clock[side]);
  return kind == 1 ? meeting.lanes[side] : meeting.values[side][source];
}

// All lanes' operands of a product; they stay until the lanes have met twice more.
const uint32_t (*emulated_operands(const uint32_t* own))[6] {
  Fiber* self = machine.current;
  auto& operands = self->warp->operands[self->warp->meeting.generation & 1];
  memcpy(operands[self->thread % 32], own, sizeof operands[0]);
  emulated_exchange(3, FULL, 0, int(self->thread % 32));
  return operands;
}

void emulated_group_sync(int id, int threads, bool waits) {
  if (id < 0 || id > 15) fail("there are 16 named barriers, not one with id " + std::to_string(id));
  if (threads <= 0 || threads % 32 || threads > int(machine.block + 31) / 32 * 32)
    fail("a named barrier of " + std::to_string(threads) + " threads");
  maybe_pause(8);
  Group& group = here().groups[id];
  if (group.arrived && group.threads != threads)
    fail("a named barrier with " + std::to_string(threads) + " and with " + std::to_string(group.threads) + " threads");
  group.threads = threads;
  unsigned generation = group.generation;
  if (!group.arrived) group.arriving.clear();
  release(group.arriving);
  if (++group.arrived == threads) {
    group.arrived = 0;
    group.generation++;
    group.complete = group.arriving;
    wake(group.waiting);
    if (waits) acquire(group.complete);
    return;
  }
  if (!waits) return;
  group.waiting.push_back(machine.current);
  while (group.generation == generation) block("named barrier", nullptr, id);
  acquire(group.complete);
}

unsigned emulated_counter_add(unsigned* counter, unsigned n, bool acquires) {
  maybe_pause(4);
  unsigned before = *counter;
  Clock& clock = machine.counters[counter];
  if (acquires) acquire(clock);
  release(clock);
  *counter = before + n;
  wake_counter_waiters();
  maybe_pause(4);
  return before;
}

void grid_wait(const unsigned* counter, unsigned goal) {
  maybe_pause(4);
  while (*counter < goal) {
    machine.waiters.push_back({counter, goal, machine.current});
    block("a counter in global memory to reach a goal,", counter, goal);
  }
  acquire(machine.counters[counter]);
}

void mbarrier_init(uint64_t* address, unsigned count) {
  if (reinterpret_cast<uint64_t>(address) % 8) fail("an mbarrier not aligned to 8 bytes: " + shared_place(address));
  if (count == 0 || count >= 1u << 20) fail("an mbarrier of " + std::to_string(count) + " arrivals");
  long offset = reinterpret_cast<unsigned char*>(address) - here().shared;
  if (offset < 0 || offset + 8 > long(machine.shared_bytes)) fail("an mbarrier outside shared memory");
  *address = reinterpret_cast<uint64_t>(address);
  Barrier& barrier = here().barriers[address];
  barrier = {};
  barrier.count = barrier.pending = count;
  barrier.agent = here().barriers.size() - 1;
}

void mbarrier_fence_init() { maybe_pause(4); }

void mbarrier_expect(uint64_t* address, unsigned bytes) {
  maybe_pause(8);
  if (bytes >= 1u << 20) fail("an mbarrier expects at most 2^20 - 1 bytes, not " + std::to_string(bytes));
  arrive(address, bytes);
}

void mbarrier_arrive(uint64_t* address) {
  maybe_pause(8);
  arrive(address, 0);
}

void mbarrier_wait(uint64_t* address, unsigned parity) {
  maybe_pause(8);
  if (parity > 1) fail("an mbarrier's parity is 0 or 1, not " + std::to_string(parity));
  Barrier& barrier = find(address);
  uint64_t awaited = barrier.phase;
  while ((barrier.phase & 1) == parity) {
    if (barrier.phase != awaited) fail("an mbarrier's phase was overrun by two: " + shared_place(address));
    barrier.waiting.push_back(machine.current);
    block("mbarrier of parity", address, parity);
    find(address);
  }
  acquire(barrier.complete);
}

bool emulated_done(uint64_t* address, unsigned parity) {
  maybe_pause(2);
  Barrier& barrier = find(address);
  if ((barrier.phase & 1) == parity) return false;
  acquire(barrier.complete);
  return true;
}

void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* address) {
  maybe_pause(8);
  long offset = static_cast<unsigned char*>(shared) - here().shared;
  if (offset % 16 || reinterpret_cast<uint64_t>(global) % 16 || bytes % 16 || bytes == 0)
    fail("a bulk load of " + std::to_string(bytes) + " bytes to byte " + std::to_string(offset) +
         " of shared memory from an address with " + std::to_string(reinterpret_cast<uint64_t>(global) % 16) +
         " bytes behind a multiple of 16");
  if (offset < 0 || offset + long(bytes) > long(machine.shared_bytes))
    fail("a bulk load outside " + shared_place(shared));
  Barrier& barrier = find(address);
  for (const Load& other : machine.loads)
    if (other.shared < static_cast<unsigned char*>(shared) + bytes &&
        shared < static_cast<unsigned char*>(other.shared) + other.bytes)
      fail("a bulk load over one that is under way: " + shared_place(shared));
  memset(shared, 0xff, bytes);
  machine.loads.push_back({shared, global, bytes, address, ++machine.issued});
  issue_load(machine.loads.back(), barrier.agent, __builtin_return_address(0));
}
}
