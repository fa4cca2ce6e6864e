// One token out of one row of logits, by the definitions of ops/sampling.py.
#pragma once

#include <stdlib.h>

#include "elements.h"
#include "isa.h"

namespace {

// Weights are e^((logit - largest) / temperature), at most 1. They are put into buckets of 1/32 of an octave first, so
// that only the bucket in which a limit lies has to be sorted.
constexpr int64_t BUCKETS = 1024;  // the last one holds all that weigh less than 2^-32
constexpr int BUCKET_SHIFT = 18;
constexpr int32_t ONE_BITS = 0x3f800000;
constexpr int64_t BLOCK = 512;  // weights whose sum is kept while a row is drawn from

struct Bucket {
  double mass;
  int64_t count;

  static vi of(vf weights) {
    const vi bucket = (ONE_BITS - (vi)weights) >> BUCKET_SHIFT;
    const vi last = vi{} + (int32_t)(BUCKETS - 1);
    return bucket < last ? bucket : last;
  }
  static int64_t of(float weight) { return of(splat(weight))[0]; }
  // The largest weight of a bucket.
  static float top(int64_t bucket) {
    const int32_t bits = ONE_BITS - (int32_t)(bucket << BUCKET_SHIFT);
    float weight;
    memcpy(&weight, &bits, sizeof weight);
    return bucket < BUCKETS ? weight : -1;
  }
};

// The heavier first, of equals the first.
inline int by_rank(const void* left, const void* right) {
  const uint64_t a = *(const uint64_t*)left, b = *(const uint64_t*)right;
  return a < b ? -1 : a > b;
}

class Row {
 public:
  // `scratch`: scratch_bytes(vocabulary).
  Row(const distkv::SampledRow& row, char* scratch)
      : row_(row),
        size_(row.vocabulary),
        padded_(round_up(row.vocabulary, W)),
        weights_((float*)scratch),
        ranks_((uint64_t*)(weights_ + padded_)),
        sums_((double*)(ranks_ + size_)) {}

  static size_t scratch_bytes(int64_t vocabulary) {
    return round_up(vocabulary, W) * 4 + vocabulary * 8 + (vocabulary / BLOCK + 1) * 8;
  }

  int64_t sample() {
    if (!load()) return -1;
    if (row_.temperature == 0) return largest();
    weigh();
    if (row_.min_p > 0) least_ = row_.min_p;
    if (row_.top_k > 0 && row_.top_k < size_) cut_count();
    if (row_.top_p < 1) cut_mass();
    return draw();
  }

 private:
  // The row as floats, its largest; false unless all are finite.
  bool load() {
    widen(row_.logits, row_.dtype, row_.offset, size_, weights_);
    for (int64_t i = size_; i < padded_; ++i) weights_[i] = weights_[0];
    vf top = ::load(weights_), nothing = {};
    for (int64_t i = 0; i < padded_; i += W) {
      const vf x = ::load(weights_ + i);
      top = vmax(top, x);
      nothing = nothing + (x - x);  // NaN as soon as one is infinite or NaN
    }
    top_ = max_lane(top);
    return sum_lane(nothing) == 0;
  }

  int64_t largest() const {
    int64_t i = 0;
    while (weights_[i] != top_) ++i;
    return i;
  }

  void weigh() {
    const vf top = splat(top_), scale = splat(1.44269504089f / row_.temperature), one = splat(1);
    for (int64_t i = 0; i < padded_; i += W) {
      const vf weight = exp2_of((::load(weights_ + i) - top) * scale);
      store(weights_ + i, weight < one ? weight : one);  // rounding may leave the largest a little above
    }
    for (int64_t i = size_; i < padded_; ++i) weights_[i] = 0;
  }

  void fill_buckets() {
    if (are_filled_) return;
    are_filled_ = true;
    for (int64_t i = 0; i < size_; i += W) {
      const vi buckets = Bucket::of(::load(weights_ + i));
      for (int64_t j = 0; j < smaller(W, size_ - i); ++j) {
        Bucket& bucket = buckets_[buckets[j]];
        bucket.mass += weights_[i + j];
        bucket.count += 1;
      }
    }
  }

  // The weights of one bucket, ranked. Returns how many.
  int64_t rank(int64_t bucket) {
    const float top = Bucket::top(bucket), below = Bucket::top(bucket + 1);
    int64_t count = 0;
    for (int64_t i = 0; i < size_; i += W) {
      const vf weights = ::load(weights_ + i);
      if (!any_above(weights, splat(below))) continue;
      for (int64_t j = i; j < smaller(i + W, size_); ++j) {
        if (weights_[j] > top || weights_[j] <= below) continue;
        int32_t bits;
        memcpy(&bits, weights_ + j, sizeof bits);
        ranks_[count++] = (uint64_t)(ONE_BITS - bits) << 32 | (uint64_t)j;
      }
    }
    qsort(ranks_, count, sizeof *ranks_, by_rank);
    return count;
  }

  float weight_of(uint64_t rank) const { return weights_[(uint32_t)rank]; }

  // The k heaviest, and those that weigh as much as the last of them.
  void cut_count() {
    fill_buckets();
    int64_t before = 0, bucket = 0;
    while (before + buckets_[bucket].count < row_.top_k) before += buckets_[bucket++].count;
    const int64_t count = rank(bucket);
    const float limit = weight_of(ranks_[row_.top_k - before - 1]);
    least_ = limit > least_ ? limit : least_;
    last_bucket_ = bucket;
    buckets_[bucket].mass = 0;  // from now on of what the count has left
    for (int64_t i = 0; i < count && weight_of(ranks_[i]) >= limit; ++i) buckets_[bucket].mass += weight_of(ranks_[i]);
  }

  // The heaviest until they make up top_p of what the count has left; never none.
  void cut_mass() {
    fill_buckets();
    double left = 0, before = 0;
    for (int64_t b = 0; b <= last_bucket_; ++b) left += buckets_[b].mass;
    const double limit = left * row_.top_p;
    int64_t bucket = 0, kept = 0;
    while (bucket < last_bucket_ && before + buckets_[bucket].mass < limit) before += buckets_[bucket++].mass;
    const int64_t count = rank(bucket);
    do before += weight_of(ranks_[kept++]);
    while (kept < count && before < limit);
    const uint64_t rank = ranks_[kept - 1];
    if (weight_of(rank) < least_) return;
    least_ = weight_of(rank);
    last_of_least_ = (uint32_t)rank;
  }

  int64_t draw() {
    double total = 0;
    const int64_t blocks = (size_ + BLOCK - 1) / BLOCK;
    for (int64_t b = 0; b < blocks; ++b) total += sums_[b] = sum_of(b);
    double target = row_.uniform * total;
    int64_t block = 0;
    while (block + 1 < blocks && target >= sums_[block]) target -= sums_[block++];
    // Sums are rounded: where the target lies beyond the last weight, that one is it.
    for (;; --block) {
      int64_t found = -1;
      for (int64_t i = block * BLOCK; i < smaller(size_, (block + 1) * BLOCK); ++i) {
        if (!is_kept(i)) continue;
        found = i;
        if (target < weights_[i]) break;
        target -= weights_[i];
      }
      if (found >= 0) return found;
    }
  }

  bool is_kept(int64_t i) const { return weights_[i] > least_ || (weights_[i] == least_ && i <= last_of_least_); }

  double sum_of(int64_t block) const {
    const int64_t begin = block * BLOCK, end = smaller(padded_, begin + BLOCK);
    if (begin <= last_of_least_ && last_of_least_ < end) {
      double sum = 0;
      for (int64_t i = begin; i < smaller(end, size_); ++i) sum += is_kept(i) ? weights_[i] : 0;
      return sum;
    }
    const vf least = splat(least_);
    vf sum = {};
    if (last_of_least_ >= end)
      for (int64_t i = begin; i < end; i += W) sum = sum + (::load(weights_ + i) >= least ? ::load(weights_ + i) : vf{});
    else
      for (int64_t i = begin; i < end; i += W) sum = sum + (::load(weights_ + i) > least ? ::load(weights_ + i) : vf{});
    return sum_lane(sum);
  }

  const distkv::SampledRow& row_;
  const int64_t size_, padded_;
  float* weights_;
  uint64_t* ranks_;
  double* sums_;
  float top_ = 0;
  float least_ = 0;
  int64_t last_of_least_ = INT64_MAX;  // of those that weigh no more than the least: the last that is kept
  bool are_filled_ = false;
  int64_t last_bucket_ = BUCKETS - 1;  // that the count has left anything of
  Bucket buckets_[BUCKETS] = {};
};

int64_t sample_row(const distkv::SampledRow& row, char* scratch) { return Row(row, scratch).sample(); }

}  // namespace
