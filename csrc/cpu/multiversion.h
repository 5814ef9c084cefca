// Functions that are compiled once for each kind of CPU.
#pragma once

// A function so marked is compiled for AVX-512, AVX2 and the base instruction set, and the loader picks one, so a built
// wheel runs on every x86-64 CPU at its full width. All that it calls must be inlined into it (MEGALORA_INLINE).
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define MEGALORA_HAS_CLONES 1
#define MEGALORA_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MEGALORA_MULTIVERSION
#endif
