// Collectives among the ranks of one host, through the memory that they share (collectives.h says how it is laid out).
//
// Knows addresses, bytes and three kinds of floating numbers; not tensors, labels, or who a rank is. No call blocks for
// long: one that returns `not_yet` is made again with the same arguments, so that its caller can look around meanwhile.
#include "runtime/collectives.h"

#include <ctime>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "runtime/dispatch.h"
#include "runtime/export.h"
#include "sums.h"

using namespace collectives;

namespace {

constexpr int64_t patience_ns = 50'000'000;  // then a call returns
constexpr int64_t looks = 200;               // some microseconds, in which the core is kept
constexpr int64_t offering_ns = 300'000;     // for how long it is then offered to others before the rank sleeps
constexpr int64_t staged_small = -1;         // instead of an address: in the staging memory of this turn

Header& header(const Wire& w, int64_t i) { return *reinterpret_cast<Header*>(w.segments[i]); }

Slot& slot(const Wire& w, int64_t i) { return header(w, i).slots[w.slot]; }

Post& post(const Wire& w, int64_t i) { return slot(w, i).posts[w.number % 2]; }

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

long futex(std::atomic<uint32_t>* word, int op, uint32_t value, const timespec* timeout) {
    return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), op, value, timeout, nullptr, 0);
}

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Raises this rank's counter, and wakes the members that sleep. Either a sleeper sees the counter when it looks for the
// last time, or it is seen to sleep here: both sides write first and then read, in one order for all.
void raise(const Wire& w, Counter Slot::* which) {
    (slot(w, w.me).*which).value.store(w.number, std::memory_order_seq_cst);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    for (int64_t i = 0; i < w.size; i++) {
        Header& other = header(w, i);
        if (i != w.me && other.sleeps.load(std::memory_order_relaxed)) {
            other.bell.fetch_add(1, std::memory_order_seq_cst);
            futex(&other.bell, FUTEX_WAKE, 1 << 30, nullptr);
        }
    }
}

bool have_all(const Wire& w, Counter Slot::* which) {
    for (int64_t i = 0; i < w.size; i++)
        if ((slot(w, i).*which).value.load(std::memory_order_acquire) < w.number) return false;
    return true;
}

// Whether every member's counter has come to this exchange before patience ends: looks, then looks and offers the core
// to whoever else wants it, then sleeps until a member rings.
bool wait(const Wire& w, Counter Slot::* which) {
    for (int64_t i = 0; i < looks; i++) {
        if (have_all(w, which)) return true;
        relax();
    }
    const int64_t start = now_ns();
    while (now_ns() - start < offering_ns) {
        if (have_all(w, which)) return true;
        sched_yield();
    }
    Header& own = header(w, w.me);
    own.sleeps.store(1, std::memory_order_seq_cst);
    bool all = false;
    while (true) {
        const uint32_t bell = own.bell.load(std::memory_order_seq_cst);
        std::atomic_thread_fence(std::memory_order_seq_cst);
        if ((all = have_all(w, which))) break;
        const int64_t left = start + patience_ns - now_ns();
        if (left <= 0) break;
        const timespec timeout{0, long(left)};
        futex(&own.bell, FUTEX_WAIT, bell, &timeout);
    }
    own.sleeps.store(0, std::memory_order_relaxed);
    return all;
}

// What this rank brings: where it lies, and where it is put for the others to read it. `stage` 0: it lies there.
struct Brought {
    const char* data;
    char* stage;
};

class Arrival {
 public:
    Arrival(Wire& wire, uint64_t signature) : w(wire), small(nullptr) {
        w.number++;
        post(w, w.me).signature = signature;
        small = w.segments[w.me] + staging_start + (w.slot * 2 + int64_t(w.number % 2)) * small_bytes;
    }

    // A field of `bytes` bytes, of which the others read all but `kept` bytes from `keep` on.
    void bring(int64_t field, const int64_t* from, int64_t bytes, int64_t keep, int64_t kept) {
        const char* data = reinterpret_cast<const char*>(from[0]);
        char* stage = reinterpret_cast<char*>(from[1]);
        if (from[1] == staged_small) {
            stage = small;
            small += (bytes + 63) / 64 * 64;
        }
        if (stage && bytes) {
            std::memcpy(stage, data, size_t(keep));
            std::memcpy(stage + keep + kept, data + keep + kept, size_t(bytes - keep - kept));
        }
        post(w, w.me).offsets[field] = (stage ? stage : data) - w.segments[w.me];
    }

    void tell() {
        w.stage = arriving;
        raise(w, &Slot::arrived);
    }

 private:
    Wire& w;
    char* small;
};

// Whether all came to the same call.
bool agree(const Wire& w) {
    for (int64_t i = 1; i < w.size; i++)
        if (post(w, i).signature != post(w, 0).signature) return false;
    return true;
}

// Where member i has put a field; null if that cannot be.
const char* brought(const Wire& w, int64_t i, int64_t field, int64_t bytes) {
    const int64_t offset = post(w, i).offsets[field];
    const bool inside = offset >= 0 && bytes <= w.segment_bytes && offset <= w.segment_bytes - bytes;
    return inside ? w.segments[i] + offset : nullptr;
}

// One member's part of a gathered field, in bytes: `rows` pieces of `row` bytes each, which lie together where they
// come from and `pitch` apart from `start` on where they go to.
struct Part {
    int64_t start, row, rows, pitch;

    int64_t bytes() const { return row * rows; }

    void copy(char* out, const char* from) const {
        if (bytes() == 0) return;  // then there may be no memory either
        if (row == pitch || rows == 1) {
            std::memcpy(out + start, from, size_t(bytes()));
            return;
        }
        for (int64_t r = 0; r < rows; r++) std::memcpy(out + start + r * pitch, from + r * row, size_t(row));
    }
};

// What a call is about, the same from step to step: a header, then one Part per field and member.
struct Gather {
    uint64_t signature;
    int64_t num_fields;
    Part parts[];

    const Part& part(const Wire& w, int64_t field, int64_t i) const { return parts[field * w.size + i]; }
};

struct Reduce {
    uint64_t signature;
    int64_t dtype, whole, num_addends;
    int64_t addend_dtypes[max_fields];
    int64_t starts[];  // of each member's piece, in numbers; one more: how many there are
};

// A capture keeps copies of what Python writes anew for every call: arguments, and the call's description.
template <typename Call>
void capture(int (*function)(Wire*, const Call*, const int64_t*), Wire* wire, const Call* call, int64_t call_bytes,
             const int64_t* args, int64_t num_args) {
    narrows::Capture* to = narrows::capturing();
    if (to == nullptr || wire->stage != outside) return;  // a call that is made again is one call
    const char* bytes = reinterpret_cast<const char*>(call);
    to->calls.emplace_back(
        [=, kept = std::vector<char>(bytes, bytes + call_bytes), given = std::vector<int64_t>(args, args + num_args)] {
            return function(wire, reinterpret_cast<const Call*>(kept.data()), given.data());
        });
}

// The end of every call: the others may know that this rank has read, or must all have read before it goes on.
int leave(Wire& w, bool lingers) {
    if (w.stage == arriving) {
        raise(w, &Slot::read);
        w.stage = reading;
    }
    if (lingers && !wait(w, &Slot::read)) return not_yet;
    w.stage = outside;
    return done;
}

// For who came to another call than the others; nothing was read.
int leave_at_once(Wire& w) {
    raise(w, &Slot::read);
    w.stage = outside;
    return differs;
}

// The bytes that member i has brought of field f: x in full, or one of its addends.
int64_t field_bytes(const Wire& w, const Reduce& call, int64_t i, int64_t field) {
    if (field == 0) return call.starts[w.size] * sums::size_of(call.dtype);
    return (call.starts[i + 1] - call.starts[i]) * sums::size_of(call.addend_dtypes[field - 1]);
}

// Sums piece p of all members' x, with the addends of member p, into `out`; false if a member's post cannot be.
bool sum_piece(const Wire& w, const Reduce& call, const int64_t* args, int64_t p, char* out) {
    const int64_t start = call.starts[p], count = call.starts[p + 1] - start;
    if (!count) return true;
    sums::Part parts[max_ranks + max_fields];
    int64_t num = 0;
    for (int64_t i = 0; i < w.size; i++) {
        const char* x =
            i == w.me ? reinterpret_cast<const char*>(args[0]) : brought(w, i, 0, field_bytes(w, call, i, 0));
        if (!x) return false;
        parts[num++] = {x + start * sums::size_of(call.dtype), call.dtype};
    }
    for (int64_t a = 1; a <= call.num_addends; a++) {
        const char* x =
            p == w.me ? reinterpret_cast<const char*>(args[2 * a]) : brought(w, p, a, field_bytes(w, call, p, a));
        if (!x) return false;
        parts[num++] = {x, call.addend_dtypes[a - 1]};
    }
    narrows::kernels().sum(out, parts, num, count);
    return true;
}

// The norm that follows a sum: of [rows, width], after `residual` (null: none) has been added to it.
struct Norm {
    const void *residual, *weight;
    void* out;
    int64_t num_rows, width;
    double eps;

    void take(void* sum, int64_t dtype) const {
        const int wide = dtype == sums::float32;
        if (residual)
            narrows::kernels().add_rms_norm(out, sum, sum, residual, weight, num_rows, width, float(eps), wide, 1);
        else
            narrows::kernels().rms_norm(out, width, 0, sum, width, 0, weight, num_rows, 1, width, float(eps), wide, 1);
    }
};

int reduce(Wire& w, const Reduce* call, const int64_t* args, const Norm* norm) {
    const int64_t num_fields = 1 + call->num_addends;
    const int64_t item = sums::size_of(call->dtype);
    if (w.stage == outside) {
        const int64_t start = call->starts[w.me], stop = call->starts[w.me + 1];
        Arrival arrival(w, call->signature);
        // Who sums its own piece alone keeps it where it is.
        const int64_t kept = call->whole ? 0 : (stop - start) * item;
        arrival.bring(0, args, field_bytes(w, *call, w.me, 0), start * item, kept);
        for (int64_t a = 1; call->whole && a < num_fields; a++)
            arrival.bring(a, args + 2 * a, field_bytes(w, *call, w.me, a), 0, 0);
        arrival.tell();
    }
    if (w.stage == arriving) {
        if (!wait(w, &Slot::arrived)) return not_yet;
        if (!agree(w)) return leave_at_once(w);
        char* out = reinterpret_cast<char*>(args[2 * num_fields]);
        for (int64_t step = 0; step < (call->whole ? w.size : 1); step++) {
            const int64_t p = (w.me + step) % w.size;
            if (!sum_piece(w, *call, args, p, out + (call->whole ? call->starts[p] * item : 0)))
                return leave_at_once(w);
        }
        if (norm) {
            raise(w, &Slot::read);  // the others need not wait for it
            w.stage = reading;
            norm->take(out, call->dtype);
        }
    }
    return leave(w, args[2 * num_fields + 1]);
}

}  // namespace

// The numbers that Python must know: sizes in bytes and limits, in the order of shm_calls.py.
NARROWS_EXPORT void narrows_shm_layout(int64_t* out) {
    const int64_t known[] = {sizeof(Wire), blocks_start, max_slots, max_fields, max_ranks, small_bytes};
    std::memcpy(out, known, sizeof known);
}

// Gathers fields. args: per field the addresses (data, stage or 0 or staged_small, out); then whether the caller may
// write to `data` as soon as this returns, so that all must have read it.
NARROWS_EXPORT int narrows_shm_gather(Wire* wire, const Gather* call, const int64_t* args) {
    Wire& w = *wire;
    capture(narrows_shm_gather, wire, call, sizeof(Gather) + call->num_fields * w.size * sizeof(Part), args,
            3 * call->num_fields + 1);
    if (w.stage == outside) {
        Arrival arrival(w, call->signature);
        for (int64_t f = 0; f < call->num_fields; f++)
            arrival.bring(f, args + 3 * f, call->part(w, f, w.me).bytes(), 0, 0);
        arrival.tell();
        for (int64_t f = 0; f < call->num_fields; f++)
            call->part(w, f, w.me).copy(reinterpret_cast<char*>(args[3 * f + 2]), reinterpret_cast<char*>(args[3 * f]));
    }
    if (w.stage == arriving) {
        if (!wait(w, &Slot::arrived)) return not_yet;
        if (!agree(w)) return leave_at_once(w);
        for (int64_t step = 1; step < w.size; step++) {
            const int64_t i = (w.me + step) % w.size;  // nobody is everybody's first
            for (int64_t f = 0; f < call->num_fields; f++) {
                const Part& part = call->part(w, f, i);
                const char* from = brought(w, i, f, part.bytes());
                if (!from) return leave_at_once(w);
                part.copy(reinterpret_cast<char*>(args[3 * f + 2]), from);
            }
        }
    }
    return leave(w, args[3 * call->num_fields]);
}

// Sums the members' x: this rank's piece, or all of it if `whole`, for which the addends travel too. args: for x and
// then for each addend the addresses (data, stage or 0 or staged_small); out; and whether all must have read `data`.
NARROWS_EXPORT int narrows_shm_reduce(Wire* wire, const Reduce* call, const int64_t* args) {
    capture(narrows_shm_reduce, wire, call, sizeof(Reduce) + (wire->size + 1) * sizeof(int64_t), args,
            2 * (1 + call->num_addends) + 2);
    return reduce(*wire, call, args, nullptr);
}

// As narrows_shm_reduce of a `whole` sum, and then its RMSNorm, after a residual was added: the Norm's six numbers come
// behind the other args. The bits are those of the sum and then of narrows_rms_norm or narrows_add_rms_norm.
NARROWS_EXPORT int narrows_shm_reduce_norm(Wire* wire, const Reduce* call, const int64_t* args) {
    const int64_t num_args = 2 * (1 + call->num_addends) + 2;
    capture(narrows_shm_reduce_norm, wire, call, sizeof(Reduce) + (wire->size + 1) * sizeof(int64_t), args,
            num_args + sizeof(Norm) / sizeof(int64_t));
    return reduce(*wire, call, args, reinterpret_cast<const Norm*>(args + num_args));
}
