"""The features of a chip that matter here: what each target should have, and what this project does with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparkctl.doctor import probes
from sparkctl.doctor.probes import Probe
from sparkctl.doctor.targets import Target

# NVIDIA's staff, on its developer forum in 2026-05, for sm_121a: no tensor memory, wgmma, TMA multicast, distributed
# shared memory or clusters above 1x1x1; TMA in one block and FP8 products are there. The other expectations are those
# of the PTX ISA's target notes.
DATACENTER = {100, 103}
CLUSTERS = {90, *DATACENTER}  # in hardware; of sm_110 and sm_120 nobody has said so
NO_CLUSTERS = {121}
GEFORCE = {120, 121}  # of the same instructions
Expected = Callable[[Target], bool | None]


@dataclass(frozen=True)
class Feature:
    """A row. use: what this project does with it. needed: training does not run without it.

    launch_only: ptxas takes it for every target, so that only a launch tells.
    """

    name: str
    use: str
    probe: Probe
    expected: Expected
    needed: bool = False
    launch_only: bool = False

    def named(self, target: Target) -> str:
        """The name, with the target's bytes in it where it has some."""
        return self.name.format(shared=f"{target.shared:,}")


def _since(number: int) -> Expected:
    return lambda target: target.number >= number


def _own(numbers: set[int]) -> Expected:
    """Of these architectures, where code is made for them alone (`a`, `f`)."""
    return lambda target: target.own and target.number in numbers


def _clusters(target: Target) -> bool | None:
    if target.number in NO_CLUSTERS or target.number < min(CLUSTERS):
        return False
    return True if target.number in CLUSTERS else None


FEATURES = (
    Feature("mma bf16", "every matrix product, and tl.dot", probes.MMA_BF16, _since(80), needed=True),
    Feature("cp.async", "loads ahead of the products", probes.CP_ASYNC, _since(80), needed=True),
    Feature(
        "shared memory, {shared} bytes", "tiles are chosen to fit a block", probes.SHARED_MEMORY, lambda _: True,
        needed=True, launch_only=True,
    ),
    Feature(f"registers, {probes.HELD} a thread", "tiles that do not spill", probes.REGISTERS, lambda _: True),
    Feature("tcgen05.alloc", "nothing: needs tensor memory", probes.TCGEN05, _own({*DATACENTER, 110})),
    Feature("wgmma.mma_async", "products on Hopper, and tl.dot", probes.WGMMA, _own({90})),
    Feature("cp.async.bulk.tensor, one CTA", "nothing: cp.async does", probes.TMA, _since(90)),
    Feature(".multicast::cluster", "nothing: blocks work alone", probes.MULTICAST, _clusters, launch_only=True),
    Feature("ld.shared::cluster", "nothing: blocks work alone", probes.DISTRIBUTED, _clusters, launch_only=True),
    Feature("clusters above 1x1x1", "nothing: blocks work alone", probes.CLUSTER, _clusters, launch_only=True),
    Feature("mma e4m3", "nothing: fp8 is not lossless", probes.MMA_E4M3, _since(89)),
    Feature("mma kind::f8f6f4", "nothing: fp8 is not lossless", probes.MMA_FP8, _own({*DATACENTER, 110, *GEFORCE})),
    Feature("mma kind::f8f6f4, fp4", "nothing: fp4 is not lossless", probes.MMA_FP4, _own(GEFORCE)),
    Feature("mma mxf8f6f4 block_scale", "nothing: fp8 is not lossless", probes.MMA_MXFP8, _own(GEFORCE)),
    Feature("mma mxf4nvf4 block_scale", "nothing: fp4 is not lossless", probes.MMA_NVFP4, _own(GEFORCE)),
)  # fmt: skip
