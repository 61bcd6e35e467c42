/* Finite scalar quantization in one pass over memory, the best of a tile of scores, and their softmax; grid.py, nearest.py,
   entropies.py and vocabulary.py have the formulas, native.py the calls.

   Every operation rounds once and alike in vector and scalar code (compiled without contraction to fused
   multiply-add), so a value has the same bits at every place of every layout. Positions come from a sigmoid that is off
   by a few units in the last place; rows in which one lies close to the edge of a bin are done again by the exact
   formula, with tanh in double. */

#include <math.h>
#include <stdint.h>

#define ROW 512      /* numbers of one row of whole tokens, at most */
#define CHANNELS 64  /* at most */
#define LEAST -43.0f /* of logarithms of probabilities */

#if defined(_MSC_VER)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define VECTORS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORS
#endif
#if defined(__GNUC__)
#define INSIDE static inline __attribute__((always_inline)) /* so that it is compiled for each set of vectors */
#else
#define INSIDE static inline
#endif

/* Constants of each column: rows of `stride` numbers, in the order of native.py. */
typedef struct {
  const float *lean, *scale, *offset, *slope, *shift, *gain, *base, *zero, *top, *width, *clear;
} Columns;

INSIDE Columns columns(const float *table, int64_t stride, int64_t start) {
  const float *t = table + start;
  Columns c = {t,
               t + stride,
               t + 2 * stride,
               t + 3 * stride,
               t + 4 * stride,
               t + 5 * stride,
               t + 6 * stride,
               t + 7 * stride,
               t + 8 * stride,
               t + 9 * stride,
               t + 10 * stride};
  return c;
}

INSIDE float exponential(float x) { /* for x from -87 to 0 */
  float t = x * 1.44269504f, whole = rintf(t), f = t - whole; /* exp(x) = 2^whole 2^f */
  float p = 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  union {
    int32_t bits;
    float value;
  } power;
  power.bits = (int32_t)((uint32_t)((int32_t)whole + 127) << 23);
  return p * power.value;
}

INSIDE float sigmoid(float u) {
  float size = fabsf(u);
  size = size > 87.0f ? 87.0f : size;
  float small = exponential(-size), share = 1.0f / (1.0f + small);
  return u < 0 ? small * share : share;
}

/* The digit at activation a in column k, and whether it is near an edge, or a NaN. */
INSIDE float place(float a, Columns c, int64_t k, int *near) {
  float p = a * c.scale[k] + c.offset[k];
  p = p < 0.0f ? 0.0f : p;
  p = p > c.top[k] ? c.top[k] : p;
  float r = rintf(p);
  *near |= !(fabsf(p - r) < c.clear[k]);
  return r;
}

INSIDE float clamped(float x) {
  x = x < -1.0f ? -1.0f : x;
  return x > 1.0f ? 1.0f : x;
}

/* The digit of each of m numbers; `one` if all columns are of one channel. The branches are decided once per row. */
INSIDE void digits(const float *restrict z, float *restrict digit, int64_t m, Columns c, int one, float alpha,
                   int clamps) {
  int near = 0;
  if (clamps)
    for (int64_t i = 0; i < m; i++) {
      int64_t k = one ? 0 : i;
      digit[i] = place(clamped(z[i] * alpha + c.shift[k]), c, k, &near);
    }
  else
    for (int64_t i = 0; i < m; i++) {
      int64_t k = one ? 0 : i;
      digit[i] = place(sigmoid(z[i] * (2.0f * alpha) + c.lean[k]), c, k, &near);
    }
  if (!near) return;
  for (int64_t i = 0; i < m; i++) {
    int64_t k = one ? 0 : i;
    float x = z[i] * alpha + c.shift[k], a = clamps ? clamped(x) : (float)tanh((double)x);
    float r = rintf(a * c.gain[k] + c.base[k]) + c.zero[k];
    r = r < 0.0f ? 0.0f : r;
    digit[i] = r > c.top[k] ? c.top[k] : r;
  }
}

/* Codes, `step` apart, of the digits of `count` tokens; those of a channel are `across` apart, of a token's `along`. */
INSIDE void pack(const float *digit, int64_t *codes, int64_t step, int64_t count, int64_t d, int64_t across,
                 int64_t along, int64_t factors, const int64_t *basis, int small) {
  int64_t run = d / factors;
  for (int64_t f = 0; f < factors; f++) {
    const float *first = digit + f * run * across;
    const int64_t *b = basis + f * run;
    if (small && run == 4) { /* float32 holds the index */
      float b0 = (float)b[0], b1 = (float)b[1], b2 = (float)b[2], b3 = (float)b[3];
      for (int64_t t = 0; t < count; t++) {
        const float *x = first + t * along;
        float sum = x[0] * b0 + x[across] * b1 + x[2 * across] * b2 + x[3 * across] * b3;
        codes[t * step + f] = sum == sum ? (int32_t)sum : -1;
      }
    } else if (small) {
      for (int64_t t = 0; t < count; t++) {
        float sum = 0.0f;
        for (int64_t j = 0; j < run; j++) sum += first[t * along + j * across] * (float)b[j];
        codes[t * step + f] = sum == sum ? (int32_t)sum : -1;
      }
    } else {
      for (int64_t t = 0; t < count; t++) {
        int64_t sum = 0;
        int whole = 1;
        for (int64_t j = 0; j < run; j++) {
          float x = first[t * along + j * across];
          whole &= x == x;
          sum += x == x ? (int64_t)x * b[j] : 0;
        }
        codes[t * step + f] = whole ? sum : -1;
      }
    }
  }
}

/* A NaN in one run of channels makes all codes of its token -1. */
static void spread(int64_t *codes, int64_t count, int64_t factors) {
  for (int64_t t = 0; t < count; t++) {
    int broken = 0;
    for (int64_t f = 0; f < factors; f++) broken |= codes[t * factors + f] < 0;
    if (broken)
      for (int64_t f = 0; f < factors; f++) codes[t * factors + f] = -1;
  }
}

/* z and latents (count, d), codes (count, factors); a row of the table holds `stride` numbers, whole tokens. */
EXPORT VECTORS void tokens_forward(const float *z, float *latents, int64_t *codes, int64_t count, int64_t d,
                                   const float *table, int64_t stride, int64_t factors, const int64_t *basis,
                                   int64_t small, float alpha, int64_t clamps) {
  float digit[ROW];
  Columns c = columns(table, stride, 0);
  for (int64_t start = 0, total = count * d; start < total; start += stride) {
    int64_t m = total - start < stride ? total - start : stride;
    digits(z + start, digit, m, c, 0, alpha, (int)clamps);
    for (int64_t i = 0; i < m; i++) latents[start + i] = (digit[i] - c.width[i]) / c.width[i];
    int64_t *at = codes + start / d * factors;
    pack(digit, at, factors, m / d, d, 1, d, factors, basis, (int)small);
    if (factors > 1) spread(at, m / d, factors);
  }
}

/* z and latents (outer, d, inner), codes (outer, inner, factors); a row of the table holds d numbers. */
EXPORT VECTORS void planes_forward(const float *z, float *latents, int64_t *codes, int64_t outer, int64_t d,
                                   int64_t inner, const float *table, int64_t factors, const int64_t *basis,
                                   int64_t small, float alpha, int64_t clamps) {
  enum { WIDE = 256 };
  float digit[CHANNELS * WIDE];
  for (int64_t o = 0; o < outer; o++)
    for (int64_t start = 0; start < inner; start += WIDE) {
      int64_t m = inner - start < WIDE ? inner - start : WIDE;
      for (int64_t j = 0; j < d; j++) {
        Columns c = columns(table, d, j);
        const float *from = z + (o * d + j) * inner + start;
        float *to = latents + (o * d + j) * inner + start, *row = digit + j * WIDE, width = c.width[0];
        digits(from, row, m, c, 1, alpha, (int)clamps);
        for (int64_t i = 0; i < m; i++) to[i] = (row[i] - width) / width;
      }
      int64_t *at = codes + (o * inner + start) * factors;
      pack(digit, at, factors, m, d, WIDE, 1, factors, basis, (int)small);
      if (factors > 1) spread(at, m, factors);
    }
}

/* Residual stages of one clamped lattice in groups, as stages.py has them: z and latents (count, d), codes (count, depth,
   factors). The table has, for each group, rows of `stride` numbers: rate, middle, top, width, level, and L^-j for j from 1
   to its number of stages less 1. */
EXPORT VECTORS void stages_forward(const float *z, float *latents, int64_t *codes, int64_t count, int64_t d,
                                   const float *table, int64_t stride, const int64_t *sizes, int64_t groups,
                                   int64_t depth, int64_t factors, const int64_t *basis) {
  float left[ROW], place[ROW], above[ROW], prefix[ROW], digit[ROW], total[ROW];
  for (int64_t start = 0, all = count * d; start < all; start += stride) {
    int64_t m = all - start < stride ? all - start : stride, stage = 0;
    int64_t *at = codes + start / d * depth * factors;
    const float *t = table;
    for (int64_t i = 0; i < m; i++) left[i] = z[start + i], total[i] = 0.0f;
    for (int64_t g = 0; g < groups; g++) {
      const float *rate = t, *middle = t + stride, *top = t + 2 * stride, *width = t + 3 * stride;
      const float *level = t + 4 * stride;
      for (int64_t i = 0; i < m; i++) {
        float x = left[i] * rate[i], r = rintf(x + middle[i]);
        r = r < 0.0f ? 0.0f : r;
        place[i] = r > top[i] ? top[i] : r;
        float even = place[i] - middle[i], value = even / width[i];
        left[i] = x - even;
        total[i] = g ? total[i] + value : value;
        above[i] = 0.0f;
      }
      for (int64_t j = sizes[g] - 1; j >= 0; j--, stage++) {
        const float *shrink = t + (4 + j) * stride; /* of L^-j, where j > 0 */
        if (j)
          for (int64_t i = 0; i < m; i++) prefix[i] = floorf((place[i] + 0.5f) * shrink[i]);
        const float *here = j ? prefix : place;
        for (int64_t i = 0; i < m; i++) {
          digit[i] = here[i] - above[i] * level[i];
          above[i] = here[i];
        }
        pack(digit, at + stage * factors, depth * factors, m / d, d, 1, d, factors, basis, 1);
      }
      t += (4 + sizes[g]) * stride;
    }
    for (int64_t i = 0; i < m; i++) latents[start + i] = total[i];
  }
}

/* The gradient of m numbers, times that of their latents. */
INSIDE void slopes(const float *restrict gradient, const float *restrict z, float *restrict out, int64_t m, Columns c,
                   int one, float alpha, int clamps) {
  if (clamps)
    for (int64_t i = 0; i < m; i++) {
      float v = gradient[i] * c.slope[one ? 0 : i];
      int passes = (fabsf(z[i] * alpha) <= 1.0f) | (gradient[i] * z[i] > 0.0f); /* inside, or leads back; no NaN */
      out[i] = passes ? v : 0.0f;
    }
  else
    for (int64_t i = 0; i < m; i++) {
      int64_t k = one ? 0 : i;
      float share = sigmoid(z[i] * (2.0f * alpha) + c.lean[k]);
      float v = gradient[i] * ((1.0f - share) * share) * c.slope[k];
      out[i] = z[i] == z[i] ? v : 0.0f;
    }
}

/* All (count, d), or (outer, d, inner); rows of the table as in the forward functions. */
EXPORT VECTORS void tokens_backward(const float *gradient, const float *z, float *out, int64_t total,
                                    const float *table, int64_t stride, float alpha, int64_t clamps) {
  Columns c = columns(table, stride, 0);
  for (int64_t start = 0; start < total; start += stride) {
    int64_t m = total - start < stride ? total - start : stride;
    slopes(gradient + start, z + start, out + start, m, c, 0, alpha, (int)clamps);
  }
}

EXPORT VECTORS void planes_backward(const float *gradient, const float *z, float *out, int64_t outer, int64_t d,
                                    int64_t inner, const float *table, float alpha, int64_t clamps) {
  for (int64_t o = 0; o < outer; o++)
    for (int64_t j = 0; j < d; j++) {
      int64_t at = (o * d + j) * inner;
      slopes(gradient + at, z + at, out + at, inner, columns(table, d, j), 1, alpha, (int)clamps);
    }
}

/* Takes `rows` codes from number `first` on into the best and second best score so far, and the best one's number, of
   each of `count` tokens. Their scores lie down a tile whose rows are `stride` apart, yet without `offsets`. A tie makes
   the second best as good as the best, and so does a NaN. */
EXPORT VECTORS void scan(const float *restrict tile, const float *restrict offsets, int64_t rows, int64_t stride,
                         int64_t count, int64_t first, float *restrict best, float *restrict second,
                         int32_t *restrict number) {
  for (int64_t k = 0; k < rows; k++) {
    const float *restrict row = tile + k * stride;
    float offset = offsets[k];
    int32_t here = (int32_t)(first + k);
    for (int64_t i = 0; i < count; i++) {
      float score = row[i] + offset, top = best[i], low = score < top ? score : top;
      second[i] = low > second[i] ? low : second[i];
      number[i] = score > top ? here : number[i];
      best[i] = score > top ? score : top;
    }
  }
}

INSIDE float highest(const float *score, int64_t size) {
  float top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int64_t k = 0; k < size; k++) top = score[k] > top ? score[k] : top;
  return top;
}

/* The logarithm of a probability but for what all have in common. Half of the exponents are left for products. */
INSIDE float relative(float score, float top) {
  float x = score - top;
  return x < LEAST ? LEAST : x;
}

/* The sums over a row of e^x and of e^x (v - slope x), x relative to `top`; v is 0 if it is NULL. */
INSIDE void sums(const float *score, int64_t size, float top, const float *v, float slope, double *total,
                 double *moment) {
  *total = *moment = 0;
  for (int64_t start = 0; start < size; start += ROW) {
    int64_t end = size - start < ROW ? size : start + ROW;
    float mass = 0, sum = 0;
#pragma omp simd reduction(+ : mass, sum)
    for (int64_t k = start; k < end; k++) {
      float x = relative(score[k], top), e = exponential(x);
      mass += e;
      sum += e * ((v ? v[k] : 0.0f) - slope * x);
    }
    *total += mass;
    *moment += sum;
  }
}

/* Each of `rows` rows of `size` scores becomes its powers of e relative to the highest, whose sum is `mass`. */
EXPORT VECTORS void exponentiate(float *tile, int64_t rows, int64_t size, float *top, float *mass) {
  for (int64_t r = 0; r < rows; r++) {
    float *score = tile + r * size, high = highest(score, size), sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < size; k++) {
      score[k] = exponential(relative(score[k], high));
      sum += score[k];
    }
    top[r] = high;
    mass[r] = sum;
  }
}

/* Each of `rows` rows of `size` scores becomes its softmax p, of which `entropy` is that in nats. */
EXPORT VECTORS void soften(float *tile, int64_t rows, int64_t size, float *entropy) {
  for (int64_t r = 0; r < rows; r++) {
    float *score = tile + r * size, top = highest(score, size);
    double total, moment;
    sums(score, size, top, 0, 1.0f, &total, &moment);
    entropy[r] = (float)(log(total) + moment / total);
    float share = (float)(1 / total);
    for (int64_t k = 0; k < size; k++) score[k] = exponential(relative(score[k], top)) * share;
  }
}

/* Scores become the gradient for them, w p (v - p.v) of a row of weight w, where v = of_mixture - of_total ln p. */
EXPORT VECTORS void soften_backward(float *tile, int64_t rows, int64_t size, const float *of_mixture,
                                    const float *weight, float of_total) {
  for (int64_t r = 0; r < rows; r++) {
    float *score = tile + r * size, top = highest(score, size);
    double total, moment;
    sums(score, size, top, of_mixture, of_total, &total, &moment);
    float share = (float)(weight[r] / total), mean = (float)(moment / total);
    for (int64_t k = 0; k < size; k++) {
      float x = relative(score[k], top);
      score[k] = exponential(x) * share * (of_mixture[k] - of_total * x - mean);
    }
  }
}

EXPORT int64_t latticode_native_version(void) { return 5; }

/* MSVC's linker is told to export the initializer of a Python module, which this is not: nothing imports it. */
EXPORT void *PyInit__native(void) { return 0; }
