// Loops over independent items on as many threads as torch uses: OpenMP's, of the runtime that torch has loaded.
#pragma once

#include <omp.h>

#include <cstdint>

namespace mull {

template <class Body>
void parallel_for(std::int64_t count, const Body& body) {
    const int threads = count < omp_get_max_threads() ? static_cast<int>(count) : omp_get_max_threads();
    if (threads <= 1) {
        for (std::int64_t i = 0; i < count; ++i) body(i);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (std::int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace mull
