"""The kernels for CPUs: C++ in `native/`, compiled once for AVX-512 and once for AVX2 when mull is installed."""
