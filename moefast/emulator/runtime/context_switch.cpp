#include "context_switch.h"

#include <stdint.h>

#ifdef __APPLE__
#define SYMBOL "_msl_switch"
#else
#define SYMBOL "msl_switch"
#endif

#if defined(__x86_64__)
asm(".text\n.globl " SYMBOL "\n" SYMBOL
    ":\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    // `ret` would always be mispredicted: the processor expects the stack it left.
    "  popq %rcx\n  jmp *%rcx\n");
#elif defined(__aarch64__)
asm(".text\n.globl " SYMBOL "\n.p2align 2\n" SYMBOL
    ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n  br x30\n");  // as above
#else
#error "the emulator runs on x86-64 and arm64"
#endif

namespace emulator {

void* prepared_stack(void* top, void (*run)()) {
  auto* stack = (uintptr_t*)((uintptr_t)top & ~(uintptr_t)15);
#if defined(__x86_64__)
  *--stack = 0;               // no return address: aligned as after a call
  *--stack = (uintptr_t)run;  // where it goes
  for (int i = 0; i < 6; i++)
    *--stack = 0;
#else
  stack -= 20;
  for (int i = 0; i < 20; i++)
    stack[i] = 0;
  stack[11] = (uintptr_t)run;  // x30
#endif
  return stack;
}

}  // namespace emulator
