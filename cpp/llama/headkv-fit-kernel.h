// The inner loops of the fit, included once per instruction set (see headkv-simd.h).
#pragma once

#include "headkv-fit.h"
#include "headkv-simd.h"

#include <cmath>

namespace {

void fit_soften(float * x, float * m, float * s, float * y, int n) {
    constexpr int N = headkv_fit_kernel::N_KEYS;
    vf mv = vf_load(x);
    for (int i = W; i < N; i += W) {
        mv = vf_max(mv, vf_load(x + i));
    }
    const float mb = vf_hmax(mv);
    if (mb == -INFINITY) {
        for (int i = 0; i < N; i += W) {
            vf_store(x + i, vf_zero());
        }
        return;
    }
    if (mb > *m) {
        const float f = std::exp(*m - mb); // 0 for the first one
        for (int i = 0; i < n; i += W) {
            vf_store(y + i, vf_mul(vf_load(y + i), vf_set(f)));
        }
        *s *= f;
        *m = mb;
    }
    vf sv = vf_zero();
    for (int i = 0; i < N; i += W) {
        const vf p = vf_exp(vf_sub(vf_load(x + i), vf_set(*m)));
        vf_store(x + i, p);
        sv = vf_add(sv, p);
    }
    *s += vf_sum(sv);
}

// R vectors of columns of N_ROWS rows at a time: the accumulators stay in registers
void fit_add_product(const float * a, int64_t a_row, int64_t a_i, int n_rows, const float * b, int64_t b_i, int n_i, int n, float * y, int64_t y_row) {
    constexpr int N = headkv_fit_kernel::N_ROWS;
    constexpr int R = 2;
    for (int d = 0; d < n; d += R * W) {
        for (int j = 0; j < n_rows; j += N) {
            vf acc[N * R];
            for (int u = 0; u < N; ++u) {
                for (int r = 0; r < R; ++r) {
                    acc[u * R + r] = vf_load(y + (j + u) * y_row + d + r * W);
                }
            }
            for (int i = 0; i < n_i; ++i) {
                vf bi[R];
                for (int r = 0; r < R; ++r) {
                    bi[r] = vf_load(b + i * b_i + d + r * W);
                }
                for (int u = 0; u < N; ++u) {
                    const vf au = vf_set(a[(j + u) * a_row + i * a_i]);
                    for (int r = 0; r < R; ++r) {
                        acc[u * R + r] = vf_fma(au, bi[r], acc[u * R + r]);
                    }
                }
            }
            for (int u = 0; u < N; ++u) {
                for (int r = 0; r < R; ++r) {
                    vf_store(y + (j + u) * y_row + d + r * W, acc[u * R + r]);
                }
            }
        }
    }
}

// the compiler makes vectors of the sums, whose number is fixed
inline double fit_dot(const double * a, const double * b, int n) {
    constexpr int N = 16;
    double acc[N] = {};
    int i = 0;
    for (; i + N <= n; i += N) {
        for (int u = 0; u < N; ++u) {
            acc[u] += a[i + u] * b[i + u];
        }
    }
    double res = 0.0;
    for (; i < n; ++i) {
        res += a[i] * b[i];
    }
    for (double x : acc) {
        res += x;
    }
    return res;
}

bool fit_cholesky(double * a, int n) {
    double * row = a;
    for (int i = 0; i < n; row += ++i) {
        const double * other = a;
        for (int j = 0; j < i; other += ++j) {
            row[j] = (row[j] - fit_dot(row, other, j)) / other[j];
        }
        const double square = row[i] - fit_dot(row, row, i);
        if (!(square > 0.0) || std::isinf(square)) {
            return false;
        }
        row[i] = std::sqrt(square);
    }
    return true;
}

void fit_solve(const double * l, int n, double * b, int n_columns) {
    const double * row = l;
    for (int i = 0; i < n; row += ++i) {
        double * bi = b + (int64_t) i * n_columns;
        for (int k = 0; k < i; ++k) {
            const double * bk = b + (int64_t) k * n_columns;
            for (int d = 0; d < n_columns; ++d) {
                bi[d] -= row[k] * bk[d];
            }
        }
        for (int d = 0; d < n_columns; ++d) {
            bi[d] /= row[i];
        }
    }
    for (int i = n - 1; i >= 0; --i) {
        row -= i + 1;
        double * bi = b + (int64_t) i * n_columns;
        for (int d = 0; d < n_columns; ++d) {
            bi[d] /= row[i];
        }
        for (int k = 0; k < i; ++k) {
            double * bk = b + (int64_t) k * n_columns;
            for (int d = 0; d < n_columns; ++d) {
                bk[d] -= row[k] * bi[d];
            }
        }
    }
}

const headkv_fit_kernel fit_kernel = { fit_soften, fit_add_product, fit_cholesky, fit_solve };

} // namespace
