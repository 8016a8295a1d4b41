// Attention of a few queries to the keys and values of a head, shared by generation and training.
#pragma once

#include <cmath>

#include "vectors.h"

constexpr int64_t GROUP = 4;  // queries that share each read of a key

// Memory to prefetch, a cache line at a time, while something else is computed: `lines` of 64 bytes in each of `rows`
// that lie `stride` bytes apart.
struct Ahead {
  const char* from;
  int64_t rows, lines, stride;
  int64_t row = 0, line = 0;

  void fetch() {
    if (row >= rows) return;
    __builtin_prefetch(from + row * stride + line * 64);
    if (++line == lines) line = 0, row++;
  }
};

// weights[g][t] = scale * queries[g] . keys[:, t] for COUNT queries and VECTORS * LANES positions from t on.
template <int COUNT, int VECTORS, class T>
inline void some_scores(const float* queries, const T* keys, float* weights, int64_t size, int64_t capacity, float scale,
                 Ahead& ahead) {
  Floats sums[COUNT][VECTORS] = {};
  for (int64_t d = 0; d < size; d++) {
    ahead.fetch();
    for (int v = 0; v < VECTORS; v++) {
      const Floats key = load(keys + d * capacity + v * LANES);
      for (int g = 0; g < COUNT; g++) sums[g][v] += queries[g * size + d] * key;
    }
  }
  for (int g = 0; g < COUNT; g++)
    for (int v = 0; v < VECTORS; v++) store(weights + g * capacity + v * LANES, sums[g][v] * scale);
}

// The same for all positions before `length`, rounded up to whole vectors.
template <int COUNT, class T>
inline void group_scores(const float* queries, const T* keys, float* weights, int64_t size, int64_t length, int64_t capacity,
                  float scale, Ahead& ahead) {
  int64_t t = 0;
  for (; t + 3 * LANES < length; t += 4 * LANES)
    some_scores<COUNT, 4>(queries, keys + t, weights + t, size, capacity, scale, ahead);
  for (; t < length; t += LANES)
    some_scores<COUNT, 1>(queries, keys + t, weights + t, size, capacity, scale, ahead);
}

// Softmax of the first `length` weights; those up to `filled`, a whole number of vectors, become 0.
inline void softmax(float* weights, int64_t length, int64_t filled) {
  for (int64_t t = length; t < filled; t++) weights[t] = -INFINITY;
  Floats highest_of = load(weights);
  for (int64_t t = LANES; t < filled; t += LANES) highest_of = larger(load(weights + t), highest_of);
  const float highest = largest(highest_of);
  Floats total = {};
  for (int64_t t = 0; t < filled; t += LANES) {
    const Floats value = exponential(load(weights + t) - highest);
    total += value;
    store(weights + t, value);
  }
  const float share = 1.0f / sum(total);
  for (int64_t t = 0; t < filled; t += LANES) store(weights + t, load(weights + t) * share);
}

// attended[g][:PARTS * LANES] = weights[g] . values for COUNT queries, where values are (length, D).
template <int COUNT, int PARTS, class T>
inline void some_sums(const float* weights, const T* values, T* attended, int64_t size, int64_t length, int64_t capacity,
               int64_t stride, Ahead& ahead) {
  Floats sums[COUNT][PARTS] = {};
  for (int64_t t = 0; t < length; t++) {
    ahead.fetch();
    for (int part = 0; part < PARTS; part++) {
      const Floats value = load(values + t * size + part * LANES);
      for (int g = 0; g < COUNT; g++) sums[g][part] += weights[g * capacity + t] * value;
    }
  }
  for (int g = 0; g < COUNT; g++)
    for (int part = 0; part < PARTS; part++) store(attended + g * stride + part * LANES, sums[g][part]);
}

template <int COUNT, class T>
inline void weighted_sums(const float* weights, const T* values, T* attended, int64_t size, int64_t length, int64_t capacity,
                   int64_t stride, Ahead& ahead) {
  int64_t d = 0;
  for (; d + 4 * LANES <= size; d += 4 * LANES)
    some_sums<COUNT, 4>(weights, values + d, attended + d, size, length, capacity, stride, ahead);
  const int64_t parts = (size - d) / LANES;
  if (parts == 3) some_sums<COUNT, 3>(weights, values + d, attended + d, size, length, capacity, stride, ahead);
  if (parts == 2) some_sums<COUNT, 2>(weights, values + d, attended + d, size, length, capacity, stride, ahead);
  if (parts == 1) some_sums<COUNT, 1>(weights, values + d, attended + d, size, length, capacity, stride, ahead);
  for (d += parts * LANES; d < size; d++) {
    for (int g = 0; g < COUNT; g++) {
      float total = 0;
      for (int64_t t = 0; t < length; t++) total += weights[g * capacity + t] * widen(values[t * size + d]);
      attended[g * stride + d] = narrow<T>(total);
    }
  }
}

// Attention of COUNT queries to the first `length` keys and values of a head; with `causal` the queries are those
// of neighbouring tokens: the last attends to `length` keys, each earlier one to one fewer. `weights` is scratch space
// for COUNT rows of `capacity`, and results are `stride` apart.
template <int COUNT, class T>
inline void attend_group(const float* queries, const T* keys, const T* values, float* weights, T* attended, int64_t size,
                  int64_t length, bool causal, int64_t capacity, int64_t stride, float scale, Ahead& own_values,
                  Ahead& next_keys) {
  group_scores<COUNT>(queries, keys, weights, size, length, capacity, scale, own_values);
  const int64_t filled = (length + LANES - 1) / LANES * LANES;
  for (int64_t g = 0; g < COUNT; g++)
    softmax(weights + g * capacity, causal ? length - (COUNT - 1 - g) : length, filled);
  weighted_sums<COUNT>(weights, values, attended, size, length, capacity, stride, next_keys);
}
