// The norms of rows.cpp, for other files here: as its exported functions, but not calls of their own.
#pragma once

#include <cstdint>

namespace rows {

// x [num_rows, width] becomes x + residual (null: stays), and out its RMSNorm; nothing has gaps. `wide`: float32.
void add_norm(void* out, void* x, const void* residual, const void* weight, int64_t num_rows, int64_t width, float eps,
              bool wide);

}  // namespace rows
