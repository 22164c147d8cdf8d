// dirmerge._C: the native kernels on raw addresses or NumPy arrays, and how they were built.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/view.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace dirmerge {
namespace {

DType dtype_of(const std::string& name) {
    if (name == "bfloat16") return DType::bfloat16;
    if (name == "float16") return DType::float16;
    if (name == "float32") return DType::float32;
    if (name == "float64") return DType::float64;
    throw py::type_error("dtype must be bfloat16, float16, float32 or float64, got " + name);
}

View view_of_address(std::uintptr_t address, const std::string& dtype, std::vector<std::int64_t> shape,
                     std::vector<std::int64_t> strides) {
    if (shape.size() != strides.size()) throw py::value_error("shape and strides must have the same length");
    return {reinterpret_cast<void*>(address), dtype_of(dtype), std::move(shape), std::move(strides), true};
}

View view_of_array(const py::array& array) {
    View view{const_cast<void*>(array.data()), dtype_of(py::str(array.dtype())), {}, {}, array.writeable()};
    const auto size = static_cast<py::ssize_t>(size_of(view.dtype));
    for (py::ssize_t d = 0; d < array.ndim(); ++d) {
        if (array.strides(d) % size != 0)
            throw py::value_error("strides must be multiples of the element size");
        view.shape.push_back(array.shape(d));
        view.strides.push_back(array.strides(d) / size);
    }
    return view;
}

// Every message names the kernel and the argument.
class Checks {
  public:
    explicit Checks(const char* kernel) : kernel_(kernel) {}

    void require(bool condition, const char* sentence) const {
        if (!condition) throw py::value_error(std::string(kernel_) + ": " + sentence);
    }

    void output(const View& result, const std::vector<std::int64_t>& shape, DType dtype) const {
        require(result.is_writable, "the output must be writable");
        require(result.shape == shape, "the output has the wrong shape");
        require(result.dtype == dtype, "the output has the wrong dtype");
        require(result.is_contiguous(), "the output must be contiguous");
    }

    Matrix matrix(const View& view, const char* sentence) const {
        require(view.dims() == 2 && (view.shape[1] <= 1 || view.strides[1] == 1), sentence);
        return {view.data, view.dtype, view.shape[0], view.shape[1], view.strides[0]};
    }

  private:
    const char* kernel_;
};

DType compute_dtype(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

Elements elements(const View& view) { return {view.data, view.dtype}; }

std::pair<double, std::int64_t> delta(const View& finetuned, const View& base, const View& value,
                                      int threads) {
    const Checks checks("delta");
    const bool is_double = finetuned.dtype == DType::float64 || base.dtype == DType::float64;
    checks.require(finetuned.shape == base.shape, "finetuned and base must have the same shape");
    checks.require(finetuned.is_contiguous() && base.is_contiguous(),
                   "finetuned and base must be contiguous");
    checks.output(value, base.shape, is_double ? DType::float64 : DType::float32);
    double sum_of_squares;
    std::int64_t nonfinite;
    {
        const py::gil_scoped_release release;
        kernels().delta(elements(finetuned), elements(base), value.data, base.count(), &sum_of_squares,
                        &nonfinite, threads);
    }
    return {sum_of_squares, nonfinite};
}

// The arguments that the fused kernels over a base and several weights share.
struct Weights {
    std::optional<Elements> base;
    std::vector<Elements> tasks;
    bool is_double = false;

    Weights(const Checks& checks, const std::optional<View>& base_view, const std::vector<View>& views) {
        checks.require(!views.empty(), "weights must be T >= 1 arrays");
        const auto add = [&](const View& view) {
            checks.require(view.shape == views[0].shape, "base and weights must have the same shape");
            checks.require(view.is_contiguous(), "base and weights must be contiguous");
            is_double = is_double || view.dtype == DType::float64;
            return elements(view);
        };
        if (base_view) base = add(*base_view);
        for (const View& view : views) tasks.push_back(add(view));
    }

    const Elements* base_data() const { return base ? &*base : nullptr; }
    std::int64_t count() const { return static_cast<std::int64_t>(tasks.size()); }
};

std::int64_t delta_add(const std::optional<View>& base, const std::vector<View>& weights,
                       const std::vector<double>& coefficients, const View& result, int threads) {
    const Checks checks("delta_add");
    const Weights inputs(checks, base, weights);
    checks.require(coefficients.size() == weights.size(), "coefficients must be T numbers");
    checks.output(result, weights[0].shape, result.dtype);
    std::int64_t nonfinite;
    const py::gil_scoped_release release;
    kernels().delta_add(inputs.base_data(), inputs.tasks.data(), coefficients.data(), inputs.count(),
                        inputs.is_double, elements(result), result.count(), &nonfinite, threads);
    return nonfinite;
}

std::int64_t delta_kth_magnitude(const std::optional<View>& base, const std::vector<View>& weights,
                                 std::int64_t k, const View& result, int threads) {
    const Checks checks("delta_kth_magnitude");
    const Weights inputs(checks, base, weights);
    checks.output(result, {inputs.count()}, inputs.is_double ? DType::float64 : DType::float32);
    const std::int64_t count = weights[0].count();
    checks.require(1 <= k && k <= count, "k must be from 1 to the size of a weight");
    std::int64_t nonfinite;
    const py::gil_scoped_release release;
    kernels().delta_kth_magnitude(inputs.base_data(), inputs.tasks.data(), inputs.count(), inputs.is_double,
                                  count, k, result.data, &nonfinite, threads);
    return nonfinite;
}

std::int64_t delta_elect_add(const std::optional<View>& base, const std::vector<View>& weights,
                             const std::optional<View>& thresholds,
                             const std::vector<double>& election_weights, double scale, const View& result,
                             int threads) {
    const Checks checks("delta_elect_add");
    const Weights inputs(checks, base, weights);
    if (thresholds) {
        checks.require(
            thresholds->shape == std::vector<std::int64_t>{inputs.count()} && thresholds->is_contiguous(),
            "thresholds must have shape (T,), contiguous");
        checks.require(thresholds->dtype == (inputs.is_double ? DType::float64 : DType::float32),
                       "thresholds must be float32 (float64 if an input is)");
    }
    checks.require(election_weights.size() == weights.size(), "election_weights must be T numbers");
    checks.output(result, weights[0].shape, result.dtype);
    std::int64_t nonfinite;
    const py::gil_scoped_release release;
    kernels().delta_elect_add(inputs.base_data(), inputs.tasks.data(),
                              thresholds ? thresholds->data : nullptr, election_weights.data(),
                              inputs.count(), inputs.is_double, scale, elements(result), result.count(),
                              &nonfinite, threads);
    return nonfinite;
}

void kth_largest_magnitude(const View& x, std::int64_t k, const View& result, int threads) {
    const Checks checks("kth_largest_magnitude");
    checks.require(x.dims() >= 2 && x.is_contiguous(1), "x must have shape (T, ...), each x[t] contiguous");
    checks.require(compute_dtype(x.dtype) == x.dtype, "x must be float32 or float64");
    checks.output(result, {x.shape[0]}, x.dtype);
    if (x.shape[0] == 0) return;
    const std::int64_t count = x.count() / x.shape[0];
    checks.require(1 <= k && k <= count, "k must be from 1 to the size of x[t]");
    const py::gil_scoped_release release;
    kernels().kth_largest_magnitude(elements(x), x.shape[0], count, x.strides[0], k, result.data, threads);
}

void elect_merge(const View& x, const std::optional<View>& thresholds,
                 const std::optional<std::vector<double>>& weights, const View& result, int threads) {
    const Checks checks("elect_merge");
    checks.require(x.dims() >= 2 && x.shape[0] >= 1 && x.is_contiguous(1),
                   "x must have shape (T, ...) with T >= 1, each x[t] contiguous");
    const std::int64_t tasks = x.shape[0];
    checks.output(result, {x.shape.begin() + 1, x.shape.end()}, x.dtype);
    if (thresholds) {
        checks.require(thresholds->shape == std::vector<std::int64_t>{tasks} && thresholds->is_contiguous(),
                       "thresholds must have shape (T,), contiguous");
        checks.require(thresholds->dtype == compute_dtype(x.dtype),
                       "thresholds must be float32 (float64 if x is)");
    }
    std::vector<float> single_weights;
    const void* weights_data = nullptr;
    if (weights) {
        checks.require(static_cast<std::int64_t>(weights->size()) == tasks, "weights must be T numbers");
        single_weights.assign(weights->begin(), weights->end());
        weights_data =
            x.dtype == DType::float64 ? static_cast<const void*>(weights->data()) : single_weights.data();
    }
    const py::gil_scoped_release release;
    kernels().elect_merge(elements(x), tasks, x.count() / tasks, x.strides[0],
                          thresholds ? thresholds->data : nullptr, weights_data, result.data, threads);
}

void lowrank_add(const View& base, const View& update, double scale, const View& result, int threads) {
    const Checks checks("lowrank_add");
    const Matrix b = checks.matrix(base, "base must be a matrix with contiguous rows");
    const Matrix u = checks.matrix(update, "update must be a matrix with contiguous rows");
    const Matrix r = checks.matrix(result, "the output must be a matrix with contiguous rows");
    checks.require(base.shape == update.shape && base.shape == result.shape, "all shapes must be the same");
    checks.require(update.dtype == DType::float32, "update must be float32");
    checks.require(size_of(base.dtype) == 2, "base must be bfloat16 or float16");
    checks.require(result.is_writable, "the output must be writable");
    const py::gil_scoped_release release;
    kernels().lowrank_add(b, u, static_cast<float>(scale), r, threads);
}

py::dict build_info() {
    py::dict info;
    info["version"] = DIRMERGE_VERSION;
    info["compiler"] = DIRMERGE_COMPILER;
    info["flags"] = DIRMERGE_FLAGS;
#ifdef DIRMERGE_X86_LEVELS
    info["built_for"] = "baseline x86_64_v3 x86_64_v4";
#else
    info["built_for"] = "baseline";
#endif
    info["runs_on"] = kernels().name;
    return info;
}

}  // namespace
}  // namespace dirmerge

PYBIND11_MODULE(_C, module) {
    using namespace dirmerge;
    module.doc() = "Native kernels of dirmerge on Views or NumPy arrays; outputs are written in place.";
    py::class_<View>(module, "View", "A strided array at an address; NumPy arrays convert by themselves.")
        .def(py::init(&view_of_address), py::arg("address"), py::arg("dtype"), py::arg("shape"),
             py::arg("strides"))
        .def(py::init(&view_of_array), py::arg("array").noconvert());
    py::implicitly_convertible<py::array, View>();
    module.def("delta", &delta, py::arg("finetuned"), py::arg("base"), py::arg("value"), py::arg("threads"),
               "value = finetuned - base; returns the sum of squares and the number of non-finite entries.");
    module.def(
        "delta_add", &delta_add, py::arg("base"), py::arg("weights"), py::arg("coefficients"),
        py::arg("result"), py::arg("threads"),
        "result = base + sum of coefficients[t] * (weights[t] - base), rounded to nearest even; returns "
        "the number of non-finite results.");
    module.def("delta_kth_magnitude", &delta_kth_magnitude, py::arg("base"), py::arg("weights"), py::arg("k"),
               py::arg("result"), py::arg("threads"),
               "result[t] = k-th largest |weights[t] - base|; returns the number of non-finite differences.");
    module.def("delta_elect_add", &delta_elect_add, py::arg("base"), py::arg("weights"),
               py::arg("thresholds"), py::arg("election_weights"), py::arg("scale"), py::arg("result"),
               py::arg("threads"),
               "result = base + scale * elect_merge(weights - base), rounded to nearest even; returns the "
               "number of non-finite results.");
    module.def("kth_largest_magnitude", &kth_largest_magnitude, py::arg("x"), py::arg("k"), py::arg("result"),
               py::arg("threads"), "result[t] = k-th largest |x[t]|.");
    module.def("elect_merge", &elect_merge, py::arg("x"), py::arg("thresholds"), py::arg("weights"),
               py::arg("result"), py::arg("threads"),
               "Sign election with a disjoint mean; see dirmerge.ops.elect_merge.");
    module.def("lowrank_add", &lowrank_add, py::arg("base"), py::arg("update"), py::arg("scale"),
               py::arg("result"), py::arg("threads"),
               "result = base + scale * update, rounded to nearest even.");
    module.def("build_info", &build_info, "Version, compiler, flags and instruction sets of this library.");
}
