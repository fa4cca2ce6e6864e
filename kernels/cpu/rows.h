// Row-wise work that is bound by memory: merge of partials, RoPE, casts, and a plain read.
#pragma once

#include "elements.h"
#include "isa.h"

namespace {

// Weights of so many partials are kept while a row is merged; those of further ones are computed once more per tile.
constexpr int64_t KEPT_WEIGHTS = 64;
// How many rows ahead each part is prefetched: every part is a stream of its own, of short pieces.
constexpr int64_t ROWS_AHEAD = 4;

struct RowWeights {
  const float* lses;
  int64_t stride;
  float top, inverse;
  float kept[KEPT_WEIGHTS];

  float fresh(int64_t p) const { return expf(lses[p * stride] - top) * inverse; }
  float operator()(int64_t p) const { return p < KEPT_WEIGHTS ? kept[p] : fresh(p); }
};

// `C` vectors of one row of `to`, from part p at from + p * step.
template <int C>
inline void merge_tile(const float* from, int64_t parts, int64_t step, const RowWeights& weights, int64_t ahead,
                       float* to) {
  vf sums[C] = {};
  for (int64_t p = 0; p < parts; ++p) {
    const vf weight = splat(weights(p));
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      sums[c] = sums[c] + load(from + p * step + c * W) * weight;
      prefetch(from + p * step + ahead + c * W);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) store(to + c * W, sums[c]);
}

// Contract: ops.merge, for rows [begin, end); part p of a row lies p * stride rows further on.
void merge_rows(const float* outs, const float* lses, int64_t parts, int64_t stride, int64_t begin, int64_t end,
                int64_t head_dim, float* out, float* lse) {
  for (int64_t row = begin; row < end; ++row) {
    RowWeights weights{lses + row, stride, NO_SCORE, 0, {}};
    for (int64_t p = 0; p < parts; ++p) {
      const float x = lses[p * stride + row];
      weights.top = x > weights.top || x != x ? x : weights.top;
    }
    float* to = out + row * head_dim;
    if (weights.top == NO_SCORE) {
      memset(to, 0, head_dim * sizeof(float));
      lse[row] = NO_SCORE;
      continue;
    }
    float sum = 0;
    for (int64_t p = 0; p < parts; ++p) {
      const float x = expf(lses[p * stride + row] - weights.top);
      if (p < KEPT_WEIGHTS) weights.kept[p] = x;
      sum += x;
    }
    weights.inverse = 1 / sum;
    for (int64_t p = 0; p < smaller(parts, KEPT_WEIGHTS); ++p) weights.kept[p] *= weights.inverse;
    const float* from = outs + row * head_dim;
    const int64_t step = stride * head_dim, ahead = ROWS_AHEAD * head_dim;
    int64_t d = 0;
    for (; d + 8 * W <= head_dim; d += 8 * W) merge_tile<8>(from + d, parts, step, weights, ahead, to + d);
    for (; d + W <= head_dim; d += W) merge_tile<1>(from + d, parts, step, weights, ahead, to + d);
    for (; d < head_dim; ++d) {
      to[d] = 0;
      for (int64_t p = 0; p < parts; ++p) to[d] += from[p * step + d] * weights(p);
    }
    lse[row] = weights.top + logf(sum);
  }
}

template <class From, class To>
inline void cast_of(const void* from, void* to, int64_t count) {
  const typename From::Type* source = (const typename From::Type*)from;
  typename To::Type* target = (typename To::Type*)to;
  int64_t i = 0;
  for (; i + W <= count; i += W) To::store(target + i, From::load(source + i));
  if (i < count) store_first<To>(target + i, load_first<From>(source + i, count - i), count - i);
}

template <class From>
inline void cast_from(const void* from, void* to, int32_t to_dtype, int64_t count) {
  if (to_dtype == DISTKV_FP32) cast_of<From, Fp32>(from, to, count);
  else if (to_dtype == DISTKV_BF16) cast_of<From, Bf16>(from, to, count);
  else cast_of<From, Fp16>(from, to, count);
}

void cast(const void* from, int32_t from_dtype, void* to, int32_t to_dtype, int64_t count) {
  if (from_dtype == to_dtype) memcpy(to, from, count * element_bytes(from_dtype));
  else if (from_dtype == DISTKV_FP32) cast_from<Fp32>(from, to, to_dtype, count);
  else if (from_dtype == DISTKV_BF16) cast_from<Bf16>(from, to, to_dtype, count);
  else cast_from<Fp16>(from, to, to_dtype, count);
}

// Angles of one pair of vectors: dims d .. d + W and their partners, half of what is rotated further on.
struct Turn {
  vf cos_left, cos_right, sin_left, sin_right;

  vf left(vf l, vf r) const { return l * cos_left - r * sin_left; }
  vf right(vf l, vf r) const { return r * cos_right + l * sin_right; }
};

template <class From, class To>
inline void rotate_of(const void* from, const float* cos, const float* sin, int64_t head_dim, int64_t rotated, void* to) {
  const typename From::Type* x = (const typename From::Type*)from;
  typename To::Type* out = (typename To::Type*)to;
  const int64_t half = rotated / 2;
  int64_t d = 0;
  for (; d + W <= half; d += W) {
    const Turn turn{load(cos + d), load(cos + half + d), load(sin + d), load(sin + half + d)};
    const vf left = From::load(x + d), right = From::load(x + half + d);
    To::store(out + d, turn.left(left, right));
    To::store(out + half + d, turn.right(left, right));
  }
  if (const int64_t n = half - d; n > 0) {
    const Turn turn{load_first<Fp32>(cos + d, n), load_first<Fp32>(cos + half + d, n), load_first<Fp32>(sin + d, n),
                    load_first<Fp32>(sin + half + d, n)};
    const vf left = load_first<From>(x + d, n), right = load_first<From>(x + half + d, n);
    store_first<To>(out + d, turn.left(left, right), n);
    store_first<To>(out + half + d, turn.right(left, right), n);
  }
  if (rotated < head_dim) cast_of<From, To>(x + rotated, out + rotated, head_dim - rotated);
}

template <class From>
inline void rotate_from(const void* from, const float* cos, const float* sin, int64_t head_dim, int64_t rotated,
                        void* to, int32_t to_dtype) {
  if (to_dtype == DISTKV_FP32) rotate_of<From, Fp32>(from, cos, sin, head_dim, rotated, to);
  else if (to_dtype == DISTKV_BF16) rotate_of<From, Bf16>(from, cos, sin, head_dim, rotated, to);
  else rotate_of<From, Fp16>(from, cos, sin, head_dim, rotated, to);
}

void rotate(const void* from, int32_t from_dtype, const float* cos, const float* sin, int64_t head_dim,
            int64_t rotated, void* to, int32_t to_dtype) {
  if (from_dtype == DISTKV_FP32) rotate_from<Fp32>(from, cos, sin, head_dim, rotated, to, to_dtype);
  else if (from_dtype == DISTKV_BF16) rotate_from<Bf16>(from, cos, sin, head_dim, rotated, to, to_dtype);
  else rotate_from<Fp16>(from, cos, sin, head_dim, rotated, to, to_dtype);
}

// Sums `bytes` (a multiple of 256) while prefetching as much at `ahead`.
float read_once(const char* from, const char* ahead, int64_t bytes) {
  constexpr int VECTORS = 256 / (W * 4);
  vf sums[4] = {};
  for (int64_t i = 0; i < bytes; i += 256) {
#pragma GCC unroll 16
    for (int j = 0; j < VECTORS; ++j) sums[j % 4] = sums[j % 4] + load((const float*)(from + i) + j * W);
    for (int j = 0; j < 256; j += 64) prefetch(ahead + i + j);
  }
  return sum_lane(sums[0] + sums[1] + sums[2] + sums[3]);
}

}  // namespace
