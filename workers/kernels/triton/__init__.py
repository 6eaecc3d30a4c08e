"""The kernels for GPUs, in Triton: one op a file, and `reference.py` with the same signatures in plain torch.

Only `choice.py` may be imported where triton is not installed. Nothing here looks at the device from the host, shapes
of buffers follow from shapes of arguments alone, and no sum depends on the order in which programs run: whatever calls
these kernels can be captured in a CUDA graph, and a row's bits do not depend on the rows beside it.

Triton compiles a kernel anew for an integer that is one, or a multiple of 16: a number that changes from step to step
is named in `do_not_specialize`, or a request would wait for a compiler. Block sizes that follow from it are few, and
all of them come up in `workers.warm_up`.
"""
