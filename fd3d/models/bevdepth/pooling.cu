// Splatting on the device: sums over the points of each cell, and both gradients, with a feature
// for a point never in memory. The meaning is `pool_reference` in pooling.py.
//
// Maps lie channels last, so that neighbouring threads read neighbouring channels. Every result has
// one thread that adds in a fixed order: no atomics, the same bits in every run.

typedef long long int64;

static __device__ int64 task_number() {
    return (int64)blockIdx.x * blockDim.x + threadIdx.x;
}

// depth: flat probabilities. context: (pixels, channels). points, pixels, starts: `PointTable`.
// sums: (cells, channels).
extern "C" __global__ void pool_sum(
    const float* depth, const float* context, const int64* points, const int* pixels,
    const int* starts, float* sums, int64 cells, int64 channels
) {
    int64 task = task_number();
    if (task >= cells * channels) return;
    int64 cell = task / channels, channel = task % channels;
    float sum = 0.0f;
    for (int k = starts[cell]; k < starts[cell + 1]; ++k)
        sum += depth[points[k]] * context[pixels[k] * channels + channel];
    sums[task] = sum;
}

// cells: of every point of (cameras, bins, area), -1 outside. grad: (cells, channels).
// result: (cameras * area, channels).
extern "C" __global__ void pool_context_grad(
    const float* depth, const int* cells, const float* grad, float* result,
    int64 cameras, int64 bins, int64 area, int64 channels
) {
    int64 task = task_number();
    if (task >= cameras * area * channels) return;
    int64 pixel = task / channels, channel = task % channels;
    int64 point = pixel / area * bins * area + pixel % area;
    float sum = 0.0f;
    for (int64 bin = 0; bin < bins; ++bin, point += area)
        if (cells[point] >= 0) sum += depth[point] * grad[cells[point] * channels + channel];
    result[task] = sum;
}

// result: as the flat probabilities.
extern "C" __global__ void pool_depth_grad(
    const float* context, const int* cells, const float* grad, float* result,
    int64 cameras, int64 bins, int64 area, int64 channels
) {
    int64 point = task_number();
    if (point >= cameras * bins * area) return;
    int64 pixel = point / (bins * area) * area + point % area;
    float sum = 0.0f;
    if (cells[point] >= 0)
        for (int64 channel = 0; channel < channels; ++channel)
            sum += context[pixel * channels + channel] * grad[cells[point] * channels + channel];
    result[point] = sum;
}
