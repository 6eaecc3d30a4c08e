// Collectives of ranks on one host, through memory they share: a sum takes microseconds, over sockets a millisecond.
//
// Every rank has a mailbox of two halves, used in turns, and counts its posts. To have seen everyone's post n is to
// know that everyone has read the posts before it, so a half is free again two posts later and nothing else needs a
// barrier.
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstring>

#include "simd.h"

using namespace mull;

namespace {

constexpr int SPINS = 1000;               // about 30 µs, before a waiter gives its core away
constexpr std::int64_t NAP_NS = 20000000;  // a waiter looks at the clock this often

struct alignas(64) Counter {
    std::atomic<std::uint32_t> posts;
    std::atomic<std::uint32_t> sleepers;
};

std::int64_t now_ns() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

}  // namespace

// Mirrored by `workers.host_group`.
struct HostGroup {
    std::uint8_t* memory;  // a Counter per rank, then the mailboxes: [rank][half][half_bytes]
    std::int64_t half_bytes;
    std::int64_t timeout_ns;  // 0, from any thread, ends a wait at its next nap
    std::int32_t rank, size;
    std::uint32_t posts;

    Counter& counter(int of) { return reinterpret_cast<Counter*>(memory)[of]; }
    std::uint8_t* mailbox(int of) {
        return memory + sizeof(Counter) * size + (of * 2 + posts % 2) * half_bytes;
    }

    // What lies in this rank's half is complete.
    void post() {
        Counter& mine = counter(rank);
        mine.posts.store(posts);
        if (mine.sleepers.load()) syscall(SYS_futex, &mine.posts, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    }

    bool has_posted(int of) { return static_cast<std::int32_t>(counter(of).posts.load() - posts) >= 0; }

    // False where the deadline passes first.
    bool wait(int of) {
        for (int spin = 0; spin < SPINS; ++spin) {
            if (has_posted(of)) return true;
            _mm_pause();
        }
        Counter& theirs = counter(of);
        const std::int64_t began = now_ns();
        theirs.sleepers.fetch_add(1);
        const timespec nap{0, NAP_NS};
        while (true) {
            const std::uint32_t seen = theirs.posts.load();
            if (static_cast<std::int32_t>(seen - posts) >= 0) break;
            if (now_ns() - began > __atomic_load_n(&timeout_ns, __ATOMIC_RELAXED)) {
                theirs.sleepers.fetch_sub(1);
                return false;
            }
            syscall(SYS_futex, &theirs.posts, FUTEX_WAIT, seen, &nap, nullptr, 0);
        }
        theirs.sleepers.fetch_sub(1);
        return true;
    }

    // Posts what `fill` writes into this rank's mailbox and waits for everyone's. Returns the rank that is late, or -1.
    template <class Fill>
    int exchange(const Fill& fill) {
        ++posts;
        fill(mailbox(rank));
        post();
        for (int of = 0; of < size; ++of)
            if (of != rank && !wait(of)) return of;
        return -1;
    }

    int exchange(const void* from, std::int64_t bytes) {
        return exchange([&](std::uint8_t* mailbox) { std::memcpy(mailbox, from, bytes); });
    }
};

// x = the sum of all ranks' x, added in rank order, in place. Returns the rank that is late, or -1.
extern "C" std::int32_t mull_host_all_reduce(HostGroup* group, float* x, std::int64_t count) {
    const std::int64_t capacity = group->half_bytes / static_cast<std::int64_t>(sizeof(float));
    for (std::int64_t start = 0; start < count; start += capacity) {
        const std::int64_t part = std::min(capacity, count - start);
        const int late = group->exchange(x + start, part * sizeof(float));
        if (late >= 0) return late;
        for (std::int64_t i = 0; i < part; i += Floats::width) {
            const int lanes = static_cast<int>(std::min<std::int64_t>(Floats::width, part - i));
            const auto of = [&](int rank) {
                return Floats::load(reinterpret_cast<const float*>(group->mailbox(rank)) + i, lanes);
            };
            Floats sum = of(0);
            for (int rank = 1; rank < group->size; ++rank) sum = sum + of(rank);
            sum.store(x + start + i, lanes);
        }
    }
    return -1;
}

// out = [size][bytes]: every rank's bytes, in rank order. Returns the rank that is late, or -1.
extern "C" std::int32_t mull_host_all_gather(HostGroup* group, const std::uint8_t* x, std::int64_t bytes,
                                             std::uint8_t* out) {
    for (std::int64_t start = 0; start < bytes; start += group->half_bytes) {
        const std::int64_t part = std::min(group->half_bytes, bytes - start);
        const int late = group->exchange(x + start, part);
        if (late >= 0) return late;
        for (int rank = 0; rank < group->size; ++rank)
            std::memcpy(out + rank * bytes + start, group->mailbox(rank), part);
    }
    return -1;
}

// The next send_bytes[w] bytes go to rank w; out gets receive_bytes[w] of each rank w, in rank order. A mailbox has a
// segment for every rank, and says how many rounds its owner needs: all go as many as the one with the most to send.
// Returns the rank that is late, or -1.
extern "C" std::int32_t mull_host_all_to_all(HostGroup* group, const std::uint8_t* rows, const std::int64_t* send_bytes,
                                             const std::int64_t* receive_bytes, std::uint8_t* out) {
    constexpr std::int64_t HEAD = 64;
    const std::int64_t segment = (group->half_bytes - HEAD) / group->size;
    // Bytes of a message that travel in a round.
    const auto part = [&](std::int64_t bytes, std::int64_t round) {
        return std::clamp<std::int64_t>(bytes - round * segment, 0, segment);
    };
    std::int64_t rounds = 1;
    for (int to = 0; to < group->size; ++to) rounds = std::max(rounds, (send_bytes[to] + segment - 1) / segment);
    const std::int64_t own_rounds = rounds;
    for (std::int64_t round = 0; round < rounds; ++round) {
        const int late = group->exchange([&](std::uint8_t* mailbox) {
            std::memcpy(mailbox, &own_rounds, sizeof own_rounds);
            const std::uint8_t* from = rows;
            for (int to = 0; to < group->size; from += send_bytes[to++])
                std::memcpy(mailbox + HEAD + to * segment, from + round * segment, part(send_bytes[to], round));
        });
        if (late >= 0) return late;
        std::uint8_t* to = out;
        for (int of = 0; of < group->size; to += receive_bytes[of++]) {
            std::int64_t their_rounds;
            std::memcpy(&their_rounds, group->mailbox(of), sizeof their_rounds);
            rounds = std::max(rounds, their_rounds);
            std::memcpy(to + round * segment, group->mailbox(of) + HEAD + group->rank * segment,
                        part(receive_bytes[of], round));
        }
    }
    return -1;
}
