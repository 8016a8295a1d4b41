// One step of generation, between the matrix products.
//
//   n   rows that decode together       D   size of a head
//   Q   query heads                     K   key-value heads, each read by G = Q / K query heads
//
// Results are rounded to the type of the tensors exactly where the layers of `transformers` round theirs, except that
// attention keeps its weights in fp32. What a row becomes does not depend on the others, nor on the threads.

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t MOST_GROUP = 4;  // query heads that read a key together

// residual += added (unless that is null); normed = weight * (residual / its root mean square).
template <class T>
void add_rms_norm(T* residual, const T* added, const T* weight, T* normed, int64_t rows, int64_t size, double eps,
                  int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > PARALLEL_WORK)
  for (int64_t row = 0; row < rows; row++) {
    T* x = residual + row * size;
    const T* delta = added ? added + row * size : nullptr;
    T* y = normed + row * size;
    const int64_t whole = size / LANES * LANES;
    Floats squares = {};
    float rest = 0;
    for (int64_t i = 0; i < whole; i += LANES) {
      Floats value = load(x + i);
      if (delta) {
        value = rounded<T>(value + load(delta + i));
        store(x + i, value);
      }
      squares += value * value;
    }
    for (int64_t i = whole; i < size; i++) {
      if (delta) x[i] = narrow<T>(widen(x[i]) + widen(delta[i]));
      rest += widen(x[i]) * widen(x[i]);
    }
    const float scale = 1.0f / std::sqrt((sum(squares) + rest) / size + float(eps));
    for (int64_t i = 0; i < whole; i += LANES) store(y + i, load(weight + i) * rounded<T>(load(x + i) * scale));
    for (int64_t i = whole; i < size; i++) y[i] = narrow<T>(widen(weight[i]) * rounded<T>(widen(x[i]) * scale));
  }
}

// One head turned by its position: `sin` has the sign of the half that it multiplies.
template <class T>
void rotate(const T* x, const T* cos, const T* sin, float* y, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = widen(x[i]), b = widen(x[i + half]);
    y[i] = rounded<T>(rounded<T>(a * widen(cos[i])) + rounded<T>(b * widen(sin[i])));
    y[i + half] = rounded<T>(rounded<T>(b * widen(cos[i + half])) + rounded<T>(a * widen(sin[i + half])));
  }
}

// Memory that is needed soon, fetched a line at a time while something else is computed: `lines` of 64 bytes in each of
// `rows` that lie `stride` bytes apart.
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

// weights[g][t] = scale * queries[g] . keys[:, t] for GROUP queries and VECTORS * LANES places from t on.
template <int GROUP, int VECTORS, class T>
void some_scores(const float* queries, const T* keys, float* weights, int64_t size, int64_t capacity, float scale,
                 Ahead& ahead) {
  Floats sums[GROUP][VECTORS] = {};
  for (int64_t d = 0; d < size; d++) {
    ahead.fetch();
    for (int v = 0; v < VECTORS; v++) {
      const Floats key = load(keys + d * capacity + v * LANES);
      for (int g = 0; g < GROUP; g++) sums[g][v] += queries[g * size + d] * key;
    }
  }
  for (int g = 0; g < GROUP; g++)
    for (int v = 0; v < VECTORS; v++) store(weights + g * capacity + v * LANES, sums[g][v] * scale);
}

// The same for all places before `length`, rounded up to whole vectors.
template <int GROUP, class T>
void group_scores(const float* queries, const T* keys, float* weights, int64_t size, int64_t length, int64_t capacity,
                  float scale, Ahead& ahead) {
  int64_t t = 0;
  for (; t + 3 * LANES < length; t += 4 * LANES)
    some_scores<GROUP, 4>(queries, keys + t, weights + t, size, capacity, scale, ahead);
  for (; t < length; t += LANES)
    some_scores<GROUP, 1>(queries, keys + t, weights + t, size, capacity, scale, ahead);
}

void softmax(float* weights, int64_t length) {
  float highest = weights[0];
  for (int64_t t = 1; t < length; t++) highest = weights[t] > highest ? weights[t] : highest;
  const int64_t end = (length + LANES - 1) / LANES * LANES;
  for (int64_t t = length; t < end; t++) weights[t] = -INFINITY;
  Floats total = {};
  for (int64_t t = 0; t < end; t += LANES) {
    const Floats value = exponential(load(weights + t) - highest);
    total += value;
    store(weights + t, value);
  }
  const float share = 1.0f / sum(total);
  for (int64_t t = 0; t < end; t += LANES) store(weights + t, load(weights + t) * share);
}

// attended[:PARTS * LANES] = weights . values, where values are (length, D).
template <int PARTS, class T>
void weighted_part(const float* weights, const T* values, T* attended, int64_t size, int64_t length, Ahead& ahead) {
  Floats even[PARTS] = {}, odd[PARTS] = {};
  int64_t t = 0;
  for (; t + 2 <= length; t += 2) {
    for (int part = 0; part < PARTS; part++) {
      even[part] += weights[t] * load(values + t * size + part * LANES);
      odd[part] += weights[t + 1] * load(values + (t + 1) * size + part * LANES);
      ahead.fetch();
    }
  }
  for (int part = 0; part < PARTS; part++) {
    if (t < length) even[part] += weights[t] * load(values + t * size + part * LANES);
    store(attended + part * LANES, even[part] + odd[part]);
  }
}

template <class T>
void weighted_sum(const float* weights, const T* values, T* attended, int64_t size, int64_t length, Ahead& ahead) {
  int64_t d = 0;
  for (; d + 4 * LANES <= size; d += 4 * LANES)
    weighted_part<4>(weights, values + d, attended + d, size, length, ahead);
  const int64_t parts = (size - d) / LANES;
  if (parts == 3) weighted_part<3>(weights, values + d, attended + d, size, length, ahead);
  if (parts == 2) weighted_part<2>(weights, values + d, attended + d, size, length, ahead);
  if (parts == 1) weighted_part<1>(weights, values + d, attended + d, size, length, ahead);
  for (d += parts * LANES; d < size; d++) {
    float total = 0;
    for (int64_t t = 0; t < length; t++) total += weights[t] * widen(values[t * size + d]);
    attended[d] = narrow<T>(total);
  }
}

// Turn queries and keys, put keys and values into the cache, and attend to all of it up to each row's position.
//
//   projected   (n, (Q + 2 K) D)    queries, keys and values of the new tokens
//   cos, sin    (positions, D)      keys, values   (n, K, D, capacity) and (n, K, capacity, D), of one layer
//   attended    (n, Q D)
template <class T>
void attend(const T* projected, const T* cos, const T* sin, const int64_t* positions, T* keys, T* values, T* attended,
            int64_t rows, int64_t query_heads, int64_t kv_heads, int64_t size, int64_t capacity, double scale,
            int64_t threads) {
  const int64_t group = query_heads / kv_heads;
#pragma omp parallel num_threads(threads) if (rows * query_heads * size * 16 > PARALLEL_WORK)
  {
    std::vector<float> weights(std::min(group, MOST_GROUP) * capacity), queries(group * size), key(size);
#pragma omp for
    for (int64_t task = 0; task < rows * kv_heads; task++) {
      const int64_t row = task / kv_heads, head = task % kv_heads, position = positions[row];
      const T* fresh = projected + row * (query_heads + 2 * kv_heads) * size;
      const T *turn_cos = cos + position * size, *turn_sin = sin + position * size;
      T *row_keys = keys + task * size * capacity, *row_values = values + task * capacity * size;
      for (int64_t g = 0; g < group; g++)
        rotate(fresh + (head * group + g) * size, turn_cos, turn_sin, queries.data() + g * size, size);
      rotate(fresh + (query_heads + head) * size, turn_cos, turn_sin, key.data(), size);
      for (int64_t d = 0; d < size; d++) row_keys[d * capacity + position] = narrow<T>(key[d]);
      std::copy_n(fresh + (query_heads + kv_heads + head) * size, size, row_values + position * size);
      const int64_t length = position + 1, bytes = sizeof(T);
      Ahead own_values{(const char*)row_values, 1, (length * size * bytes + 63) / 64, 0}, next_keys{};
      if (task + 1 < rows * kv_heads) {
        const int64_t next_length = positions[(task + 1) / kv_heads] + 1;
        const char* from = (const char*)(row_keys + size * capacity);
        next_keys = {from, size, (next_length * bytes + 63) / 64, capacity * bytes};
      }
      for (int64_t first = 0; first < group; first += MOST_GROUP) {
        const int64_t part = std::min(MOST_GROUP, group - first);
        const float* q = queries.data() + first * size;
        if (part == 4) {
          group_scores<4>(q, row_keys, weights.data(), size, length, capacity, float(scale), own_values);
        } else {
          for (int64_t g = 0; g < part; g++)
            group_scores<1>(q + g * size, row_keys, weights.data() + g * capacity, size, length, capacity,
                            float(scale), own_values);
        }
        for (int64_t g = 0; g < part; g++) {
          softmax(weights.data() + g * capacity, length);
          T* to = attended + (row * query_heads + head * group + first + g) * size;
          weighted_sum(weights.data() + g * capacity, row_values, to, size, length, next_keys);
        }
      }
    }
  }
}

// outputs = silu(gate) * up of (n, 2 size) rows that hold gate and up side by side.
template <class T>
void gated(const T* gate_up, T* outputs, int64_t rows, int64_t size, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > PARALLEL_WORK)
  for (int64_t row = 0; row < rows; row++) {
    const T *gate = gate_up + row * 2 * size, *up = gate + size;
    T* y = outputs + row * size;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
      const Floats x = load(gate + i);
      store(y + i, rounded<T>(x / (1.0f + exponential(-x))) * load(up + i));
    }
    for (; i < size; i++) {
      const float x = widen(gate[i]);
      y[i] = narrow<T>(rounded<T>(x / (1.0f + std::exp(-x))) * widen(up[i]));
    }
  }
}

uint64_t mix(uint64_t value) {  // the finalizer of splitmix64, as in sampling.py
  value += 0x9e3779b97f4a7c15;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}

constexpr int64_t BLOCK = 8 * LANES;  // words whose weights are added up before the search

// Sixteen logits divided by the temperature; -infinity for words that do not exist and for the forbidden one.
template <class T>
Floats some_logits(const T* logits, int64_t first, int64_t words, int64_t forbidden, float inverse_temperature) {
  Floats values;
  if (first + LANES <= words) {
    values = load(logits + first);
  } else {
    for (int64_t lane = 0; lane < LANES; lane++)
      values[lane] = first + lane < words ? widen(logits[first + lane]) : -INFINITY;
  }
  if (forbidden >= first && forbidden < first + LANES) values[forbidden - first] = -INFINITY;
  return values * inverse_temperature;
}

// One token per row by inverting the cumulative distribution at a number of the row's own random stream, or the most
// likely one, and its log-probability; as `choose_tokens` in sampling.py without top-k and top-p.
//
//   logits   (n, words)    keys, counters   (n,)    tokens, logprobs   (n,)
template <class T>
void choose(const T* logits, const int64_t* keys, const int64_t* counters, int64_t* tokens, float* logprobs,
            int64_t rows, int64_t words, int64_t greedy, int64_t min_new_tokens, int64_t eos, double temperature,
            int64_t threads) {
  const int64_t blocks = (words + BLOCK - 1) / BLOCK;
  const float inverse = greedy ? 1.0f : float(1.0 / temperature);
#pragma omp parallel num_threads(threads) if (rows * words > PARALLEL_WORK)
  {
    std::vector<double> sums(blocks);
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
      const T* x = logits + row * words;
      const int64_t forbidden = counters[row] < min_new_tokens ? eos : -1;
      Floats highest_of = Floats{} - INFINITY;
      for (int64_t i = 0; i < words; i += LANES)
        highest_of = larger(some_logits(x, i, words, forbidden, inverse), highest_of);
      const float highest = largest(highest_of);
      double total = 0;
      for (int64_t block = 0; block < blocks; block++) {
        Floats part = {};
        const int64_t end = std::min((block + 1) * BLOCK, words);
        for (int64_t i = block * BLOCK; i < end; i += LANES)
          part += exponential(some_logits(x, i, words, forbidden, inverse) - highest);
        sums[block] = sum(part);
        total += sums[block];
      }
      int64_t chosen = -1;
      if (greedy) {
        for (int64_t i = 0; i < words && chosen < 0; i += LANES) {
          const Floats some = some_logits(x, i, words, forbidden, inverse);
          for (int64_t lane = 0; lane < LANES && chosen < 0; lane++)
            if (some[lane] == highest && i + lane < words) chosen = i + lane;
        }
      } else {
        const uint64_t bits = mix(uint64_t(keys[row]) ^ mix(uint64_t(counters[row]))) >> 41;
        const double target = double(bits) * 0x1p-23 * total;
        double before = 0;
        int64_t block = 0;
        while (block + 1 < blocks && before + sums[block] <= target) before += sums[block++];
        // back to a block with weight, where rounding or the last blocks' zeros have led beyond it
        while (block > 0 && sums[block] == 0) before -= sums[--block];
        const int64_t end = std::min((block + 1) * BLOCK, words);
        for (int64_t i = block * BLOCK; i < end; i += LANES) {
          const Floats weights = exponential(some_logits(x, i, words, forbidden, inverse) - highest);
          for (int64_t lane = 0; lane < LANES && i + lane < words; lane++) {
            if (weights[lane] == 0) continue;
            if (chosen >= 0 && before > target) break;
            chosen = i + lane;  // the last word with weight, unless the sum exceeds the target before
            before += weights[lane];
          }
          if (chosen >= 0 && before > target) break;
        }
      }
      if (chosen < 0) chosen = words - 1;  // of logits that are NaN any word, but a word
      const Floats some = some_logits(x, chosen / LANES * LANES, words, forbidden, inverse);
      tokens[row] = chosen;
      logprobs[row] = some[chosen % LANES] - highest - float(std::log(total));
    }
  }
}

}  // namespace

#define EXPORT(SUFFIX, T)                                                                                              \
  void add_rms_norm_##SUFFIX(T* residual, const T* added, const T* weight, T* normed, int64_t rows, int64_t size,     \
                             double eps, int64_t threads) {                                                           \
    add_rms_norm(residual, added, weight, normed, rows, size, eps, threads);                                          \
  }                                                                                                                    \
  void attend_##SUFFIX(const T* projected, const T* cos, const T* sin, const int64_t* positions, T* keys, T* values,  \
                       T* attended, int64_t rows, int64_t query_heads, int64_t kv_heads, int64_t size,                \
                       int64_t capacity, double scale, int64_t threads) {                                             \
    attend(projected, cos, sin, positions, keys, values, attended, rows, query_heads, kv_heads, size, capacity, scale, \
           threads);                                                                                                   \
  }                                                                                                                    \
  void gated_##SUFFIX(const T* gate_up, T* outputs, int64_t rows, int64_t size, int64_t threads) {                    \
    gated(gate_up, outputs, rows, size, threads);                                                                      \
  }                                                                                                                    \
  void choose_##SUFFIX(const T* logits, const int64_t* keys, const int64_t* counters, int64_t* tokens,                \
                       float* logprobs, int64_t rows, int64_t words, int64_t greedy, int64_t min_new_tokens,          \
                       int64_t eos, double temperature, int64_t threads) {                                            \
    choose(logits, keys, counters, tokens, logprobs, rows, words, greedy, min_new_tokens, eos, temperature, threads); \
  }

extern "C" {
EXPORT(f32, float)
EXPORT(bf16, bfloat16)
}
