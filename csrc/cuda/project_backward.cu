// Backward of the projection, one launch: dK = E^T dK', dV = F^T dV', dE = dK' K^T, dF = dV' V^T (E = F: one sum of
// both).
//
// Input tiles: 128 rows of the sequence by 128 columns, which are pieces of heads side by side, so that a tile of E is
// read once for several heads. Matrix tiles: 128 rows of E by 128 of its columns; they sum over all sequences and heads
// that share the matrix in registers, in a fixed order, and write each element of dE once: no atomics, nothing to add
// up afterwards. No tile waits for another.
#include "gemm.cuh"
#include "kernels.h"

namespace linformer::cuda {
namespace {

template <class Traits>
LINFORMER_DEVICE void input_tile(const Arguments& a, Element<Traits::kType>* shared, int index) {
  constexpr DType kType = Traits::kType;
  using Shape = typename Traits::Input;
  const Problem& p = a.p;
  const int tile = index % a.unit_tiles, unit = index / a.unit_tiles % a.units;
  int b = 0;
  int first = 0;
  if (!find_item(p.cu_seqlens_k, p.batch, p.total_k, min(p.len_k, p.seq_len_max), Traits::kRows,
                 index / a.unit_tiles / a.units, &b, &first)) {
    return;
  }
  const Sequence sequence = key_sequence(p, b);
  const Piece start = piece_of(a, unit, tile, 0);
  if (!a.p.shared_kv && !(start.value ? p.grad_value : p.grad_key).data) return;

  using MatrixLoader = Loader<kType, Shape::kStep, Shape::kM, kThreads, Shape::kPitchA>;
  using GradsLoader = Loader<kType, Shape::kStep, Shape::kN, kThreads, Shape::kPitchB>;
  MatrixLoader matrix(projection_source<kType>(a, start.value, b, start.head, sequence.length), 0,
                      first + MatrixLoader::first_column(threadIdx.x), threadIdx.x);
  const int column = GradsLoader::first_column(threadIdx.x);
  const Piece mine = piece_of(a, unit, tile, column / a.piece);
  const Rows& mine_grad = mine.value ? p.grad_value_proj : p.grad_key_proj;
  Source<kType> source = projected_source<kType>(a, mine_grad, b, mine.head, mine.value ? p.value_dim : p.head_dim,
                                                 mine.value ? kAlignedGradValueProj : kAlignedGradKeyProj);
  if (!mine.exists || !mine_grad.data) source.rows = 0;    // reads as zero
  GradsLoader grads(source, 0, mine.column + column % a.piece, threadIdx.x);

  float c[Shape::kTilesM * Shape::kTilesN][4];
  clear(c);
  const int steps = static_cast<int>((p.proj_dim + Shape::kStep - 1) / Shape::kStep);
  const bool active = piece_of(a, unit, tile, warp_id() % 2 * Shape::kWarpN / a.piece).exists;
  multiply_stages<kType, Shape>(c, shared, steps, active, p.allow_tf32, [&](auto* e_tile, auto* grad_tile) {
    grads.load(grad_tile, threadIdx.x);
    grads.next_rows();
    matrix.load(e_tile, threadIdx.x);
    matrix.next_rows();
  });
  store_tile<kType, Shape>(c, shared, [&](int row, int at) {
    Target<kType> to;
    const Piece piece = piece_of(a, unit, tile, at / a.piece);
    const int n = first + row;
    const Rows& rows = piece.value ? p.grad_value : p.grad_key;
    if (!piece.exists || n >= sequence.length || !rows.data) return to;
    const int d = piece.column + at % a.piece;
    to.data = rows_at<kType>(rows, b, piece.head, sequence.start + n) + d;
    to.columns = static_cast<int>(piece.value ? p.value_dim : p.head_dim) - d;
    to.aligned = (a.aligned & (piece.value ? kAlignedGradValue : kAlignedGradKey)) != 0;
    to.zero = p.mask && !p.mask[b * p.mask_batch_stride + n * p.mask_row_stride];
    return to;
  });
  __syncthreads();    // the next tile reuses the memory
}

template <class Traits>
LINFORMER_DEVICE void matrix_tile(const Arguments& a, Element<Traits::kType>* shared, int index) {
  constexpr DType kType = Traits::kType;
  using Shape = typename Traits::Matrix;
  const Problem& p = a.p;
  const int column = index % a.matrix_blocks * Shape::kN;
  const int row = index / a.matrix_blocks % a.row_blocks * Shape::kM;
  // [E, F] x sequences that have their own x heads that have their own
  const int matrix = index / a.matrix_blocks / a.row_blocks;
  const int own_heads = p.per_head_proj ? static_cast<int>(p.heads_kv) : 1;
  const int own_sequences = p.per_batch_proj ? static_cast<int>(p.batch) : 1;
  const bool of_value = matrix / own_heads / own_sequences != 0;
  const int first_head = matrix % own_heads, first_sequence = matrix / own_heads % own_sequences;
  const int heads = p.per_head_proj ? 1 : static_cast<int>(p.heads_kv);
  const int64_t sequences = p.per_batch_proj ? 1 : p.batch;
  const Rows& target = of_value ? p.grad_proj_value : p.grad_proj_key;
  if (!target.data) return;

  using GradsLoader = Loader<kType, Shape::kM, Shape::kStep, kThreads, Shape::kPitchA>;
  using RowsLoader = Loader<kType, Shape::kN, Shape::kStep, kThreads, Shape::kPitchB>;
  const int key_steps = static_cast<int>((p.head_dim + Shape::kStep - 1) / Shape::kStep);
  const int value_steps = static_cast<int>((p.value_dim + Shape::kStep - 1) / Shape::kStep);
  const int steps_of_head = p.shared_kv ? key_steps + value_steps : of_value ? value_steps : key_steps;
  float c[Shape::kTilesM * Shape::kTilesN][4];
  clear(c);
  const int steps = static_cast<int>(sequences * heads * steps_of_head);
  int b = first_sequence, head = first_head, step = 0;    // of what comes next
  multiply_stages<kType, Shape>(c, shared, steps, true, p.allow_tf32, [&](auto* grad_tile, auto* x_tile) {
    const bool value = p.shared_kv ? step >= key_steps : of_value;
    const int d =
        (p.shared_kv && value ? step - key_steps : step) * Shape::kStep + GradsLoader::first_column(threadIdx.x);
    const auto source =
        projected_source<kType>(a, value ? p.grad_value_proj : p.grad_key_proj, b, head,
                                value ? p.value_dim : p.head_dim, value ? kAlignedGradValueProj : kAlignedGradKeyProj);
    GradsLoader(source, row, d, threadIdx.x).load(grad_tile, threadIdx.x);
    RowsLoader(sequence_source<kType>(a, value, b, head, key_sequence(p, b)), column, d, threadIdx.x)
        .load(x_tile, threadIdx.x);
    if (++step < steps_of_head) return;
    step = 0;
    if (++head < first_head + heads) return;
    head = first_head;
    ++b;
  });
  store_tile<kType, Shape>(c, shared, [&](int r, int n) {
    Target<kType> to;
    if (row + r >= p.proj_dim) return to;
    to.data = rows_at<kType>(target, first_sequence, first_head, row + r) + column + n;
    to.columns = static_cast<int>(p.seq_len_max) - column - n;
    to.aligned = (a.aligned & (of_value ? kAlignedGradProjValue : kAlignedGradProjKey)) != 0;
    return to;
  });
  __syncthreads();    // the next tile reuses the memory
}

template <class Traits>
LINFORMER_DEVICE void project_backward(const Arguments& a) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto* shared = reinterpret_cast<Element<Traits::kType>*>(memory);
  for (int index = blockIdx.x; index < a.matrix_tiles + a.input_tiles; index += gridDim.x) {
    if (index < a.matrix_tiles) {
      matrix_tile<Traits>(a, shared, index);
    } else {
      input_tile<Traits>(a, shared, index - a.matrix_tiles);
    }
  }
}

}    // namespace

#define LINFORMER_KERNEL(name, type)                                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads, 1) name(const __grid_constant__ Arguments a) { \
    project_backward<ProjectBackward<DType::type>>(a);                                                  \
  }
LINFORMER_KERNELS_OF_TYPE(LINFORMER_PROJECT_BACKWARD_, LINFORMER_KERNEL)

}    // namespace linformer::cuda
