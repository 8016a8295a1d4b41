// Vectors of sixteen numbers, in fp32 whatever the type in memory. The compiler maps them to the processor's own.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

constexpr int64_t LANES = 16;
constexpr int64_t PARALLEL_WORK = 1 << 15;  // numbers below which starting threads costs more than it saves

struct bfloat16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(bfloat16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Rounds to nearest even, as PyTorch does.
template <class T>
inline T narrow(float value);

template <>
inline float narrow<float>(float value) {
  return value;
}

template <>
inline bfloat16 narrow<bfloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint16_t rounded = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  return {value == value ? rounded : uint16_t(0x7fc0)};
}

// What `value` becomes when it is stored as T.
template <class T>
inline float rounded(float value) {
  return widen(narrow<T>(value));
}

inline Floats load(const float* from) {
  Floats result;
  std::memcpy(&result, from, 64);
  return result;
}

inline Floats widen(Halves halves) {
#ifdef __AVX512BF16__
  return (Floats)((Bits)_mm512_cvtepu16_epi32((__m256i)halves) << 16);  // one instruction, where GCC 12 emits four
#else
  return (Floats)(__builtin_convertvector(halves, Bits) << 16);
#endif
}

// Rounds to nearest even. The processor's own instruction treats numbers below 1.2e-38 as zero.
inline Halves narrow(Floats values) {
#ifdef __AVX512BF16__
  return (Halves)_mm512_cvtneps_pbh((__m512)values);
#else
  Bits bits = (Bits)values;
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bits = values == values ? bits : Bits{} + 0x7fc0;
  return __builtin_convertvector(bits, Halves);
#endif
}

inline Floats load(const bfloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, 32);
  return widen(halves);
}

inline void store(float* to, Floats values) { std::memcpy(to, &values, 64); }

inline void store(bfloat16* to, Floats values) {
  const Halves halves = narrow(values);
  std::memcpy(to, &halves, 32);
}

// Loads `count` numbers where less than a whole vector is left in memory; the rest of the vector is zeros.
template <class T>
inline Floats load_some(const T* from, int64_t count) {
  T whole[LANES] = {};
  std::memcpy(whole, from, count * sizeof(T));
  return load(whole);
}

template <class T>
inline void store_some(T* to, Floats values, int64_t count) {
  T whole[LANES];
  store(whole, values);
  std::memcpy(to, whole, count * sizeof(T));
}

// What `values` become when they are stored as T.
template <class T>
inline Floats rounded(Floats values);

template <>
inline Floats rounded<float>(Floats values) {
  return values;
}

template <>
inline Floats rounded<bfloat16>(Floats values) {
  return widen(narrow(values));
}

inline float sum(Floats values) {
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += values[lane];
  return total;
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float largest(Floats values) {
  float result = values[0];
  for (int lane = 1; lane < LANES; lane++) result = values[lane] > result ? values[lane] : result;
  return result;
}

// e^x within two units in the last place (Cephes' polynomial): 0 below -87, infinity above 88.7, NaN for NaN.
inline Floats exponential(Floats x) {
  const float low = -87.0f, high = 88.72f;
  Floats bounded = x < low ? Floats{} + low : x;
  bounded = bounded > high ? Floats{} + high : bounded;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  Floats powers = (bounded * 1.44269504088896341f + shift) - shift;
  Floats rest = bounded - powers * 0.693359375f;
  rest = rest + powers * 2.12194440e-4f;
  Floats y = Floats{} + 1.9875691500e-4f;
  y = y * rest + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.0f;
  Ints half = __builtin_convertvector(powers, Ints) >> 1;  // in two steps: 2^128 alone is no fp32 number
  Ints other = __builtin_convertvector(powers, Ints) - half;
  y = y * (Floats)((half + 127) << 23) * (Floats)((other + 127) << 23);
  y = x < low ? Floats{} : y;
  y = x > high ? Floats{} + __builtin_inff() : y;
  return x == x ? y : x;
}
