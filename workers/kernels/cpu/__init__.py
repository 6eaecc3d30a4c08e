"""The kernels for CPUs: C++ in `native/`, compiled once for each of `library.BUILDS` when mull is installed."""
