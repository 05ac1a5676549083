// One launch updates every parameter. Whoever compiles this (_cuda.py) defines EZO_NOISE, EZO_ROUNDS, EZO_STOCHASTIC,
// EZO_ONE, EZO_R, EZO_C, EZO_THREADS, EZO_BLOCKS and the dtypes that occur: EZO_FP32, EZO_BF16, EZO_FP16 (0 or 1), and
// EZO_BF16_Z, EZO_FP16_Z where z has the dtype, too.
#include "ezo_update.cuh"

extern "C" __global__ void __launch_bounds__(EZO_THREADS, EZO_BLOCKS)
    ezo_update(const long long* __restrict__ table, const int* __restrict__ keys, const float* __restrict__ coef,
               int count, int steps, int queries, int query, int threshold, float scale) {
  const long long work = table[(long long)count * ezo::kFields + blockIdx.x];
  const long long* const entry = table + (work >> 32) * ezo::kFields;
  const unsigned tile = (unsigned)work & 0x7fffffffu;
  const ezo::Steps a = {keys, coef, steps, queries, (unsigned)query, (unsigned)threshold, scale};
  const int code = (int)entry[2];
#define EZO_UPDATE(CODE, ROUNDED)                                                                            \
  ezo::update_tile<EZO_NOISE, EZO_ROUNDS, CODE, ROUNDED, EZO_STOCHASTIC, EZO_ONE, EZO_R, EZO_C, EZO_THREADS>( \
      entry, tile, threadIdx.x, a)
#if EZO_FP32
  if (code == 0) return EZO_UPDATE(0, false);
#endif
#if EZO_BF16
  if (code == 1) return EZO_UPDATE(1, false);
#endif
#if EZO_FP16
  if (code == 2) return EZO_UPDATE(2, false);
#endif
#if EZO_BF16_Z
  if (code == 3) return EZO_UPDATE(1, true);
#endif
#if EZO_FP16_Z
  if (code == 4) return EZO_UPDATE(2, true);
#endif
}
