// What ranks of one host share, byte by byte: how a rank says that it has come, and where its numbers lie.
//
// Every rank has one segment, which all others map: a Header, small staging memory, then blocks that Python hands out.
// In a segment only its owner writes, but for `bell`. A group of ranks has the same place among the slots of each
// member.
//
// One exchange, the n-th of its group: a member writes what it brings, says where in posts[n % 2], and raises `arrived`
// to n. When all have arrived, each reads what it wants from the others, and then raises `read` to n. Whoever has
// arrived at n + 1 has read all of exchange n; so what was brought to n may be written again once n + 1 is complete,
// and two turns of posts and of staging memory are enough for one meeting per exchange.
#pragma once

#include <atomic>
#include <cstdint>

namespace collectives {

constexpr int64_t max_slots = 12;           // groups that a rank is in: those of up to four mesh axes, and to spare
constexpr int64_t max_fields = 16;          // tensors of one exchange
constexpr int64_t max_ranks = 256;          // members of a group
constexpr int64_t small_bytes = 128 << 10;  // what one rank may bring to an exchange without a block of its own
constexpr int64_t page = 4096;

struct Post {
    uint64_t signature;           // of the call: who differs here came to another one
    int64_t offsets[max_fields];  // of each field, from the start of the segment
};

struct alignas(64) Counter {
    std::atomic<uint64_t> value;
};

struct Slot {
    Counter arrived;
    Counter read;
    alignas(64) Post posts[2];
};

struct Header {
    char nonce[64];                            // says whose segment it is
    alignas(64) std::atomic<uint32_t> sleeps;  // the owner waits in the kernel: ring
    std::atomic<uint32_t> bell;                // the word it waits on
    Slot slots[max_slots];
};

constexpr int64_t staging_start = (sizeof(Header) + page - 1) / page * page;
constexpr int64_t blocks_start = staging_start + max_slots * 2 * small_bytes;

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

// One rank's end of one group's exchanges: its own memory, as Python lays it out (narrows/comm/shm_calls.py).
struct Wire {
    int64_t size, me, slot;
    int64_t segment_bytes;
    char** segments;  // of the members, as mapped here
    uint64_t number;  // of the exchange that it is in, or was in last
    int64_t stage;    // how far that has come: see Stage
};

enum Stage : int64_t { outside, arriving, reading };
enum Outcome : int { done, not_yet, differs };

}  // namespace collectives
