// CUDA device code of BGMV (Punica, arXiv 2310.18547): shrink and expand for few rows an adapter.
// They read weights in place from the page pool and are bound by the bytes of the weights.
//
// Compiled once for each kind of batch and each group of projections, with these macros:
//   BF16          1 for bfloat16, 0 for float16
//   PDL           1 where programmatic dependent launch exists (sm_90 on)
//   E4M3          1 if A and B are in e4m3, 0 if they have the type of x and y
//   UNIT          64, and 128 if A and B are in e4m3: rows of A and B start at multiples of it
//   PAGE          numbers of A and B in a page of one layer, a multiple of UNIT
//   NUM_MODULES   projections of the group, 1 to 3
//   K, K_ROW      input features; the same rounded up to UNIT
//   GROUP, NUM_GROUPS   index of the group, and how many groups there are
//   MAX_SPLITS    most splits of K
//   NT            tiles of 8 rows in an item of shrink
//   WARPS         warps of a block of shrink
//   OUT_0, OUT_1, OUT_2, START_1, START_2   columns of the modules in y, and where they start
//   ROWS          rows of a tile of expand: few, or 16 for the matrix unit
//   MAX_RANK      largest rank of any adapter
//   THREADS       threads of a block of expand
//
// Both kernels loop over the work of a plan. Their grid depends on the number of rows and the kind
// alone, so a captured launch serves every later plan of that kind. A plan has room for `capacity`
// rows:
//   plan[0 .. 2]  number of items, of tiles, of rows with an adapter
//   plan[4 ..]    for each group how K is split: int4 (splits, units of UNIT features in each, the
//                 binary logarithm of splits rounded up to a power of two, 1 if any adapter of the
//                 batch touches the group, else 0)
//   then          capacity tiles: int4 (slot, first row, rows, unused)
//   then          order: the token of each of capacity rows
//   then          items: int4 (slot, first row, rows, first rank); room for one for each row and
//                 16 ranks
// The place of each part depends on `capacity` alone, so no load waits for another part.

typedef unsigned long long U64;
#if E4M3
typedef unsigned char W;  // a number of A or B
#else
typedef unsigned short W;
#endif
#ifndef EMULATED  // else tests/helpers/kernels/cuda_emulator.h has these
typedef unsigned short T;  // a 16-bit float, handled as bits: no CUDA header is needed to compile
#if BF16
#define MMA_TYPES "bf16.bf16"
__device__ __forceinline__ float2 unpack(unsigned w) {
  return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
}
__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
  return w;
}
#else
#define MMA_TYPES "f16.f16"
__device__ __forceinline__ float2 unpack(unsigned w) {
  float2 f;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(f.x), "=f"(f.y) : "r"(w));
  return f;
}
__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned w;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
  return w;
}
#endif

#if E4M3
__device__ __forceinline__ unsigned times_2_120(unsigned w) {  // two bfloat16
  asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(w) : "r"(0x7b807b80), "r"(0x80008000));
  return w;
}
// The low two numbers of a word in e4m3.
__device__ __forceinline__ unsigned to_float16(unsigned word) {
  unsigned w;
  asm("{.reg .b16 l; cvt.u16.u32 l, %1; cvt.rn.f16x2.e4m3x2 %0, l;}" : "=r"(w) : "r"(word));
  return w;
}
__device__ __forceinline__ float2 to_floats(unsigned word) {
  float2 f;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(f.x), "=f"(f.y) : "r"(to_float16(word)));
  return f;
}
#endif

// Programmatic dependent launch. Each kernel releases the next at once, so code before the wait may
// run beside several earlier kernels. It may read weights and the plan, but not x, v or y. After the
// wait all writes of earlier kernels are visible. A kernel that has waited in one block at least ends
// after all earlier ones; where no adapter touches the group, the other blocks end at once.
__device__ __forceinline__ void wait_for_previous() {
#if PDL
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void release_next() {
#if PDL
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ U64 keep_policy() {
  U64 policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Loads an entry of the table or of a page table, and the rest of its line into the L2 cache, where
// it outlives the weights that stream through: later groups and steps read that line again.
// Volatile, so that the compiler moves none behind the branch that the one before it decides.
__device__ __forceinline__ int load_entry(const int* pointer) {
  int value;
  asm volatile("ld.global.nc.L2::cache_hint.L2::128B.b32 %0, [%1], %2;"
               : "=r"(value) : "l"(pointer), "l"(keep_policy()));
  return value;
}

// Not the read-only path (.nc): ptxas moves its loads behind wait_for_previous().
__device__ __forceinline__ uint4 load_weights(const W* pointer) {
  uint4 w;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(pointer) : "memory");
  return w;
}
#if E4M3
__device__ __forceinline__ uint2 load_half(const W* pointer) {
  uint2 w;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
               : "=r"(w.x), "=r"(w.y) : "l"(pointer) : "memory");
  return w;
}
#endif

// Volatile, so that the compiler does not move it before wait_for_previous().
__device__ __forceinline__ uint4 load_input(const T* pointer) {
  uint4 w;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(pointer) : "memory");
  return w;
}

__device__ __forceinline__ void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                    unsigned a3, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPES ".f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Keeps a pointer in registers, so that it is not computed again at each use.
template <typename P>
__device__ __forceinline__ const P* hold(const P* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}
#endif  // EMULATED

// Eight numbers of A or B as they lie in memory, the same as two or four of T, and as floats.
// WIDE vectors of x go with a vector of A.
#if E4M3
typedef uint2 Eight;
const int WIDE = 2;
__device__ __forceinline__ Eight no_eight() { return make_uint2(0, 0); }
__device__ __forceinline__ Eight load_eight(const W* pointer) { return load_half(pointer); }
// Two of a word's four numbers as two of T. T has every number of e4m3.
__device__ __forceinline__ unsigned widen_pair(unsigned word, int pair) {
#if BF16  // the bits, moved to their places, are a bfloat16 2^120 times too small
  const unsigned bytes = __byte_perm(word, 0, pair ? 0x3424 : 0x1404);
  return times_2_120((bytes & 0x80008000) | (bytes >> 4 & 0x07f007f0));
#else
  return to_float16(pair ? word >> 16 : word);
#endif
}
__device__ __forceinline__ uint4 widen_eight(unsigned low, unsigned high) {
  return make_uint4(widen_pair(low, 0), widen_pair(low, 1), widen_pair(high, 0), widen_pair(high, 1));
}
__device__ __forceinline__ uint4 widen_eight(Eight w) { return widen_eight(w.x, w.y); }
__device__ __forceinline__ uint4 eight_of(uint4 w, int i) {
  return i ? widen_eight(w.z, w.w) : widen_eight(w.x, w.y);
}
__device__ __forceinline__ float2 floats_of(Eight w, int i) {
  const unsigned word = i < 2 ? w.x : w.y;
  return to_floats(i & 1 ? word >> 16 : word);
}
#else
typedef uint4 Eight;
const int WIDE = 1;
__device__ __forceinline__ Eight no_eight() { return make_uint4(0, 0, 0, 0); }
__device__ __forceinline__ Eight load_eight(const W* pointer) { return load_weights(pointer); }
__device__ __forceinline__ uint4 eight_of(uint4 w, int i) { return w; }
__device__ __forceinline__ float2 floats_of(Eight w, int i) {
  return unpack(i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w);
}
#endif

// Blocks of few warps spend much of their time on addresses: hence unsigned and multiply-add.
__device__ __forceinline__ unsigned page_of(const int* pages, unsigned element) {
  return load_entry(pages + element / (unsigned)PAGE);
}
__device__ __forceinline__ const W* address(const W* pool, unsigned page, unsigned element) {
  const unsigned size = sizeof(W);
  const char* base = reinterpret_cast<const char*>(pool) + (U64)page * (size * PAGE);
  return reinterpret_cast<const W*>(base + (U64)(element % (unsigned)PAGE) * size);
}
// Pages hold whole units.
__device__ __forceinline__ const W* locate(const W* pool, const int* pages, unsigned element) {
  return address(pool, page_of(pages, element), element);
}

struct Plan {
  int num_items, num_tiles, num_rows;
};
__device__ __forceinline__ Plan read_plan(const int* plan) {
  const int4 counts = __ldg(reinterpret_cast<const int4*>(plan));
  return {counts.x, counts.y, counts.z};
}
struct Split {
  int splits, units, shift, touched;
};
__device__ __forceinline__ Split read_split(const int* plan) {
  const int4 split = __ldg(reinterpret_cast<const int4*>(plan) + 1 + GROUP);
  return {split.x, split.y, split.z, split.w};
}
__device__ __forceinline__ const int4* tiles_of(const int* plan) {
  return reinterpret_cast<const int4*>(plan) + 1 + NUM_GROUPS;
}
__device__ __forceinline__ const int* order_of(const int* plan, int capacity) {
  return plan + 4 + 4 * NUM_GROUPS + 4 * capacity;
}
__device__ __forceinline__ const int4* items_of(const int* plan, int capacity) {
  return reinterpret_cast<const int4*>(plan + 4 + 4 * NUM_GROUPS + 5 * capacity);
}
// Returns the item of a block's first work. The number of splits is still being loaded, so this loads
// the item for each possible number.
__device__ __forceinline__ int4 first_item(const int4* items, int capacity, Split split) {
  const int num_places = capacity * ((MAX_RANK + 15) / 16);
  int4 item = make_int4(0, 0, 0, 0);
#pragma unroll
  for (int shift = 0; 1 << shift <= MAX_SPLITS; ++shift) {
    const int of_item = (int)(blockIdx.x >> shift) / NUM_MODULES;
    const int4 guess = __ldg(items + min(of_item, num_places - 1));
    if (shift == split.shift) item = guess;
  }
  return item;
}

#if E4M3 && NT == 1  // else it takes more registers, and only two blocks fit a processor
#define SHRINK_BOUNDS __launch_bounds__(WARPS * 32, 3)
#else
#define SHRINK_BOUNDS __launch_bounds__(WARPS * 32)
#endif

// v[split, p, m, r] = x[order[p]] . A[slot, m, r] over the split's units of UNIT input features.
//
// A block takes 16 ranks and up to 8 * NT rows of one adapter. Its warps take units in turn and add
// up in shared memory. Ranks are the 16 rows of the matrix unit's A operand, tokens the 8 columns of
// its B operand. Both operands hold the same permutation of K (a lane reads 8 consecutive elements,
// and 16 of A in e4m3).
// A sum over K does not depend on the order, so neither shared memory nor a transpose is needed.
extern "C" __global__ void SHRINK_BOUNDS
shrink(const T* x, float* __restrict__ v, const W* __restrict__ pool,
       const int* __restrict__ plan, const int* __restrict__ page_table,
       const int* __restrict__ rank, const int* __restrict__ a_start, int x_stride,
       int pages_stride, int slot_stride, int module_stride, int capacity, int v_row_stride,
       int v_module_stride) {
  release_next();
  const int UNITS = (K + UNIT - 1) / UNIT;
  __shared__ float partial[WARPS][NT * 8][17];  // [warp][row][rank], 17 against bank conflicts
  const int* order = order_of(plan, capacity);
  const Plan step = read_plan(plan);
  const Split split = read_split(plan);
  const int warp = threadIdx.x / 32, group = (threadIdx.x & 31) >> 2, lane = threadIdx.x & 3;
  const uint4 zero = make_uint4(0, 0, 0, 0);
  bool has_waited = false;
  int4 item = first_item(items_of(plan, capacity), capacity, split);
  const int num_works = split.touched ? step.num_items * NUM_MODULES << split.shift : 0;
  for (unsigned work = blockIdx.x; work < num_works; work += gridDim.x) {
    const int part = work & ((1 << split.shift) - 1);
    if (part >= split.splits) continue;
    const unsigned of_item = work >> split.shift, module = of_item % NUM_MODULES;
    if (work != blockIdx.x) item = __ldg(items_of(plan, capacity) + of_item / NUM_MODULES);
    const int limit = load_entry(rank + module * module_stride + item.x * slot_stride);
    const int start = load_entry(a_start + module * module_stride + item.x * slot_stride);
    if (item.w >= limit) continue;
    const int* pages = hold(page_table + (long long)item.x * pages_stride);
    const bool has_low = item.w + group < limit, has_high = item.w + group + 8 < limit;
    const int low = start + (item.w + group) * K_ROW, high = low + 8 * K_ROW;
    const T* x_row[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int row = n * 8 + group;
      x_row[n] =
          row < item.z ? x + (long long)__ldg(order + item.y + row) * x_stride : nullptr;
    }
    const int last = min(UNITS, (part + 1) * split.units);
    int unit = part * split.units + warp;

    uint4 a_low[2], a_high[2];
    auto fetch = [&](int u) {
      const W* p_low = has_low ? locate(pool, pages, low + u * UNIT) : nullptr;
      const W* p_high = has_high ? locate(pool, pages, high + u * UNIT) : nullptr;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int k = h * (UNIT / 2) + lane * (UNIT / 8);
        const bool in = K % UNIT == 0 || u * UNIT + k < K;
        a_low[h] = has_low && in ? load_weights(p_low + k) : zero;
        a_high[h] = has_high && in ? load_weights(p_high + k) : zero;
        if (E4M3 && K % 16 && u * UNIT + k + 8 >= K) {  // the rest of the row may hold NaN
          a_low[h].z = a_low[h].w = 0;
          a_high[h].z = a_high[h].w = 0;
        }
      }
    };
    if (unit < last) fetch(unit);
    if (!has_waited) {
      wait_for_previous();
      has_waited = true;
    }

    float c[NT][4] = {};
    while (unit < last) {
      uint4 b[NT][2 * WIDE];
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 2 * WIDE; ++i) {
          const int k = unit * UNIT + i / WIDE * (UNIT / 2) + lane * (UNIT / 8) + i % WIDE * 8;
          b[n][i] = x_row[n] && (K % UNIT == 0 || k < K) ? load_input(x_row[n] + k) : zero;
        }
      uint4 w_low[2] = {a_low[0], a_low[1]}, w_high[2] = {a_high[0], a_high[1]};
      unit += WARPS;
      if (unit < last) fetch(unit);
#pragma unroll
      for (int i = 0; i < 2 * WIDE; ++i) {
        const uint4 low = eight_of(w_low[i / WIDE], i % WIDE);
        const uint4 high = eight_of(w_high[i / WIDE], i % WIDE);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          mma(c[n], low.x, high.x, low.y, high.y, b[n][i].x, b[n][i].y);
          mma(c[n], low.z, high.z, low.w, high.w, b[n][i].z, b[n][i].w);
        }
      }
    }

    __syncthreads();  // other warps may still read the previous work's sums
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        partial[warp][n * 8 + lane * 2 + (i & 1)][group + (i >> 1) * 8] = c[n][i];
    __syncthreads();
    for (int i = threadIdx.x; i < NT * 128; i += WARPS * 32) {
      const int row = i / 16, r = i % 16;
      if (row < item.z && item.w + r < limit) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += partial[w][row][r];
        v[((long long)part * step.num_rows + item.y + row) * v_row_stride +
          module * v_module_stride + item.w + r] = sum;
      }
    }
  }
  if (!has_waited && (num_works || blockIdx.x == 0)) wait_for_previous();
}

// A block of expand takes a tile and a panel: WIDTH columns of one module.
const int WIDTH = THREADS * (ROWS < 16 ? 8 : 2);
const int BLOCKS_0 = (OUT_0 + WIDTH - 1) / WIDTH, BLOCKS_1 = (OUT_1 + WIDTH - 1) / WIDTH;
const int BLOCKS = BLOCKS_0 + BLOCKS_1 + (OUT_2 + WIDTH - 1) / WIDTH;
const bool EXACT = OUT_0 % WIDTH == 0 && OUT_1 % WIDTH == 0 && OUT_2 % WIDTH == 0;

struct Panel {
  int block, module, width, column;  // block of the module; the module's columns, its start in y
};
template <class Work>
__device__ __forceinline__ Panel panel_of(Work work) {
  Panel panel = {(int)(work % BLOCKS), 0, OUT_0, 0};
  if (panel.block >= BLOCKS_0 + BLOCKS_1) {
    panel = {panel.block - (BLOCKS_0 + BLOCKS_1), 2, OUT_2, START_2};
  } else if (panel.block >= BLOCKS_0) {
    panel = {panel.block - BLOCKS_0, 1, OUT_1, START_1};
  }
  return panel;
}
__device__ __forceinline__ int4 first_tile(const int* plan, int capacity) {
  return __ldg(tiles_of(plan) + min((int)blockIdx.x / BLOCKS, capacity - 1));
}

#if ROWS < 16
// y[order[p], out_m] += scale * (sum over splits of v[:, p, m]) . B[slot, m], in place.
//
// A block takes up to ROWS rows of one adapter and THREADS * 8 columns of one module. A thread takes
// 8 columns. It loads one vector for each of 16 ranks at a time, all in flight together.
extern "C" __global__ void __launch_bounds__(THREADS, ROWS == 1 ? 4 : 3)
expand(T* y, const float* v, const W* __restrict__ pool, const int* __restrict__ plan,
       const int* __restrict__ page_table, const int* __restrict__ rank,
       const int* __restrict__ b_start, const float* __restrict__ scale, int y_stride,
       int pages_stride, int slot_stride, int module_stride, int capacity, int v_row_stride,
       int v_module_stride) {
  release_next();
  const int AT_ONCE = ROWS == 1 ? 4 : MAX_SPLITS;  // distinct adapters leave few splits
  __shared__ float shrunk[ROWS][16];
  const int* order = order_of(plan, capacity);
  const Plan step = read_plan(plan);
  const Split split = read_split(plan);
  const int num_splits = split.splits, num_works = split.touched ? step.num_tiles * BLOCKS : 0;
  const uint4 zero = make_uint4(0, 0, 0, 0);
  bool has_waited = false;
  int4 tile = first_tile(plan, capacity);
  for (int work = blockIdx.x; work < num_works; work += gridDim.x) {
    if (work != blockIdx.x) tile = __ldg(tiles_of(plan) + work / BLOCKS);
    const Panel panel = panel_of(work);
    const int module = panel.module, width = panel.width, column = panel.column;
    const int place = module * module_stride + tile.x * slot_stride;
    const int limit = load_entry(rank + place), start = load_entry(b_start + place);
    if (limit == 0) continue;
    const float factor = __ldg(scale + place);
    const int* pages = hold(page_table + (long long)tile.x * pages_stride);
    const unsigned width_row = (width + UNIT - 1) / UNIT * UNIT;
    const int n = panel.block * WIDTH + threadIdx.x * 8;
    const bool in = EXACT || n < width;

    Eight b[16];
    const Eight none = no_eight();
    auto fetch = [&](int first) {
      const unsigned element = start + first * width_row + n;
      const W* weights = hold(pool);
      unsigned page[16];  // loads all page numbers first: the loads of weights wait for them
      if (in && first + 16 <= limit) {
#pragma unroll
        for (int r = 0; r < 16; ++r) page[r] = page_of(pages, element + r * width_row);
#pragma unroll
        for (int r = 0; r < 16; ++r)
          b[r] = load_eight(address(weights, page[r], element + r * width_row));
      } else {  // past the limit it looks up the last row again, so that no lookup is conditional
        const unsigned column = start + (in ? n : 0);
#pragma unroll
        for (int r = 0; r < 16; ++r)
          page[r] = page_of(pages, column + min(first + r, limit - 1) * width_row);
#pragma unroll
        for (int r = 0; r < 16; ++r)
          b[r] = in && first + r < limit
                     ? load_eight(address(weights, page[r], element + r * width_row))
                     : none;
      }
    };
    T* y_row[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const int token = row < tile.z ? __ldg(order + tile.y + row) : 0;
      y_row[row] = y + (long long)token * y_stride + column + n;
    }
    fetch(0);
    if (!has_waited) {
      wait_for_previous();
      has_waited = true;
    }

    uint4 old[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; ++row)
      old[row] = in && row < tile.z ? load_input(y_row[row]) : zero;

    float acc[ROWS][8] = {};
    for (int first = 0; first < limit; first += 16) {
      __syncthreads();  // other threads may still read the previous ranks
      if (first) fetch(first);
      for (int i = threadIdx.x; i < ROWS * 16; i += THREADS) {
        const int row = i / 16, r = first + i % 16;
        float sum = 0;
        if (row < tile.z && r < limit) {
          const float* from =
              v + (long long)(tile.y + row) * v_row_stride + module * v_module_stride + r;
          const long long stride = (long long)step.num_rows * v_row_stride;
          for (int first_split = 0; first_split < num_splits; first_split += AT_ONCE) {
            float share[AT_ONCE];
#pragma unroll
            for (int s = 0; s < AT_ONCE; ++s)
              share[s] = first_split + s < num_splits ? __ldcg(from + (first_split + s) * stride) : 0;
#pragma unroll
            for (int s = 0; s < AT_ONCE; ++s) sum += share[s];
          }
        }
        shrunk[row][i % 16] = sum * factor;
      }
      __syncthreads();
#pragma unroll
      for (int r = 0; r < 16; ++r) {
        const float2 w0 = floats_of(b[r], 0), w1 = floats_of(b[r], 1), w2 = floats_of(b[r], 2),
                     w3 = floats_of(b[r], 3);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
          const float s = shrunk[row][r];
          acc[row][0] += s * w0.x, acc[row][1] += s * w0.y;
          acc[row][2] += s * w1.x, acc[row][3] += s * w1.y;
          acc[row][4] += s * w2.x, acc[row][5] += s * w2.y;
          acc[row][6] += s * w3.x, acc[row][7] += s * w3.y;
        }
      }
    }
    if (!in) continue;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      if (row >= tile.z) break;
      const float2 o0 = unpack(old[row].x), o1 = unpack(old[row].y);
      const float2 o2 = unpack(old[row].z), o3 = unpack(old[row].w);
      uint4 sum;
      sum.x = pack(o0.x + acc[row][0], o0.y + acc[row][1]);
      sum.y = pack(o1.x + acc[row][2], o1.y + acc[row][3]);
      sum.z = pack(o2.x + acc[row][4], o2.y + acc[row][5]);
      sum.w = pack(o3.x + acc[row][6], o3.y + acc[row][7]);
      *reinterpret_cast<uint4*>(y_row[row]) = sum;
    }
  }
  if (!has_waited && (num_works || blockIdx.x == 0)) wait_for_previous();
}
#endif

// The same for many rows an adapter: a tile of 16 rows is the matrix unit's A operand.
//
// A warp takes 64 columns of one module. Lane (g, q) of its 8 x 4 fetches 8 columns, from g * 8 on, of
// the ranks 2q, 2q + 1, 2q + 8 and 2q + 9 of 16. The j-th columns of all lanes are an operand of one
// product, whose 8 columns are j, 8 + j, 16 + j and so on. From the 8 products a lane gets 16
// consecutive columns, from 16q on, of rows g and g + 8: no transpose, and whole vectors of y.
#if ROWS == 16
extern "C" __global__ void __launch_bounds__(THREADS)
expand(T* y, const float* v, const W* __restrict__ pool, const int* __restrict__ plan,
       const int* __restrict__ page_table, const int* __restrict__ rank,
       const int* __restrict__ b_start, const float* __restrict__ scale, int y_stride,
       int pages_stride, int slot_stride, int module_stride, int capacity, int v_row_stride,
       int v_module_stride) {
  release_next();
  // [row][pair of ranks]; padded by 4, the rows of a fragment lie in different banks.
  __shared__ unsigned shrunk[16][(MAX_RANK + 15) / 16 * 8 + 4];
  const int* order = order_of(plan, capacity);
  const Plan step = read_plan(plan);
  const Split split = read_split(plan);
  const int num_splits = split.splits, num_works = split.touched ? step.num_tiles * BLOCKS : 0;
  const int warp = threadIdx.x / 32, g = (threadIdx.x & 31) >> 2, q = threadIdx.x & 3;
  const uint4 zero = make_uint4(0, 0, 0, 0);
  bool has_waited = false;
  int4 tile = first_tile(plan, capacity);
  for (unsigned work = blockIdx.x; work < num_works; work += gridDim.x) {
    if (work != blockIdx.x) tile = __ldg(tiles_of(plan) + work / BLOCKS);
    const Panel panel = panel_of(work);
    const int module = panel.module, width = panel.width, column = panel.column;
    const int place = module * module_stride + tile.x * slot_stride;
    const int limit = load_entry(rank + place), start = load_entry(b_start + place);
    if (limit == 0) continue;
    const float factor = __ldg(scale + place);
    const int* pages = hold(page_table + (long long)tile.x * pages_stride);
    const W* weights = hold(pool);
    const unsigned width_row = (width + UNIT - 1) / UNIT * UNIT;
    const int first_n = panel.block * WIDTH + warp * 64;
    const int n = first_n + g * 8;
    const bool in = EXACT || n < width;

    Eight b[4];
    const Eight none = no_eight();
    auto fetch = [&](int first, Eight(&into)[4]) {
      unsigned page[4];
      // Past the limit it looks up the last row again, so that no lookup is conditional.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = min(first + 2 * q + (i & 1) + (i >> 1) * 8, limit - 1);
        page[i] = page_of(pages, start + r * width_row + (in ? n : 0));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = first + 2 * q + (i & 1) + (i >> 1) * 8;
        into[i] = in && r < limit ? load_eight(address(weights, page[i], start + r * width_row + n))
                                  : none;
      }
    };
    // 16 consecutive columns of rows g and g + 8.
    T* y_row[2];
    bool has[2][2];
    fetch(0, b);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = g + h * 8, at = first_n + q * 16;
      const int token = row < tile.z ? __ldg(order + tile.y + row) : 0;
      y_row[h] = y + (long long)token * y_stride + column + at;
      has[h][0] = row < tile.z && (EXACT || at < width);
      has[h][1] = row < tile.z && (EXACT || at + 8 < width);
    }
    if (!has_waited) {
      wait_for_previous();
      has_waited = true;
    }

    uint4 old[2][2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i) old[h][i] = has[h][i] ? load_input(y_row[h] + i * 8) : zero;

    __syncthreads();  // other threads may still read the previous tile
    const long long stride = (long long)step.num_rows * v_row_stride;
    for (int i = threadIdx.x; i < (limit + 15) / 16 * 128; i += THREADS) {
      const int row = i % 128 / 8, r = i / 128 * 16 + i % 8 * 2;
      float low = 0, high = 0;
      if (row < tile.z && r < limit) {
        const float* from =
            v + (long long)(tile.y + row) * v_row_stride + module * v_module_stride + r;
        for (int first_split = 0; first_split < num_splits; first_split += 8) {
          float2 share[8];
#pragma unroll
          for (int s = 0; s < 8; ++s)
            share[s] = first_split + s < num_splits
                           ? __ldcg(reinterpret_cast<const float2*>(from + (first_split + s) * stride))
                           : make_float2(0, 0);
#pragma unroll
          for (int s = 0; s < 8; ++s) low += share[s].x, high += share[s].y;
        }
        if (r + 1 == limit) high = 0;  // beyond the limit memory may hold NaN
      }
      shrunk[row][r / 2] = pack(low * factor, high * factor);
    }
    __syncthreads();

    float acc[8][4] = {};
    for (int first = 0; first < limit; first += 16) {
      Eight next[4] = {none, none, none, none};
      if (first + 16 < limit) fetch(first + 16, next);
      const int pair = first / 2 + q;
      const unsigned a0 = shrunk[g][pair], a1 = shrunk[g + 8][pair];
      const unsigned a2 = shrunk[g][pair + 4], a3 = shrunk[g + 8][pair + 4];
#if E4M3
      const uint4 wide[4] = {widen_eight(b[0]), widen_eight(b[1]), widen_eight(b[2]), widen_eight(b[3])};
#else
      const uint4(&wide)[4] = b;
#endif
      const unsigned* w[4] = {&wide[0].x, &wide[1].x, &wide[2].x, &wide[3].x};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const unsigned halves = j & 1 ? 0x7632 : 0x5410;
        mma(acc[j], a0, a1, a2, a3, __byte_perm(w[0][j / 2], w[1][j / 2], halves),
            __byte_perm(w[2][j / 2], w[3][j / 2], halves));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = next[i];
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!has[h][i]) continue;
        const float2 o0 = unpack(old[h][i].x), o1 = unpack(old[h][i].y);
        const float2 o2 = unpack(old[h][i].z), o3 = unpack(old[h][i].w);
        const int c = h * 2 + i;
        uint4 sum;
        sum.x = pack(o0.x + acc[0][c], o0.y + acc[1][c]);
        sum.y = pack(o1.x + acc[2][c], o1.y + acc[3][c]);
        sum.z = pack(o2.x + acc[4][c], o2.y + acc[5][c]);
        sum.w = pack(o3.x + acc[6][c], o3.y + acc[7][c]);
        *reinterpret_cast<uint4*>(y_row[h] + i * 8) = sum;
      }
  }
  if (!has_waited && (num_works || blockIdx.x == 0)) wait_for_previous();
}
#endif
