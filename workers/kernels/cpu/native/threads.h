// Loops over independent items on as many threads as torch uses: OpenMP's, of the runtime that torch has loaded.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace mull {

// Each thread takes items of its own share, one after another, then what is left of the others': a panel of weights lies
// behind the panel before it, and memory that is read on and on comes nearly twice as fast as every other 32 KiB of it.
template <class Body>
void parallel_for(std::int64_t count, const Body& body) {
    const int threads = static_cast<int>(std::min<std::int64_t>(count, omp_get_max_threads()));
    if (threads <= 1) {
        for (std::int64_t i = 0; i < count; ++i) body(i);
        return;
    }
    struct alignas(64) Share {
        std::atomic<std::int64_t> next;
        std::int64_t stop;
    };
    const std::unique_ptr<Share[]> shares(new Share[threads]);
    for (int i = 0; i < threads; ++i) {
        shares[i].next.store(count * i / threads, std::memory_order_relaxed);
        shares[i].stop = count * (i + 1) / threads;
    }
#pragma omp parallel num_threads(threads)
    for (int i = 0; i < threads; ++i) {
        Share& share = shares[(omp_get_thread_num() + i) % threads];
        while (true) {
            const std::int64_t item = share.next.fetch_add(1, std::memory_order_relaxed);
            if (item >= share.stop) break;
            body(item);
        }
    }
}

}  // namespace mull
