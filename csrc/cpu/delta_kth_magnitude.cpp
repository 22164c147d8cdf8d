// delta_kth_magnitude: exact selection among differences that are formed anew at every pass, see select.h.
#include "cpu/blocks.h"
#include "cpu/select.h"

namespace dirmerge::DIRMERGE_ISA {

namespace {

constexpr std::int64_t part = 2048;  // elements whose base stays in the first-level cache

template <typename V>
struct Differences {
    using Bits = decltype(to_bits(V{}));
    static constexpr bool needs_buffer = true;
    const Elements* base;
    Elements weight;

    std::int64_t size;
    std::int64_t* nonfinite;  // of each piece: every pass finds the same

    const Bits* read(std::int64_t start, std::int64_t count, Bits* buffer) const {
        V origin[part], difference[part];
        std::int64_t found = 0;
        for (std::int64_t i = 0; i < count; i += part) {
            const std::int64_t width = count - i < part ? count - i : part;
            const std::int64_t rest = size - start - i - width;
            const std::int64_t next = rest < part ? rest : part;
            if (base != nullptr) prefetch(*base, start + i + width, next);
            prefetch(weight, start + i + width, next);
            read_origin(base, start + i, width, origin);
            read_difference(weight, origin, start + i, width, difference);
            found += count_nonfinite(difference, width);
            std::memcpy(buffer + i, difference, static_cast<std::size_t>(width) * sizeof(V));
        }
        nonfinite[start / piece] = found;
        return buffer;
    }
};

template <typename V>
void select_tasks(const Elements* base, const Elements* weights, std::int64_t tasks, std::int64_t count,
                  std::int64_t k, V* result, std::int64_t* nonfinite, int threads) {
    *nonfinite = 0;
    const std::int64_t pieces = (count + piece - 1) / piece;
    const Scratch scratch(static_cast<std::size_t>(pieces) * sizeof(std::int64_t));
    std::int64_t* const counts = static_cast<std::int64_t*>(scratch.data());
    for (std::int64_t t = 0; t < tasks; ++t) {
        const Differences<V> differences{base, weights[t], count, counts};
        result[t] = from_bits(select(differences, count, k, threads));
        for (std::int64_t p = 0; p < pieces; ++p) *nonfinite += counts[p];
    }
}

}  // namespace

void delta_kth_magnitude(const Elements* base, const Elements* weights, std::int64_t tasks, bool is_double,
                         std::int64_t count, std::int64_t k, void* result, std::int64_t* nonfinite,
                         int threads) {
    if (is_double)
        select_tasks(base, weights, tasks, count, k, static_cast<double*>(result), nonfinite, threads);
    else
        select_tasks(base, weights, tasks, count, k, static_cast<float*>(result), nonfinite, threads);
}

}  // namespace dirmerge::DIRMERGE_ISA
