"""Triton kernels: one file per op, its kernels and its launcher, imported as dirmerge.triton_kernels.

A launcher has the name and the arguments of its op. It expects what the public function of dirmerge.ops has
validated, launches on the current stream of the input's device and never waits for it. dirmerge.ops._triton
enters the launchers into the backend table.

With TRITON_INTERPRET=1 in the environment before Triton is imported, the same kernels run on CPU tensors in
Triton's interpreter: right, and slow. It is for tests.
"""
