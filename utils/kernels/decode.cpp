// One step of generation, between the matrix products.
//
//   n   rows that decode together       D   size of a head
//   Q   query heads                     K   key-value heads, each shared by G = Q / K query heads
//
// Results are rounded to the type of the tensors exactly where the layers of `transformers` round theirs, except that
// attention keeps its weights in fp32. The result of a row depends neither on the others nor on the number of threads.

#include <algorithm>
#include <cmath>
#include <vector>

#include "attention.h"
#include "rows.h"

namespace {

// residual += added (unless that is null); normed = weight * (residual / its root mean square).
template <class T>
void add_rms_norm(T* residual, const T* added, const T* weight, T* normed, int64_t rows, int64_t size, double eps,
                  int64_t threads) {
#pragma omp parallel for num_threads(threads) if (rows * size > PARALLEL_WORK)
  for (int64_t row = 0; row < rows; row++) {
    T* x = residual + row * size;
    const T* delta = added ? added + row * size : nullptr;
    T* y = normed + row * size;
    if (delta) {
      int64_t i = 0;
      for (; i + LANES <= size; i += LANES) store(x + i, load(x + i) + load(delta + i));
      for (; i < size; i++) x[i] = narrow<T>(widen(x[i]) + widen(delta[i]));
    }
    normalize(x, weight, y, size, inverse_rms(x, size, eps));
  }
}

// Rotates one head by its position: `sin` carries the sign for the half that it multiplies.
template <class T>
void rotate(const T* x, const T* cos, const T* sin, float* y, int64_t size) {
  const int64_t half = size / 2;
  int64_t i = 0;
  for (; i + LANES <= half; i += LANES) {
    const Floats a = load(x + i), b = load(x + i + half);
    store(y + i, rounded<T>(rounded<T>(a * load(cos + i)) + rounded<T>(b * load(sin + i))));
    store(y + i + half, rounded<T>(rounded<T>(b * load(cos + i + half)) + rounded<T>(a * load(sin + i + half))));
  }
  for (; i < half; i++) {
    const float a = widen(x[i]), b = widen(x[i + half]);
    y[i] = rounded<T>(rounded<T>(a * widen(cos[i])) + rounded<T>(b * widen(sin[i])));
    y[i + half] = rounded<T>(rounded<T>(b * widen(cos[i + half])) + rounded<T>(a * widen(sin[i + half])));
  }
}

// Rotates queries and keys, writes keys and values to the cache, and attends to it up to each row's position.
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
    std::vector<float> weights(GROUP * capacity), queries(group * size), key(size);
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
      T* to = attended + (row * query_heads + head * group) * size;
      int64_t g = 0;
      for (; g + GROUP <= group; g += GROUP)
        attend_group<GROUP>(queries.data() + g * size, row_keys, row_values, weights.data(), to + g * size, size,
                            length, false, capacity, size, float(scale), own_values, next_keys);
      for (; g < group; g++)
        attend_group<1>(queries.data() + g * size, row_keys, row_values, weights.data(), to + g * size, size, length,
                        false, capacity, size, float(scale), own_values, next_keys);
    }
  }
}

// The same for all tokens of prompts, each of which attends to itself and those before it.
//
//   projected   (n, W, (Q + 2 K) D), W tokens of each row           attended   (n, W, Q D)
template <class T>
void attend_prompts(const T* projected, const T* cos, const T* sin, T* keys, T* values, T* attended, int64_t rows,
                    int64_t width, int64_t query_heads, int64_t kv_heads, int64_t size, int64_t capacity, double scale,
                    int64_t threads) {
  const int64_t group = query_heads / kv_heads, heads = query_heads + 2 * kv_heads, stride = query_heads * size;
#pragma omp parallel num_threads(threads) if (rows * heads * width * size > PARALLEL_WORK)
  {
    std::vector<float> weights(GROUP * capacity), queries(GROUP * size), key(LANES * size);
    Ahead nothing{};
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < rows * kv_heads; task++) {
      const int64_t row = task / kv_heads, kv_head = task % kv_heads;
      const T* tokens = projected + row * width * heads * size;
      T *row_keys = keys + task * size * capacity, *row_values = values + task * capacity * size;
      for (int64_t first = 0; first < width; first += LANES) {
        const int64_t some = std::min(LANES, width - first);
        for (int64_t t = 0; t < some; t++) {
          const T* from = tokens + ((first + t) * heads + query_heads + kv_head) * size;
          rotate(from, cos + (first + t) * size, sin + (first + t) * size, key.data() + t * size, size);
          std::copy_n(from + kv_heads * size, size, row_values + (first + t) * size);
        }
        for (int64_t d = 0; d < size; d++)
          for (int64_t t = 0; t < some; t++) row_keys[d * capacity + first + t] = narrow<T>(key[t * size + d]);
      }
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        T* to = attended + row * width * stride + head * size;
        for (int64_t t = 0; t < width; t += GROUP) {
          const int64_t some = std::min(GROUP, width - t);
          for (int64_t q = 0; q < some; q++)
            rotate(tokens + ((t + q) * heads + head) * size, cos + (t + q) * size, sin + (t + q) * size,
                   queries.data() + q * size, size);
          if (some == GROUP) {
            attend_group<GROUP>(queries.data(), row_keys, row_values, weights.data(), to + t * stride, size, t + GROUP,
                                true, capacity, stride, float(scale), nothing, nothing);
            continue;
          }
          for (int64_t q = 0; q < some; q++)
            attend_group<1>(queries.data() + q * size, row_keys, row_values, weights.data(), to + (t + q) * stride,
                            size, t + q + 1, true, capacity, stride, float(scale), nothing, nothing);
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
    const T* gate = gate_up + row * 2 * size;
    gate_row(gate, gate + size, outputs + row * size, size);
  }
}

constexpr int64_t PARALLEL_PRODUCT = 1 << 17;  // multiplications

// COUNT rows of x (fp32) times WIDTH neighbouring panels, which are (size, LANES) each.
template <int COUNT, int WIDTH, class T>
void some_products(const float* x, const T* panels, const T* bias, T* y, int64_t size, int64_t outputs, int64_t first) {
  Floats sums[COUNT][WIDTH] = {};
  for (int64_t k = 0; k < size; k++) {
    for (int p = 0; p < WIDTH; p++) {
      const Floats weight = load(panels + (p * size + k) * LANES);
      for (int r = 0; r < COUNT; r++) sums[r][p] += x[r * size + k] * weight;
    }
  }
  for (int p = 0; p < WIDTH; p++) {
    const int64_t from = first + p * LANES, whole = std::min(LANES, outputs - from);
    for (int r = 0; r < COUNT; r++) {
      T values[LANES];
      if (bias) {
        for (int64_t lane = 0; lane < whole; lane++) sums[r][p][lane] += widen(bias[from + lane]);
      }
      store(values, sums[r][p]);
      std::copy_n(values, whole, y + r * outputs + from);
    }
  }
}

template <int COUNT, class T>
void row_products(const float* x, const T* panels, const T* bias, T* y, int64_t size, int64_t outputs, int64_t first) {
  if (first + LANES < outputs) some_products<COUNT, 2>(x, panels, bias, y, size, outputs, first);
  else some_products<COUNT, 1>(x, panels, bias, y, size, outputs, first);
}

// y (n, outputs) = x (n, size) times a small matrix, whose outputs lie in panels of LANES: (panels, size, LANES), the
// last one padded with arbitrary values; plus the bias unless that is null.
template <class T>
void small_product(const T* x, const T* panels, const T* bias, T* y, int64_t rows, int64_t size, int64_t outputs,
                   int64_t threads) {
  std::vector<float> wide(rows * size);
  for (int64_t i = 0; i < rows * size; i++) wide[i] = widen(x[i]);
#pragma omp parallel for num_threads(threads) if (rows * size * outputs > PARALLEL_PRODUCT)
  for (int64_t first = 0; first < outputs; first += 2 * LANES) {
    const T* some = panels + first * size;
    const float* from = wide.data();
    T* to = y;
    int64_t left = rows;
    for (; left >= 8; left -= 8, from += 8 * size, to += 8 * outputs)
      row_products<8>(from, some, bias, to, size, outputs, first);
    for (; left >= 4; left -= 4, from += 4 * size, to += 4 * outputs)
      row_products<4>(from, some, bias, to, size, outputs, first);
    for (; left; left--, from += size, to += outputs) row_products<1>(from, some, bias, to, size, outputs, first);
  }
}

uint64_t mix(uint64_t value) {  // the finalizer of splitmix64, as in sampling.py
  value += 0x9e3779b97f4a7c15;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}

constexpr int64_t BLOCK = 8 * LANES;  // words per partial sum of weights; the search first finds the block

// Sixteen logits divided by the temperature; -infinity beyond the vocabulary and for the forbidden word.
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

// One token per row by inverting the cumulative distribution at a number from the row's own random stream, or with
// temperature 0 the most likely one, and its log-probability; as `choose_tokens` in sampling.py without top-k and top-p.
//
//   logits   (n, words)    keys, counters, temperatures, minimums   (n,)    tokens, logprobs   (n,)
template <class T>
void choose(const T* logits, const int64_t* keys, const int64_t* counters, const double* temperatures,
            const int64_t* minimums, int64_t* tokens, float* logprobs, int64_t rows, int64_t words, int64_t eos,
            int64_t threads) {
  const int64_t blocks = (words + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(threads) if (rows * words > PARALLEL_WORK)
  {
    std::vector<double> sums(blocks);
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
      const T* x = logits + row * words;
      const bool greedy = temperatures[row] == 0;
      const float inverse = greedy ? 1.0f : float(1.0 / temperatures[row]);
      const int64_t forbidden = counters[row] < minimums[row] ? eos : -1;
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
        const int64_t end = std::min((block + 1) * BLOCK, words);
        for (int64_t i = block * BLOCK; i < end; i += LANES) {
          const Floats weights = exponential(some_logits(x, i, words, forbidden, inverse) - highest);
          for (int64_t lane = 0; lane < LANES && i + lane < words; lane++) {
            if (weights[lane] == 0) continue;
            if (chosen >= 0 && before > target) break;
            chosen = i + lane;  // the last word with weight, unless the sum exceeds the target earlier
            before += weights[lane];
          }
          if (chosen >= 0 && before > target) break;
        }
      }
      if (chosen < 0) chosen = words - 1;  // logits are NaN: any valid word will do
      const Floats some = some_logits(x, chosen / LANES * LANES, words, forbidden, inverse);
      tokens[row] = chosen;
      logprobs[row] = some[chosen % LANES] - highest - float(std::log(total));
    }
  }
}

// Pointers to the weights of a layer: two vectors, and the panels of four matrices.
template <class T>
struct Layer {
  const T *input_norm, *qkv, *output, *mlp_norm, *gate_up, *down;
};

// All layers of a model whose matrices are small and have no bias, for one new token in each row. For models so
// small that an operation takes less time than its call from Python. Writes the head's input to `normed`; overwrites
// `hidden`.
//
//   hidden, normed   (n, H)       keys, values   (layers, slots, K, D, capacity) and (layers, slots, K, capacity, D)
template <class T>
void small_step(const Layer<T>* layers, const T* final_norm, T* hidden, T* normed, const T* cos, const T* sin,
                const int64_t* positions, T* keys, T* values, int64_t count, int64_t rows, int64_t hidden_size,
                int64_t mlp_size, int64_t query_heads, int64_t kv_heads, int64_t size, int64_t slots, int64_t capacity,
                double eps, double scale, int64_t threads) {
  const int64_t projected_size = (query_heads + 2 * kv_heads) * size, cached = slots * kv_heads * size * capacity;
  std::vector<T> projected(rows * std::max(projected_size, 2 * mlp_size)), summand(rows * hidden_size);
  std::vector<T> inner(rows * std::max(query_heads * size, mlp_size));
  T* added = nullptr;
  for (int64_t index = 0; index < count; index++) {
    const Layer<T>& layer = layers[index];
    add_rms_norm(hidden, added, layer.input_norm, normed, rows, hidden_size, eps, threads);
    small_product<T>(normed, layer.qkv, nullptr, projected.data(), rows, hidden_size, projected_size, threads);
    attend(projected.data(), cos, sin, positions, keys + index * cached, values + index * cached, inner.data(), rows,
           query_heads, kv_heads, size, capacity, scale, threads);
    added = summand.data();
    small_product<T>(inner.data(), layer.output, nullptr, added, rows, query_heads * size, hidden_size, threads);
    add_rms_norm(hidden, added, layer.mlp_norm, normed, rows, hidden_size, eps, threads);
    small_product<T>(normed, layer.gate_up, nullptr, projected.data(), rows, hidden_size, 2 * mlp_size, threads);
    gated(projected.data(), inner.data(), rows, mlp_size, threads);
    small_product<T>(inner.data(), layer.down, nullptr, added, rows, mlp_size, hidden_size, threads);
  }
  add_rms_norm(hidden, added, final_norm, normed, rows, hidden_size, eps, threads);
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
  void attend_prompts_##SUFFIX(const T* projected, const T* cos, const T* sin, T* keys, T* values, T* attended,       \
                               int64_t rows, int64_t width, int64_t query_heads, int64_t kv_heads, int64_t size,      \
                               int64_t capacity, double scale, int64_t threads) {                                     \
    attend_prompts(projected, cos, sin, keys, values, attended, rows, width, query_heads, kv_heads, size, capacity,   \
                   scale, threads);                                                                                    \
  }                                                                                                                    \
  void gated_##SUFFIX(const T* gate_up, T* outputs, int64_t rows, int64_t size, int64_t threads) {                    \
    gated(gate_up, outputs, rows, size, threads);                                                                      \
  }                                                                                                                    \
  void small_product_##SUFFIX(const T* x, const T* panels, const T* bias, T* y, int64_t rows, int64_t size,            \
                              int64_t outputs, int64_t threads) {                                                      \
    small_product(x, panels, bias, y, rows, size, outputs, threads);                                                   \
  }                                                                                                                    \
  void small_step_##SUFFIX(const Layer<T>* layers, const T* final_norm, T* hidden, T* normed, const T* cos,           \
                           const T* sin, const int64_t* positions, T* keys, T* values, int64_t count, int64_t rows,   \
                           int64_t hidden_size, int64_t mlp_size, int64_t query_heads, int64_t kv_heads,              \
                           int64_t size, int64_t slots, int64_t capacity, double eps, double scale,                   \
                           int64_t threads) {                                                                          \
    small_step(layers, final_norm, hidden, normed, cos, sin, positions, keys, values, count, rows, hidden_size,       \
               mlp_size, query_heads, kv_heads, size, slots, capacity, eps, scale, threads);                          \
  }                                                                                                                    \
  void choose_##SUFFIX(const T* logits, const int64_t* keys, const int64_t* counters, const double* temperatures,      \
                       const int64_t* minimums, int64_t* tokens, float* logprobs, int64_t rows, int64_t words,         \
                       int64_t eos, int64_t threads) {                                                                 \
    choose(logits, keys, counters, temperatures, minimums, tokens, logprobs, rows, words, eos, threads);               \
  }

extern "C" {
EXPORT(f32, float)
EXPORT(bf16, bfloat16)
}
