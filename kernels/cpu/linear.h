// y = x w^T, [M, N] out of [M, K] and weights [N, K] as they lie: some rows of x times some rows of w at a time.
//
// All sums of a tile stay in registers, one vector each, and their lanes are added up once per DEPTH of K; so every
// weight is loaded once for TILE_ROWS rows, and a row's bits do not depend on what other rows there are.
#pragma once

#include "traits.h"

namespace {

using distkv::LINEAR_OUTPUTS;
using distkv::LINEAR_ROWS;

constexpr int TILE_ROWS = 4;
constexpr int TILE_OUTPUTS = W == 16 ? 6 : 3;  // with TILE_ROWS: as many sums as registers take
constexpr int64_t DEPTH = 1024;                // of K: TILE_ROWS rows of it, as floats, fit half of L1
constexpr int AHEAD = 4;                       // tiles whose weights are asked for while one is computed
constexpr int64_t STRIDE = DEPTH + 32;         // between rows: a power of two would put them in the same sets of L1

template <class X>
class Linear {
 public:
  using Element = typename X::Element;
  using Query = typename X::Query;
  static constexpr int LINE = 64 / sizeof(Element);  // elements of a cache line

  Linear(const DistkvLinear& p, char* scratch)
      : p_(p), w_((const Element*)p.w), sums_((float*)scratch), x_((Query*)(sums_ + LINEAR_ROWS * LINEAR_OUTPUTS)) {}

  static size_t scratch_bytes() {
    return LINEAR_ROWS * LINEAR_OUTPUTS * sizeof(float) + TILE_ROWS * STRIDE * sizeof(Query);
  }

  // Rows [m, m + rows) of x, outputs [n, n + outputs).
  void run(int64_t m, int64_t rows, int64_t n, int64_t outputs) {
    memset(sums_, 0, rows * LINEAR_OUTPUTS * sizeof(float));
    for (int64_t k = 0; k < p_.num_inputs; k += DEPTH) {
      const int64_t length = smaller(DEPTH, p_.num_inputs - k);
      for (int64_t r = 0; r < rows; r += TILE_ROWS) {
        const int64_t in_tile = smaller(TILE_ROWS, rows - r);
        load_rows(m + r, in_tile, k, length);
        const Element* w = w_ + n * p_.w_stride + k;
        float* sums = sums_ + r * LINEAR_OUTPUTS;
        switch (in_tile) {
          case 1: along<1>(w, length, outputs, r == 0, sums); break;
          case 2: along<2>(w, length, outputs, r == 0, sums); break;
          case 3: along<3>(w, length, outputs, r == 0, sums); break;
          default: along<TILE_ROWS>(w, length, outputs, r == 0, sums);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) store_row(m + r, n, outputs, sums_ + r * LINEAR_OUTPUTS);
  }

 private:
  // As they are multiplied, filled up with zeros.
  void load_rows(int64_t m, int64_t rows, int64_t k, int64_t length) {
    for (int64_t r = 0; r < rows; ++r) {
      Query* to = x_ + r * STRIDE;
      X::load_queries(p_.x, DISTKV_BF16, (m + r) * p_.x_stride + k, length, to);
      memset((void*)(to + length), 0, (round_up(length, X::CHUNK) - length) * sizeof(Query));
    }
  }

  template <int ROWS>
  void along(const Element* w, int64_t length, int64_t outputs, bool fetches, float* sums) const {
    int64_t n = 0;
    for (; n + TILE_OUTPUTS <= outputs; n += TILE_OUTPUTS)
      tile<ROWS, TILE_OUTPUTS>(w + n * p_.w_stride, length, fetches, sums + n);
    for (; n < outputs; ++n) tile<ROWS, 1>(w + n * p_.w_stride, length, fetches, sums + n);
  }

  template <int ROWS, int OUTPUTS>
  __attribute__((always_inline)) inline void add(const Element* w, const Query* x, vf* sum) const {
    typename X::Operand weights[OUTPUTS];
#pragma GCC unroll 8
    for (int c = 0; c < OUTPUTS; ++c) weights[c] = X::load(w + c * p_.w_stride);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const auto row = X::load_query(x + r * STRIDE);
#pragma GCC unroll 8
      for (int c = 0; c < OUTPUTS; ++c) sum[r * OUTPUTS + c] = X::multiply_add(weights[c], row, sum[r * OUTPUTS + c]);
    }
  }

  template <int ROWS, int OUTPUTS>
  KEEP_REGISTERS void tile(const Element* w, int64_t length, bool fetches, float* sums) const {
    constexpr int COUNT = ROWS * OUTPUTS, FULL = (COUNT + W - 1) / W * W;
    vf sum[FULL] = {};
    int64_t k = 0;
    for (; k + LINE <= length; k += LINE) {
      if (fetches) {
#pragma GCC unroll 8
        for (int c = 0; c < OUTPUTS; ++c) prefetch(w + (c + AHEAD * OUTPUTS) * p_.w_stride + k);
      }
#pragma GCC unroll 8
      for (int i = 0; i < LINE; i += X::CHUNK) add<ROWS, OUTPUTS>(w + k + i, x_ + k + i, sum);
    }
    for (; k + X::CHUNK <= length; k += X::CHUNK) add<ROWS, OUTPUTS>(w + k, x_ + k, sum);
    if (k < length) {
#pragma GCC unroll 8
      for (int c = 0; c < OUTPUTS; ++c) {
        const auto weights = X::load_first(w + c * p_.w_stride + k, length - k);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
          sum[r * OUTPUTS + c] = X::multiply_add(weights, X::load_query(x_ + r * STRIDE + k), sum[r * OUTPUTS + c]);
      }
    }
    float lanes[FULL];
#pragma GCC unroll 8
    for (int i = 0; i < FULL; i += W) store(lanes + i, sums_of_lanes(sum + i));
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < OUTPUTS; ++c) sums[r * LINEAR_OUTPUTS + c] += lanes[r * OUTPUTS + c];
  }

  void store_row(int64_t m, int64_t n, int64_t outputs, const float* sums) const {
    uint16_t* y = (uint16_t*)p_.y + m * p_.y_stride + n;
    int64_t i = 0;
    for (; i + W <= outputs; i += W) Bf16::store(y + i, load(sums + i));
    if (i < outputs) store_first<Bf16>(y + i, load_first<Fp32>(sums + i, outputs - i), outputs - i);
  }

  const DistkvLinear& p_;
  const Element* w_;
  float* sums_;
  Query* x_;
};

#if defined(__AVX512BF16__)
using Linears = Linear<Pairs>;
#else
using Linears = Linear<Widened<Bf16>>;
#endif

void linear(const DistkvLinear& p, int64_t m, int64_t rows, int64_t n, int64_t outputs, char* scratch) {
  Linears(p, scratch).run(m, rows, n, outputs);
}

}  // namespace
