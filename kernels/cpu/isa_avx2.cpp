// Compiled with the flags for avx2 in setup.py.
#define DISTKV_ISA avx2
#include "isa_functions.h"
