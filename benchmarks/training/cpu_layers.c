// Training layers for channels-last activations, compiled by cpu_layers.py: with VALUE_BITS 16 for bfloat16, 32 for float.
// BatchNorm sees a matrix of rows, one per pixel, by channels. Each function does its rows or images begin to end - 1.
#include <stdint.h>
#include <string.h>

#if VALUE_BITS == 16
typedef uint16_t value;
static inline float load(value v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
static inline value store(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof f);
    return (value)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // to the nearest, ties to even
}
#else
typedef float value;
static inline float load(value v) { return v; }
static inline value store(float f) { return f; }
#endif

// The gradient behind ReLU6, given the gradient in front of it and the normalised value y.
static inline float behind(float gradient, float y, int64_t relu6) {
    return !relu6 || (y > 0.0f && y < 6.0f) ? gradient : 0.0f;
}

// Sums of x - x[0] and of its squares, a row of `sum` and `squares` for every `block` rows; begin is a multiple of block.
// With x[0], a variance that is small beside the mean isn't lost in the difference of two sums.
void sums(int64_t begin, int64_t end, int64_t channels, int64_t block, const value *restrict x, float *restrict sum,
          float *restrict squares) {
    for (int64_t first = begin; first < end; first += block) {
        float *restrict s = sum + first / block * channels, *restrict q = squares + first / block * channels;
        memset(s, 0, channels * sizeof *s);
        memset(q, 0, channels * sizeof *q);
        for (int64_t r = first; r < end && r < first + block; r++) {
            const value *restrict xs = x + r * channels;
            for (int64_t c = 0; c < channels; c++) {
                float v = load(xs[c]) - load(x[c]);
                s[c] += v;
                q[c] += v * v;
            }
        }
    }
}

// y = ReLU6(scale * x + shift)
void normalize(int64_t begin, int64_t end, int64_t channels, int64_t relu6, const value *restrict x,
               const float *restrict scale, const float *restrict shift, value *restrict y) {
    const float low = relu6 ? 0.0f : -__builtin_inff(), high = relu6 ? 6.0f : __builtin_inff();
    for (int64_t r = begin; r < end; r++) {
        const value *restrict xs = x + r * channels;
        value *restrict ys = y + r * channels;
        for (int64_t c = 0; c < channels; c++) {
            float v = scale[c] * load(xs[c]) + shift[c];
            v = v < low ? low : v;
            ys[c] = store(v > high ? high : v);
        }
    }
}

// Sums of the gradient and of the gradient times (x - mean), in rows like those of `sums`.
void gradient_sums(int64_t begin, int64_t end, int64_t channels, int64_t block, int64_t relu6,
                   const value *restrict gradient, const value *restrict x, const float *restrict scale,
                   const float *restrict shift, const float *restrict mean, float *restrict sum,
                   float *restrict products) {
    for (int64_t first = begin; first < end; first += block) {
        float *restrict s = sum + first / block * channels, *restrict p = products + first / block * channels;
        memset(s, 0, channels * sizeof *s);
        memset(p, 0, channels * sizeof *p);
        for (int64_t r = first; r < end && r < first + block; r++) {
            const value *restrict gs = gradient + r * channels, *restrict xs = x + r * channels;
            for (int64_t c = 0; c < channels; c++) {
                float v = load(xs[c]), g = behind(load(gs[c]), scale[c] * v + shift[c], relu6);
                s[c] += g;
                p[c] += g * (v - mean[c]);
            }
        }
    }
}

// dx = scale * gradient + by_x * x + constant
void gradient_of_x(int64_t begin, int64_t end, int64_t channels, int64_t relu6, const value *restrict gradient,
                   const value *restrict x, const float *restrict scale, const float *restrict shift,
                   const float *restrict by_x, const float *restrict constant, value *restrict dx) {
    for (int64_t r = begin; r < end; r++) {
        const value *restrict gs = gradient + r * channels, *restrict xs = x + r * channels;
        value *restrict ds = dx + r * channels;
        for (int64_t c = 0; c < channels; c++) {
            float v = load(xs[c]), g = behind(load(gs[c]), scale[c] * v + shift[c], relu6);
            ds[c] = store(scale[c] * g + by_x[c] * v + constant[c]);
        }
    }
}

// LANES channels, which the loops below take at once; cpu_layers.py says how many.
typedef float lanes __attribute__((vector_size(4 * LANES)));

static inline lanes load_lanes(const value *v) {
    lanes result;
    for (int i = 0; i < LANES; i++) result[i] = load(v[i]);
    return result;
}

// Gradients of a 3x3 depthwise convolution with padding 1, for the images begin to end - 1.
//
// x and dx are (images, height, width, channels), the gradient (images, rows, columns, channels) with
// rows = (height - 1) / stride + 1, likewise the columns; channels is a multiple of LANES. The weight is
// (3, 3, channels), and `dw` has one such gradient for each image. `space` holds 2 * (height + 2) * (width + 2) * LANES
// floats for this call alone: both operands with a border of zeros, the gradient with zeros between its pixels as well
// if the stride is above 1.
void depthwise_gradients(int64_t begin, int64_t end, int64_t height, int64_t width, int64_t channels, int64_t stride,
                         const value *restrict gradient, const value *restrict x, const float *restrict weight,
                         value *restrict dx, float *restrict dw, lanes *restrict space) {
    const int64_t rows = (height - 1) / stride + 1, columns = (width - 1) / stride + 1;
    const int64_t line = width + 2, area = (height + 2) * line;
    lanes *restrict xs = space, *restrict gs = space + area;
    memset(space, 0, 2 * area * sizeof *space);
    for (int64_t n = begin; n < end; n++)
        for (int64_t c = 0; c < channels; c += LANES) {
            const value *from_x = x + n * height * width * channels + c;
            for (int64_t h = 0; h < height; h++)
                for (int64_t w = 0; w < width; w++)
                    xs[(h + 1) * line + w + 1] = load_lanes(from_x + (h * width + w) * channels);
            const value *from_g = gradient + n * rows * columns * channels + c;
            for (int64_t h = 0; h < rows; h++)
                for (int64_t w = 0; w < columns; w++)
                    gs[(h * stride + 1) * line + w * stride + 1] = load_lanes(from_g + (h * columns + w) * channels);
            lanes k[9], sum[9] = {{0}};
            for (int i = 0; i < 9; i++) memcpy(&k[i], weight + i * channels + c, sizeof *k);
            value *to = dx + n * height * width * channels + c;
            for (int64_t h = 0; h < height; h++) {
                const lanes *restrict xc = xs + (h + 1) * line + 1, *restrict gc = gs + (h + 1) * line + 1;
                for (int64_t w = 0; w < width; w++) {
                    lanes total = {0};
                    for (int i = 0; i < 3; i++)
                        for (int j = 0; j < 3; j++) {
                            int64_t offset = (i - 1) * line + j - 1;
                            total += k[3 * i + j] * gc[w - offset];
                            sum[3 * i + j] += gc[w] * xc[w + offset];
                        }
                    for (int i = 0; i < LANES; i++) to[(h * width + w) * channels + i] = store(total[i]);
                }
            }
            for (int i = 0; i < 9; i++) memcpy(dw + (9 * n + i) * channels + c, &sum[i], sizeof *sum);
        }
}
