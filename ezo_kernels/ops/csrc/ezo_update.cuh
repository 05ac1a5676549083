// The update: w <- w - coef_0 z_0 - coef_1 z_1 - ..., z made again; several steps in one pass over w.
//
// A program updates one tile (R rows by C columns) of one parameter, as the table of _update_triton.py tells it. A step
// rounds to the weight's dtype before the next one begins, in registers: the bits are those of one pass a step.
#pragma once

#include "ezo_noise.cuh"

#ifndef __CUDACC__
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
#endif

namespace ezo {

constexpr int kFields = 20;  // numbers of one parameter in the table
// Number 2 is its code: 0 fp32, 1 bf16, 2 fp16; 3 and 4 are CODE 1 and 2 below with ROUNDED.

// What a launch is given beside its table.
struct Steps {
  const int* keys;    // [steps, 2]
  const float* coef;  // [steps, queries]
  int steps, queries;
  u32 query;  // first direction
  u32 threshold;
  float scale;
};

// ---- dtypes: CODE 0 fp32, 1 bf16, 2 fp16; narrow and widen lose nothing once a value is rounded

#ifdef __CUDACC__
EZO_FN u32 to_half(float v) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
}
EZO_FN float from_half(u32 h) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"((u16)h));
  return v;
}
EZO_FN float round_down(float v) { return floorf(v); }
// Two neighbours to nearest even in bf16 or fp16: the lower half of the word is the first.
EZO_FN u32 to_bf16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
EZO_FN u32 to_half_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
// An address out of a table is in global memory, which the compiler cannot know.
EZO_FN uint4 load(const uint4* at) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
}
EZO_FN u32 load(const u32* at) {
  u32 v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(at));
  return v;
}
EZO_FN u32 load(const u16* at) {
  u16 v;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(at));
  return v;
}
EZO_FN void store(uint4* at, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
EZO_FN void store(u32* at, u32 v) { asm volatile("st.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory"); }
EZO_FN void store(u16* at, u32 v) { asm volatile("st.global.u16 [%0], %1;" ::"l"(at), "h"((u16)v) : "memory"); }
#else
template <class T>
EZO_FN T load(const T* at) {
  return *at;
}
template <class T, class V>
EZO_FN void store(T* at, V v) {
  *at = (T)v;
}
EZO_FN u32 to_half(float v) {
  const _Float16 h = (_Float16)v;
  u16 i;
  __builtin_memcpy(&i, &h, 2);
  return i;
}
EZO_FN float from_half(u32 i) {
  _Float16 h;
  const u16 low = (u16)i;
  __builtin_memcpy(&h, &low, 2);
  return (float)h;
}
EZO_FN float round_down(float v) { return __builtin_floorf(v); }
EZO_FN u32 to_bf16_pair(float low, float high) {
  const u32 a = bits(low), b = bits(high);
  return (a + 0x7fffu + ((a >> 16) & 1u)) >> 16 | ((b + 0x7fffu + ((b >> 16) & 1u)) & 0xffff0000u);
}
EZO_FN u32 to_half_pair(float low, float high) { return to_half(low) | to_half(high) << 16; }
#endif

template <int CODE>
EZO_FN u32 narrow(float v) {
  return CODE == 1 ? bits(v) >> 16 : to_half(v);
}

template <int CODE>
EZO_FN float widen(u32 h) {
  return CODE == 1 ? from_bits(h << 16) : from_half(h);
}

// v so that narrow(v) is v rounded to 16 bits; `random` is a 16-bit lane, kept from NaN by the caller.
template <int CODE, bool STOCHASTIC>
EZO_FN float rounded(float v, u32 random) {
  const u32 i = bits(v);
  if constexpr (CODE == 1) return from_bits(i + (STOCHASTIC ? random : v == v ? 0x7fffu + ((i >> 16) & 1u) : 0u));
  if constexpr (!STOCHASTIC) return v;
  const float size = from_bits(i & 0x7fffffffu);
  const float ulps = mul(size, 0x1p24f), whole = round_down(ulps);
  const float small = mul(add(whole, round_down(add(sub(ulps, whole), mul((float)random, 0x1p-16f)))), 0x1p-24f);
  const u32 normal = (i + (random >> 3)) & ~8191u;
  return from_bits(size < 0x1p-14f ? bits(small) | (i & 0x80000000u) : normal);
}

// z of two neighbours, finite, rounded to nearest even in the weight's dtype.
template <int CODE>
EZO_FN void round_z(float& low, float& high) {
  const u32 pair = CODE == 1 ? to_bf16_pair(low, high) : to_half_pair(low, high);
  low = CODE == 1 ? from_bits(pair << 16) : from_half(pair & 0xffffu);
  high = CODE == 1 ? from_bits(pair & 0xffff0000u) : from_half(pair >> 16);
}

// The lanes of two neighbours, without those of a NaN.
EZO_FN u32 keep(u32 word, float low, float high) {
  return word & ((low == low ? 0x0000ffffu : 0u) | (high == high ? 0xffff0000u : 0u));
}

// ---- N consecutive columns of one row

template <int ROUNDS, int CODE, bool STOCHASTIC, int N>
EZO_FN void round_columns(Key key, u32 site, u32 row, u32 first, float* v) {
#pragma unroll
  for (int b = 0; b < N; b += 8) {
    Words w = {0, 0, 0, 0};
    if constexpr (STOCHASTIC) {
      w = philox<ROUNDS>(site, (first + b) >> 3, kRoundingStream, row, key);
      float sum = v[b];  // a NaN may have all bits set, and adding to it would make it a number: one test for eight
#pragma unroll
      for (int j = 1; j < 8; ++j) sum = add(sum, v[b + j]);
      if (sum != sum) {
        w.w0 = keep(w.w0, v[b], v[b + 1]), w.w1 = keep(w.w1, v[b + 2], v[b + 3]);
        w.w2 = keep(w.w2, v[b + 4], v[b + 5]), w.w3 = keep(w.w3, v[b + 6], v[b + 7]);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) v[b + j] = rounded<CODE, STOCHASTIC>(v[b + j], lane(w, j));
  }
}

// v after every step; whether any of them moved it. factor: of the parameter, on every coefficient. ROUNDED: z has the weight's
// dtype. ONE: there is one step of one query, so
// that everything but the row leaves the loop over rows.
template <int NOISE, int ROUNDS, int CODE, bool ROUNDED, bool STOCHASTIC, bool ONE, int N>
EZO_FN bool advance(const Steps& a, u32 site, float factor, u32 row, u32 first, float* v) {
  bool touched = false;
#pragma unroll 1
  for (int s = 0; s < (ONE ? 1 : a.steps); ++s) {
    if (CODE != 0 && s) {
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = widen<CODE>(narrow<CODE>(v[j]));
    }
    const Key key = {(u32)a.keys[2 * s], (u32)a.keys[2 * s + 1]};
    bool moved = false;
#pragma unroll 1
    for (int q = 0; q < (ONE ? 1 : a.queries); ++q) {
      const float coef = mul(a.coef[s * a.queries + q], factor);
      if (!(bits(coef) << 1)) continue;  // zero, not a subnormal: a skipped step leaves every bit alone, that of -0 too
      float z[N];
      z_columns<NOISE, ROUNDS, N>(key, site, (a.query + q) << 8, row, first, a.threshold, a.scale, z);
      if constexpr (ROUNDED) {
#pragma unroll
        for (int j = 0; j < N; j += 2) round_z<CODE>(z[j], z[j + 1]);
      }
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = sub(v[j], mul(z[j], coef));
      moved = true;
    }
    if (CODE != 0 && moved) round_columns<ROUNDS, CODE, STOCHASTIC, N>(key, site, row, first, v);
    touched |= moved;
  }
  return touched;
}

// ---- memory

// 16 bytes: four columns of fp32, eight of the others.
template <int CODE>
EZO_FN void unpack(uint4 raw, float* v) {
  const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (CODE == 0) {
      v[i] = from_bits(words[i]);
    } else {
      v[2 * i] = CODE == 1 ? from_bits(words[i] << 16) : from_half(words[i] & 0xffffu);
      v[2 * i + 1] = CODE == 1 ? from_bits(words[i] & 0xffff0000u) : from_half(words[i] >> 16);
    }
  }
}

template <int CODE>
EZO_FN uint4 pack(const float* v) {
  u32 words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    words[i] = CODE == 0 ? bits(v[i]) : narrow<CODE>(v[2 * i]) | (narrow<CODE>(v[2 * i + 1]) << 16);
  uint4 raw;
  raw.x = words[0], raw.y = words[1], raw.z = words[2], raw.w = words[3];
  return raw;
}

// Element offset of a flat index over the dimensions of a table entry.
EZO_FN i64 strided(const i64* entry, u32 index) {
  const u32 n1 = (u32)entry[10], n2 = (u32)entry[11], n3 = (u32)entry[12];
  const u32 i3 = index / n3, i2 = i3 / n2, i1 = i2 / n1;
  return (i64)(index - i3 * n3) * entry[16] + (i64)(i3 - i2 * n2) * entry[15] + (i64)(i2 - i1 * n1) * entry[14] +
         (i64)i1 * entry[13];
}

template <int CODE>
struct Element {
  using type = u16;
};
template <>
struct Element<0> {
  using type = u32;
};

// Columns first .. first + N - 1 of any parameter. Four neighbours lie in one tap: segments are multiples of four.
template <int CODE, int N, bool STORE>
EZO_FN void access(const i64* entry, u32 row, u32 first, float* v) {
  using T = typename Element<CODE>::type;
  T* const base = (T*)entry[0];
  const u32 columns = (u32)entry[5], channels = (u32)entry[6], padded = (u32)entry[7];
  const bool conv = entry[9] != 0;
  const i64 step = entry[18], at_row = (i64)row * entry[17];
#pragma unroll
  for (int b = 0; b < N; b += 4) {
    const u32 tap = (first + b) / padded, within = first + b - tap * padded;
    T* const at = base + at_row + strided(entry, conv ? tap : row) + (i64)within * step;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool inside = first + b + j < columns && within + j < channels;
      if constexpr (STORE) {
        if (inside) store(at + j * step, CODE == 0 ? bits(v[b + j]) : narrow<CODE>(v[b + j]));
      } else {
        const u32 raw = inside ? (u32)load(at + j * step) : 0u;
        v[b + j] = CODE == 0 ? from_bits(raw) : widen<CODE>(raw);
      }
    }
  }
}

// ---- one thread's part of a tile

template <int NOISE, int ROUNDS, int CODE, bool ROUNDED, bool STOCHASTIC, bool ONE, int R, int C, int THREADS>
EZO_FN void update_tile(const i64* entry, u32 tile, u32 thread, const Steps& a) {
  constexpr int VECTOR = CODE == 0 ? 4 : 8, N = kUnit<NOISE> > VECTOR ? kUnit<NOISE> : VECTOR;
  constexpr int ACROSS = C / N, DOWN = THREADS / ACROSS;
  static_assert(C % N == 0 && THREADS % ACROSS == 0, "a thread keeps its columns");
  const u32 site = (u32)entry[1], rows = (u32)entry[4], across = (u32)entry[8];
  const u32 first = tile % across * C + thread % ACROSS * N, top = tile / across * R;
  const u32 end = top + R < rows ? top + R : rows;
  const float factor = from_bits((u32)entry[19]);
  u32 row = top + thread / ACROSS;
  if (entry[3]) {
    // rows of multiples of eight elements, at multiples of 16 bytes
    using T = typename Element<CODE>::type;
    const u32 channels = (u32)entry[6];
    const i64 stride = entry[16];
    if (first >= channels) return;
    T* at = (T*)entry[0] + (i64)row * stride + first;
#pragma unroll 1
    for (; row < end; row += DOWN, at += DOWN * stride) {
      float v[N];
#pragma unroll
      for (int b = 0; b < N; b += VECTOR) {
        uint4 raw = {0, 0, 0, 0};
        if (N == VECTOR || first + b < channels) raw = load((const uint4*)(at + b));
        unpack<CODE>(raw, v + b);
      }
      if (!advance<NOISE, ROUNDS, CODE, ROUNDED, STOCHASTIC, ONE, N>(a, site, factor, row, first, v)) return;
#pragma unroll
      for (int b = 0; b < N; b += VECTOR)
        if (N == VECTOR || first + b < channels) store((uint4*)(at + b), pack<CODE>(v + b));
    }
  } else if (first < (u32)entry[5]) {
#pragma unroll 1
    for (; row < end; row += DOWN) {
      float v[N];
      access<CODE, N, false>(entry, row, first, v);
      if (!advance<NOISE, ROUNDS, CODE, ROUNDED, STOCHASTIC, ONE, N>(a, site, factor, row, first, v)) return;
      access<CODE, N, true>(entry, row, first, v);
    }
  }
}

}  // namespace ezo
