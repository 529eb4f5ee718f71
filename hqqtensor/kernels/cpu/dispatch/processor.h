// What an x86-64 processor has, by its own words: CPUID, and XGETBV for the registers that the system saves. The compilers'
// __builtin_cpu_supports is not used: it reads tables of the compiler's runtime library, and that of another compiler, which
// links the library of `make wheel`, leaves some of them empty.
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>

namespace hqqtensor {

struct Processor {
  unsigned leaf1_ecx = 0;
  unsigned leaf7_ebx = 0;
  unsigned leaf7_ecx = 0;
  unsigned leaf7_edx = 0;
  unsigned leaf7_1_eax = 0;
  uint64_t saved_registers = 0;  // XCR0: which registers the system saves when it switches between threads

  Processor() {
    unsigned a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d)) leaf1_ecx = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) leaf7_ebx = b, leaf7_ecx = c, leaf7_edx = d;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) leaf7_1_eax = a;
    if (leaf1_ecx & bit_OSXSAVE) {
      unsigned low, high;
      asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
      saved_registers = (uint64_t)high << 32 | low;
    }
  }

  bool saves(uint64_t registers) const { return (saved_registers & registers) == registers; }
  // True if all `bits` of a word are set.
  static bool all(unsigned word, unsigned bits) { return (word & bits) == bits; }
};

constexpr uint64_t kAvxRegisters = 0x6;      // the lower and the upper halves of 256-bit registers
constexpr uint64_t kAvx512Registers = 0xe6;  // these, masks, and 512-bit registers

}  // namespace hqqtensor
#endif
