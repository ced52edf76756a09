// Starts fibers and changes between them.
#pragma once

#include "runtime.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulated {

constexpr size_t STACK = 128 << 10;
static void run_fiber();

#if defined(__x86_64__)
// swapcontext would call the kernel for the signal mask at each switch.
asm(R"(
.text
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulated_switch, .-emulated_switch
)");
extern "C" void emulated_switch(void** save, void* load);
static void start(Fiber& fiber, unsigned char* stack) {
  void** top = reinterpret_cast<void**>(stack + STACK - 64);
  *--top = nullptr;  // where run_fiber would return to; keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&run_fiber);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber.stack_pointer = top;
}
static void change(void** save, void* load) { emulated_switch(save, load); }
static void discard(Fiber&) {}
#else
static void start(Fiber& fiber, unsigned char* stack) {
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = STACK;
  context->uc_link = nullptr;
  makecontext(context, run_fiber, 0);
  fiber.stack_pointer = context;
}
static void change(void** save, void* load) {
  if (!*save) *save = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load));
}
static void discard(Fiber& fiber) { delete static_cast<ucontext_t*>(fiber.stack_pointer); }
#endif

}  // namespace emulated
