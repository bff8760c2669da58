// Leaving one stack and continuing on another.
#pragma once

// Saves the callee-saved registers on the current stack, its pointer in *from, and resumes the
// stack `to`.
extern "C" void msl_switch(void** from, void* to);

namespace emulator {
// A stack that starts `run` when first switched to; `run` must not return.
void* prepared_stack(void* top, void (*run)());
}  // namespace emulator
