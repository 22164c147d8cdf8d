// kth_largest_magnitude: exact selection by the bits of the magnitudes, see select.h.
#include "cpu/select.h"

namespace dirmerge::DIRMERGE_ISA {

namespace {

template <typename U>
void select_rows(const U* x, std::int64_t tasks, std::int64_t count, std::int64_t task_stride, std::int64_t k,
                 U* result, int threads) {
    // Threads share one row if it is long, and take a row each if rows are short.
    const bool long_rows = threads_for(count, threads) == threads;
    parallel_for(tasks, long_rows ? 1 : threads_for(tasks * count, threads), [&](std::int64_t t) {
        result[t] = select(InMemory<U>{x + t * task_stride}, count, k, long_rows ? threads : 1);
    });
}

}  // namespace

void kth_largest_magnitude(Elements x, std::int64_t tasks, std::int64_t count, std::int64_t task_stride,
                           std::int64_t k, void* result, int threads) {
    if (x.dtype == DType::float64)
        select_rows(static_cast<const std::uint64_t*>(x.data), tasks, count, task_stride, k,
                    static_cast<std::uint64_t*>(result), threads);
    else
        select_rows(static_cast<const std::uint32_t*>(x.data), tasks, count, task_stride, k,
                    static_cast<std::uint32_t*>(result), threads);
}

}  // namespace dirmerge::DIRMERGE_ISA
