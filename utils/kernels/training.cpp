// Layers of training and scoring, forward and backward, between the matrix products.
//
//   n   tokens        H   hidden units        I   units between gate and down        D   size of a head
//
// Results are rounded to the type of the tensors where the layers of `transformers` round theirs; gradients are computed
// in fp32 and rounded once. Nothing depends on the number of threads.

#include <algorithm>

#include "rows.h"

namespace {

constexpr int64_t PART = 32;  // rows whose weight gradients are added up by one thread

// outputs (n, H) = weight * (x * scale), where scales (n,) are 1 / the root mean square of each row.
template <class T>
void rms_norm(const T* x, const T* weight, T* outputs, float* scales, int64_t rows, int64_t size, double eps,
              int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > PARALLEL_WORK)
  for (int64_t row = 0; row < rows; row++) {
    scales[row] = inverse_rms(x + row * size, size, eps);
    normalize(x + row * size, weight, outputs + row * size, size, scales[row]);
  }
}

// With g = gradient * weight and y = x * scale:
//
//   of_x = scale * (g - y * mean(g * y))        of_weight = sum over rows of gradient * y
//
// sums (ceil(n / PART), H) are zeros, or null where the weight needs no gradient.
template <class T>
void rms_norm_backward(const T* gradient, const T* x, const T* weight, const float* scales, T* of_x, T* of_weight,
                       float* sums, int64_t rows, int64_t size, int64_t threads) {
  const int64_t parts = (rows + PART - 1) / PART, whole = size / LANES * LANES;
#pragma omp parallel for num_threads(threads) if (rows * size > PARALLEL_WORK)
  for (int64_t part = 0; part < parts; part++) {
    float* total = sums ? sums + part * size : nullptr;
    for (int64_t row = part * PART; row < std::min(rows, (part + 1) * PART); row++) {
      const T *g = gradient + row * size, *value = x + row * size;
      T* to = of_x + row * size;
      const float scale = scales[row];
      Floats products = {};
      float rest = 0;
      for (int64_t i = 0; i < whole; i += LANES) products += load(g + i) * load(weight + i) * load(value + i);
      for (int64_t i = whole; i < size; i++) rest += widen(g[i]) * widen(weight[i]) * widen(value[i]);
      const float along = (sum(products) + rest) * scale * scale / size;
      for (int64_t i = 0; i < whole; i += LANES) {
        const Floats up = load(g + i), own = load(value + i);
        store(to + i, scale * (up * load(weight + i) - own * along));
        if (total) store(total + i, load(total + i) + up * rounded<T>(own * scale));
      }
      for (int64_t i = whole; i < size; i++) {
        const float up = widen(g[i]), own = widen(value[i]);
        to[i] = narrow<T>(scale * (up * widen(weight[i]) - own * along));
        if (total) total[i] += up * rounded<T>(own * scale);
      }
    }
  }
  if (!sums) return;
  for (int64_t part = 1; part < parts; part++)
    for (int64_t i = 0; i < size; i++) sums[i] += sums[part * size + i];
  for (int64_t i = 0; i < size; i++) of_weight[i] = narrow<T>(sums[i]);
}

// The halves (a, b) of a head become (a cos - b sin, b cos + a sin); `back` is the transposed map. Handles
// numbers i to i + some of each half.
template <class T, bool back, bool whole>
inline void turn_some(const T* x, const T* cos, const T* sin, T* y, int64_t half, int64_t i, int64_t some) {
  const auto get = [&](const T* from) { return whole ? load(from) : load_some(from, some); };
  const Floats a = get(x + i), b = get(x + half + i), first = get(sin + i), second = get(sin + half + i);
  const Floats of_b = rounded<T>(back ? b * second : -b * first), of_a = rounded<T>(back ? -a * first : a * second);
  const Floats low = rounded<T>(a * get(cos + i)) + of_b, high = rounded<T>(b * get(cos + half + i)) + of_a;
  if (whole) {
    store(y + i, low);
    store(y + half + i, high);
  } else {
    store_some(y + i, low, some);
    store_some(y + half + i, high, some);
  }
}

template <class T, bool back>
void turn(const T* x, const T* cos, const T* sin, T* y, int64_t half) {
  for (int64_t i = 0; i + LANES <= half; i += LANES) turn_some<T, back, true>(x, cos, sin, y, half, i, LANES);
  if (half % LANES == 0) return;
  if (half > LANES)  // recomputes some numbers rather than load part of a vector: `y` must not alias `x`
    turn_some<T, back, true>(x, cos, sin, y, half, half - LANES, LANES);
  else
    turn_some<T, back, false>(x, cos, sin, y, half, 0, half);
}

// outputs (n, heads, D) = x rotated by cos and sin (n, D), or rotated back.
template <class T>
void rotary(const T* x, const T* cos, const T* sin, T* outputs, int64_t rows, int64_t heads, int64_t size, int64_t back,
            int64_t threads) {
  const auto turns = back ? turn<T, true> : turn<T, false>;
#pragma omp parallel for num_threads(threads) if (rows * heads * size > PARALLEL_WORK)
  for (int64_t row = 0; row < rows; row++)
    for (int64_t head = row * heads; head < (row + 1) * heads; head++)
      turns(x + head * size, cos + row * size, sin + row * size, outputs + head * size, size / 2);
}

// outputs (n, I) = silu(gate) * up.
template <class T>
void swiglu(const T* gate, const T* up, T* outputs, int64_t rows, int64_t size, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > PARALLEL_WORK)
  for (int64_t row = 0; row < rows; row++)
    gate_row(gate + row * size, up + row * size, outputs + row * size, size);
}

// Gradients of gate and up (n, I) from that of the product; `product`, unless null, receives silu(gate) * up and may
// alias `gradient`. With s = sigmoid(gate), d silu / d gate = s (1 + gate (1 - s)).
template <class T>
void swiglu_backward(const T* gradient, const T* gate, const T* up, T* of_gate, T* of_up, T* product, int64_t rows,
                     int64_t size, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > PARALLEL_WORK)
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t i = row * size; i < (row + 1) * size; i += LANES) {
      const int64_t some = std::min(LANES, (row + 1) * size - i);
      const bool whole = some == LANES;
      const Floats g = whole ? load(gradient + i) : load_some(gradient + i, some);
      const Floats x = whole ? load(gate + i) : load_some(gate + i, some);
      const Floats u = whole ? load(up + i) : load_some(up + i, some);
      const Floats share = 1.0f / (1.0f + exponential(-x)), smooth = silu<T>(x);
      const auto put = [&](T* to, Floats values) {
        whole ? store(to + i, values) : store_some(to + i, values, some);
      };
      put(of_gate, g * u * share * (1.0f + x * (1.0f - share)));
      put(of_up, g * smooth);
      if (product) put(product, smooth * u);
    }
  }
}

}  // namespace

#define EXPORT(SUFFIX, T)                                                                                              \
  void rms_norm_##SUFFIX(const T* x, const T* weight, T* outputs, float* scales, int64_t rows, int64_t size,          \
                         double eps, int64_t threads) {                                                               \
    rms_norm(x, weight, outputs, scales, rows, size, eps, threads);                                                    \
  }                                                                                                                    \
  void rms_norm_backward_##SUFFIX(const T* gradient, const T* x, const T* weight, const float* scales, T* of_x,       \
                                  T* of_weight, float* sums, int64_t rows, int64_t size, int64_t threads) {           \
    rms_norm_backward(gradient, x, weight, scales, of_x, of_weight, sums, rows, size, threads);                        \
  }                                                                                                                    \
  void rotary_##SUFFIX(const T* x, const T* cos, const T* sin, T* outputs, int64_t rows, int64_t heads, int64_t size, \
                       int64_t back, int64_t threads) {                                                                \
    rotary(x, cos, sin, outputs, rows, heads, size, back, threads);                                                    \
  }                                                                                                                    \
  void swiglu_##SUFFIX(const T* gate, const T* up, T* outputs, int64_t rows, int64_t size, int64_t threads) {         \
    swiglu(gate, up, outputs, rows, size, threads);                                                                    \
  }                                                                                                                    \
  void swiglu_backward_##SUFFIX(const T* gradient, const T* gate, const T* up, T* of_gate, T* of_up, T* product,      \
                                int64_t rows, int64_t size, int64_t threads) {                                        \
    swiglu_backward(gradient, gate, up, of_gate, of_up, product, rows, size, threads);                                 \
  }

extern "C" {
EXPORT(f32, float)
EXPORT(bf16, bfloat16)
}
