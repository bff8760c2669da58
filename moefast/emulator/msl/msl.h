// The Metal standard library on C++ for OpenCL. Precompiled once; every kernel starts from it.
#pragma once
#pragma clang system_header
// In the order in which they need each other.
// clang-format off
#include "types.h"
#include "vectors.h"
#include "traits.h"
#include "convert.h"
#include "math.h"
#include "integer.h"
#include "relational.h"
#include "geometric.h"
#include "variants.h"
#include "broadcast.h"
#include "packed.h"
#include "matrix.h"
#include "context.h"
#include "simdgroup.h"
#include "simdgroup_matrix.h"
#include "atomic.h"
#include "entry.h"
// clang-format on
