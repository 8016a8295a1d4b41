// Log-probabilities of given tokens from logits, and the gradient of the logits, without a copy of them in fp32.
//
//   n   positions        V   vocabulary        l = logits / temperature        p = softmax(l)

#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace {

constexpr int64_t WIDE = 4 * LANES;
constexpr float LOWEST = -1e30f;  // finite, because 0 * -infinity would reach the entropy

// Logits i to i + LANES of a row of `words`; `blank` beyond its end.
template <class T>
inline Floats logits_at(const T* logits, int64_t i, int64_t words, float blank) {
  if (i + LANES <= words) return load(logits + i);
  Floats values = Floats{} + blank;
  for (int64_t lane = 0; i + lane < words; lane++) values[lane] = widen(logits[i + lane]);
  return values;
}

struct Sums {
  Floats shares[4] = {}, weighted[4] = {};  // of e^(l - highest), and of that times (l - highest)
};

template <class T, bool with_entropy>
Sums sums_of(const T* logits, int64_t words, float inverse, float highest) {
  Sums sums;
  const auto add = [&](int part, Floats logit) {
    const Floats below = logit * inverse - highest, share = exponential(below);
    sums.shares[part] += share;
    if (with_entropy) sums.weighted[part] += share * below;
  };
  int64_t i = 0;
  for (; i + WIDE <= words; i += WIDE)
    for (int part = 0; part < 4; part++) add(part, load(logits + i + part * LANES));
  for (; i + LANES <= words; i += LANES) add(0, load(logits + i));
  if (i < words) add(1, logits_at(logits, i, words, LOWEST));
  return sums;
}

inline float total(const Floats* parts) { return sum((parts[0] + parts[1]) + (parts[2] + parts[3])); }

// normalizer = log sum e^l, at_target = l of the target, entropy = -sum p log p unless it is null, each (n,).
template <class T>
void log_normalize(const T* logits, const int64_t* targets, float* normalizer, float* at_target, float* entropy,
                   int64_t rows, int64_t words, double temperature, int64_t threads) {
  const float inverse = float(1.0 / temperature);
#pragma omp parallel for num_threads(threads) if (rows * words > PARALLEL_WORK)
  for (int64_t row = 0; row < rows; row++) {
    const T* x = logits + row * words;
    Floats most[4] = {Floats{} - INFINITY, Floats{} - INFINITY, Floats{} - INFINITY, Floats{} - INFINITY};
    int64_t i = 0;
    for (; i + WIDE <= words; i += WIDE)
      for (int part = 0; part < 4; part++) most[part] = larger(load(x + i + part * LANES), most[part]);
    for (; i < words; i += LANES) most[0] = larger(logits_at(x, i, words, LOWEST), most[0]);
    const float highest = largest(larger(larger(most[0], most[1]), larger(most[2], most[3]))) * inverse;
    const Sums sums = entropy ? sums_of<T, true>(x, words, inverse, highest)
                              : sums_of<T, false>(x, words, inverse, highest);
    const float shares = total(sums.shares);
    normalizer[row] = highest + std::log(shares);
    at_target[row] = widen(x[targets[row]]) * inverse;
    if (entropy) entropy[row] = std::log(shares) - total(sums.weighted) / shares;
  }
}

// Overwrites logits with their gradient (g (onehot - p) - e p (log p + entropy)) / temperature, with g of_logprobs and
// e of_entropy, which may be null, both (n,).
template <class T>
void log_normalize_backward(T* logits, const int64_t* targets, const float* normalizer, const float* entropy,
                            const float* of_logprobs, const float* of_entropy, int64_t rows, int64_t words,
                            double temperature, int64_t threads) {
  const float inverse = float(1.0 / temperature);
#pragma omp parallel for num_threads(threads) if (rows * words > PARALLEL_WORK)
  for (int64_t row = 0; row < rows; row++) {
    T* x = logits + row * words;
    const float g = of_logprobs[row], e = of_entropy ? of_entropy[row] : 0.0f;
    const float constant = g + e * (of_entropy ? entropy[row] : 0.0f);
    const auto gradient = [&](Floats logit) {
      const Floats logs = logit * inverse - normalizer[row], shares = exponential(logs);
      return of_entropy ? -inverse * shares * (constant + e * logs) : -inverse * constant * shares;
    };
    const float of_target = gradient(Floats{} + widen(x[targets[row]]))[0] + g * inverse;
    int64_t i = 0;
    for (; i + LANES <= words; i += LANES) store(x + i, gradient(load(x + i)));
    if (i < words) store_some(x + i, gradient(load_some(x + i, words - i)), words - i);
    x[targets[row]] = narrow<T>(of_target);
  }
}

}  // namespace

#define EXPORT(SUFFIX, T)                                                                                              \
  void log_normalize_##SUFFIX(const T* logits, const int64_t* targets, float* normalizer, float* at_target,           \
                              float* entropy, int64_t rows, int64_t words, double temperature, int64_t threads) {     \
    log_normalize(logits, targets, normalizer, at_target, entropy, rows, words, temperature, threads);                 \
  }                                                                                                                    \
  void log_normalize_backward_##SUFFIX(T* logits, const int64_t* targets, const float* normalizer,                    \
                                       const float* entropy, const float* of_logprobs, const float* of_entropy,       \
                                       int64_t rows, int64_t words, double temperature, int64_t threads) {            \
    log_normalize_backward(logits, targets, normalizer, entropy, of_logprobs, of_entropy, rows, words, temperature,    \
                           threads);                                                                                   \
  }

extern "C" {
EXPORT(f32, float)
EXPORT(bf16, bfloat16)
}
