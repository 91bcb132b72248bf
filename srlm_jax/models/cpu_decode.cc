// Attention of one decoded token per row over a KV cache, for CPUs; see cpu.py.
//
// A query attends to a prefix that all rows share, then to its row's own keys. Keys are read in
// blocks that stay in the L1 cache: a block of the prefix once for all rows of a task, a block of a
// row's own keys once for all its queries. The sums of a row do not depend on the other rows, on
// the tasks or on the number of threads.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kLanes = 16;  // floats per vector
constexpr int64_t kBlock = 32;  // keys per block, a multiple of kLanes
constexpr int64_t kRows = 8;    // rows per task

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));

Vector Load(const float* x) {
  Vector v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}

void Store(float* x, Vector v) { std::memcpy(x, &v, sizeof(v)); }

// Lane i of the result is the sum of the lanes of x[i]. Overwrites x.
Vector Sums(Vector (&x)[kLanes]) {
  for (int i = 0; i < 8; ++i) {  // x[i]: 8 partial sums of vector i, then 8 of vector i + 8
    x[i] = __builtin_shufflevector(x[i], x[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21,
                                   22, 23) +
           __builtin_shufflevector(x[i], x[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28,
                                   29, 30, 31);
  }
  for (int i = 0; i < 4; ++i) {  // 4 partial sums of each of i, i + 4, i + 8, i + 12
    x[i] = __builtin_shufflevector(x[i], x[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25,
                                   26, 27) +
           __builtin_shufflevector(x[i], x[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28,
                                   29, 30, 31);
  }
  for (int i = 0; i < 2; ++i) {
    x[i] = __builtin_shufflevector(x[i], x[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13,
                                   28, 29) +
           __builtin_shufflevector(x[i], x[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14,
                                   15, 30, 31);
  }
  return __builtin_shufflevector(x[0], x[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14,
                                 30) +
         __builtin_shufflevector(x[0], x[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15,
                                 31);
}

// The largest lane, and the sum of the lanes.
float Largest(Vector v) {
  float x = v[0];
  for (int64_t i = 1; i < kLanes; ++i) x = v[i] > x ? v[i] : x;
  return x;
}

float Sum(Vector v) {
  float x = v[0];
  for (int64_t i = 1; i < kLanes; ++i) x += v[i];
  return x;
}

// exp(x) for x <= 0, with a relative error below 3e-7; 0 below -87.
// 2^n * exp(r) with n = round(x / ln 2); the polynomial of Cephes' expf.
Vector Exp(Vector x) {
  const Vector clamped = x > -87.0f ? x : Vector{} - 87.0f;
  const Vector shift = Vector{} + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
  const Vector n = (clamped * 1.44269504f + shift) - shift;
  const Vector r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  Vector scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return x > -87.0f ? p * scale : Vector{};
}

// The online softmax of one query (Milakov and Gimelshein 2018); weights are relative to `peak`.
struct Query {
  const float* q;  // [H]
  float* value;    // [H], the weighted sum of values
  float peak = -1e30f;
  float weight = 0;

  // Adds `count` keys, at most kBlock: k and v [count, H].
  template <int64_t H>
  void Add(const float* k, const float* v, int64_t count, float scale) {
    constexpr int64_t kParts = H / kLanes;
    Vector query[kParts];
    for (int64_t h = 0; h < kParts; ++h) query[h] = Load(q + h * kLanes) * scale;
    Vector scores[kBlock / kLanes];
    Vector highest = Vector{} - 1e30f;
    for (int64_t first = 0; first < kBlock; first += kLanes) {
      Vector products[kLanes] = {};
      for (int64_t i = 0; i < kLanes && first + i < count; ++i) {
        const float* key = k + (first + i) * H;
        for (int64_t h = 0; h < kParts; ++h) products[i] += query[h] * Load(key + h * kLanes);
      }
      const Integers lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      const Integers left = Integers{} + static_cast<int32_t>(count - first);
      const Vector sums = Sums(products);
      scores[first / kLanes] = lane < left ? sums : Vector{} - 1e30f;  // weight 0 beyond the end
      highest = scores[first / kLanes] > highest ? scores[first / kLanes] : highest;
    }
    const float top = std::max(peak, Largest(highest));
    const float decay = Exp(Vector{} + (peak - top))[0];
    float weights[kBlock];
    Vector total = {};
    for (int64_t i = 0; i < kBlock / kLanes; ++i) {
      const Vector found = Exp(scores[i] - top);
      total += found;
      Store(weights + i * kLanes, found);
    }
    peak = top;
    weight = weight * decay + Sum(total);
    Vector even[kParts], odd[kParts] = {};  // two chains of sums, for the latency of an addition
    for (int64_t h = 0; h < kParts; ++h) even[h] = Load(value + h * kLanes) * decay;
    int64_t i = 0;
    for (; i + 1 < count; i += 2) {
      for (int64_t h = 0; h < kParts; ++h) {
        even[h] += weights[i] * Load(v + i * H + h * kLanes);
        odd[h] += weights[i + 1] * Load(v + (i + 1) * H + h * kLanes);
      }
    }
    if (i < count) {
      for (int64_t h = 0; h < kParts; ++h) even[h] += weights[i] * Load(v + i * H + h * kLanes);
    }
    for (int64_t h = 0; h < kParts; ++h) Store(value + h * kLanes, even[h] + odd[h]);
  }
};

struct Arrays {
  const float *q, *k, *v, *prefix_k, *prefix_v;  // [B, K, G, H], 2 x [B, K, S, H], 2 x [K, W, H]
  const int32_t *length, *prefix_length;         // [B]
  float* out;                                    // [B, K, G, H]
  int64_t B, K, G, S, W;
  int64_t window;  // a query sees this many positions, the last of which is its own
};

// One task: the rows from kRows * (task / K), and the key/value head task % K.
template <int64_t H>
void Attend(const Arrays& a, int64_t task) {
  const int64_t head = task % a.K, first = task / a.K * kRows;
  const int64_t last = std::min(first + kRows, a.B);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(H));
  std::vector<Query> queries((last - first) * a.G);
  for (int64_t i = 0; i < static_cast<int64_t>(queries.size()); ++i) {
    const int64_t at = (((first + i / a.G) * a.K + head) * a.G + i % a.G) * H;
    queries[i].q = a.q + at;
    queries[i].value = a.out + at;
    std::fill(queries[i].value, queries[i].value + H, 0.0f);
  }
  // Adds the visible keys of one block, those before `length`, to the G queries of a row.
  auto add = [&](int64_t row, const float* k, const float* v, int64_t start, int64_t end,
                 int64_t length) {
    const int64_t count = std::min(end, length) - start;
    for (int64_t g = 0; g < a.G && count > 0; ++g) {
      queries[(row - first) * a.G + g].Add<H>(k + start * H, v + start * H, count, scale);
    }
  };
  for (int64_t start = 0; start < a.W; start += kBlock) {
    for (int64_t row = first; row < last; ++row) {
      if (!a.length[row]) continue;  // an idle row
      const int64_t visible = int64_t{a.prefix_length[row]} + a.length[row] - a.window;
      add(row, a.prefix_k + head * a.W * H, a.prefix_v + head * a.W * H, std::max(start, visible),
          start + kBlock, std::min<int64_t>(a.prefix_length[row], a.W));
    }
  }
  for (int64_t row = first; row < last; ++row) {
    const int64_t own = (row * a.K + head) * a.S * H;
    const int64_t visible = std::max<int64_t>(a.length[row] - a.window, 0);
    for (int64_t start = visible; start < a.length[row]; start += kBlock) {
      add(row, a.k + own, a.v + own, start, start + kBlock, std::min<int64_t>(a.length[row], a.S));
    }
  }
  for (Query& query : queries) {
    for (int64_t h = 0; h < H; ++h) query.value[h] /= std::max(query.weight, 1e-30f);
  }
}

// Tasks that threads take one after the other.
struct Tasks {
  Arrays arrays;
  void (*attend)(const Arrays&, int64_t task);
  int64_t count;
  std::atomic<int64_t> next{0};
  int64_t done = 0;
  std::mutex mutex;
  std::condition_variable all_done;

  void Work() {
    for (int64_t task; (task = next.fetch_add(1)) < count;) {
      attend(arrays, task);
      std::lock_guard<std::mutex> lock(mutex);
      if (++done == count) all_done.notify_one();
    }
  }
};

ffi::Error Decode(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k,
                  ffi::Buffer<ffi::F32> v, ffi::Buffer<ffi::S32> length,
                  ffi::Buffer<ffi::F32> prefix_k, ffi::Buffer<ffi::F32> prefix_v,
                  ffi::Buffer<ffi::S32> prefix_length, int64_t window,
                  ffi::ResultBuffer<ffi::F32> out) {
  const auto shape = q.dimensions();
  void (*attend)(const Arrays&, int64_t) = shape[3] == 16    ? Attend<16>
                                           : shape[3] == 32  ? Attend<32>
                                           : shape[3] == 64  ? Attend<64>
                                           : shape[3] == 128 ? Attend<128>
                                                             : nullptr;
  if (!attend) return ffi::Error::InvalidArgument("head widths are 16, 32, 64 and 128");
  // A thread of the pool may start after the caller has done all the work, so both own the tasks.
  auto tasks = std::make_shared<Tasks>();
  tasks->arrays = {q.typed_data(), k.typed_data(), v.typed_data(), prefix_k.typed_data(),
                   prefix_v.typed_data(), length.typed_data(), prefix_length.typed_data(),
                   out->typed_data(), shape[0], shape[1], shape[2], k.dimensions()[3],
                   prefix_k.dimensions()[1], window};
  tasks->attend = attend;
  tasks->count = (shape[0] + kRows - 1) / kRows * shape[1];
  const int64_t helpers = std::min(pool.num_threads(), tasks->count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([tasks] { tasks->Work(); });
  tasks->Work();
  std::unique_lock<std::mutex> lock(tasks->mutex);
  tasks->all_done.wait(lock, [&] { return tasks->done == tasks->count; });
  return ffi::Error::Success();
}

// Writes new_k and new_v [B, K, H] at position[b] of row b; a position of S writes nothing. The
// results are the same buffers as k and v.
ffi::Error Append(ffi::Buffer<ffi::F32> k, ffi::Buffer<ffi::F32>, ffi::Buffer<ffi::F32> new_k,
                  ffi::Buffer<ffi::F32> new_v, ffi::Buffer<ffi::S32> position,
                  ffi::ResultBuffer<ffi::F32> out_k, ffi::ResultBuffer<ffi::F32> out_v) {
  const auto shape = k.dimensions();
  const int64_t B = shape[1], K = shape[2], S = shape[3], H = shape[4];
  for (int64_t row = 0; row < B; ++row) {
    const int64_t at = position.typed_data()[row];
    if (at < 0 || at >= S) continue;
    for (int64_t head = row * K; head < (row + 1) * K; ++head) {
      const int64_t target = (head * S + at) * H;
      std::copy_n(new_k.typed_data() + head * H, H, out_k->typed_data() + target);
      std::copy_n(new_v.typed_data() + head * H, H, out_v->typed_data() + target);
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    SrlmCpuAppend, Append,
    ffi::Ffi::Bind()
        .Arg<ffi::Buffer<ffi::F32>>()   // k [1, B, K, S, H]
        .Arg<ffi::Buffer<ffi::F32>>()   // v [1, B, K, S, H]
        .Arg<ffi::Buffer<ffi::F32>>()   // new k [B, K, H]
        .Arg<ffi::Buffer<ffi::F32>>()   // new v [B, K, H]
        .Arg<ffi::Buffer<ffi::S32>>()   // position [B]
        .Ret<ffi::Buffer<ffi::F32>>()   // k
        .Ret<ffi::Buffer<ffi::F32>>()); // v

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    SrlmCpuDecode, Decode,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::Buffer<ffi::F32>>()   // q [B, K, G, H]
        .Arg<ffi::Buffer<ffi::F32>>()   // k [1, B, K, S, H]
        .Arg<ffi::Buffer<ffi::F32>>()   // v [1, B, K, S, H]
        .Arg<ffi::Buffer<ffi::S32>>()   // length [B]
        .Arg<ffi::Buffer<ffi::F32>>()   // prefix k [K, W, H]
        .Arg<ffi::Buffer<ffi::F32>>()   // prefix v [K, W, H]
        .Arg<ffi::Buffer<ffi::S32>>()   // prefix length [B]
        .Attr<int64_t>("window")
        .Ret<ffi::Buffer<ffi::F32>>()); // [B, K, G, H]
