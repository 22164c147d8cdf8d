// The portable layer under the CUDA kernels: one source, compiled by nvcc, by NVRTC, and by a C++20 compiler
// that runs it on the CPU.
//
// Under nvcc and NVRTC this header adds three integer names and one macro. Anywhere else it is an emulator of
// a GPU that runs one block at a time: every CUDA thread is a fiber with a stack of its own, which runs until
// it waits at a barrier or a warp-level operation. Which fiber runs next is up to the chosen order, so that a
// kernel that lacks a barrier gives another result in one order than in another; and a barrier at which only
// part of the block arrives ends the launch with an error that names the place. ASan and UBSan see every
// access to memory.
//
// What the emulator does not do: caches and memory ordering (fibers switch only where they wait), tensor
// cores, inline PTX, asynchronous copies. Static shared memory keeps what the block before left in it;
// dynamic shared memory is filled with 0xFF, NaN as a float, before every block.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

#define SIMT_DYNAMIC_SHARED(type, name)                                \
    extern __shared__ __align__(16) unsigned char simt_shared_bytes[]; \
    type* const name = reinterpret_cast<type*>(simt_shared_bytes)

#else
#define SIMT_EMULATED

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One block runs at a time, so its shared memory may as well be static.
#define __shared__ static

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline constexpr int warpSize = 32;

namespace simt {

// ---- Fibers: a stack, and a switch from one to another.

#if defined(__x86_64__)

// What a function must preserve, pushed on the stack that is left.
struct Context {
    void* stack_pointer = nullptr;
};

extern "C" void simt_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
    .pushsection .text
    .weak simt_switch
    .hidden simt_switch
    .type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size simt_switch, . - simt_switch
    .popsection
)");

inline void switch_context(Context& from, Context& to) { simt_switch(&from.stack_pointer, to.stack_pointer); }

inline void prepare_context(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
    // The switch pops six registers and returns into entry, which expects rsp = 8 modulo 16 as after a call.
    void** top = reinterpret_cast<void**>(stack + bytes) - 2;
    *top = reinterpret_cast<void*>(entry);
    std::fill(top - 6, top, nullptr);
    context.stack_pointer = top - 6;
}

#else

struct Context {
    ucontext_t state;
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

inline void prepare_context(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = stack;
    context.state.uc_stack.ss_size = bytes;
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
}

#endif

// Memory is committed as it is touched: a fiber costs the pages that its kernel uses.
class Stacks {
  public:
    static constexpr std::size_t bytes = 256 << 10;

    char* of(unsigned fiber) { return memory_ + fiber * bytes; }

    void reserve(unsigned fibers) {
        if (fibers > count_) {
            release();
            void* const memory = mmap(nullptr, fibers * bytes, PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (memory == MAP_FAILED) throw std::bad_alloc();
            memory_ = static_cast<char*>(memory);
            count_ = fibers;
        }
        unpoison();
    }

    ~Stacks() { release(); }

  private:
    void release() {
        unpoison();
        if (memory_ != nullptr) munmap(memory_, count_ * bytes);
    }

    // A fiber's outermost frames, and all frames of a launch that ended with an error, are never left: for
    // ASan they would stay forbidden, whatever comes to lie there.
    void unpoison() {
#if defined(__SANITIZE_ADDRESS__)
        ASAN_UNPOISON_MEMORY_REGION(memory_, count_ * bytes);
#endif
    }

    char* memory_ = nullptr;
    unsigned count_ = 0;
};

// ---- The machine: one block at a time.

enum class State { ready, at_block_barrier, at_warp_barrier, finished };

struct Fiber {
    Context context;
    uint3 index;
    unsigned rank;
    State state;
    unsigned mask;                // of the warp barrier
    std::source_location where;   // it waits
    std::uint64_t exchanged = 0;  // what the other lanes of the warp may read
};

struct Machine {
    // Set by tests.
    // 0: one warp after the other, each as far as it comes, upwards; 1: downwards; more: all threads in turn,
    // in an order that this seeds.
    int order = 0;
    // Of a grid: with fewer, kernels stride over their work.
    std::int64_t max_blocks = 0x7FFFFFFF;

    dim3 grid, block;
    uint3 block_index{};
    std::vector<Fiber> fibers;
    Fiber* running = nullptr;
    Context scheduler;
    Stacks stacks;
    std::function<void()> body;
    unsigned char* dynamic_shared = nullptr;
    int votes = 0, vote = 0;  // of __syncthreads_or and its kind

    std::mutex mutex;
    std::string error;  // of the last launch that failed
};

inline Machine machine;

inline std::string place(const std::source_location& where) {
    const std::string path = where.file_name();
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(where.line());
}

inline void wait(State state, unsigned mask, const std::source_location& where) {
    Fiber& self = *machine.running;
    self.state = state;
    self.mask = mask;
    self.where = where;
    switch_context(self.context, machine.scheduler);
}

inline void fiber_entry() {
    machine.body();
    wait(State::finished, 0, std::source_location::current());
    __builtin_unreachable();
}

// Wakes the lanes of a warp whose whole mask waits at one place; returns whether there were any.
inline bool release_warp(unsigned first) {
    const unsigned end = std::min<unsigned>(first + 32, static_cast<unsigned>(machine.fibers.size()));
    const unsigned existing = end - first == 32 ? ~0u : (1u << (end - first)) - 1;
    bool released = false;
    for (unsigned lane = 0; lane < end - first; ++lane) {
        const Fiber fiber = machine.fibers[first + lane];
        if (fiber.state != State::at_warp_barrier) continue;
        const unsigned mask = fiber.mask & existing;
        if ((mask >> lane & 1) == 0)
            throw std::runtime_error("lane " + std::to_string(lane) + " is not in the mask it passes at " +
                                     place(fiber.where));
        bool complete = true;
        for (unsigned other = 0; other < end - first; ++other)
            if (mask >> other & 1) {
                const Fiber& waiting = machine.fibers[first + other];
                complete &= waiting.state == State::at_warp_barrier && (waiting.mask & existing) == mask &&
                            waiting.where.line() == fiber.where.line();
            }
        if (!complete) continue;
        for (unsigned other = 0; other < end - first; ++other)
            if (mask >> other & 1) machine.fibers[first + other].state = State::ready;
        released = true;
    }
    return released;
}

// Wakes the block if all its unfinished threads wait at one barrier; returns whether they did.
inline bool release_block() {
    const Fiber* first = nullptr;
    for (const Fiber& fiber : machine.fibers) {
        if (fiber.state == State::finished) continue;
        if (fiber.state != State::at_block_barrier) return false;
        if (first == nullptr) first = &fiber;
        if (fiber.where.line() != first->where.line())
            throw std::runtime_error("divergent barrier: thread " + std::to_string(first->rank) +
                                     " waits at " + place(first->where) + ", thread " +
                                     std::to_string(fiber.rank) + " at " + place(fiber.where));
    }
    machine.vote = machine.votes;
    machine.votes = 0;
    for (Fiber& fiber : machine.fibers)
        if (fiber.state == State::at_block_barrier) fiber.state = State::ready;
    return first != nullptr;
}

[[noreturn]] inline void report_deadlock() {
    for (const Fiber& fiber : machine.fibers)
        if (fiber.state == State::at_warp_barrier)
            throw std::runtime_error("deadlock: thread " + std::to_string(fiber.rank) + " waits at " +
                                     place(fiber.where) + " for lanes that do not come");
    throw std::runtime_error("deadlock");
}

// Runs a fiber until it waits or ends; false if it cannot run.
inline bool step(Fiber& fiber) {
    if (fiber.state != State::ready) return false;
    machine.running = &fiber;
    switch_context(machine.scheduler, fiber.context);
    return true;
}

// Runs every thread once, in a new random order, and wakes the warps that have come together.
inline bool run_fairly(std::vector<unsigned>& order, std::mt19937& random) {
    std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    for (const unsigned rank : order) progress |= step(machine.fibers[rank]);
    for (unsigned first = 0; first < order.size(); first += 32) progress |= release_warp(first);
    return progress;
}

// Runs one warp after the other, each as far as it comes without the others.
inline bool run_greedily(bool descending) {
    const unsigned threads = static_cast<unsigned>(machine.fibers.size());
    const unsigned warps = (threads + 31) / 32;
    bool progress = false;
    for (unsigned i = 0; i < warps; ++i) {
        const unsigned first = 32 * (descending ? warps - 1 - i : i);
        const unsigned lanes = std::min(threads - first, 32u);
        for (bool further = true; further; progress |= further) {
            further = false;
            for (unsigned lane = 0; lane < lanes; ++lane)
                further |= step(machine.fibers[first + (descending ? lanes - 1 - lane : lane)]);
            further |= release_warp(first);
        }
    }
    return progress;
}

inline void run_block() {
    const dim3 size = machine.block;
    const unsigned threads = size.x * size.y * size.z;
    machine.stacks.reserve(threads);
    machine.fibers.resize(threads);
    for (unsigned rank = 0; rank < threads; ++rank) {
        Fiber& fiber = machine.fibers[rank];
        fiber.index = {rank % size.x, rank / size.x % size.y, rank / (size.x * size.y)};
        fiber.rank = rank;
        fiber.state = State::ready;
        prepare_context(fiber.context, machine.stacks.of(rank), Stacks::bytes, fiber_entry);
    }
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    std::mt19937 random(static_cast<unsigned>(machine.order) * 7919u + machine.block_index.x);
    const auto is_finished = [](const Fiber& fiber) { return fiber.state == State::finished; };
    while (!std::all_of(machine.fibers.begin(), machine.fibers.end(), is_finished)) {
        const bool progress =
            machine.order < 2 ? run_greedily(machine.order == 1) : run_fairly(order, random);
        if (!release_block() && !progress) report_deadlock();
    }
}

// Runs the blocks of a grid one after the other; returns 0 or a CUDA error code, the reason in machine.error.
template <typename Body>
int launch(dim3 grid, dim3 block, std::size_t shared_bytes, const Body& body) {
    const std::lock_guard lock(machine.mutex);
    const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 ||
        grid.z > 65535 || threads == 0 || threads > 1024 || block.z > 64 || shared_bytes > (227 << 10)) {
        machine.error = "a grid, block or shared memory that no GPU can launch";
        return 9;  // cudaErrorInvalidConfiguration
    }
    // Of the exact size, so that ASan sees the first byte beyond it; malloc aligns to 16.
    const std::unique_ptr<void, decltype(&std::free)> shared(std::malloc(shared_bytes), &std::free);
    machine.grid = grid;
    machine.block = block;
    machine.dynamic_shared = static_cast<unsigned char*>(shared.get());
    machine.body = body;
    machine.votes = 0;
    try {
        for (unsigned z = 0; z < grid.z; ++z)
            for (unsigned y = 0; y < grid.y; ++y)
                for (unsigned x = 0; x < grid.x; ++x) {
                    machine.block_index = {x, y, z};
                    std::memset(machine.dynamic_shared, 0xFF, shared_bytes);
                    run_block();
                }
    } catch (const std::exception& error) {
        machine.error = "block (" + std::to_string(machine.block_index.x) + ", " +
                        std::to_string(machine.block_index.y) + ", " + std::to_string(machine.block_index.z) +
                        "): " + error.what();
        return 719;  // cudaErrorLaunchFailure
    }
    return 0;
}

// The value that the lane `source` of the same warp passes; all lanes of the mask call it together.
template <typename T>
T exchange(unsigned mask, T value, unsigned source, const std::source_location& where) {
    static_assert(sizeof(T) <= sizeof(std::uint64_t));
    Fiber& self = *machine.running;
    std::memcpy(&self.exchanged, &value, sizeof value);
    wait(State::at_warp_barrier, mask, where);
    const std::size_t from = (self.rank & ~31u) + source;
    if (from < machine.fibers.size()) std::memcpy(&value, &machine.fibers[from].exchanged, sizeof value);
    // Nobody overwrites its value before all have read it.
    wait(State::at_warp_barrier, mask, where);
    return value;
}

inline unsigned lane() { return machine.running->rank & 31u; }

}  // namespace simt

// ---- The names of CUDA C++.

#define threadIdx (simt::machine.running->index)
#define blockIdx (simt::machine.block_index)
#define blockDim (simt::machine.block)
#define gridDim (simt::machine.grid)

#define SIMT_DYNAMIC_SHARED(type, name) \
    type* const name = reinterpret_cast<type*>(simt::machine.dynamic_shared)

using Where = std::source_location;

inline void __syncthreads(Where where = Where::current()) {
    simt::wait(simt::State::at_block_barrier, 0, where);
}

inline int __syncthreads_or(int predicate, Where where = Where::current()) {
    simt::machine.votes |= predicate != 0;
    simt::wait(simt::State::at_block_barrier, 0, where);
    return simt::machine.vote;
}

inline int __syncthreads_count(int predicate, Where where = Where::current()) {
    simt::machine.votes += predicate != 0;
    simt::wait(simt::State::at_block_barrier, 0, where);
    return simt::machine.vote;
}

inline void __syncwarp(unsigned mask = ~0u, Where where = Where::current()) {
    simt::wait(simt::State::at_warp_barrier, mask, where);
}

inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, Where where = Where::current()) {
    const unsigned first = simt::lane() & ~static_cast<unsigned>(width - 1);
    return simt::exchange(mask, value, first + (static_cast<unsigned>(source) & (width - 1)), where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, Where where = Where::current()) {
    const unsigned lane = simt::lane();
    const unsigned source = lane ^ static_cast<unsigned>(bits);
    const unsigned end = (lane & ~static_cast<unsigned>(width - 1)) + width;
    return simt::exchange(mask, value, source < end ? source : lane, where);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, Where where = Where::current()) {
    const unsigned lane = simt::lane();
    const bool inside = (lane & (width - 1)) + delta < static_cast<unsigned>(width);
    return simt::exchange(mask, value, inside ? lane + delta : lane, where);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, Where where = Where::current()) {
    const unsigned lane = simt::lane();
    const bool inside = (lane & (width - 1)) >= delta;
    return simt::exchange(mask, value, inside ? lane - delta : lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, Where where = Where::current()) {
    const unsigned lane = simt::lane();
    unsigned ballot = 0;
    simt::machine.running->exchanged = predicate != 0;
    simt::wait(simt::State::at_warp_barrier, mask, where);
    const unsigned first = simt::machine.running->rank - lane;
    for (unsigned other = 0; other < 32 && first + other < simt::machine.fibers.size(); ++other)
        if (mask >> other & 1)
            ballot |= static_cast<unsigned>(simt::machine.fibers[first + other].exchanged) << other;
    simt::wait(simt::State::at_warp_barrier, mask, where);
    return ballot;
}

inline int __any_sync(unsigned mask, int predicate, Where where = Where::current()) {
    return __ballot_sync(mask, predicate, where) != 0;
}

inline int __all_sync(unsigned mask, int predicate, Where where = Where::current()) {
    return __ballot_sync(mask, predicate == 0, where) == 0;
}

// Fibers are never interrupted: every operation on memory is atomic.
template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
    const T old = *address;
    *address = old + value;
    return old;
}

template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
    const T old = *address;
    *address = std::max(old, value);
    return old;
}

template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
    const T old = *address;
    *address = old | value;
    return old;
}

template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
    const T old = *address;
    *address = value;
    return old;
}

template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    const T old = *address;
    if (old == expected) *address = value;
    return old;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }
inline int __popc(unsigned a) { return std::popcount(a); }
inline int __clz(int a) { return std::countl_zero(static_cast<unsigned>(a)); }
inline int __ffs(int a) { return a == 0 ? 0 : std::countr_zero(static_cast<unsigned>(a)) + 1; }
inline unsigned __float_as_uint(float a) { return std::bit_cast<unsigned>(a); }
inline float __uint_as_float(unsigned a) { return std::bit_cast<float>(a); }

#endif

namespace dirmerge::cuda {

// The same on every platform, and the types that CUDA's 64-bit functions take.
using int64 = long long;
using uint64 = unsigned long long;
using uint32 = unsigned int;

}  // namespace dirmerge::cuda
