// Which instruction set serves this process.
#pragma once

#include <atomic>

#include "isa.h"

namespace distkv {

const Isa& isa_in_use();

}  // namespace distkv
