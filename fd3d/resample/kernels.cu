// Resampling on the device: dequantise, move, resample and cast in one pass, and the transpose.
//
// The meaning is fd3d/resample/reference.py; the geometry comes ready as `Plan.steps`. Compiled
// once for each combination of
//   STORED  type of the map: 0 int8, 1 uint8, 2 float16, 3 bfloat16, 4 float32
//   RESULT  type of the result (or of its gradient): 2, 3 or 4 as above
//   PACKED  1: channels lie together in both maps and come in whole groups, so that a thread
//           moves a group in one load and neighbouring threads take neighbouring groups;
//           0: any strides, neighbouring threads take neighbouring cells.
// No header is included: NVRTC finds none when it comes from a wheel.

#define GROUP 4

typedef long long int64;
typedef unsigned short bits16;

#ifdef __CUDACC__
static __device__ float float_of_half(bits16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
static __device__ bits16 half_of_float(float value) {
    bits16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
static __device__ float float_of_bits(unsigned bits) { return __uint_as_float(bits); }
static __device__ unsigned bits_of_float(float value) { return __float_as_uint(value); }
#endif

template <int KIND> struct Number;
template <> struct Number<0> {
    typedef signed char type;
    static __device__ float get(type stored) { return (float)stored; }
};
template <> struct Number<1> {
    typedef unsigned char type;
    static __device__ float get(type stored) { return (float)stored; }
};
template <> struct Number<2> {
    typedef bits16 type;
    static __device__ float get(type stored) { return float_of_half(stored); }
    static __device__ type put(float value) { return half_of_float(value); }
};
template <> struct Number<3> {
    typedef bits16 type;
    static __device__ float get(type stored) { return float_of_bits((unsigned)stored << 16); }
    static __device__ type put(float value) {
        unsigned bits = bits_of_float(value);
        // Round half to even; not-a-number keeps a bit that says so.
        return value == value ? (type)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : 0x7fc0;
    }
};
template <> struct Number<4> {
    typedef float type;
    static __device__ float get(type stored) { return stored; }
    static __device__ type put(float value) { return value; }
};

typedef Number<STORED> Stored;
typedef Number<RESULT> Result;
template <typename T> struct alignas(GROUP * sizeof(T)) Pack { T at[GROUP]; };

// Strides of a (B, C, Y, X) map, in elements.
struct Layout { int64 frame, channel, row, col; };

// What a thread works on: one target cell and a group of channels.
struct Task { int frame, row, col, channel, count; };

static __device__ bool take_task(Task& task, int channels, int to_y, int to_x) {
    // 32 bits: dividing 64 would cost more than the sums of a small cell.
    unsigned groups = (channels + GROUP - 1) / GROUP, cells = to_y * to_x;
    unsigned mine = blockIdx.x * blockDim.x + threadIdx.x;
    if (mine >= groups * cells) return false;
#if PACKED
    int group = mine % groups, cell = mine / groups;
#else
    int cell = mine % cells, group = mine / cells;
#endif
    task.frame = blockIdx.y;
    task.row = cell / to_x;
    task.col = cell % to_x;
    task.channel = group * GROUP;
    task.count = channels - task.channel < GROUP ? channels - task.channel : GROUP;
    return true;
}

// The parts of one target cell, as positions in units of 2^-32 source cells.
struct Parts {
    int64 ax, bx, ay, by, u, v, last_u, last_v;
    int sx, sy, wide, high;

    __device__ Parts(const int64* steps, const Task& task, int from_y, int from_x) {
        const int64* mine = steps + 8 * (int64)task.frame;
        ax = mine[0], bx = mine[1], ay = mine[3], by = mine[4];
        sx = (int)mine[6], sy = (int)mine[7];
        int64 across = (int64)task.col * sx, down = (int64)task.row * sy;
        u = ax * across + bx * down + mine[2];
        v = ay * across + by * down + mine[5];
        wide = from_x, high = from_y;
        last_u = ((int64)from_x << 32) - (1ll << 31);
        last_v = ((int64)from_y << 32) - (1ll << 31);
    }
    // Places and weights of the four source cells around part (i, j); false where it has none.
    __device__ bool taps(int i, int j, int rows[2], int cols[2], float weights[2][2]) const {
        int64 at_u = u + ax * i + bx * j, at_v = v + ay * i + by * j;
        int64 first = -(1ll << 31);
        if (at_u < first || at_u > last_u || at_v < first || at_v > last_v) return false;
        int col = (int)(at_u >> 32), row = (int)(at_v >> 32);
        float right = (float)(unsigned)at_u * (1.0f / 4294967296.0f);
        float bottom = (float)(unsigned)at_v * (1.0f / 4294967296.0f);
        // The outermost cells go on to the map's edge.
        cols[0] = col < 0 ? 0 : col, cols[1] = col + 1 < wide ? col + 1 : wide - 1;
        rows[0] = row < 0 ? 0 : row, rows[1] = row + 1 < high ? row + 1 : high - 1;
        weights[0][0] = (1.0f - bottom) * (1.0f - right), weights[0][1] = (1.0f - bottom) * right;
        weights[1][0] = bottom * (1.0f - right), weights[1][1] = bottom * right;
        return true;
    }
    __device__ int count_inside() const {
        int found = 0, rows[2], cols[2];
        float weights[2][2];
        for (int j = 0; j < sy; ++j)
            for (int i = 0; i < sx; ++i) found += taps(i, j, rows, cols, weights);
        return found;
    }
    // Weight of a part: densities share the covered area out, intensities are means.
    __device__ float share(int found, int density, float gain) const {
        if (found == 0) return 0.0f;
        return density ? gain / ((float)sx * (float)sy) : 1.0f / (float)found;
    }
};

static __device__ void add_cells(
    const Stored::type* at, int64 stride, int count, float weight, float* sums) {
#if PACKED
    Pack<Stored::type> found = *(const Pack<Stored::type>*)at;
    for (int k = 0; k < GROUP; ++k) sums[k] += weight * Stored::get(found.at[k]);
#else
    for (int k = 0; k < count; ++k) sums[k] += weight * Stored::get(at[k * stride]);
#endif
}

// map (B, C, Y, X) -> out (B, C, Y', X') and valid (B, Y', X'). scale and zero are (B, C),
// gain is (B,), steps is (B, 8).
extern "C" __global__ void resample(
    const Stored::type* map, const float* scale, const float* zero, const int64* steps,
    const float* gain, Result::type* out, unsigned char* valid, int64 channels,
    int64 from_y, int64 from_x, int64 to_y, int64 to_x, int64 density,
    int64 map_frame, int64 map_channel, int64 map_row, int64 map_col,
    int64 out_frame, int64 out_channel, int64 out_row, int64 out_col) {
    Task task;
    if (!take_task(task, (int)channels, (int)to_y, (int)to_x)) return;
    Parts parts(steps, task, (int)from_y, (int)from_x);
    const Stored::type* source = map + task.frame * map_frame + task.channel * map_channel;
    float total[GROUP] = {0.0f};
    int found = 0, rows[2], cols[2];
    float weights[2][2];
    for (int j = 0; j < parts.sy; ++j) {
        // One sum for each row of parts: long float32 sums lose digits.
        float line[GROUP] = {0.0f};
        for (int i = 0; i < parts.sx; ++i) {
            if (!parts.taps(i, j, rows, cols, weights)) continue;
            ++found;
            for (int down = 0; down < 2; ++down)
                for (int across = 0; across < 2; ++across)
                    add_cells(source + rows[down] * map_row + cols[across] * map_col, map_channel,
                              task.count, weights[down][across], line);
        }
        for (int k = 0; k < GROUP; ++k) total[k] += line[k];
    }
    float share = parts.share(found, (int)density, gain[task.frame]);
    int64 numbers = task.frame * channels + task.channel;
    Result::type* target = out + task.frame * out_frame + task.channel * out_channel +
                           task.row * out_row + task.col * out_col;
    Pack<Result::type> done;
    for (int k = 0; k < task.count; ++k) {
        float value = zero[numbers + k] * (float)found + scale[numbers + k] * total[k];
        done.at[k] = Result::put(found ? value * share : 0.0f);
    }
#if PACKED
    *(Pack<Result::type>*)target = done;
#else
    for (int k = 0; k < task.count; ++k) target[k * out_channel] = done.at[k];
#endif
    if (task.channel == 0)
        valid[((int64)task.frame * to_y + task.row) * to_x + task.col] = found > 0;
}

// The transpose: the gradient of out, (B, C, Y', X') in RESULT's type, is added into that of
// map, float32 (B, C, Y, X), which comes zeroed. Sums arrive in any order: the last digit may
// differ from run to run.
extern "C" __global__ void spread(
    const Result::type* grad, const float* scale, const int64* steps, const float* gain,
    float* map, int64 channels, int64 from_y, int64 from_x, int64 to_y, int64 to_x,
    int64 density, int64 grad_frame, int64 grad_channel, int64 grad_row, int64 grad_col,
    int64 map_frame, int64 map_channel, int64 map_row, int64 map_col) {
    Task task;
    if (!take_task(task, (int)channels, (int)to_y, (int)to_x)) return;
    Parts parts(steps, task, (int)from_y, (int)from_x);
    float share = parts.share(parts.count_inside(), (int)density, gain[task.frame]);
    if (share == 0.0f) return;
    const Result::type* source = grad + task.frame * grad_frame + task.channel * grad_channel +
                                 task.row * grad_row + task.col * grad_col;
    float* target = map + task.frame * map_frame + task.channel * map_channel;
    float sent[GROUP];
    for (int k = 0; k < task.count; ++k)
        sent[k] = share * scale[task.frame * channels + task.channel + k] *
                  Result::get(source[k * grad_channel]);
    int rows[2], cols[2];
    float weights[2][2];
    for (int j = 0; j < parts.sy; ++j)
        for (int i = 0; i < parts.sx; ++i) {
            if (!parts.taps(i, j, rows, cols, weights)) continue;
            for (int down = 0; down < 2; ++down)
                for (int across = 0; across < 2; ++across)
                    for (int k = 0; k < task.count; ++k)
                        atomicAdd(target + rows[down] * map_row + cols[across] * map_col +
                                      k * map_channel,
                                  weights[down][across] * sent[k]);
        }
}
