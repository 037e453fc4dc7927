// Philox4x32-10 (Salmon et al., 2011), the generator behind dropout on every backend.
//
// An element of P is addressed by where it stands, not by who computes it: sequence b, query head h, query row q,
// column k.
//   counter = (k / 4, q, b * heads + h, offset)    key = seed    word = k % 4    kept where word >= threshold
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LINFORMER_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LINFORMER_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace linformer {

struct Philox4 {
  uint32_t word[4];
};

LINFORMER_HOST_DEVICE Philox4 philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Words below this are dropped: floor(p * 2^32), held inside 32 bits.
LINFORMER_HOST_DEVICE uint32_t dropout_threshold(double p) {
  const double words = p * 4294967296.0;
  return words >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(words);
}

}    // namespace linformer
