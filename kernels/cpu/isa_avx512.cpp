// Compiled with the flags for avx512 in setup.py.
#define DISTKV_ISA avx512
#include "isa_functions.h"
