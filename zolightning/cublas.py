"""Makes cuBLAS choose the same kernels for matrix products in every run, and round each result once."""

import os

import torch

_WORKSPACE = ":4096:8"  # 8 buffers of 4 MiB: what PyTorch takes on an H100, four times as much as elsewhere


def repeat_products() -> None:
    """Makes matrix products on CUDA devices depend on nothing but their operands, library and card.

    A run that was killed goes on with the same bits if its products round as before: cuBLAS chooses among its kernels
    by shapes and by the workspace it is given, so that is set here (``CUBLAS_WORKSPACE_CONFIG``, unless the environment
    has it). Where it splits a long sum over several blocks, PyTorch lets it round their parts to bfloat16 or float16
    before they are added; here they are added in float32 and rounded once, like those of other shapes: the losses of a
    step differ by a thousandth of themselves, and so little should not depend on how a sum was split.

    It has to be called before the first product on a device; on CPUs it changes nothing. The commands call it when they
    start. Importing the package does not, because how products are computed is for the program to decide.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACE)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
