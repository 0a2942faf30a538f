"""Fused operators for Qwen3.5 and its relatives, one folder each.

`reference.py` is the meaning in plain torch, `kernel.py` the Triton kernels with their launchers, `op.py` the autograd
operator and its dispatch. bf16 in and out, fp32 inside. On CPU every operator is its reference.
"""
