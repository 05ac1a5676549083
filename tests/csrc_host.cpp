// The CUDA headers on the CPU: what tests/test_csrc.py calls through ctypes.
#include "ezo_update.cuh"

using namespace ezo;

extern "C" void philox_words(const u32* counter, const u32* key, int rounds, u32* out) {
  const Key k = {key[0], key[1]};
  const Words w = rounds == 7 ? philox<7>(counter[0], counter[1], counter[2], counter[3], k)
                              : philox<10>(counter[0], counter[1], counter[2], counter[3], k);
  out[0] = w.w0, out[1] = w.w1, out[2] = w.w2, out[3] = w.w3;
}

extern "C" void folded(u64 seed, u64 step, u32* out) {
  const Key k = fold_key(seed, step);
  out[0] = k.k0, out[1] = k.k1;
}

extern "C" void pair(u32 w0, u32 w1, float* z) { gaussian_pair(w0, w1, z[0], z[1]); }

template <int NOISE, int ROUNDS, int N>
static void fill(const u32* key, u32 site, u32 query, u32 rows, u32 columns, u32 threshold, float scale, float* out) {
  for (u32 r = 0; r < rows; ++r)
    for (u32 c = 0; c < columns; c += N)
      z_columns<NOISE, ROUNDS, N>({key[0], key[1]}, site, query << 8, r, c, threshold, scale, out + (u64)r * columns + c);
}

template <int ROUNDS>
static int fill_by(int noise, int n, const u32* key, u32 site, u32 query, u32 rows, u32 columns, u32 threshold,
                   float scale, float* out) {
#define EZO_FILL(NOISE, N)                                                                  \
  if (noise == NOISE && n == N) {                                                           \
    fill<NOISE, ROUNDS, N>(key, site, query, rows, columns, threshold, scale, out);         \
    return 0;                                                                               \
  }
  EZO_FILL(kGaussian, 4) EZO_FILL(kGaussian, 8) EZO_FILL(kClt4, 4) EZO_FILL(kClt4, 8) EZO_FILL(kUniform, 4)
  EZO_FILL(kUniform, 8) EZO_FILL(kHadamard, 32) EZO_FILL(kRademacher, 4) EZO_FILL(kRademacher, 8)
  EZO_FILL(kRademacher, 32) EZO_FILL(kSparse, 8)
  return 1;
}

// z of `rows` by `columns` (a multiple of n), n columns at a time. 0, or 1 where there is no such form.
extern "C" int z_matrix(int noise, int rounds, int n, const u32* key, u32 site, u32 query, u32 rows, u32 columns,
                        u32 threshold, float scale, float* out) {
  return rounds == 7 ? fill_by<7>(noise, n, key, site, query, rows, columns, threshold, scale, out)
                     : fill_by<10>(noise, n, key, site, query, rows, columns, threshold, scale, out);
}

extern "C" void z_int8(const u32* key, int rounds, u32 site, u32 query, u32 rows, u32 columns, u32 threshold, int r_max,
                       signed char* out) {
  for (u32 r = 0; r < rows; ++r)
    for (u32 c = 0; c < columns; c += 4) {
      const Key k = {key[0], key[1]};
      const u32 counter2 = query << 8 | kSparseInt8Stream;
      const Words w = rounds == 7 ? philox<7>(site, c >> 2, counter2, r, k) : philox<10>(site, c >> 2, counter2, r, k);
      const u32 words[4] = {w.w0, w.w1, w.w2, w.w3};
      for (int j = 0; j < 4; ++j) out[(u64)r * columns + c + j] = (signed char)sparse_int8(words[j], threshold, r_max);
    }
}

constexpr int kR = EZO_R, kC = EZO_C, kThreads = EZO_THREADS;

template <int NOISE, bool STOCHASTIC, bool ONE>
static void programs(const i64* table, int count, int n, const Steps& a) {
  for (int program = 0; program < n; ++program) {
    const i64 work = table[(i64)count * kFields + program];
    const i64* const entry = table + (work >> 32) * kFields;
    for (u32 t = 0; t < kThreads; ++t) {
      const u32 tile = (u32)work & 0x7fffffffu;
      if (entry[2] == 0) update_tile<NOISE, 7, 0, false, STOCHASTIC, ONE, kR, kC, kThreads>(entry, tile, t, a);
      if (entry[2] == 1) update_tile<NOISE, 7, 1, false, STOCHASTIC, ONE, kR, kC, kThreads>(entry, tile, t, a);
      if (entry[2] == 2) update_tile<NOISE, 7, 2, false, STOCHASTIC, ONE, kR, kC, kThreads>(entry, tile, t, a);
      if (entry[2] == 3) update_tile<NOISE, 7, 1, true, STOCHASTIC, ONE, kR, kC, kThreads>(entry, tile, t, a);
      if (entry[2] == 4) update_tile<NOISE, 7, 2, true, STOCHASTIC, ONE, kR, kC, kThreads>(entry, tile, t, a);
    }
  }
}

// The kernel of update.cu, one program and one thread after the other.
extern "C" int update(const i64* table, const int* keys, const float* coef, int count, int n, int steps, int queries,
                      int query, int threshold, float scale, int noise, int stochastic) {
  const Steps a = {keys, coef, steps, queries, (u32)query, (u32)threshold, scale};
  const bool one = steps == 1 && queries == 1;
#define EZO_RUN(NOISE)                                                                                        \
  if (noise == NOISE) {                                                                                       \
    stochastic ? one ? programs<NOISE, true, true>(table, count, n, a) : programs<NOISE, true, false>(table, count, n, a) \
               : one ? programs<NOISE, false, true>(table, count, n, a) : programs<NOISE, false, false>(table, count, n, a); \
    return 0;                                                                                                 \
  }
  EZO_RUN(kGaussian) EZO_RUN(kClt4) EZO_RUN(kUniform) EZO_RUN(kHadamard) EZO_RUN(kRademacher) EZO_RUN(kSparse)
  return 1;
}
