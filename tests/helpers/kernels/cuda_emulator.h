// Runs a CUDA kernel's threads on the CPU, as fibers of one thread, block after block. It is slow, and
// exact about the order of reads and writes. Barriers are CUDA's; a thread that misses one is an error.
// Defines what bgmv.cu uses of CUDA, and stands in for its inline assembly.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 { unsigned x = 0, y = 0, z = 0; };
struct float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static dim3 threadIdx, blockIdx, gridDim, blockDim;

// Alignment as the hardware demands it.
static const char* fault = nullptr;
template <class P> P checked(const P* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(P)) fault = "misaligned address";
  return *p;
}
template <class P> P __ldg(const P* p) { return checked(p); }
template <class A, class B> auto min(A a, B b) { return a < b ? a : b; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = x | (uint64_t)y << 32;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= (bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return out;
}

namespace emulator {
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  int waits_for = 0;  // 0: nothing, 1: its warp, 2: its block
  bool is_done = false;
  bool has_waited = false;  // for the kernel before
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static unsigned current, num_waited;  // threads of the kernel that have waited
static void (*body)(void*);
static void* body_argument;

inline void wait(int what) {
  Fiber& fiber = fibers[current];
  fiber.waits_for = what;
  swapcontext(&fiber.context, &scheduler);
}

inline void enter() {
  body(body_argument);
  num_waited += fibers[current].has_waited;
  fibers[current].is_done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

// Resumes the threads of which all have reached the point where they wait. False if none can go on.
inline bool release(unsigned first, unsigned end, int what) {
  for (unsigned i = first; i < end; ++i)
    if (fibers[i].is_done || fibers[i].waits_for != what) return false;
  for (unsigned i = first; i < end; ++i) fibers[i].waits_for = 0;
  return true;
}

inline void run_block(unsigned num_threads) {
  for (unsigned i = 0; i < num_threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.waits_for = 0, fiber.is_done = fiber.has_waited = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, enter, 0);
  }
  while (!fault) {
    bool is_over = true, has_moved = false;
    for (unsigned i = 0; i < num_threads; ++i) {
      is_over = is_over && fibers[i].is_done;
      if (fibers[i].is_done || fibers[i].waits_for) continue;
      has_moved = true, current = i, threadIdx.x = i;
      swapcontext(&scheduler, &fibers[i].context);
    }
    if (is_over) return;
    for (unsigned i = 0; i < num_threads; i += 32) has_moved = release(i, i + 32, 1) || has_moved;
    has_moved = release(0, num_threads, 2) || has_moved;
    if (!has_moved) fault = "a barrier that not all threads reach";
  }
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}

// Returns what went wrong, or null. `arguments` as cuLaunchKernel takes them.
template <class... A>
const char* launch(void (*kernel)(A...), unsigned blocks, unsigned num_threads, void** arguments) {
  struct Packed { void (*kernel)(A...); void** arguments; } packed{kernel, arguments};
  body = [](void* data) {
    auto* of = static_cast<Packed*>(data);
    call(of->kernel, of->arguments, std::index_sequence_for<A...>{});
  };
  body_argument = &packed;
  fault = nullptr, num_waited = 0;
  if (fibers.size() < num_threads) fibers.resize(num_threads);
  gridDim.x = blocks, blockDim.x = num_threads;
  for (unsigned block = 0; block < blocks && !fault; ++block) {
    blockIdx.x = block;
    run_block(num_threads);
    // A kernel ends after the one before it as soon as one of its blocks does. Reads before the wait
    // are found by __ldcg, and writes follow reads.
    if (num_waited % num_threads) fault = "some threads of a block wait, others do not";
  }
  if (!num_waited && !fault) fault = "a kernel that may end before the one before it";
  return fault;
}
}  // namespace emulator

inline void __syncthreads() { emulator::wait(2); }

// What bgmv.cu has in assembly.
typedef unsigned short T;
inline float as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
#if BF16
inline float widen(T bits) { return as_float((unsigned)bits << 16); }
inline T narrow(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#else
inline float widen(T bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return value;
}
inline T narrow(float value) {
  const _Float16 half = value;
  T bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
#endif
inline float2 unpack(unsigned w) { return {widen(w & 0xffff), widen(w >> 16)}; }
inline unsigned pack(float low, float high) { return narrow(low) | (unsigned)narrow(high) << 16; }
inline void wait_for_previous() { emulator::fibers[emulator::current].has_waited = true; }
inline void release_next() {}
// What the kernels before have written.
template <class P> P __ldcg(const P* p) {
  if (!emulator::fibers[emulator::current].has_waited) fault = "read before the wait";
  return checked(p);
}
inline int load_entry(const int* p) { return __ldg(p); }
template <class P> uint4 load_weights(const P* p) { return checked(reinterpret_cast<const uint4*>(p)); }
template <class P> uint2 load_half(const P* p) { return checked(reinterpret_cast<const uint2*>(p)); }
// Numbers in e4m3: NaN is the largest magnitude.
inline float of_e4m3(unsigned bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  float value = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  if ((bits & 0x7f) == 0x7f) value = NAN;
  return bits & 0x80 ? -value : value;
}
inline float2 to_floats(unsigned word) { return {of_e4m3(word & 0xff), of_e4m3(word >> 8 & 0xff)}; }
inline unsigned to_float16(unsigned word) { return pack(to_floats(word).x, to_floats(word).y); }
inline unsigned times_2_120(unsigned w) {
  return pack(std::ldexp(unpack(w).x, 120), std::ldexp(unpack(w).y, 120));
}
inline uint4 load_input(const T* p) { return __ldcg(reinterpret_cast<const uint4*>(p)); }
template <typename P> const P* hold(const P* p) { return p; }

// mma.sync.m16n8k16: lane (g, q) holds of A the rows g and g + 8, of B the column g, of C the rows
// g and g + 8 and the columns 2q and 2q + 1.
inline void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                unsigned b1) {
  static unsigned held[32][32][6];  // [warp][lane]
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(held[warp][lane], mine, sizeof mine);
  emulator::wait(1);
  auto half = [](unsigned w, unsigned i) { return widen(i ? w >> 16 : w & 0xffff); };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g + i / 2 * 8, column = 2 * q + i % 2;
    float sum = c[i];
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned pair = k % 8 / 2;
      const unsigned a = held[warp][row % 8 * 4 + pair][row / 8 + k / 8 * 2];
      const unsigned b = held[warp][column * 4 + pair][4 + k / 8];
      sum += half(a, k % 2) * half(b, k % 2);
    }
    c[i] = sum;
  }
  emulator::wait(1);  // the others may still read
}
