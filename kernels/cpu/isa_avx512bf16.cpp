// Compiled with the flags for avx512bf16 in setup.py.
#define DISTKV_ISA avx512bf16
#include "isa_functions.h"
