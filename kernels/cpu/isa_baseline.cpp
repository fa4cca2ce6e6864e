// Compiled with the flags for baseline in setup.py.
#define DISTKV_ISA baseline
#include "isa_functions.h"
