// The CPU kernels, and the choice of instruction set.
//
// Every cpu/<op>.cpp is compiled once per instruction set, with DIRMERGE_ISA naming the namespace of that
// copy, and the best copy that the processor runs is chosen at the first call. So that the linker cannot
// merge code of two copies, the kernels instantiate no templates of the standard library: parallel_for,
// Scratch and whatever else needs them is compiled once, in common/.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace dirmerge {

// Elements of one dtype at an address.
struct Elements {
    void* data;
    DType dtype;
};

// A matrix whose rows lie row_stride elements apart, each contiguous.
struct Matrix {
    void* data;
    DType dtype;
    std::int64_t rows, cols, row_stride;
};

struct Kernels {
    const char* name;

    // value = finetuned − base over `count` elements, with Σ value² and the number of non-finite values.
    // value is double if an input is, else float.
    void (*delta)(Elements finetuned, Elements base, void* value, std::int64_t count, double* sum_of_squares,
                  std::int64_t* nonfinite, int threads);

    // result = round(base + Σ coefficients[t] · (weights[t] − base)) over `count` elements, with the number
    // of non-finite results; in double if is_double, else in float. base may be null: then it is 0.
    void (*delta_add)(const Elements* base, const Elements* weights, const double* coefficients,
                      std::int64_t tasks, bool is_double, Elements result, std::int64_t count,
                      std::int64_t* nonfinite, int threads);

    // result[t] = k-th largest |weights[t] − base| of `count` elements, with the number of non-finite
    // differences of all tasks; double if is_double, else float. base may be null: then it is 0.
    void (*delta_kth_magnitude)(const Elements* base, const Elements* weights, std::int64_t tasks,
                                bool is_double, std::int64_t count, std::int64_t k, void* result,
                                std::int64_t* nonfinite, int threads);

    // result = round(base + scale · elect_merge(weights[t] − base)) over `count` elements, with the number of
    // non-finite results. thresholds, which may be null, are double if is_double, else float.
    void (*delta_elect_add)(const Elements* base, const Elements* weights, const void* thresholds,
                            const double* election_weights, std::int64_t tasks, bool is_double, double scale,
                            Elements result, std::int64_t count, std::int64_t* nonfinite, int threads);

    // result[t] = k-th largest |x[t]| of `tasks` rows of `count` floats or doubles, task_stride elements
    // apart.
    void (*kth_largest_magnitude)(Elements x, std::int64_t tasks, std::int64_t count,
                                  std::int64_t task_stride, std::int64_t k, void* result, int threads);

    // `tasks` rows of `count` elements, task_stride elements apart. thresholds and weights may be null; both
    // have the compute type of x.
    void (*elect_merge)(Elements x, std::int64_t tasks, std::int64_t count, std::int64_t task_stride,
                        const void* thresholds, const void* weights, void* result, int threads);

    // result = round(base + scale · update), all of one shape; base is bfloat16 or float16, update is float.
    void (*lowrank_add)(Matrix base, Matrix update, float scale, Matrix result, int threads);
};

namespace baseline {
extern const Kernels kernels;
}
#ifdef DIRMERGE_X86_LEVELS
namespace x86_64_v3 {
extern const Kernels kernels;
}
namespace x86_64_v4 {
extern const Kernels kernels;
}
#endif

// The best copy that this processor runs.
const Kernels& kernels();

}  // namespace dirmerge
