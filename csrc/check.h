// Checks of what the ops are given: one line each, and the message quotes the condition that failed.
#pragma once

#include <c10/util/Exception.h>

// MEGALORA_CHECK(condition, what was seen instead...)
#define MEGALORA_CHECK(condition, ...) TORCH_CHECK(condition, "megalora: `" #condition "` does not hold: ", __VA_ARGS__)
