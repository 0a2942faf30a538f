"""What Triton's interpreter wants beforehand: tiles that are known, sums over more rows than programs."""

from __future__ import annotations

from importlib import import_module


def few_programs() -> None:
    """What adds up a weight's gradient takes several turns here, as it does over the rows of a real pack."""
    for operator in ("rms_norm", "gated_norm", "qk_norm_rope", "causal_conv"):
        kernel = import_module(f"sparkctl_kernels.{operator}.kernel")
        assert kernel.PROGRAMS >= 2
        kernel.PROGRAMS = 2


class Number(int):
    """What the interpreter's loops should count with: the library's kernels cast their counters."""

    def to(self, dtype: object) -> Number:
        return self


def pin_tiles() -> None:
    """The library's kernels have no device to be tuned on here."""
    from sparkctl_kernels.gated_delta import fla_rule

    for module in (fla_rule.chunk_delta_h, fla_rule.chunk_o, fla_rule.chunk_fwd, fla_rule.wy_fast):
        module.range = lambda *bounds: map(Number, range(*bounds))
    for kernel in fla_rule.KERNELS:
        for shape in ("1x64-1x64", "1x64-2x64", "1x128-1x128", "2x16-4x8", "4x64-4x64"):
            names = {"BK", "BV"} & {name for config in kernel.configs for name in config}
            kernel.tiles[shape] = dict.fromkeys(names, 32) | {"num_warps": 4}
