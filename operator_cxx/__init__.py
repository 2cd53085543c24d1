"""The operators of the detectors: C++ and CUDA kernels, their bindings, and references in plain torch.

Modules check their arguments and call a kernel. They never depend on graphs, configs or training, and import
nothing from the other folders.

    <operator>.py                  the torch operator, with gradient, torch.compile and torch.export
    kernels/<operator>.h           the arithmetic, shared by both libraries
    kernels/cpu/<operator>.cc      the CPU kernel
    kernels/cuda/<operator>.cu     the GPU kernel
    reference/<operator>.py        the same operator in plain torch: the fallback, and the expectation of the tests
    include/                       headers shared by the kernels; necklace.h is the C interface of both libraries
    library.py, build.py           loads the libraries; compiles them
    numpy_ops.pyx, mxnet_ops/      the bindings to NumPy and MXNet
"""
