// Checks of what a caller gives: std::invalid_argument says what was found and what is expected.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace common {

inline void require(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument(message);
}

inline void require_aligned(const void* pointer, const char* name) {
    require(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, std::string(name) + " must be 16-byte aligned");
}

}  // namespace common
