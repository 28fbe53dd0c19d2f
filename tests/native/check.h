// What the tests of the compiled code share: checks, memory whose ends are guarded, numbers, and recorded calls.
#pragma once

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "numbers.h"
#include "runtime/dispatch.h"

namespace testing {

namespace call = narrows::call;
using narrows::BF16_WEIGHT, narrows::INT8, narrows::INT8_WEIGHT, narrows::Q4_0, narrows::Q4_K, narrows::Q5_K,
    narrows::Q6_K, narrows::Q8_0;

struct Test {
    const char* name;
    void (*body)();
    bool at_every_edge;
};

std::vector<Test>& tests();

struct Registered {
    Registered(const char* name, void (*body)(), bool at_every_edge) { tests().push_back({name, body, at_every_edge}); }
};

[[noreturn]] void fail(const char* file, int line, const char* condition, const std::string& about);

// Where a Buffer lies: on the heap, whose ends AddressSanitizer watches wherever code is instrumented; or right before,
// or right after, a page that nobody may touch, which catches masked loads and stores too:
// those are never instrumented.
enum class Edge { heap, end, start };
extern Edge edge;

// `count` numbers, zeros at first. Without any it has no address, as a tensor of torch has none.
template <typename T>
class Buffer {
 public:
    explicit Buffer(int64_t count) : count_(count) {
        if (count == 0) return;
        const int64_t bytes = count * int64_t(sizeof(T));
        if (edge == Edge::heap) {
            memory_ = std::calloc(1, bytes);
            data_ = static_cast<T*>(memory_);
            return;
        }
        const int64_t page = sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
        mapped_ = inside + page;
        memory_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        char* const start = static_cast<char*>(memory_);
        const bool at_end = edge == Edge::end;
        if (memory_ == MAP_FAILED || mprotect(at_end ? start + inside : start, page, PROT_NONE)) std::abort();
        data_ = reinterpret_cast<T*>(at_end ? start + inside - bytes : start + page);
    }
    ~Buffer() {
        if (mapped_)
            munmap(memory_, mapped_);
        else
            std::free(memory_);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    T* data() { return data_; }
    int64_t size() const { return count_; }
    T& operator[](int64_t i) { return data_[i]; }
    T* begin() { return data_; }
    T* end() { return data_ + count_; }

    std::string bytes() const { return {reinterpret_cast<const char*>(data_), size_t(count_) * sizeof(T)}; }
    void clear() { std::fill(begin(), end(), T(0)); }

 private:
    int64_t count_, mapped_ = 0;
    void* memory_ = nullptr;
    T* data_ = nullptr;
};

// The same numbers in every run.
class Random {
 public:
    explicit Random(uint64_t seed = 1) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
    uint64_t next() {
        state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
        return state_;
    }
    int64_t below(int64_t count) { return int64_t(next() % uint64_t(count)); }
    // A whole number of at most `most` either way: sums of a few thousand such products are exact in float32.
    float whole(int64_t most) { return float(below(2 * most + 1) - most); }
    float uniform() { return float(below(1 << 20)) / float(1 << 19) - 1.0f; }

 private:
    uint64_t state_;
};

template <typename T>
T stored(float x) {
    return rounded_to<T>(x);
}

template <typename T>
void fill_whole(Buffer<T>& to, Random& random, int64_t most = 3) {
    for (T& x : to) x = stored<T>(random.whole(most));
}

template <typename T>
void fill_uniform(Buffer<T>& to, Random& random, float scale = 1.0f) {
    for (T& x : to) x = stored<T>(random.uniform() * scale);
}

inline bool near(double got, double want, double tolerance) {
    return std::abs(got - want) <= tolerance * (1.0 + std::abs(want));  // false for a NaN
}

inline double silu(double x) { return x / (1.0 + std::exp(-x)); }

// Elements from the first row's first number to the last row's last one.
inline int64_t span(int64_t num_rows, int64_t stride, int64_t width) {
    return num_rows == 0 ? 0 : (num_rows - 1) * stride + width;
}

template <typename... Parts>
std::string about(Parts... parts) {
    std::string text;
    ((text += std::to_string(parts) + " "), ...);
    return text;
}

// Whether `work`, in a process of its own, is ended by abort() after it has printed `sentence`.
template <typename Work>
bool aborts_saying(const char* sentence, Work work) {
    int ends[2];
    if (pipe(ends)) std::abort();
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        work();
        _exit(0);
    }
    close(ends[1]);
    std::string said;
    char part[256];
    for (ssize_t got; (got = read(ends[0], part, sizeof part)) > 0;) said.append(part, size_t(got));
    close(ends[0]);
    int status;
    waitpid(child, &status, 0);
    const bool aborted = WIFSIGNALED(status) ? WTERMSIG(status) == SIGABRT : WEXITSTATUS(status) != 0;
    return aborted && said.find(sentence) != std::string::npos;
}

}  // namespace testing

// A test is its body; TEST_AT_EDGES: once for each place where its buffers may lie.
#define TEST(NAME)                                                     \
    static void NAME();                                                \
    static const testing::Registered NAME##_there(#NAME, NAME, false); \
    static void NAME()
#define TEST_AT_EDGES(NAME)                                           \
    static void NAME();                                               \
    static const testing::Registered NAME##_there(#NAME, NAME, true); \
    static void NAME()

// CHECK(condition, numbers...): the numbers are printed if it does not hold.
#define CHECK(CONDITION, ...) \
    if (!(CONDITION)) testing::fail(__FILE__, __LINE__, #CONDITION, testing::about(__VA_ARGS__))

extern "C" {
narrows::Capture* narrows_capture_begin();
void narrows_capture_end(narrows::Capture*, int64_t);
int64_t narrows_capture_size(const narrows::Capture*);
void narrows_capture_free(narrows::Capture*);
int narrows_capture_run(const narrows::Capture*, int64_t*, int64_t*);
const char* narrows_targets();
const char* narrows_running();
int narrows_use(const char*);
}

namespace testing {

// The calls that `work` makes, captured while it makes them.
class Capture {
 public:
    template <typename Work>
    explicit Capture(Work work) : capture_(narrows_capture_begin()) {
        work();
        size_ = narrows_capture_size(capture_);
        narrows_capture_end(capture_, size_ < 0 ? 0 : size_);
        times_.resize(size_ < 0 ? 1 : size_ + 1);
    }
    ~Capture() { narrows_capture_free(capture_); }
    Capture(const Capture&) = delete;
    Capture& operator=(const Capture&) = delete;

    int64_t size() const { return size_; }
    void rewind() { __atomic_store_n(&at_, 0, __ATOMIC_RELEASE); }
    int run() { return narrows_capture_run(capture_, &at_, times_.data()); }
    int64_t* position() { return &at_; }
    const std::vector<int64_t>& times() const { return times_; }

 private:
    narrows::Capture* capture_;
    int64_t size_ = 0, at_ = 0;
    std::vector<int64_t> times_;
};

// Makes the call `work` once more, captured, and replays it: `out` must get the same bits each time.
// `prepare` brings back what the call overwrites.
template <typename Out, typename Prepare, typename Work>
void check_replay(Buffer<Out>& out, Prepare prepare, Work work) {
    const std::string want = out.bytes();
    prepare();
    Capture capture(work);
    CHECK(capture.size() == 1 && out.bytes() == want);
    prepare();
    CHECK(capture.run() == 0 && out.bytes() == want);
}

template <typename Out, typename Work>
void check_replay(Buffer<Out>& out, Work work) {
    check_replay(out, [&] { out.clear(); }, work);
}

// Of a call that no capture repeats: it knows that it has missed one.
template <typename Work>
void check_not_replayed(Work work) {
    CHECK(Capture(work).size() == -1);
}

}  // namespace testing
