#include "common/parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace dirmerge {

namespace {
// About 100 µs of memory-bound work: below that, starting a thread costs more than it brings.
constexpr std::int64_t grain = 1 << 18;
}  // namespace

void parallel_for(std::int64_t count, int threads, Task task) {
    std::atomic<std::int64_t> next{0};
    const auto work = [&] {
        for (std::int64_t i = next++; i < count; i = next++) task(i);
    };
    std::vector<std::thread> helpers;
    const std::int64_t wanted = std::min<std::int64_t>(threads, count) - 1;
    try {
        helpers.reserve(static_cast<std::size_t>(std::max<std::int64_t>(wanted, 0)));
        for (std::int64_t i = 0; i < wanted; ++i) helpers.emplace_back(work);
    } catch (const std::system_error&) {
        // No more threads to be had: those that run, this one among them, do all the work.
    }
    work();
    for (std::thread& helper : helpers) helper.join();
}

int threads_for(std::int64_t work, int threads) {
    return static_cast<int>(std::clamp<std::int64_t>(work / grain, 1, std::max(threads, 1)));
}

Scratch::Scratch(std::size_t bytes) : data_(std::malloc(std::max<std::size_t>(bytes, 1))) {
    if (data_ == nullptr) throw std::bad_alloc();
}

Scratch::~Scratch() { std::free(data_); }

}  // namespace dirmerge
