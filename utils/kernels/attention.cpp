// Causal attention within each sequence of a packed row, forward and backward, in fp32 whatever the type in memory.
//
//   N   tokens of the row, of which the sequences cover the first    D   size of a head
//   Q   query heads                                                  K   key-value heads, each shared by Q / K of them
//   W   tokens of a sequence
//
// Softmax weights are computed for a few queries at a time, in the forward and again in the backward pass (Dao et al.
// 2022, appendix B.2). Nothing depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <vector>

#include "attention.h"

namespace {

int64_t whole_vectors(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// One head of a sequence in fp32: (W, D) and transposed, (D, W), both padded to whole vectors with zeros.
struct Head {
  int64_t width = 0, size = 0;  // padded
  std::vector<float> rows, columns;

  template <class T>
  void read(const T* tokens, int64_t count, int64_t head_size, int64_t stride, bool needs_rows, bool needs_columns) {
    width = whole_vectors(count), size = whole_vectors(head_size);
    if (needs_rows) rows.assign(width * size, 0.0f);
    if (needs_columns) columns.assign(width * size, 0.0f);
    for (int64_t t = 0; t < count; t++) {
      for (int64_t d = 0; d < head_size; d++) {
        const float value = widen(tokens[t * stride + d]);
        if (needs_rows) rows[t * size + d] = value;
        if (needs_columns) columns[d * width + t] = value;
      }
    }
  }
};

template <class T>
void read_row(const T* from, float* to, int64_t size) {
  for (int64_t d = 0; d < size; d++) to[d] = widen(from[d]);
}

template <class T>
void write_row(const float* from, T* to, int64_t size) {
  for (int64_t d = 0; d < size; d++) to[d] = narrow<T>(from[d]);
}

// query, attended   (N, Q, D)       key, value   (N, K, D)       boundaries   (sequences + 1,) where they start and end
template <class T>
void attend_packed(const T* query, const T* key, const T* value, const int32_t* boundaries, T* attended,
                   int64_t sequences, int64_t query_heads, int64_t kv_heads, int64_t size, double scale,
                   int64_t threads) {
  const int64_t group = query_heads / kv_heads, stride = query_heads * size, kv_stride = kv_heads * size;
#pragma omp parallel num_threads(threads) if (boundaries[sequences] * stride > PARALLEL_WORK)
  {
    Head keys, values;
    std::vector<float> weights, queries, results;
    Ahead nothing{};
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < sequences * kv_heads; task++) {
      const int64_t head = task % kv_heads, start = boundaries[task / kv_heads];
      const int64_t count = boundaries[task / kv_heads + 1] - start;
      keys.read(key + start * kv_stride + head * size, count, size, kv_stride, false, true);
      values.read(value + start * kv_stride + head * size, count, size, kv_stride, true, false);
      weights.resize(GROUP * keys.width);
      queries.assign(GROUP * keys.size, 0.0f);
      results.resize(GROUP * keys.size);
      for (int64_t query_head = head * group; query_head < (head + 1) * group; query_head++) {
        for (int64_t t = 0; t < count; t += GROUP) {
          const int64_t place = (start + t) * stride + query_head * size, some = std::min(GROUP, count - t);
          for (int64_t q = 0; q < some; q++) read_row(query + place + q * stride, &queries[q * keys.size], size);
          if (some == GROUP) {
            attend_group<GROUP>(queries.data(), keys.columns.data(), values.rows.data(), weights.data(), results.data(),
                                keys.size, t + GROUP, true, keys.width, keys.size, float(scale), nothing, nothing);
          } else {
            for (int64_t q = 0; q < some; q++)
              attend_group<1>(&queries[q * keys.size], keys.columns.data(), values.rows.data(), weights.data(),
                              &results[q * keys.size], keys.size, t + q + 1, true, keys.width, keys.size, float(scale),
                              nothing, nothing);
          }
          for (int64_t q = 0; q < some; q++) write_row(&results[q * keys.size], attended + place + q * stride, size);
        }
      }
    }
  }
}

// totals[t][:PARTS * LANES] += sum over COUNT queries of weights[g][t] * rows[g], for t < length.
template <int COUNT, int PARTS>
void add_some_products(const float* weights, const float* rows, float* totals, int64_t size, int64_t length,
                       int64_t capacity) {
  Floats factors[COUNT][PARTS];
  for (int g = 0; g < COUNT; g++)
    for (int part = 0; part < PARTS; part++) factors[g][part] = load(rows + g * size + part * LANES);
  for (int64_t t = 0; t < length; t++) {
    for (int part = 0; part < PARTS; part++) {
      float* total = totals + t * size + part * LANES;
      Floats added = load(total);
      for (int g = 0; g < COUNT; g++) added += weights[g * capacity + t] * factors[g][part];
      store(total, added);
    }
  }
}

template <int COUNT>
void add_products(const float* weights, const float* rows, float* totals, int64_t size, int64_t length,
                  int64_t capacity) {
  int64_t d = 0;
  for (; d + 4 * LANES <= size; d += 4 * LANES)
    add_some_products<COUNT, 4>(weights, rows + d, totals + d, size, length, capacity);
  const int64_t parts = (size - d) / LANES;
  if (parts == 3) add_some_products<COUNT, 3>(weights, rows + d, totals + d, size, length, capacity);
  if (parts == 2) add_some_products<COUNT, 2>(weights, rows + d, totals + d, size, length, capacity);
  if (parts == 1) add_some_products<COUNT, 1>(weights, rows + d, totals + d, size, length, capacity);
}

// Buffers for the backward pass of one head of a sequence: K, V and the gradients of both, (W, D), among others.
struct Backward {
  Head keys, values;
  std::vector<float> of_keys, of_values, queries, gradients, results, weights, of_scores;

  template <class T>
  void begin(const T* key, const T* value, int64_t count, int64_t size, int64_t stride) {
    keys.read(key, count, size, stride, true, true);
    values.read(value, count, size, stride, false, true);
    of_keys.assign(keys.width * keys.size, 0.0f);
    of_values.assign(keys.width * keys.size, 0.0f);
    queries.assign(GROUP * keys.size, 0.0f);
    gradients.assign(GROUP * keys.size, 0.0f);
    results.resize(GROUP * keys.size);
    weights.resize(GROUP * keys.width);
    of_scores.resize(GROUP * keys.width);
  }

  // With P = softmax(scale Q K^T) and dP = dO V^T: dS = P (dP - sum of P dP) scale, dQ = dS K, dK += dS^T Q, dV += P^T dO,
  // for COUNT neighbouring queries from number `first` of those loaded, the last of which attends to `length` tokens.
  template <int COUNT>
  void step(int64_t first, int64_t length, float scale) {
    Ahead nothing{};
    const int64_t size = keys.size, width = keys.width, filled = whole_vectors(length);
    const float *q = &queries[first * size], *g = &gradients[first * size];
    group_scores<COUNT>(q, keys.columns.data(), weights.data(), size, length, width, scale, nothing);
    group_scores<COUNT>(g, values.columns.data(), of_scores.data(), size, length, width, 1.0f, nothing);
    for (int64_t row = 0; row < COUNT; row++) {
      float *p = &weights[row * width], *s = &of_scores[row * width];
      softmax(p, length - (COUNT - 1 - row), filled);
      Floats products = {};
      for (int64_t t = 0; t < filled; t += LANES) products += load(p + t) * load(s + t);
      const float mean = sum(products);
      for (int64_t t = 0; t < filled; t += LANES) store(s + t, load(p + t) * (load(s + t) - mean) * scale);
    }
    weighted_sums<COUNT>(of_scores.data(), keys.rows.data(), &results[first * size], size, length, width, size,
                         nothing);
    add_products<COUNT>(of_scores.data(), q, of_keys.data(), size, length, width);
    add_products<COUNT>(weights.data(), g, of_values.data(), size, length, width);
  }
};

// gradient, query, of_query   (N, Q, D)       key, value, of_key, of_value   (N, K, D)
template <class T>
void attend_packed_backward(const T* gradient, const T* query, const T* key, const T* value, const int32_t* boundaries,
                            T* of_query, T* of_key, T* of_value, int64_t sequences, int64_t query_heads,
                            int64_t kv_heads, int64_t size, double scale, int64_t threads) {
  const int64_t group = query_heads / kv_heads, stride = query_heads * size, kv_stride = kv_heads * size;
#pragma omp parallel num_threads(threads) if (boundaries[sequences] * stride > PARALLEL_WORK)
  {
    Backward work;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < sequences * kv_heads; task++) {
      const int64_t head = task % kv_heads, start = boundaries[task / kv_heads];
      const int64_t count = boundaries[task / kv_heads + 1] - start, from = start * kv_stride + head * size;
      work.begin(key + from, value + from, count, size, kv_stride);
      const int64_t padded = work.keys.size;
      for (int64_t query_head = head * group; query_head < (head + 1) * group; query_head++) {
        for (int64_t t = 0; t < count; t += GROUP) {
          const int64_t place = (start + t) * stride + query_head * size, some = std::min(GROUP, count - t);
          for (int64_t q = 0; q < some; q++) {
            read_row(query + place + q * stride, &work.queries[q * padded], size);
            read_row(gradient + place + q * stride, &work.gradients[q * padded], size);
          }
          if (some == GROUP) {
            work.step<GROUP>(0, t + GROUP, float(scale));
          } else {
            for (int64_t q = 0; q < some; q++) work.step<1>(q, t + q + 1, float(scale));
          }
          for (int64_t q = 0; q < some; q++) write_row(&work.results[q * padded], of_query + place + q * stride, size);
        }
      }
      for (int64_t t = 0; t < count; t++) {
        write_row(&work.of_keys[t * padded], of_key + from + t * kv_stride, size);
        write_row(&work.of_values[t * padded], of_value + from + t * kv_stride, size);
      }
    }
  }
}

}  // namespace

#define EXPORT(SUFFIX, T)                                                                                              \
  void attend_packed_##SUFFIX(const T* query, const T* key, const T* value, const int32_t* boundaries, T* attended,   \
                              int64_t sequences, int64_t query_heads, int64_t kv_heads, int64_t size, double scale,   \
                              int64_t threads) {                                                                      \
    attend_packed(query, key, value, boundaries, attended, sequences, query_heads, kv_heads, size, scale, threads);   \
  }                                                                                                                    \
  void attend_packed_backward_##SUFFIX(const T* gradient, const T* query, const T* key, const T* value,               \
                                       const int32_t* boundaries, T* of_query, T* of_key, T* of_value,                \
                                       int64_t sequences, int64_t query_heads, int64_t kv_heads, int64_t size,        \
                                       double scale, int64_t threads) {                                               \
    attend_packed_backward(gradient, query, key, value, boundaries, of_query, of_key, of_value, sequences,            \
                           query_heads, kv_heads, size, scale, threads);                                              \
  }

extern "C" {
EXPORT(f32, float)
EXPORT(bf16, bfloat16)
}
