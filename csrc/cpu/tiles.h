// Products of float32 matrices on Intel's AMX tiles, which multiply bfloat16 and add in float32.
#pragma once

#include <cstdint>

#include "cpu/multiversion.h"

#if defined(MEGALORA_HAS_CLONES)
#define MEGALORA_HAS_TILES 1
#endif

namespace megalora::cpu {

// Whether this build and CPU have them and the kernel grants their state. Asks it for all threads of the process.
bool has_tiles();

}  // namespace megalora::cpu
