// The noise contract (docs/rng.md) in CUDA C++: Philox4x32, every transform, masks and rounding lanes.
//
//     z[row, column] = transform(philox(key; site, column block, query << 8 | stream, row))
//
// Nothing is included and nothing is kept, so that NVRTC takes it as it is. Host compilers take it, too: the tests run
// these very functions on the CPU, bit for bit against the reference. Every rounding is written out, so that no
// compiler may fuse a product and a sum; compile with --fmad=false (nvcc, NVRTC) or -ffp-contract=off all the same.
#pragma once

#ifdef __CUDACC__
#define EZO_FN __device__ __forceinline__
#else
#define EZO_FN static inline __attribute__((always_inline))
#endif

namespace ezo {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

// ---- fp32, each operation rounded to nearest even

#ifdef __CUDACC__
// In PTX: CuPy compiles everything with -ftz=true, whatever it is told, and __fmul_rn and the like would flush subnormals.
EZO_FN float mul(float a, float b) {
  float r;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
EZO_FN float add(float a, float b) {
  float r;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
EZO_FN float sub(float a, float b) {
  float r;
  asm("sub.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
EZO_FN float fma(float a, float b, float c) {
  float r;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c));
  return r;
}
EZO_FN float neg(float a) {
  float r;
  asm("neg.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}
EZO_FN u32 bits(float a) { return __float_as_uint(a); }
EZO_FN float from_bits(u32 a) { return __uint_as_float(a); }
EZO_FN u32 byte_sum(u32 a) { return __dp4a(a, 0x01010101u, 0u); }
#else
EZO_FN float mul(float a, float b) { return a * b; }
EZO_FN float add(float a, float b) { return a + b; }
EZO_FN float sub(float a, float b) { return a - b; }
EZO_FN float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EZO_FN float neg(float a) { return -a; }
EZO_FN u32 bits(float a) {
  u32 i;
  __builtin_memcpy(&i, &a, 4);
  return i;
}
EZO_FN float from_bits(u32 i) {
  float a;
  __builtin_memcpy(&a, &i, 4);
  return a;
}
EZO_FN u32 byte_sum(u32 a) { return (a & 255) + ((a >> 8) & 255) + ((a >> 16) & 255) + (a >> 24); }
#endif

// ---- words

enum Stream : u32 {
  kGaussianStream = 0,
  kRademacherStream = 1,
  kMaskStream = 2,
  kSparseInt8Stream = 3,
  kRoundingStream = 4,
  kClt4Stream = 6,
  kUniformStream = 7,
  kHadamardStream = 8,
};

struct Key {
  u32 k0, k1;
};

struct Words {
  u32 w0, w1, w2, w3;
};

template <int ROUNDS>
EZO_FN Words philox(u32 c0, u32 c1, u32 c2, u32 c3, Key key) {
  u32 k0 = key.k0, k1 = key.k1;
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) {
    const u64 p0 = (u64)c0 * 0xD2511F53u, p1 = (u64)c2 * 0xCD9E8D57u;
    const u32 a = (u32)(p1 >> 32) ^ c1 ^ k0, b = (u32)(p0 >> 32) ^ c3 ^ k1;
    c0 = a;
    c1 = (u32)p1;
    c2 = b;
    c3 = (u32)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

// The key of (seed, step).
EZO_FN Key fold_key(u64 seed, u64 step) {
  const Words w = philox<10>((u32)step, (u32)(step >> 32), 0, 0x455A4F31u, {(u32)seed, (u32)(seed >> 32)});
  return {w.w0, w.w1};
}

// ---- transforms of words

// Two normals: the pinned Box-Muller.
EZO_FN void gaussian_pair(u32 w0, u32 w1, float& z0, float& z1) {
  const float u = fma((float)w0, 0x1p-32f, 0x1p-33f);
  const u32 i = bits(u), e = (i - 0x3f3504f3u) & 0xff800000u;
  const float t = sub(from_bits(i - e), 1.0f);
  float p = fma(t, 0x1.a90dd2p-3f, -0x1.4e97f6p-2f);
  p = fma(p, t, 0x1.6083dp-2f);
  p = fma(p, t, -0x1.973b12p-2f);
  p = fma(p, t, 0x1.ff6ad8p-2f);
  p = fma(p, t, -0x1.555b4ap-1f);
  p = fma(p, t, 0x1.000074p0f);
  p = fma(p, t, -0x1.fffffep0f);
  const float v = fma(p, t, mul((float)(int)e, -0x1.62e43p-23f));
  float y = from_bits(0x5f376908u - (u32)((int)bits(v) >> 1));  // at u = 1, v is -0
  const float h = mul(v, -0.5f);
  y = mul(y, fma(mul(h, y), y, 1.5f));
  y = mul(y, fma(mul(h, y), y, 1.5f));
  float r = mul(v, y);
  r = fma(fma(neg(r), r, v), mul(0.5f, y), r);
  const float x = mul((float)(int)(w1 << 1), 0x1p-32f), x2 = mul(x, x);
  float s = fma(x2, 0x1.3e17c8p-4f, -0x1.32535ap-1f);
  s = fma(s, x2, 0x1.4668f2p1f);
  s = fma(s, x2, -0x1.4abbc4p2f);
  s = fma(s, x2, 0x1.921fb6p1f);
  float c = fma(x2, 0x1.c1f06p-3f, -0x1.54f618p0f);
  c = fma(c, x2, 0x1.03bd06p2f);
  c = fma(c, x2, -0x1.3bd3a6p2f);
  c = fma(c, x2, 0x1.fffffep-1f);
  r = from_bits(bits(r) ^ (w1 & 0x80000000u));
  z0 = mul(r, c);
  z1 = mul(mul(r, x), s);
}

#ifdef __CUDACC__
// The same to about 1e-3, through the special function unit: one GPU family, outside the contract's portable bits.
EZO_FN void gaussian_fast_pair(u32 w0, u32 w1, float& z0, float& z1) {
  const float u = fma((float)w0, 0x1p-32f, 0x1p-33f);
  const float angle = mul((float)(int)(w1 << 1), 0x1.921fb6p-31f);
  float l, r, c, s;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(l) : "f"(u));
  l = mul(l, -0x1.62e43p0f);
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(l));
  asm("cos.approx.f32 %0, %1;" : "=f"(c) : "f"(angle));
  asm("sin.approx.f32 %0, %1;" : "=f"(s) : "f"(angle));
  r = from_bits(bits(r) ^ (w1 & 0x80000000u));
  z0 = mul(r, c);
  z1 = mul(r, s);
}
#endif

EZO_FN float clt4(u32 word) {
  const float s = (float)((int)byte_sum(word) - 510);
  return mul(s, add(0x1.a4cf3p-8f, mul(0x1.8cc87ap-28f, mul(s, s))));
}

EZO_FN float uniform(u32 word) { return mul((float)(int)word, 0x1.bb67aep-31f); }

// Value of one word of sparse_int8; T is the threshold.
EZO_FN int sparse_int8(u32 word, u32 threshold, int r_max) {
  const int value = (int)(((word & 0xffffu) * (u32)(2 * r_max + 1)) >> 16) - r_max;
  return (word >> 16) >= threshold ? value : 0;
}

// The 16-bit lane of column j (0..7) of a block: masks and stochastic rounding.
EZO_FN u32 lane(const Words& w, int j) {
  const u32 word = j < 2 ? w.w0 : j < 4 ? w.w1 : j < 6 ? w.w2 : w.w3;
  return j & 1 ? word >> 16 : word & 0xffffu;
}

// ---- z of consecutive columns of one row

enum Noise : int {  // as NOISE_ID in _noise_triton.py
  kGaussian = 0,
  kGaussianFast = 1,
  kClt4 = 2,
  kUniform = 3,
  kHadamard = 4,
  kRademacher = 5,
  kSparse = 6,
  kSparseInt8 = 7,
};

// The fewest columns of a noise that are made at a time; any multiple will do.
template <int NOISE>
constexpr int kUnit = NOISE == kHadamard ? 32 : NOISE == kSparse ? 8 : 4;

template <int NOISE>
EZO_FN void transform4(const Words& w, float* z) {
  if constexpr (NOISE == kClt4) {
    z[0] = clt4(w.w0), z[1] = clt4(w.w1), z[2] = clt4(w.w2), z[3] = clt4(w.w3);
  } else if constexpr (NOISE == kUniform) {
    z[0] = uniform(w.w0), z[1] = uniform(w.w1), z[2] = uniform(w.w2), z[3] = uniform(w.w3);
#ifdef __CUDACC__
  } else if constexpr (NOISE == kGaussianFast) {
    gaussian_fast_pair(w.w0, w.w1, z[0], z[1]);
    gaussian_fast_pair(w.w2, w.w3, z[2], z[3]);
#endif
  } else {
    gaussian_pair(w.w0, w.w1, z[0], z[1]);
    gaussian_pair(w.w2, w.w3, z[2], z[3]);
  }
}

// Two int16 sums in one int32, low + 65536 * high: they add and subtract as one number, the borrow is undone at the end.
EZO_FN int signed_byte(u32 word, int k) { return (int)(word << (24 - 8 * k)) >> 24; }

template <int ROUNDS>
EZO_FN void hadamard32(Key key, u32 site, u32 counter2, u32 row, u32 block, float* z) {
  const Words a = philox<ROUNDS>(site, block, counter2, row, key);
  const Words b = philox<ROUNDS>(site, block + 1, counter2, row, key);
  const u32 words[8] = {a.w0, a.w1, a.w2, a.w3, b.w0, b.w1, b.w2, b.w3};
  int x[16];  // columns c and c + 16 side by side
#pragma unroll
  for (int c = 0; c < 16; ++c) x[c] = signed_byte(words[c >> 2], c & 3) + signed_byte(words[4 + (c >> 2)], c & 3) * 65536;
#pragma unroll
  for (int step = 1; step < 16; step *= 2) {
#pragma unroll
    for (int c = 0; c < 16; ++c) {
      if (c & step) continue;
      const int p = x[c], q = x[c + step];
      x[c] = p + q;
      x[c + step] = p - q;
    }
  }
#pragma unroll
  for (int c = 0; c < 16; ++c) {
    const int low = (int)((u32)x[c] << 16) >> 16, high = (x[c] - low) >> 16;
    // the half that centres a byte: 32 halves land on column 0 of a segment and cancel on the others
    z[c] = mul((float)(low + high + (c ? 0 : 16)), 0x1.39897ep-9f);
    z[c + 16] = mul((float)(low - high), 0x1.39897ep-9f);
  }
}

// z[0..N) = columns first .. first + N - 1 of a row; `first` and N are multiples of kUnit<NOISE>, and for rademacher N
// divides 32. `query` is shifted left by 8. `threshold` and `scale` are those of sparse.
template <int NOISE, int ROUNDS, int N>
EZO_FN void z_columns(Key key, u32 site, u32 query, u32 row, u32 first, u32 threshold, float scale, float* z) {
  static_assert(N % kUnit<NOISE> == 0 && (NOISE != kRademacher || 32 % N == 0), "columns of a chunk");
  static_assert(NOISE != kSparseInt8, "integers: sparse_int8()");
  if constexpr (NOISE == kHadamard) {
#pragma unroll
    for (int s = 0; s < N / 32; ++s)
      hadamard32<ROUNDS>(key, site, query | kHadamardStream, row, (first >> 4) + 2 * s, z + 32 * s);
  } else if constexpr (NOISE == kRademacher) {
    const Words w = philox<ROUNDS>(site, first >> 7, query | kRademacherStream, row, key);
    const u32 mine = first & 32 ? (first & 64 ? w.w3 : w.w1) : (first & 64 ? w.w2 : w.w0);
    // bit (c & 1) * 16 + ((c & 31) >> 1) of the word; `first` is even
    const u32 word = mine >> ((first & 31) >> 1);
#pragma unroll
    for (int j = 0; j < N; ++j) z[j] = from_bits(0x3f800000u | ((word << (31 - (j & 1) * 16 - (j >> 1))) & 0x80000000u));
  } else {
    constexpr u32 stream = NOISE == kClt4 ? kClt4Stream : NOISE == kUniform ? kUniformStream : kGaussianStream;
#pragma unroll
    for (int b = 0; b < N / 4; ++b)
      transform4<NOISE>(philox<ROUNDS>(site, (first >> 2) + b, query | stream, row, key), z + 4 * b);
    if constexpr (NOISE == kSparse) {
#pragma unroll
      for (int b = 0; b < N / 8; ++b) {
        const Words w = philox<ROUNDS>(site, (first >> 3) + b, query | kMaskStream, row, key);
#pragma unroll
        for (int j = 0; j < 8; ++j) z[8 * b + j] = lane(w, j) >= threshold ? mul(z[8 * b + j], scale) : 0.0f;
      }
    }
  }
}

}  // namespace ezo
