// Collectives through shared memory, among threads and among processes: all kinds, uneven counts, in many rounds. Every
// rank knows what the others bring, so each checks all that it gets.
#include "runtime/collectives.cpp"

#include <sched.h>
#include <sys/prctl.h>

#include <algorithm>
#include <csignal>
#include <functional>
#include <thread>

#include "check.h"

using namespace testing;

namespace {

constexpr int64_t block_bytes = 1 << 18;
constexpr int64_t segment_bytes = blocks_start + 4 * block_bytes;

// The segments of a group that has memory of its own, and what processes tell each other beside it.
class Host {
 public:
    explicit Host(int64_t size) : size_(size) {
        bytes_ = size * segment_bytes + 4096;
        memory_ = static_cast<char*>(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
        if (memory_ == MAP_FAILED) std::abort();
        for (int64_t i = 0; i < size; ++i) segments_.push_back(memory_ + i * segment_bytes);
    }
    ~Host() { munmap(memory_, bytes_); }
    Host(const Host&) = delete;
    Host& operator=(const Host&) = delete;

    int64_t size() const { return size_; }
    char** segments() { return segments_.data(); }
    // A word for each rank, zero at first, which no collective knows.
    std::atomic<int64_t>& word(int64_t i) {
        return reinterpret_cast<std::atomic<int64_t>*>(memory_ + size_ * segment_bytes)[i];
    }

 private:
    int64_t size_, bytes_;
    char* memory_;
    std::vector<char*> segments_;
};

using Body = std::function<void(Host&, int64_t)>;

void on_threads(int64_t size, const Body& body) {
    Host host(size);
    std::vector<std::thread> threads;
    for (int64_t me = 0; me < size; ++me) threads.emplace_back([&, me] { body(host, me); });
    for (std::thread& thread : threads) thread.join();
}

// What ThreadSanitizer sees ends with the process: races among processes are those among threads.
#ifndef __SANITIZE_THREAD__
void on_processes(int64_t size, const Body& body, const std::function<void(Host&, int64_t)>& ended = {}) {
    Host host(size);
    std::vector<pid_t> ranks;
    for (int64_t me = 0; me < size; ++me) {
        ranks.push_back(fork());
        if (ranks.back() == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);  // else the ranks of a failed test would wait for each other for ever
            body(host, me);
            _exit(0);
        }
    }
    for (int64_t left = size; left; --left) {
        int status;
        const pid_t one = waitpid(-1, &status, 0);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, status);
        for (int64_t i = 0; ended && i < size; ++i)
            if (ranks[i] == one) ended(host, i);
    }
}
#endif

// One rank's end, and memory for what it brings.
struct Rank {
    Host& host;
    int64_t me;
    Wire wire;
    bool has_blocks = true;  // else all that it brings is staged in small memory

    Rank(Host& among, int64_t rank, int64_t slot = 1)
        : host(among), me(rank), wire{among.size(), rank, slot, segment_bytes, among.segments(), 0, outside} {}

    // How it brings its next input (see Input): some exchanges in one way, so that memory is used again at once.
    int64_t way() const { return has_blocks ? (int64_t(wire.number) / 5 + me) % 3 : 0; }
    char* block(int64_t i) const { return wire.segments[me] + blocks_start + i * block_bytes; }

    template <typename Call>
    int meet(int (*function)(Wire*, const Call*, const int64_t*), const std::vector<int64_t>& call,
             const std::vector<int64_t>& args) {
        int outcome;
        while ((outcome = function(&wire, reinterpret_cast<const Call*>(call.data()), args.data())) == not_yet) {
        }
        return outcome;
    }
};

int64_t address(const void* memory) { return reinterpret_cast<int64_t>(memory); }

int64_t signature(std::vector<int64_t> of) {
    uint64_t hash = 17;
    for (const int64_t x : of) hash = hash * 0x100000001b3u + uint64_t(x);
    return int64_t(hash);
}

// Small whole numbers: their sums are exact in every dtype.
float brought_by(int64_t rank, int64_t round, int64_t i) { return float((rank * 5 + round * 3 + i * 7) % 13 - 6); }

void put(char* to, int64_t dtype, float x) {
    if (dtype == sums::float32) std::memcpy(to, &x, 4);
    const bf16 two = to_bf16(x);
    if (dtype == sums::bfloat16) std::memcpy(to, &two, 2);
}

float get(const char* from, int64_t dtype) {
    if (dtype == sums::float32) {
        float x;
        std::memcpy(&x, from, 4);
        return x;
    }
    bf16 two;
    std::memcpy(&two, from, 2);
    return to_float(two);
}

// Where a rank's numbers lie when it comes, of three ways: elsewhere, and copied to the staging memory or to a block of
// its own; or in a block that the others read in place, so that all must have read it before this rank goes on.
struct Input {
    std::vector<char> own;
    char* data;
    int64_t stage;
    bool lingers;

    Input(const Rank& rank, int64_t bytes, int64_t way)
        : own(way == 2 ? 0 : bytes), data(own.data()), stage(0), lingers(false) {
        if (way == 0) stage = staged_small;
        if (way == 1) stage = address(rank.block(int64_t(rank.wire.number % 2)));
        if (way == 2) data = rank.block(2), lingers = true;
    }
};

// Rows of two fields of uneven counts from everyone.
void gather_rows(Rank& rank, int64_t round, const std::vector<int64_t>& counts) {
    const int64_t size = rank.host.size(), me = rank.me, row_bytes[] = {4 * (round % 40 + 1), 2};
    std::vector<int64_t> call{signature({0, round}), 2}, args;
    int64_t total = 0;
    for (const int64_t count : counts) total += count;
    std::vector<std::vector<char>> out;
    std::vector<Input> inputs;
    for (int64_t field = 0; field < 2; ++field) {
        const int64_t row = row_bytes[field];
        for (int64_t i = 0, start = 0; i < size; start += counts[i++] * row)
            for (const int64_t x : {start, row * counts[i], int64_t(1), row * counts[i]}) call.push_back(x);
        inputs.emplace_back(rank, row * counts[me], field ? 0 : rank.way());
        for (int64_t b = 0; b < row * counts[me]; ++b) inputs.back().data[b] = char(me * 31 + round + field + b);
        out.emplace_back(row * total + 1, char(99));
    }
    for (int64_t field = 0; field < 2; ++field)
        for (const int64_t x : {address(inputs[field].data), inputs[field].stage, address(out[field].data())})
            args.push_back(x);
    args.push_back(inputs[0].lingers);
    CHECK(rank.meet(narrows_shm_gather, call, args) == done, me, round);
    for (int64_t field = 0; field < 2; ++field) {
        std::fill(inputs[field].data, inputs[field].data + row_bytes[field] * counts[me], char(0x77));
        const char* at = out[field].data();
        for (int64_t i = 0; i < size; ++i)
            for (int64_t b = 0; b < row_bytes[field] * counts[i]; ++b)
                CHECK(*at++ == char(i * 31 + round + field + b), me, round, field, i, b);
        CHECK(*at == 99, me, round);
    }
}

// Columns of uneven widths, some of none, in as many rows from each.
void gather_columns(Rank& rank, int64_t round, const std::vector<int64_t>& widths) {
    const int64_t size = rank.host.size(), me = rank.me, num_rows = round % 4;
    int64_t pitch = 0;
    for (const int64_t width : widths) pitch += width;
    std::vector<int64_t> call{signature({1, round}), 1};
    for (int64_t i = 0, start = 0; i < size; start += widths[i++])
        for (const int64_t x : {start, widths[i], num_rows, pitch}) call.push_back(x);
    Input input(rank, num_rows * widths[me], rank.way());
    for (int64_t b = 0; b < num_rows * widths[me]; ++b) input.data[b] = char(me * 31 + round + b);
    std::vector<char> out(num_rows * pitch);
    const std::vector<int64_t> args{address(input.data), input.stage, address(out.data()), input.lingers};
    CHECK(rank.meet(narrows_shm_gather, call, args) == done, me, round);
    for (int64_t r = 0; r < num_rows; ++r) {
        const char* at = out.data() + r * pitch;
        for (int64_t i = 0; i < size; ++i)
            for (int64_t b = 0; b < widths[i]; ++b)
                CHECK(*at++ == char(i * 31 + round + r * widths[i] + b), me, round, i, b);
    }
}

// Sums of one's own rows, or of all, with addends of other dtypes; and, of all, their norm.
void reduce_rows(Rank& rank, int64_t round, const std::vector<int64_t>& counts, bool whole, bool with_norm) {
    const int64_t size = rank.host.size(), me = rank.me, width = round % 37 + 1, num_addends = round % 3;
    const int64_t dtype = round % 2, addend_dtype = (round + 1) % 2, item = sums::size_of(dtype);
    std::vector<int64_t> call{signature({2, round}), dtype, whole, num_addends}, starts{0};
    for (int64_t a = 0; a < max_fields; ++a) call.push_back(a < num_addends ? addend_dtype : 0);
    for (const int64_t count : counts) starts.push_back(starts.back() + count * width);
    call.insert(call.end(), starts.begin(), starts.end());
    const int64_t total = starts.back(), own = starts[me + 1] - starts[me];
    Input input(rank, total * item, rank.way());
    for (int64_t i = 0; i < total; ++i) put(input.data + i * item, dtype, brought_by(me, round, i));
    std::vector<std::vector<char>> addends;
    std::vector<int64_t> args{address(input.data), input.stage};
    for (int64_t a = 0; a < num_addends; ++a) {
        addends.emplace_back(own * sums::size_of(addend_dtype));
        for (int64_t i = 0; i < own; ++i)
            put(addends[a].data() + i * sums::size_of(addend_dtype), addend_dtype, brought_by(me + a + 1, round, i));
        args.push_back(address(addends[a].data()));
        args.push_back(staged_small);
    }
    const int64_t made = whole ? total : own;
    std::vector<char> out(made * item);
    args.push_back(address(out.data()));
    args.push_back(input.lingers);
    std::vector<char> residual(total * item), weight(width * item), normed(total * item);
    if (with_norm) {
        for (int64_t i = 0; i < total; ++i) put(residual.data() + i * item, dtype, brought_by(9, round, i));
        for (int64_t i = 0; i < width; ++i) put(weight.data() + i * item, dtype, 1.0f);
        const double eps = 1e-6;
        int64_t bits;
        std::memcpy(&bits, &eps, 8);
        for (const int64_t x : {round % 4 ? address(residual.data()) : 0, address(weight.data()),
                                address(normed.data()), total / width, width, bits})
            args.push_back(x);
        CHECK(rank.meet(narrows_shm_reduce_norm, call, args) == done, me, round);
    } else {
        CHECK(rank.meet(narrows_shm_reduce, call, args) == done, me, round);
    }
    std::fill(input.data, input.data + total * item, char(0x77));
    for (int64_t i = 0; i < made; ++i) {
        const int64_t at = whole ? i : starts[me] + i;
        int64_t owner = 0;
        while (starts[owner + 1] <= at) ++owner;
        float want = 0;
        for (int64_t r = 0; r < size; ++r) want += brought_by(r, round, at);
        for (int64_t a = 0; a < num_addends; ++a) want += brought_by(owner + a + 1, round, at - starts[owner]);
        if (with_norm && round % 4) want += brought_by(9, round, at);
        CHECK(get(out.data() + i * item, dtype) == want, me, round, i, want);
    }
    for (int64_t t = 0; with_norm && t < total / width; ++t) {
        double squares = 0;
        for (int64_t i = t * width; i < (t + 1) * width; ++i) squares += std::pow(get(out.data() + i * item, dtype), 2);
        for (int64_t i = t * width; i < (t + 1) * width; ++i) {
            const double want = get(out.data() + i * item, dtype) / std::sqrt(squares / double(width) + 1e-6);
            CHECK(near(get(normed.data() + i * item, dtype), want, dtype == sums::float32 ? 1e-5 : 0.02), me, round, i);
        }
    }
}

// All kinds of collectives in turns; now and then a rank is late.
void rounds(Host& host, int64_t me, int64_t count) {
    Rank rank(host, me);
    for (int64_t round = 0; round < count; ++round) {
        Random random{uint64_t(round)};  // the same on every rank
        std::vector<int64_t> counts;
        for (int64_t i = 0; i < host.size(); ++i) counts.push_back(std::max<int64_t>(0, random.below(9) - 2));
        if ((round * 7 + me * 3) % 11 == 0) sched_yield();
        switch (round % 5) {
            case 0:
                gather_rows(rank, round, counts);
                break;
            case 1:
                gather_columns(rank, round, counts);
                break;
            case 2:
                reduce_rows(rank, round, counts, false, false);
                break;
            case 3:
                reduce_rows(rank, round, counts, true, false);
                break;
            default:
                reduce_rows(rank, round, counts, true, true);
                break;
        }
    }
    CHECK(rank.wire.number == uint64_t(count) && rank.wire.stage == outside);
}

// A barrier: a gather of nothing.
struct Barrier {
    std::vector<int64_t> call, args{0, staged_small, 0, 0};

    explicit Barrier(int64_t size, int64_t kind = 77) : call{kind, 1} { call.resize(2 + 4 * size); }
    int operator()(Wire& wire) const {
        return narrows_shm_gather(&wire, reinterpret_cast<const Gather*>(call.data()), args.data());
    }
    int until_all(Wire& wire) const {
        int outcome;
        while ((outcome = (*this)(wire)) == not_yet) {
        }
        return outcome;
    }
};

void others_return_when_a_rank_is_late(Host& host, int64_t me) {
    Rank rank(host, me);
    const Barrier barrier(host.size());
    if (me == 0) {  // comes when everybody has waited in vain
        for (int64_t i = 1; i < host.size(); ++i)
            while (!host.word(i).load()) sched_yield();
        CHECK(barrier.until_all(rank.wire) == done);
        return;
    }
    CHECK(barrier(rank.wire) == not_yet && rank.wire.stage == arriving);
    host.word(me).store(1);
    CHECK(barrier.until_all(rank.wire) == done && rank.wire.number == 1);
}

void who_differs_is_told_and_the_next_exchange_is_everybodys(Host& host, int64_t me) {
    Rank rank(host, me);
    for (int64_t round = 0; round < 20; ++round) {
        CHECK(Barrier(host.size(), me == round % host.size() ? 1 : 2).until_all(rank.wire) == differs);
        CHECK(Barrier(host.size()).until_all(rank.wire) == done);
    }
}

// Rank 0 says that its field lies before its segment, or behind it, or is larger: nobody reads there.
void a_place_that_cannot_be_is_not_read(Host& host, int64_t me) {
    Rank rank(host, me);
    std::vector<char> out(1 << 17);
    for (const int64_t offset : {int64_t(-64), segment_bytes, segment_bytes - 100}) {
        const int64_t bytes = me == 0 ? 4096 : 64;
        std::vector<int64_t> call{5, 1};
        for (int64_t i = 0, start = 0; i < host.size(); start += i++ ? 64 : 4096)
            for (const int64_t x :
                 {start, i ? int64_t(64) : int64_t(4096), int64_t(1), i ? int64_t(64) : int64_t(4096)})
                call.push_back(x);
        Arrival arrival(rank.wire, uint64_t(call[0]));
        std::vector<char> own(bytes, char(me));
        const int64_t brings[] = {address(own.data()), staged_small};
        arrival.bring(0, brings, bytes, 0, 0);
        if (me == 0) post(rank.wire, 0).offsets[0] = offset;
        arrival.tell();
        const int outcome = rank.meet(narrows_shm_gather, call, {brings[0], brings[1], address(out.data()), 0});
        CHECK(outcome == (me == 0 ? done : differs), me, offset);
        CHECK(Barrier(host.size()).until_all(rank.wire) == done);
    }
}

// Two groups of the same ranks at once: each has its place in the segments.
void two_groups(Host& host, int64_t me) {
    Rank one(host, me, 0), other(host, me, max_slots - 1);
    other.has_blocks = false;
    const std::vector<int64_t> counts(size_t(host.size()), 3);
    for (int64_t round = 0; round < 60; ++round) {
        gather_rows(one, round, counts);
        if (round % 2) gather_columns(other, round, counts);
    }
}

}  // namespace

constexpr int64_t num_rounds = 300;

TEST(what_python_must_know_of_the_layout) {
    int64_t known[6];
    narrows_shm_layout(known);
    CHECK(known[0] == sizeof(Wire) && known[1] == blocks_start && blocks_start % page == 0 && known[5] == small_bytes);
}

TEST(every_collective_among_threads) {
    for (const int64_t size : {1, 2, 3, 5})
        on_threads(size, [](Host& host, int64_t me) { rounds(host, me, num_rounds); });
}

TEST(two_groups_among_threads) { on_threads(3, two_groups); }
TEST(late_ranks_among_threads) { on_threads(3, others_return_when_a_rank_is_late); }
TEST(different_calls_among_threads) { on_threads(3, who_differs_is_told_and_the_next_exchange_is_everybodys); }
TEST(places_outside_among_threads) { on_threads(3, a_place_that_cannot_be_is_not_read); }

// Exchanges captured once and replayed, with other numbers each time; a rank that has waited in vain goes on from
// where it was.
TEST(exchanges_replayed_from_a_capture) {
    on_threads(3, [](Host& host, int64_t me) {
        Rank rank(host, me);
        const int64_t size = host.size(), width = 21, total = size * width;
        std::vector<int64_t> gather{11, 1}, reduce{12, sums::float32, 1, 0};
        for (int64_t i = 0; i < size; ++i)
            for (const int64_t x : {i * width * 4, width * 4, int64_t(1), width * 4}) gather.push_back(x);
        reduce.resize(4 + max_fields);
        for (int64_t i = 0; i <= size; ++i) reduce.push_back(i * width);
        std::vector<float> own(width), all(total), sum(total);
        std::vector<int64_t> gather_args{address(own.data()), staged_small, address(all.data()), 0};
        std::vector<int64_t> reduce_args{address(all.data()), staged_small, address(sum.data()), 0};
        Capture capture([&] {
            rank.meet(narrows_shm_gather, gather, gather_args);
            rank.meet(narrows_shm_reduce, reduce, reduce_args);
        });
        CHECK(capture.size() == 2);
        // A capture keeps its own copies.
        for (auto* of : {&gather, &reduce, &gather_args, &reduce_args}) std::fill(of->begin(), of->end(), -1);
        for (int64_t round = 0; round < 100; ++round) {
            for (int64_t i = 0; i < width; ++i) own[i] = brought_by(me, round, i);
            if (round == 50 && me == 0)  // late: the others' runs return before the end
                while (!host.word(1).load() || !host.word(2).load()) sched_yield();
            capture.rewind();
            while (capture.run() == not_yet) host.word(me).store(round == 50);
            for (int64_t i = 0; i < total; ++i)
                CHECK(sum[i] == float(size) * brought_by(i / width, round, i % width), me, round, i);
        }
    });
}

#ifndef __SANITIZE_THREAD__
TEST(every_collective_among_processes) {
    for (const int64_t size : {2, 4}) on_processes(size, [](Host& host, int64_t me) { rounds(host, me, num_rounds); });
}

TEST(late_ranks_among_processes) { on_processes(3, others_return_when_a_rank_is_late); }
TEST(different_calls_among_processes) { on_processes(3, who_differs_is_told_and_the_next_exchange_is_everybodys); }

// One rank ends after some rounds. The others are not held: each call returns, and they can look who is there.
TEST(a_process_that_ends_early) {
    on_processes(
        3,
        [](Host& host, int64_t me) {
            Rank rank(host, me);
            const Barrier barrier(host.size());
            for (int64_t round = 0; round < 25; ++round) CHECK(barrier.until_all(rank.wire) == done);
            if (me == 1) _exit(0);
            while (!host.word(1).load()) CHECK(barrier(rank.wire) == not_yet, me);
            CHECK(barrier(rank.wire) == not_yet && rank.wire.stage == arriving, me);
        },
        [](Host& host, int64_t who) { host.word(who).store(1); });
}
#endif
