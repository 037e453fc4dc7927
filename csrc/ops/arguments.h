// The arguments of the operators as a Problem, and the tensors of its results.
//
// Arguments arrive validated by the public functions. What is checked again here is what memory safety needs, because
// an operator can be called without its public function.
#pragma once

#include "tensors.h"

namespace linformer {

// The sequences of a packed batch, else the padded one's.
int64_t batch_of(const OptionalTensor& offsets, int64_t padded_batch);

// On a GPU the values are not read here, which would wait for it: the kernels hold them inside the tensor, and the
// longest sequence is as long as `total` for all that is known.
const int64_t* offsets_of(const OptionalTensor& offsets, const char* name, const Tensor& like, int64_t total,
                          int64_t batch, int64_t* longest);

// Each enters its tensors and their sizes.
void set_query(Problem& p, const Tensor& query, const OptionalTensor& cu_seqlens_q);
void set_mask(Problem& p, const OptionalTensor& mask, const Tensor& key, bool packed);
void set_rows(Problem& p, const Tensor& key, const Tensor& value, const OptionalTensor& cu_seqlens_k);
void set_sequence(Problem& p, const Tensor& key, const Tensor& value, const Tensor& proj_key,
                  const OptionalTensor& proj_value, const OptionalTensor& mask, const OptionalTensor& cu_seqlens_k);
void set_projected(Problem& p, const Tensor& key_proj, const Tensor& value_proj);
void set_softmax(Problem& p, const Tensor& query, const OptionalTensor& rng_state, double dropout_p, double scale);
void set_bias(Problem& p, const OptionalTensor& key_bias, const Tensor& like);
void set_grad_out(Problem& p, const Tensor& grad_out, const Tensor& query, bool packed);
void set_segments(Problem& p, const Tensor& segments, const Tensor& like, bool packed);

void check_sizes(const Problem& p);
void check_pool_sizes(const Problem& p);
// query meets K' and V', which come from set_sequence in the fused operators.
void check_query(const Problem& p, const Problem& sequence);
void check_heads(const Problem& p);

// K' or V', or a gradient of theirs.
Rows projected_rows(const Tensor& tensor, const char* name, const Tensor& like, const Problem& p, int64_t columns);

inline bool needed(int64_t needs, int bit) { return (needs >> bit & 1) != 0; }

// A wanted gradient: its tensor, entered in the problem. An unwanted one: an empty tensor.
Tensor gradient(bool wanted, const Tensor& like, Rows& rows);
// float32, contiguous.
Tensor bias_gradient(bool wanted, const OptionalTensor& key_bias, const Tensor& like, Problem& p);
Tensor projection_gradient(bool wanted, const Tensor& like, const Problem& p, Rows& rows);

}    // namespace linformer
