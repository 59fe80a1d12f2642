// The one channel for reasons: what headkv_last_error() says on this thread.
#pragma once

#include <exception>
#include <string>

constexpr const char * HEADKV_NO_MEMORY = "not enough memory";

void headkv_set_error(const std::string & what);

const std::string & headkv_get_error();

// Logs a failure and leaves it as the reason; llama_decode() has no other way out for it. Returns false.
bool headkv_fail(const std::string & what);

// what an exception says, in our words where memory is short
const char * headkv_reason(const std::exception & e);
