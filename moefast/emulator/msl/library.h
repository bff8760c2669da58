// What is precompiled. msl.h is a system header, which it can only be when another file includes
// it.
#include "msl.h"
