// Where a walk over an item's rBlocks, and then over those of the thread's next item, will be later.
#pragma once

#include "fetch.h"
#include "isa.h"
#include "traits.h"

namespace {

using distkv::Item;

template <class X>
struct Walk {
  using Element = typename X::Element;

  const DistkvAttention& a;
  const Item& item;
  const Item* next;  // or null

  // From element `place` of what the item reads of rBlock b, which starts at `base`.
  Ahead ahead_of(int64_t b, const Element* base, int64_t place) const {
    Ahead ahead;
    for (int i = 0; i < times_to_ask<X>(item.row_end - item.row_begin); ++i)
      ahead.by[i] = distance_to(b, base, place, AHEAD_BYTES[i] / (int64_t)sizeof(Element));
    return ahead;
  }

 private:
  // Elements of an rBlock, with the gaps between heads, that an item reads.
  int64_t stretch_of(const Item& of) const { return (of.head_end - of.head_begin) * a.head_stride; }

  // In bytes, to what is read `later` elements later; 0 where nothing is.
  ptrdiff_t distance_to(int64_t b, const Element* base, int64_t place, int64_t later) const {
    int64_t target = place + later;
    const Element* other = base;
    for (const Item* at = &item; target >= stretch_of(*at);) {
      target -= stretch_of(*at);
      if (++b == at->block_end) {
        at = at == &item ? next : nullptr;
        if (!at) return 0;
        b = at->block_begin;
      }
      other = (const Element*)a.pool + slab_offset(a, a.block_ids[b], at->head_begin);
    }
    return (const char*)(other + target) - (const char*)(base + place);
  }
};

}  // namespace
