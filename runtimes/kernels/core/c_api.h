/* SPDX-License-Identifier: Apache-2.0
 * The core for callers that speak C: ctypes in the tests, Swift or Kotlin on a phone.
 *
 * Every function returns 0, or a codebook::Code after writing what is wrong to `message` (CODEBOOK_MESSAGE bytes).
 * Shapes are as in core/codebook.h; fp16 arrays are uint16. `path` is a name from codebook_path, or null for the
 * fastest; `threads` are started for the call and joined before it returns. */
#ifndef TURBOPOCKET_CODEBOOK_C_API_H
#define TURBOPOCKET_CODEBOOK_C_API_H

#include <stddef.h>
#include <stdint.h>

#define CODEBOOK_MESSAGE 240
#define CODEBOOK_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Compressed weights; ranks are those of the arrays in core/codebook.h unless a file says otherwise. */
typedef struct {
  const uint8_t* codes;
  const int64_t* codes_shape;
  const uint16_t* codebooks;
  const int64_t* codebooks_shape;
  const uint16_t* scale;
  const int64_t* scale_shape;
  const float* bias; /* or null */
  const int64_t* bias_shape;
  size_t codes_rank, codebooks_rank, scale_rank, bias_rank;
} codebook_weights;

typedef struct {
  int64_t kernel[2], stride[2], padding[4], dilation[2], groups;
} codebook_conv2d_layer;

/* The name of path i, the slowest first; null behind the last. */
CODEBOOK_API const char* codebook_path(size_t i);

CODEBOOK_API int codebook_linear(const codebook_weights* weights, const float* x, int64_t rows, int64_t columns,
                                 float* y, const char* path, size_t threads, char* message);

/* y [B, O, H', W'] must hold what codebook_conv2d_shape says. */
CODEBOOK_API int codebook_conv2d(const codebook_weights* weights, const codebook_conv2d_layer* layer, const float* x,
                                 const int64_t* x_shape, float* y, const char* path, size_t threads, char* message);
CODEBOOK_API int codebook_conv2d_shape(const codebook_weights* weights, const codebook_conv2d_layer* layer,
                                       const int64_t* x_shape, int64_t* y_shape, char* message);

CODEBOOK_API int codebook_decode(const codebook_weights* weights, float* dense, char* message);

CODEBOOK_API size_t codebook_scratch_bytes_per_thread(void);

#ifdef __cplusplus
}
#endif

#endif
