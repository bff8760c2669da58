/* The kernels of moefast for CPUs, behind a plain C interface: pointers, sizes, strides and
 * descriptors.
 *
 * Nothing here knows of MLX, NumPy or Python. Every function checks what it is given and returns a
 * status; after any but MOEFAST_OK, moefast_error() says what was wrong, as "[operation] rule, got
 * value.". A call that fails has read nothing outside its inputs; what its output holds is
 * undefined.
 */
#ifndef MOEFAST_H
#define MOEFAST_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum moefast_status {
  MOEFAST_OK = 0,
  MOEFAST_BAD_VALUE = 1,     /* an argument breaks a rule */
  MOEFAST_OUT_OF_MEMORY = 2, /* scratch memory could not be had */
};

enum moefast_dtype { MOEFAST_FLOAT32 = 0, MOEFAST_FLOAT16 = 1, MOEFAST_BFLOAT16 = 2 };

/* How a weight is stored: MLX's layouts. Rows (of `in_dims` values each) follow one another without
 * gaps. */
enum moefast_mode {
  MOEFAST_PLAIN = 0,  /* floats of `dtype` */
  MOEFAST_AFFINE = 1, /* w = scale * q + bias; q unsigned, `bits` wide, least significant first */
  MOEFAST_MXFP4 = 2,  /* e2m1 codes, groups of 32, e8m0 scales */
  MOEFAST_MXFP8 = 3,  /* e4m3 codes, groups of 32, e8m0 scales */
  MOEFAST_NVFP4 =
      4, /* e2m1 codes, groups of 16, e4m3 scales, optional float32 scale of the whole weight */
};

/* One linear map, or a stack of them (`num_experts` > 0), one per expert. Arrays are contiguous. */
typedef struct moefast_projection {
  int32_t mode;
  int32_t bits;        /* 0 for MOEFAST_PLAIN */
  int32_t group_size;  /* 0 for MOEFAST_PLAIN */
  int32_t dtype;       /* of plain values, or of affine scales and biases */
  int64_t num_experts; /* 0: a single dense weight */
  int64_t out_dims;
  int64_t in_dims;
  const void* weight; /* [(E,) out, in] values, or [(E,) out, in * bits / 8] bytes */
  const void* scales; /* [(E,) out, in / group_size]; NULL for MOEFAST_PLAIN */
  const void* biases; /* like scales; NULL unless MOEFAST_AFFINE */
  const float*
      global_scale; /* [(E)]: what MLX stores (the largest magnitude); NULL unless MOEFAST_NVFP4 */
  const void* bias; /* output bias [(E,) out], or NULL */
  int32_t bias_dtype;
} moefast_projection;

enum moefast_activation_kind {
  MOEFAST_SWIGLU = 0,
  MOEFAST_SWIGLU_OAI = 1,
  MOEFAST_SWIGLU_CLIPPED = 2,
  MOEFAST_SWIGLU_CLAMPED = 3,
  MOEFAST_GEGLU_TANH = 4,
  MOEFAST_SITU = 5,
  MOEFAST_GELU_TANH = 6, /* no gate */
  MOEFAST_RELU2 = 7,     /* no gate */
};

/* The formulas are those of moefast.Activation. */
typedef struct moefast_activation {
  int32_t kind;
  float alpha;
  float limit;
  float beta;
  float linear_beta; /* NaN: none */
} moefast_activation;

/* down(activation(gate(x), up(x))): the stacks of a layer's experts, or (num_experts 0) a shared
 * expert. */
typedef struct moefast_ffn {
  const moefast_projection* gate; /* NULL where the activation has no gate */
  const moefast_projection* up;
  const moefast_projection* down;
  moefast_activation activation;
} moefast_ffn;

/* `count` rows of `dims` floats, `stride` elements apart; within a row values are contiguous. */
typedef struct moefast_rows {
  const void* data;
  int32_t dtype;
  int64_t count;
  int64_t dims;
  int64_t stride;
} moefast_rows;

/* A vector of floats; data NULL: there is none. */
typedef struct moefast_vector {
  const void* data;
  int32_t dtype;
} moefast_vector;

enum moefast_score { MOEFAST_SOFTMAX = 0, MOEFAST_SIGMOID = 1, MOEFAST_SQRTSOFTPLUS = 2 };

/* moefast.RouterSpec, field by field. Dtypes are enum moefast_dtype, or -1 where the spec has None.
 */
typedef struct moefast_router {
  int64_t num_experts;
  int64_t top_k;
  float softcap;
  float temperature;
  int32_t score;
  int32_t score_selected; /* score_over == "selected" */
  int32_t score_dtype;
  int32_t precise;
  int32_t bias_dtype; /* -2: "scores" */
  int64_t num_groups;
  int64_t top_groups;
  int32_t group_max;         /* group_score == "max" instead of "top2_sum" */
  int32_t dropped_minus_inf; /* dropped_fill == "-inf" instead of "zero" */
  int32_t ties_highest;
  int32_t weights_masked; /* weights_from == "masked" */
  int32_t renormalize;
  float renormalize_eps;
  int32_t eps_max; /* eps_form == "max" instead of "add" */
  float scale;
  int32_t scale_output; /* scale_place == "output": moefast_route leaves the weights unscaled */
  int32_t weight_dtype; /* -2: "logits" */
  int64_t identity_experts;
} moefast_router;

/* Instruction set, threads and scratch memory. One engine runs one operation at a time: calls from
 * several threads queue up. */
typedef struct moefast_engine moefast_engine;

/* threads <= 0: one per usable core. isa NULL or "": the best that this machine has. */
int moefast_engine_create(int threads, const char* isa, moefast_engine** engine);
void moefast_engine_destroy(moefast_engine* engine);
int moefast_engine_threads(const moefast_engine* engine);
const char* moefast_engine_isa(const moefast_engine* engine);
/* Bytes of scratch memory held between calls. */
size_t moefast_engine_scratch(const moefast_engine* engine);

/* Cores that this process may use: of the machine, its affinity mask and its cgroup's quota. */
int moefast_usable_cores(void);
/* Asks the system to move memory into huge pages, where it lies: addresses and values stay. Returns
 * for how many bytes it did, or had before; 0 for less than 64 KB, and where the system has no such
 * request (Linux before 6.1, other systems). What lies beside, in the same pages, moves along. */
int64_t moefast_huge_pages(const void* from, int64_t bytes);
/* Names of the instruction sets this build has and this machine runs, best first; returns how many.
 */
size_t moefast_isas(const char** names, size_t capacity);
/* What the last failing call of this thread had to say. */
const char* moefast_error(void);

/* outs[i] [x.count, out_dims] = x @ weights[i].T + bias, of `count` dense weights. */
int moefast_matmul(moefast_engine* engine,
                   const moefast_rows* x,
                   const moefast_projection* weights,
                   void* const* outs,
                   int64_t count,
                   int32_t out_dtype);

/* The output of every route, uncombined: indices [count, top_k] -> out [count, top_k, hidden]. */
int moefast_switch_glu(moefast_engine* engine,
                       const moefast_rows* x,
                       const moefast_ffn* experts,
                       const int32_t* indices,
                       int64_t top_k,
                       void* out,
                       int32_t out_dtype);

/* The weighted sum of each token's experts: out [count, hidden]. indices, weights: [count, top_k].
 */
int moefast_experts(moefast_engine* engine,
                    const moefast_rows* x,
                    const moefast_ffn* experts,
                    const int32_t* indices,
                    const moefast_vector* weights,
                    int64_t top_k,
                    void* out,
                    int32_t out_dtype);

/* indices [count, top_k], weights [count, top_k] in weights_dtype. Experts come in the stable
 * ascending order of the family's key: for ties "lowest" best first, for ties "highest" best last.
 */
int moefast_route(moefast_engine* engine,
                  const moefast_rows* logits,
                  const moefast_router* router,
                  const moefast_vector* selection_bias,
                  const moefast_vector* expert_scale,
                  uint32_t* indices,
                  void* weights,
                  int32_t weights_dtype);

/* Routing, experts, combine and shared expert. `shared` may be NULL; `shared_gate` (hidden -> 1,
 * NULL: none) multiplies the shared expert's output by sigmoid(shared_gate(x)). combine_dtype (-1:
 * none) is what the routing weights are rounded to. */
int moefast_moe(moefast_engine* engine,
                const moefast_rows* x,
                const moefast_rows* logits,
                const moefast_router* router,
                const moefast_vector* selection_bias,
                const moefast_vector* expert_scale,
                const moefast_ffn* experts,
                const moefast_ffn* shared,
                const moefast_projection* shared_gate,
                int32_t combine_dtype,
                void* out,
                int32_t out_dtype);

/* Queries, keys or values: [batch, heads, length, dims] floats, strides in elements; the values of
 * a row are contiguous. */
typedef struct moefast_heads {
  const void* data;
  int32_t dtype;
  int64_t batch;
  int64_t heads;
  int64_t length;
  int64_t dims;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
} moefast_heads;

/* softmax(queries @ keys.T * scale) @ values in float32, rounded once:
 * out [batch, length, heads, values.dims], contiguous, as an output projection reads it. Query head
 * h reads head h / (queries.heads / keys.heads) of keys and values. `causal`: query i of L sees the
 * keys j <= i + S - L of S, and nothing of the others. */
int moefast_attention(moefast_engine* engine,
                      const moefast_heads* queries,
                      const moefast_heads* keys,
                      const moefast_heads* values,
                      float scale,
                      int32_t causal,
                      void* out,
                      int32_t out_dtype);

/* Rows without their length: x / sqrt(mean(x^2) + eps) * weight, the mean of x taken off before
 * where `centered` (LayerNorm), bias added after it. In float32, rounded once. weight and bias have
 * x.dims values, or none. out [count, dims]. */
int moefast_norm(moefast_engine* engine,
                 const moefast_rows* x,
                 const moefast_vector* weight,
                 const moefast_vector* bias,
                 float eps,
                 int32_t centered,
                 void* out,
                 int32_t out_dtype);

/* sum = x + multiplier * branch, rows of as many values, and out = the norm of what is stored
 * there. The multiplier is rounded to branch.dtype, and so are its products: the same bits as from
 * the operations one by one. sum, out [count, dims]. */
int moefast_add_norm(moefast_engine* engine,
                     const moefast_rows* x,
                     const moefast_rows* branch,
                     float multiplier,
                     const moefast_vector* weight,
                     const moefast_vector* bias,
                     float eps,
                     int32_t centered,
                     void* sum,
                     int32_t sum_dtype,
                     void* out,
                     int32_t out_dtype);

/* log(sum exp(x)) of each row, in float32 and, beyond 4096 values, in float64; rounded once. NaN,
 * or else infinity, where a value is. out [count]. */
int moefast_logsumexp(moefast_engine* engine, const moefast_rows* x, void* out, int32_t out_dtype);

/* Rotary positions of the first `rotated` values of each row: pair i (values i and rotated / 2 + i,
 * or 2 i and 2 i + 1 where `traditional`) of row r of batch b turns by the angle
 * scale * (offsets[b] + r) / freqs[i]. freqs [rotated / 2]; NULL: base^(2 i / rotated). Rounded
 * once, to x.dtype. Row r of head h of batch b goes to `out`, of which only data and strides count.
 */
int moefast_rope(moefast_engine* engine,
                 const moefast_heads* x,
                 int64_t rotated,
                 int32_t traditional,
                 const float* freqs,
                 float base,
                 float scale,
                 const int64_t* offsets,
                 const moefast_heads* out);

/* Rows of a dense quantized weight without bias, dequantized in float32 and rounded once:
 * out [count, in_dims] = weight[indices]. Each index is in 0..out_dims - 1. */
int moefast_embed(moefast_engine* engine,
                  const moefast_projection* weight,
                  const int32_t* indices,
                  int64_t count,
                  void* out,
                  int32_t out_dtype);

/* Best of a few timed runs, in bytes per second: `threads` of the engine read `bytes` bytes each,
 * once. */
int moefast_measure_read(moefast_engine* engine,
                         int threads,
                         size_t bytes,
                         double* bytes_per_second);
/* Floating point operations per second of the fastest products this instruction set has, on
 * `threads`. */
int moefast_measure_flops(moefast_engine* engine, int threads, double* flops);

#ifdef __cplusplus
}
#endif

#endif
