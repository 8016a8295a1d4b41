// Operations of a layer on one row of numbers, shared by generation and training.
#pragma once

#include <cmath>

#include "vectors.h"

// 1 / the root mean square of a row.
template <class T>
inline float inverse_rms(const T* x, int64_t size, double eps) {
  Floats squares = {};
  float rest = 0;
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) squares += load(x + i) * load(x + i);
  for (; i < size; i++) rest += widen(x[i]) * widen(x[i]);
  return 1.0f / std::sqrt((sum(squares) + rest) / size + float(eps));
}

// y = weight * (x * scale), each product rounded.
template <class T>
inline void normalize(const T* x, const T* weight, T* y, int64_t size, float scale) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store(y + i, load(weight + i) * rounded<T>(load(x + i) * scale));
  for (; i < size; i++) y[i] = narrow<T>(widen(weight[i]) * rounded<T>(widen(x[i]) * scale));
}

// silu(x) = x / (1 + e^-x), rounded.
template <class T>
inline Floats silu(Floats x) {
  return rounded<T>(x / (1.0f + exponential(-x)));
}

// y = silu(gate) * up.
template <class T>
inline void gate_row(const T* gate, const T* up, T* y, int64_t size) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store(y + i, silu<T>(load(gate + i)) * load(up + i));
  if (const int64_t rest = size - i)
    store_some(y + i, silu<T>(load_some(gate + i, rest)) * load_some(up + i, rest), rest);
}
