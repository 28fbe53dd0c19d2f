// Capture and replay of calls as such; that each function is repeated rightly, its own test says.
#include <algorithm>
#include <thread>

#include "check.h"

using namespace testing;

namespace {

// Calls as a kernel's are made: one is repeated, one may be made again, and one says that it is not repeated.
void append(std::vector<int>* to, int number) {
    if (narrows::Capture* capture = narrows::capturing())
        capture->calls.emplace_back([=] {
            append(to, number);
            return 0;
        });
    to->push_back(number);
}

int stumble(std::vector<int>* to, int* left) {
    if (narrows::Capture* capture = narrows::capturing())
        capture->calls.emplace_back([=] { return stumble(to, left); });
    if ((*left)-- > 0) return 1;
    to->push_back(-1);
    return 0;
}

void never_repeated() {
    if (narrows::Capture* capture = narrows::capturing()) capture->whole = false;
}

}  // namespace

TEST(calls_are_repeated_in_order_from_where_they_stopped) {
    std::vector<int> seen;
    int left = 0;
    Capture capture([&] { append(&seen, 1), stumble(&seen, &left), append(&seen, 2); });
    CHECK(capture.size() == 3 && seen == std::vector<int>({1, -1, 2}));
    append(&seen, 9);  // after its end nothing is recorded
    for (int round = 0; round < 3; ++round) {
        seen.clear(), left = 2;
        capture.rewind();
        CHECK(capture.run() == 1 && *capture.position() == 1 && seen == std::vector<int>({1}));
        CHECK(capture.run() == 1 && capture.run() == 0 && seen == std::vector<int>({1, -1, 2}));
        CHECK(*capture.position() == 3 && std::is_sorted(capture.times().begin(), capture.times().end()));
    }
}

TEST(a_capture_keeps_the_first_calls_only) {
    std::vector<int> seen;
    narrows::Capture* capture = narrows_capture_begin();
    append(&seen, 1), append(&seen, 2);
    narrows_capture_end(capture, 1);
    int64_t at = 0, times[2];
    CHECK(narrows_capture_size(capture) == 1 && narrows_capture_run(capture, &at, times) == 0 && seen.back() == 1 &&
          at == 1);
    narrows_capture_free(capture);
    check_not_replayed(never_repeated);
    CHECK(Capture([] {}).run() == 0);
}

TEST(each_thread_records_its_own_calls_and_any_may_look_how_far_a_run_is) {
    std::vector<int> mine, others;
    Capture capture([&] {
        std::thread([&] { append(&others, 1); }).join();
        for (int i = 0; i < 100; ++i) append(&mine, i);
    });
    CHECK(capture.size() == 100 && others.size() == 1);
    for (int round = 0; round < 20; ++round) {
        capture.rewind();
        std::thread looks([&] {
            for (int64_t last = 0, at; last < 100; last = at) {
                at = __atomic_load_n(capture.position(), __ATOMIC_ACQUIRE);
                CHECK(at >= last, at, last);
            }
        });
        CHECK(capture.run() == 0);
        looks.join();
    }
    CHECK(mine.size() == 2100);
}
