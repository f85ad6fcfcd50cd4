// kernels/bgmv.cu for the CPU, with the macros that it is compiled with for a GPU.
#include "cuda_emulator.h"
#include BGMV

extern "C" const char* run_shrink(unsigned blocks, unsigned threads, void** arguments) {
  return emulator::launch(shrink, blocks, threads, arguments);
}
extern "C" const char* run_expand(unsigned blocks, unsigned threads, void** arguments) {
  return emulator::launch(expand, blocks, threads, arguments);
}
