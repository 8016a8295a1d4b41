// What attention by matrix products does between them.
//
//   S   sequences        T   width of their rectangle        Q   query heads        h   heads, Q or fewer        D   of a head
//
// Nothing depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

// (tokens, h, D) into (S, Q, T, D), each head Q / h times: token j to `places[j]` of the S * T places, or to place j.
template <class T>
void gather_heads(const T* tokens, const int64_t* places, T* rectangle, int64_t count, int64_t width, int64_t heads,
                  int64_t query_heads, int64_t size, int64_t threads) {
  const int64_t repeats = query_heads / heads;
#pragma omp parallel for num_threads(threads) if (count * query_heads * size > PARALLEL_WORK)
  for (int64_t token = 0; token < count; token++) {
    const int64_t place = places ? places[token] : token, sequence = place / width, column = place % width;
    for (int64_t head = 0; head < query_heads; head++)
      std::copy_n(tokens + (token * heads + head / repeats) * size, size,
                  rectangle + ((sequence * query_heads + head) * width + column) * size);
  }
}

// The way back, the Q / h copies of a head added up.
template <class T>
void scatter_heads(const T* rectangle, const int64_t* places, T* tokens, int64_t count, int64_t width, int64_t heads,
                   int64_t query_heads, int64_t size, int64_t threads) {
  const int64_t repeats = query_heads / heads;
#pragma omp parallel for num_threads(threads) if (count * query_heads * size > PARALLEL_WORK)
  for (int64_t token = 0; token < count; token++) {
    const int64_t place = places ? places[token] : token, sequence = place / width, column = place % width;
    for (int64_t head = 0; head < heads; head++) {
      const T* from = rectangle + ((sequence * query_heads + head * repeats) * width + column) * size;
      T* to = tokens + (token * heads + head) * size;
      if (repeats == 1) {
        std::copy_n(from, size, to);
        continue;
      }
      for (int64_t i = 0; i < size; i += LANES) {
        const int64_t some = std::min(LANES, size - i);
        Floats total = {};
        for (int64_t copy = 0; copy < repeats; copy++) total += load_some(from + copy * width * size + i, some);
        store_some(to + i, total, some);
      }
    }
  }
}

// Softmax of each row of scores (n, queries, keys), in place; query q sees the first `first` + q + 1 keys.
template <class T>
void causal_softmax(T* scores, int64_t count, int64_t queries, int64_t keys, int64_t first, int64_t threads) {
#pragma omp parallel num_threads(threads) if (count * queries * keys > PARALLEL_WORK)
  {
    std::vector<float> shares(keys);
#pragma omp for
    for (int64_t row = 0; row < count * queries; row++) {
      T* x = scores + row * keys;
      const int64_t seen = first + row % queries + 1, whole = seen / LANES * LANES, rest = seen - whole;
      Floats last = load_some(x + whole, rest);
      for (int64_t lane = rest; lane < LANES; lane++) last[lane] = -INFINITY;
      Floats most = last;
      for (int64_t i = 0; i < whole; i += LANES) most = larger(load(x + i), most);
      const float highest = largest(most);
      last = exponential(last - highest);
      Floats total = last;
      for (int64_t i = 0; i < whole; i += LANES) {
        const Floats value = exponential(load(x + i) - highest);
        total += value;
        store(shares.data() + i, value);
      }
      const float share = 1.0f / sum(total);
      for (int64_t i = 0; i < whole; i += LANES) store(x + i, load(shares.data() + i) * share);
      store_some(x + whole, last * share, rest);
      std::fill(x + seen, x + keys, T{});
    }
  }
}

// Gradients of the weights become those of the scores: weights * (gradient - sum of gradient * weights).
template <class T>
void causal_softmax_backward(T* gradient, const T* weights, int64_t count, int64_t queries, int64_t keys, int64_t first,
                             int64_t threads) {
#pragma omp parallel for num_threads(threads) if (count * queries * keys > PARALLEL_WORK)
  for (int64_t row = 0; row < count * queries; row++) {
    T* g = gradient + row * keys;
    const T* w = weights + row * keys;
    const int64_t seen = first + row % queries + 1, whole = seen / LANES * LANES, rest = seen - whole;
    const Floats last = load_some(g + whole, rest), last_weights = load_some(w + whole, rest);
    Floats products = last * last_weights;
    for (int64_t i = 0; i < whole; i += LANES) products += load(g + i) * load(w + i);
    const float mean = sum(products);
    for (int64_t i = 0; i < whole; i += LANES) store(g + i, load(w + i) * (load(g + i) - mean));
    store_some(g + whole, last_weights * (last - mean), rest);
    std::fill(g + seen, g + keys, T{});
  }
}

}  // namespace

#define EXPORT(SUFFIX, T)                                                                                              \
  void gather_heads_##SUFFIX(const T* tokens, const int64_t* places, T* rectangle, int64_t count, int64_t width,      \
                             int64_t heads, int64_t query_heads, int64_t size, int64_t threads) {                     \
    gather_heads(tokens, places, rectangle, count, width, heads, query_heads, size, threads);                          \
  }                                                                                                                    \
  void scatter_heads_##SUFFIX(const T* rectangle, const int64_t* places, T* tokens, int64_t count, int64_t width,     \
                              int64_t heads, int64_t query_heads, int64_t size, int64_t threads) {                    \
    scatter_heads(rectangle, places, tokens, count, width, heads, query_heads, size, threads);                         \
  }                                                                                                                    \
  void causal_softmax_##SUFFIX(T* scores, int64_t count, int64_t queries, int64_t keys, int64_t first,                \
                               int64_t threads) {                                                                      \
    causal_softmax(scores, count, queries, keys, first, threads);                                                      \
  }                                                                                                                    \
  void causal_softmax_backward_##SUFFIX(T* gradient, const T* weights, int64_t count, int64_t queries, int64_t keys,  \
                                        int64_t first, int64_t threads) {                                             \
    causal_softmax_backward(gradient, weights, count, queries, keys, first, threads);                                  \
  }

extern "C" {
EXPORT(f32, float)
EXPORT(bf16, bfloat16)
}
