// Runs the CUDA text on the CPU: a block's threads one after another, in C++.
// Compile with -DKERNELS="path of the text", -DEXPORTS="EXPORT(kernel) ..." and the text's own.
#include <cstddef>
#include <cstring>
#include <utility>

#define __global__
#define __device__

struct Index { unsigned x, y; };
static Index blockIdx, threadIdx, blockDim;

static float float_of_half(unsigned short bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return (float)half;
}
static unsigned short half_of_float(float value) {
    _Float16 half = (_Float16)value;
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
static float float_of_bits(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static unsigned bits_of_float(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
static void atomicAdd(float* at, float value) { *at += value; }

#include KERNELS

// Every argument of a kernel is a pointer or a 64-bit number.
template <typename... Args, std::size_t... At>
static void call(void (*kernel)(Args...), const int64* args, std::index_sequence<At...>) {
    kernel((Args)args[At]...);
}

template <typename... Args>
static void run(void (*kernel)(Args...), const int64* args, unsigned x, unsigned y, unsigned threads) {
    blockDim = {threads, 1};
    for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
                call(kernel, args, std::index_sequence_for<Args...>());
}

#define EXPORT(name) \
    extern "C" void run_##name(const int64* args, unsigned x, unsigned y, unsigned threads) { \
        run(name, args, x, y, threads); \
    }
EXPORTS
