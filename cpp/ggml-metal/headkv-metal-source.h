// The text of the kernels, in headkv-metal-source.cpp, which CMake makes of the files of this folder.
#pragma once

extern const char * const HEADKV_METAL_COMMON; // headkv-args.h and headkv-device.metal
extern const char * const HEADKV_METAL_ATTEND;
extern const char * const HEADKV_METAL_SCORE;
extern const char * const HEADKV_METAL_SELECT_BEST;
extern const char * const HEADKV_METAL_COMPACT_ROWS;
