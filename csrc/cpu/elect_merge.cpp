// elect_merge: sign election with a disjoint mean, thresholds and block mask in one pass over the tasks.
#include "common/parallel.h"
#include "cpu/elect.h"

namespace dirmerge::DIRMERGE_ISA {

namespace {

template <typename T, typename V>
void elect_segment(const T* x, std::int64_t tasks, std::int64_t task_stride, const V* thresholds,
                   const V* weights, std::int64_t count, T* result) {
    Election<V> sums;
    clear(sums, count);
    for (std::int64_t t = 0; t < tasks; ++t)
        add_to_election(x + t * task_stride, weights == nullptr ? V{1} : weights[t],
                        thresholds == nullptr ? V{0} : thresholds[t], count, sums);
    for (std::int64_t i = 0; i < count; ++i) {
        const V merged = elected(sums, i);
        narrow(merged, result[i]);
    }
}

template <typename T>
void elect(const Matrix& x, std::int64_t tasks, std::int64_t task_stride, const void* thresholds,
           const void* weights, const std::int64_t* blocks, std::int64_t block_count, T* result,
           int threads) {
    using V = Compute<T>;
    const T* const data = static_cast<const T*>(x.data);
    const auto segments = [&](std::int64_t row, std::int64_t start, std::int64_t stop) {
        for (std::int64_t i = start; i < stop; i += election_width)
            elect_segment(data + row * x.row_stride + i, tasks, task_stride,
                          static_cast<const V*>(thresholds), static_cast<const V*>(weights),
                          stop - i < election_width ? stop - i : election_width, result + row * x.cols + i);
    };
    if (blocks == nullptr) {
        constexpr std::int64_t span = 16 * election_width;
        const std::int64_t spans = (x.cols + span - 1) / span;
        parallel_for(x.rows * spans, threads_for(tasks * x.rows * x.cols, threads), [&](std::int64_t i) {
            const std::int64_t start = i % spans * span;
            segments(i / spans, start, x.cols - start < span ? x.cols : start + span);
        });
        return;
    }
    const Scratch starts_memory(static_cast<std::size_t>(block_count + 1) * sizeof(std::int64_t));
    std::int64_t* const starts = static_cast<std::int64_t*>(starts_memory.data());
    starts[0] = 0;
    std::int64_t work = x.rows * x.cols;
    for (std::int64_t b = 0; b < block_count; ++b) {
        starts[b + 1] = starts[b] + blocks[b];
        work += tasks * blocks[b] * blocks[b];
    }
    parallel_for(block_count, threads_for(work, threads), [&](std::int64_t b) {
        for (std::int64_t row = starts[b]; row < starts[b + 1]; ++row) {
            T* const out = result + row * x.cols;
            std::memset(out, 0, static_cast<std::size_t>(starts[b]) * sizeof(T));
            segments(row, starts[b], starts[b + 1]);
            std::memset(out + starts[b + 1], 0, static_cast<std::size_t>(x.cols - starts[b + 1]) * sizeof(T));
        }
    });
}

}  // namespace

void elect_merge(Matrix x, std::int64_t tasks, std::int64_t task_stride, const void* thresholds,
                 const void* weights, const std::int64_t* blocks, std::int64_t block_count, void* result,
                 int threads) {
    with_type(x.dtype, [&](auto type) {
        using T = decltype(type);
        elect(x, tasks, task_stride, thresholds, weights, blocks, block_count, static_cast<T*>(result),
              threads);
    });
}

}  // namespace dirmerge::DIRMERGE_ISA
