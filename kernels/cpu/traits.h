// How products of queries and keys, and of weights and values, are formed: the two engines are templates over this.
// int8 K and V carry scales: those of K are multiplied into the queries, rBlock by rBlock, those of V into the weights.
//
// Widened: elements become floats as they are loaded, one fused multiply-add per vector.
// Pairs:   bf16 x bf16 two at a time into fp32 (AVX512_BF16); tokens of V are taken in pairs.
#pragma once

#include "elements.h"
#include "isa.h"

namespace {

using distkv::CHUNK_TOKENS;

template <class E>
struct Widened {
  using Element = typename E::Type;
  using Query = float;
  using Weight = float;
  using Operand = vf;
  static constexpr int CHUNK = W;  // dims per load
  static constexpr int PARTS = 1;  // vectors of accumulators per chunk of V's dims
  static constexpr int STEP = 1;   // tokens of V per multiplication
  static constexpr bool IS_PAIRS = false;
  static constexpr bool IS_OCTETS = false;
  static constexpr bool IS_INT8 = sizeof(Element) == 1;
  static constexpr bool IS_DOTS = false;

  static Operand load(const Element* p) { return E::load(p); }
  static Operand load_first(const Element* p, int64_t n) { return ::load_first<E>(p, n); }
  static Operand load_query(const Query* p) { return ::load(p); }
  static vf multiply_add(Operand a, Operand b, vf sum) { return a * b + sum; }

  static void load_values(const Element* v, const Element*, Operand* parts) { parts[0] = E::load(v); }
  static void load_first_values(const Element* v, const Element*, int64_t n, Operand* parts) {
    parts[0] = ::load_first<E>(v, n);
  }
  // Weights of a chunk are [row][CHUNK_TOKENS]; those from row r on, and that of row r and token t.
  static const Weight* weights_of(const Weight* p, int64_t r) { return p + r * CHUNK_TOKENS; }
  static Operand weight(const Weight* p, int64_t r, int64_t t) { return splat(p[r * CHUNK_TOKENS + t]); }
  // Weights are stored as they will be multiplied; sums are formed before that, so the LSE stays fp32.
  static void store_weights(Weight* p, vf x) { ::store(p, x); }
  // GROUP vectors of accumulators hold as many vectors of dims; this puts them in order.
  static constexpr int GROUP = 1;
  static void order(const vf* sums, vf* dims) { dims[0] = sums[0]; }
  static void load_queries(const void* q, int32_t dtype, int64_t offset, int64_t n, Query* to) {
    widen(q, dtype, offset, n, to);
  }
};

#if defined(__AVX512VNNI__)
// int8 by integer products (int8_quads.h), for heads of 64, 128, 192 or 256 dims.
struct Dots : Widened<Int8> {
  static constexpr bool IS_DOTS = true;
  // Vector i holds dims 16 * lane + 4 * i to + 3: lanes of 128 bits are transposed.
  static constexpr int GROUP = 4;
  static void order(const vf* sums, vf* dims) {
    const __m512 a = (__m512)sums[0], b = (__m512)sums[1], c = (__m512)sums[2], d = (__m512)sums[3];
    const __m512 front = _mm512_shuffle_f32x4(a, b, 0x44), back = _mm512_shuffle_f32x4(c, d, 0x44);
    const __m512 later_front = _mm512_shuffle_f32x4(a, b, 0xee), later_back = _mm512_shuffle_f32x4(c, d, 0xee);
    dims[0] = (vf)_mm512_shuffle_f32x4(front, back, 0x88);
    dims[1] = (vf)_mm512_shuffle_f32x4(front, back, 0xdd);
    dims[2] = (vf)_mm512_shuffle_f32x4(later_front, later_back, 0x88);
    dims[3] = (vf)_mm512_shuffle_f32x4(later_front, later_back, 0xdd);
  }
};
#endif

#if defined(__AVX512BF16__)
struct Pairs {
  using Element = uint16_t;
  using Query = uint16_t;
  using Weight = uint16_t;
  using Operand = __m512bh;
  static constexpr int CHUNK = 32;
  static constexpr int PARTS = 2;
  static constexpr int STEP = 2;
  static constexpr bool IS_PAIRS = true;
  static constexpr bool IS_OCTETS = false;
  static constexpr bool IS_INT8 = false;
  static constexpr bool IS_DOTS = false;

  static __mmask32 first(int64_t n) { return (__mmask32)((1ull << n) - 1); }
  static Operand load(const Element* p) { return (Operand)_mm512_loadu_si512(p); }
  static Operand load_first(const Element* p, int64_t n) { return (Operand)_mm512_maskz_loadu_epi16(first(n), p); }
  static Operand load_query(const Query* p) { return load(p); }
  static vf multiply_add(Operand a, Operand b, vf sum) { return (vf)_mm512_dpbf16_ps((__m512)sum, a, b); }

  // Interleaves two tokens; `next` may be null: the token after an odd last one does not exist.
  static void interleave(__m512i v, __m512i next, Operand* parts) {
    parts[0] = (Operand)_mm512_unpacklo_epi16(v, next);
    parts[1] = (Operand)_mm512_unpackhi_epi16(v, next);
  }
  static void load_values(const Element* v, const Element* next, Operand* parts) {
    interleave(_mm512_loadu_si512(v), next ? _mm512_loadu_si512(next) : _mm512_setzero_si512(), parts);
  }
  static void load_first_values(const Element* v, const Element* next, int64_t n, Operand* parts) {
    interleave(_mm512_maskz_loadu_epi16(first(n), v), _mm512_maskz_loadu_epi16(next ? first(n) : 0, next), parts);
  }
  static const Weight* weights_of(const Weight* p, int64_t r) { return p + r * CHUNK_TOKENS; }
  static Operand weight(const Weight* p, int64_t r, int64_t t) { return two_weights(p + r * CHUNK_TOKENS + t); }
  static Operand two_weights(const Weight* p) {
    int32_t two;
    memcpy(&two, p, sizeof two);
    return (Operand)_mm512_set1_epi32(two);
  }
  static void store_weights(Weight* p, vf x) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
  }
  // The interleaving takes four dims of each eight to one part, four to the other.
  static constexpr int GROUP = 2;
  static void order(const vf* sums, vf* dims) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    dims[0] = (vf)_mm512_permutex2var_ps((__m512)sums[0], first, (__m512)sums[1]);
    dims[1] = (vf)_mm512_permutex2var_ps((__m512)sums[0], second, (__m512)sums[1]);
  }
  static void load_queries(const void* q, int32_t, int64_t offset, int64_t n, Query* to) {
    memcpy(to, (const uint16_t*)q + offset, n * 2);
  }
};

// int8 K and V as Pairs: such a number is exact in bf16. Only for prefill, whose rows share what is widened.
struct WidePairs : Pairs {
  using Element = int8_t;
  static constexpr bool IS_INT8 = true;

  static Operand rounded(vf x, vf next) { return (Operand)_mm512_cvtne2ps_pbh((__m512)next, (__m512)x); }
  static Operand load(const Element* p) { return rounded(Int8::load(p), Int8::load(p + W)); }
  static Operand load_first(const Element* p, int64_t n) {
    Element few[CHUNK] = {};
    memcpy(few, p, n);
    return load(few);
  }
  static void load_values(const Element* v, const Element* next, Operand* parts) {
    interleave((__m512i)load(v), next ? (__m512i)load(next) : _mm512_setzero_si512(), parts);
  }
  static void load_first_values(const Element* v, const Element* next, int64_t n, Operand* parts) {
    interleave((__m512i)load_first(v, n), next ? (__m512i)load_first(next, n) : _mm512_setzero_si512(), parts);
  }

  // K of n tokens times its scales, rounded: that costs as much precision as to round queries times scales, which would
  // have to be packed anew for every rBlock.
  static void round_keys(const Element* k, int64_t n, int64_t head_dim, const float* scales, uint16_t* to) {
    for (int64_t d = 0; d < head_dim; d += CHUNK) {
      const int64_t dims = smaller(CHUNK, head_dim - d);
      float own[CHUNK] = {};
      memcpy(own, scales + d, dims * sizeof(float));
      const vf left = ::load(own), right = ::load(own + W);
      for (int64_t t = 0; t < n; ++t) {
        Element last[CHUNK] = {};
        const Element* p = k + t * head_dim + d;
        if (dims < CHUNK) p = (const Element*)memcpy(last, p, dims);
        const Operand keys = rounded(Int8::load(p) * left, Int8::load(p + W) * right);
        _mm512_mask_storeu_epi16(to + t * head_dim + d, first(dims), (__m512i)keys);
      }
    }
  }
};
#endif

// Where one KV head of one layer of rBlock `id` starts, in elements.
inline int64_t slab_offset(const DistkvAttention& a, int64_t id, int64_t head) {
  return ((id * a.num_layers + a.layer) * a.kv_heads + head) * a.head_stride;
}

// Where the scales of one KV head of one layer of rBlock `id` start.
inline const float* scales_of(const DistkvAttention& a, const float* scales, int64_t id, int64_t head, int64_t stride) {
  return scales + ((id * a.num_layers + a.layer) * a.kv_heads + head) * stride;
}

// Which of some neighbouring keys a query sees: [begin, end), with begin <= end.
struct Seen {
  int64_t begin, end;

  // The same of the `n` keys from key `from` on, counted from there.
  Seen within(int64_t from, int64_t n) const {
    const int64_t last = larger(0, smaller(n, end - from));
    return {smaller(last, larger(0, begin - from)), last};
  }
};

// What a query at `position` sees of the rBlock that holds positions from `start` on.
inline Seen seen_of_rblock(const DistkvAttention& a, int64_t position, int64_t start) {
  const int64_t end = a.causal ? position - start + 1 : a.rblock_size;
  return Seen{a.window ? position - start - a.window + 1 : 0, end}.within(0, a.rblock_size);
}

// Scores are bent, where there is a soft cap, and then scaled to be exponents of two.
inline float score_scale(const DistkvAttention& a) { return (a.soft_cap > 0 ? a.soft_cap : a.scale) * 1.44269504089f; }

inline void bend_scores(const DistkvAttention& a, float* s, int64_t count) {
  if (!(a.soft_cap > 0)) return;
  const vf inner = splat(a.scale / a.soft_cap);
  for (int64_t i = 0; i < count; i += W) store(s + i, tanh_of(load(s + i) * inner));
}

// A row of an item: its position, and where its query of KV head `head` starts in q.
inline int64_t position_of(const DistkvAttention& a, const distkv::Item& item, int64_t row) {
  return a.positions[item.first_token + row / (a.num_heads / a.kv_heads)];
}

inline int64_t query_offset(const DistkvAttention& a, const distkv::Item& item, int64_t head, int64_t row) {
  const int64_t group = a.num_heads / a.kv_heads;
  return (item.first_token + row / group) * a.q_token_stride + (head * group + row % group) * a.q_head_stride;
}

// Normalises one row of accumulators; a row without any key becomes (0, -inf). `top` and `sum` are in powers of two.
template <class X>
inline void emit_row(const DistkvAttention& a, const distkv::Item& item, int64_t head, int64_t row, const float* acc,
                     float top, float sum) {
  const int64_t group = a.num_heads / a.kv_heads;
  const int64_t place = row / group * a.num_heads + head * group + row % group;
  const float inverse = sum == 0 ? 0 : 1 / sum;
  float* out = item.out + place * a.head_dim;
  for (int64_t d = 0; d < a.head_dim; d += X::GROUP * W) {
    vf sums[X::GROUP], dims[X::GROUP];
    for (int i = 0; i < X::GROUP; ++i) sums[i] = load(acc + d + i * W) * splat(inverse);
    X::order(sums, dims);
    if (d + X::GROUP * W <= a.head_dim) memcpy(out + d, dims, sizeof dims);
    else memcpy(out + d, dims, (a.head_dim - d) * sizeof(float));
  }
  item.lse[place] = sum == 0 ? NO_SCORE : (top + log2f(sum)) * 0.69314718056f;
}

}  // namespace
