"""What the targets that kernels are judged for give one block. No torch here: `sparkctl doctor` reads it."""

SHARED = {"sm_121a": 101_376, "sm_120a": 101_376, "sm_90a": 232_448}  # bytes of shared memory a block may have
DOT_WARPS = {"sm_121a": 4, "sm_120a": 4}  # more race there in kernels with tl.dot (triton#10590)
