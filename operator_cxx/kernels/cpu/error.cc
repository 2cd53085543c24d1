/* nk_error_string of the CPU library, whose functions never fail. */
#include "necklace.h"

const char* nk_error_string(int32_t status) { return status ? "unknown error" : "no error"; }
