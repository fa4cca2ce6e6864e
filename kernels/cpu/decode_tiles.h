// What decode.h does with one chunk of keys: scores, weights and values of up to eight query rows, for every kind.
#pragma once

#include "fetch.h"
#include "traits.h"

namespace {

// s[r][t] = q[r] . k[t] for R query rows; `ahead` leads to what to prefetch.
template <class X, int R, bool PREFETCH>
inline void decode_scores(const typename X::Query* q, int64_t padded, const typename X::Element* k, int64_t head_dim,
                       int64_t num_keys, const Ahead& ahead, float* s) {
  constexpr int J = W / R;  // tokens at a time: W accumulators, which one transposition sums up
  const int64_t whole = head_dim / X::CHUNK * X::CHUNK, rest = head_dim - whole;
  int64_t t = 0;
  for (; t + J <= num_keys; t += J) {
    vf sums[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) sums[i] = vf{};
    for (int64_t d = 0; d < whole; d += X::CHUNK) {
      typename X::Operand keys[J];
#pragma GCC unroll 16
      for (int j = 0; j < J; ++j) {
        const typename X::Element* key = k + (t + j) * head_dim + d;
        keys[j] = X::load(key);
        if (PREFETCH) ahead.template prefetch_from<times_to_ask<X>(R)>(key);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const typename X::Operand query = X::load_query(q + r * padded + d);
#pragma GCC unroll 16
        for (int j = 0; j < J; ++j) sums[r * J + j] = X::multiply_add(query, keys[j], sums[r * J + j]);
      }
    }
    if (rest) {
#pragma GCC unroll 16
      for (int j = 0; j < J; ++j) {
        const typename X::Operand key = X::load_first(k + (t + j) * head_dim + whole, rest);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          sums[r * J + j] = X::multiply_add(X::load_query(q + r * padded + whole), key, sums[r * J + j]);
      }
    }
    const vf scores = sums_of_lanes(sums);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) memcpy(s + r * CHUNK_TOKENS + t, (const float*)&scores + r * J, J * sizeof(float));
  }
  for (; t < num_keys; ++t) {
    for (int r = 0; r < R; ++r) {
      vf sum = {};
      const typename X::Element* key = k + t * head_dim;
      for (int64_t d = 0; d < whole; d += X::CHUNK)
        sum = X::multiply_add(X::load_query(q + r * padded + d), X::load(key + d), sum);
      if (rest) sum = X::multiply_add(X::load_query(q + r * padded + whole), X::load_first(key + whole, rest), sum);
      s[r * CHUNK_TOKENS + t] = sum_lane(sum);
    }
  }
}

// acc[r][d] = acc[r][d] * shrink[r] + sum over tokens of p[r][t] v[t][d], for C chunks of dims from `d` on.
// With `rest`, C is 1 and only the first `rest` dims of the chunk exist.
template <class X, int R, int C>
KEEP_REGISTERS void decode_values(const typename X::Weight* p, const typename X::Element* v, int64_t head_dim,
                               int64_t num_keys, int64_t d, int64_t rest, Fetch& fetch, const float* shrink, float* acc,
                               int64_t padded) {
  constexpr int N = C * X::PARTS;
  vf sums[R * N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) sums[r * N + i] = load(acc + r * padded + d + i * W) * splat(shrink[r]);
  const auto add = [&](int64_t t, const typename X::Element* value, const typename X::Element* next)
                       __attribute__((always_inline)) {
    typename X::Operand values[N];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      if (rest)
        X::load_first_values(value, next, rest, values);
      else
        X::load_values(value + c * X::CHUNK, next ? next + c * X::CHUNK : nullptr, values + c * X::PARTS);
    }
    fetch.template step<times_to_ask<X>(R)>();
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename X::Operand weight = X::weight(p, r, t);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) sums[r * N + i] = X::multiply_add(weight, values[i], sums[r * N + i]);
    }
  };
  int64_t t = 0;
  for (const typename X::Element* value = v + d; t + X::STEP <= num_keys; t += X::STEP, value += X::STEP * head_dim)
    add(t, value, value + head_dim);
  if (t < num_keys) add(t, v + t * head_dim + d, nullptr);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) store(acc + r * padded + d + i * W, sums[r * N + i]);
}

// These R rows fetch their part of what `rows_left` rows, these among them, have to fetch.
template <class X, int R>
inline void decode_all_values(const typename X::Weight* p, const typename X::Element* v, int64_t head_dim,
                           int64_t num_keys, int64_t rows_left, Fetch& fetch, const float* shrink, float* acc,
                           int64_t padded) {
  constexpr int ACCUMULATORS = W == 4 ? 8 : W;
  constexpr int MOST = ACCUMULATORS / R / X::PARTS > 4 ? 4 : ACCUMULATORS / R / X::PARTS;
  constexpr int C = MOST < 1 ? 1 : MOST;
  const int64_t whole = head_dim / X::CHUNK * X::CHUNK, wide = whole / (C * X::CHUNK) * C * X::CHUNK;
  const int64_t walks = wide / (C * X::CHUNK) + (whole - wide) / X::CHUNK + (whole < head_dim);
  fetch.spread_over(walks * ((num_keys + X::STEP - 1) / X::STEP) * rows_left / R);
  int64_t d = 0;
  for (; d < wide; d += C * X::CHUNK)
    decode_values<X, R, C>(p, v, head_dim, num_keys, d, 0, fetch, shrink, acc, padded);
  for (; d < whole; d += X::CHUNK)
    decode_values<X, R, 1>(p, v, head_dim, num_keys, d, 0, fetch, shrink, acc, padded);
  if (d < head_dim) decode_values<X, R, 1>(p, v, head_dim, num_keys, d, head_dim - d, fetch, shrink, acc, padded);
}

// How much a weight may grow, as a power of two, before its row's top is raised: a branch taken in every other chunk
// would cost more than the weights, and floats have room.
constexpr float HEADROOM = 8;

// Scores of one row to weights 2^(score - top), at most 2^HEADROOM; keeps the row's top and its sums (one per lane),
// gives what to shrink acc by. ALL: every key is seen, and they fill whole vectors.
template <class X, bool ALL>
inline void decode_weights_of(const float* s, Seen seen, int64_t num_keys, float scale, float* top, float* sums,
                           float* shrink, typename X::Weight* p) {
  constexpr int64_t MOST = CHUNK_TOKENS / W;
  const vi lanes = lane_numbers(), begin = vi{} + (int32_t)seen.begin, end = vi{} + (int32_t)seen.end;
  const int64_t vectors = (num_keys + W - 1) / W;
  const auto if_seen = [&](int64_t i, vf x, vf otherwise) __attribute__((always_inline)) {
    if (ALL) return x;
    const vi keys = lanes + (int32_t)(i * W);
    return ((keys >= begin) & (keys < end)) ? x : otherwise;
  };
  vf scores[MOST], most = splat(NO_SCORE);
#pragma GCC unroll 4
  for (int64_t i = 0; i < vectors; ++i) {
    scores[i] = if_seen(i, load(s + i * W) * splat(scale), splat(NO_SCORE));
    most = vmax(most, scores[i]);
  }
  const float old_top = *top;
  *shrink = 1;
  vf total = load(sums);
  if (any_above(most, splat(old_top + HEADROOM))) {
    *top = max_lane(most);
    *shrink = exp2_of(old_top - *top);
    total = total * splat(*shrink);
  }
  const vf base = splat(*top == NO_SCORE ? 0.f : *top);
#pragma GCC unroll 4
  for (int64_t i = 0; i < vectors; ++i) {
    const vf weights = if_seen(i, exp2_of(scores[i] - base), vf{});
    X::store_weights(p + i * W, weights);
    total = total + weights;
  }
  store(sums, total);
}

template <class X>
inline void decode_weights(const float* s, Seen seen, int64_t num_keys, float scale, float* top, float* sums,
                        float* shrink, typename X::Weight* p) {
  if (num_keys == CHUNK_TOKENS && seen.begin == 0 && seen.end == CHUNK_TOKENS)
    return decode_weights_of<X, true>(s, seen, CHUNK_TOKENS, scale, top, sums, shrink, p);
  decode_weights_of<X, false>(s, seen, num_keys, scale, top, sums, shrink, p);
}

}  // namespace
