// What Python calls: the kernel's arguments are taken as cuLaunchKernel takes them, an address each.
#include "primitives.cuh"
#include EMULATED_SOURCE
#include <cstddef>
#include <type_traits>
#include <utility>

extern "C" int emulated_run(unsigned, unsigned, unsigned, unsigned, int, uint64_t, void (*)(void**), void**, char*,
                            size_t);

template <typename... Arguments, size_t... I>
static void emulated_call(void (*kernel)(Arguments...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<Arguments>*>(arguments[I])...);
}
template <typename... Arguments>
static void emulated_call(void (*kernel)(Arguments...), void** arguments) {
  emulated_call(kernel, arguments, std::index_sequence_for<Arguments...>());
}

extern "C" int emulated_launch(unsigned grid, unsigned block, unsigned shared_bytes, unsigned seed, int races,
                               uint64_t limit, void** arguments, char* message, size_t room) {
  auto call = [](void** all) { emulated_call(EMULATED_KERNEL, all); };
  return emulated_run(grid, block, shared_bytes, seed, races, limit, call, arguments, message, room);
}
