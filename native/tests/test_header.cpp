// The header compiles as C++, and the library links with it.
#include "trm_kernels.h"

#include "expect.h"

int main() {
    trm_call call = {};
    expect(trm_version()[0] != 0);
    expect(trm_forward(nullptr, &call, nullptr) == TRM_ERROR_ARGUMENT);
    return 0;
}
