// OpenMP for ThreadSanitizer: libgomp meets in ways that it cannot see, and would be full of races that are none. The
// parts of libgomp that the compiled code uses, on threads and locks that are seen; a team lives for one region.
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Loop {
    long next, end, step;
};

struct Team {
    int size;
    std::mutex lock;
    std::condition_variable changed;
    int arrived = 0, running = 0;
    long barriers = 0;
    std::map<long, Loop> loops;  // by their number in the region
    std::map<long, bool> singles;
    std::deque<std::function<void()>> tasks;
};

struct Member {
    Team* team = nullptr;
    int number = 0;
    long loops = 0, singles = 0;
};

thread_local Member member;

}  // namespace

extern "C" {

int omp_get_thread_num() { return member.number; }
int omp_get_num_threads() { return member.team ? member.team->size : 1; }

// Who waits does what there is to do; all go on when all have come and nothing is left.
void GOMP_barrier() {
    if (!member.team) return;
    Team& team = *member.team;
    std::unique_lock hold(team.lock);
    const long before = team.barriers;
    ++team.arrived;
    while (team.barriers == before) {
        if (!team.tasks.empty()) {
            const auto task = std::move(team.tasks.front());
            team.tasks.pop_front();
            ++team.running;
            hold.unlock();
            task();
            hold.lock();
            --team.running;
            team.changed.notify_all();
        } else if (team.arrived == team.size && !team.running) {
            team.arrived = 0;
            ++team.barriers;
            team.changed.notify_all();
        } else {
            team.changed.wait(hold);
        }
    }
}

void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned) {
    Team team;
    team.size = int(num_threads);
    const auto join = [&](int number) {
        const Member outside = member;
        member = {&team, number, 0, 0};
        body(data);
        GOMP_barrier();
        member = outside;
    };
    std::vector<std::thread> others;
    for (int i = 1; i < team.size; ++i) others.emplace_back(join, i);
    join(0);
    for (std::thread& other : others) other.join();
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) {
    Team& team = *member.team;
    const std::lock_guard hold(team.lock);
    Loop& loop = team.loops.at(member.loops);
    if (loop.next >= loop.end) return false;
    *first = loop.next;
    *last = loop.next = std::min(loop.end, loop.next + loop.step);
    return true;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* first, long* last) {
    {
        const std::lock_guard hold(member.team->lock);
        member.team->loops.try_emplace(++member.loops, Loop{start, end, step * chunk});
    }
    return GOMP_loop_nonmonotonic_dynamic_next(first, last);
}

void GOMP_loop_end() { GOMP_barrier(); }

bool GOMP_single_start() {
    if (!member.team) return true;
    const std::lock_guard hold(member.team->lock);
    return member.team->singles.try_emplace(++member.singles, true).second;
}

void GOMP_task(void (*body)(void*), void* data, void (*copy)(void*, void*), long size, long align, bool, unsigned,
               void**, int, void*) {
    const size_t room = size_t((size + align - 1) / align * align);
    std::shared_ptr<void> held(std::aligned_alloc(size_t(align), room), std::free);
    copy ? copy(held.get(), data) : void(std::memcpy(held.get(), data, size_t(size)));
    const std::lock_guard hold(member.team->lock);
    member.team->tasks.push_back([=] { body(held.get()); });
    member.team->changed.notify_one();
}
}
