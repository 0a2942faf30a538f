"""PTX that needs one feature each, with as much around it as a launch wants to show that it works.

Every kernel has the same parameters: where its blocks write a word each, WORDS words of SEVEN, and a tensor map over
them. It leaves its answer in %r0, which the first thread of a block writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparkctl.doctor.targets import Target

ENTRY = "probe"
SEVEN, WORDS = 7, 1024
BOX = 64  # words that the tensor map's box holds
HELD = 240  # registers that one probe fills
ONES = {"bf16": 0x3F803F80, "e4m3": 0x38383838, "e2m1": 0x22222222, "e2m1 in bytes": 0x08080808}
SCALE = {"ue8m0": 0x7F7F7F7F, "ue4m3": 0x38383838}  # 1.0 four times
TICKS = 1 << 22  # tries at a barrier before a probe gives up
WORD = 1 << 32


@dataclass(frozen=True)
class Probe:
    """A kernel's body, what it declares outside, how it is launched, and the words that its blocks then write.

    shared: it takes all shared memory that a block may have. ptx: the version of PTX that knows its instructions.
    """

    body: str
    expected: tuple[int, ...]
    threads: int = 32
    cluster: int = 1
    shared: bool = False
    ptx: str = "8.0"

    def source(self, target: Target) -> str:
        """The whole module for the target."""
        version = max(self.ptx, target.ptx, key=lambda text: tuple(map(int, text.split("."))))
        body = self.body.replace("LAST_WORD", str(target.shared - 4))
        dynamic = ".extern .shared .align 16 .b8 dynamic[];\n" if self.shared else ""
        return TEMPLATE.format(version=version, target=target, dynamic=dynamic, body=body)


TEMPLATE = """\
.version {version}
.target {target}
.address_size 64
{dynamic}.visible .entry probe(.param .u64 out, .param .u64 data, .param .align 64 .b8 map[128])
{{
.reg .pred %p<4>;
.reg .b32 %r<12>;
.reg .f32 %f<5>;
.reg .b64 %rd<8>;
ld.param.u64 %rd1, [out];
ld.param.u64 %rd2, [data];
cvta.to.global.u64 %rd1, %rd1;
cvta.to.global.u64 %rd2, %rd2;
{body}
mov.u32 %r10, %tid.x;
setp.ne.u32 %p3, %r10, 0;
@%p3 bra done;
mov.u32 %r11, %ctaid.x;
mul.wide.u32 %rd3, %r11, 4;
add.u64 %rd3, %rd1, %rd3;
st.global.u32 [%rd3], %r0;
done:
ret;
}}
"""


def _mma(shape: str, kind: str, types: str, ones: str, k: int, scale: str = "", ptx: str = "8.0") -> Probe:
    """A product of ones, k of them an entry, times one: k in fp32."""
    scales = ", %r2, {0, 0}, %r2, {0, 0}" if scale else ""
    body = f"""\
mov.b32 %r1, {ONES[ones]};
mov.b32 %r2, {SCALE.get(scale, 0)};
mov.f32 %f0, 0f00000000;
mma.sync.aligned.{shape}.row.col{kind}.f32.{types}.f32{"." + scale if scale else ""} {{%f0, %f1, %f2, %f3}}, \
{{%r1, %r1, %r1, %r1}}, {{%r1, %r1}}, {{%f0, %f0, %f0, %f0}}{scales};
mov.b32 %r0, %f0;"""
    return Probe(body, (_float(k),), ptx=ptx)


def _float(power_of_two: int) -> int:
    """The bits of that number in fp32."""
    return (127 + power_of_two.bit_length() - 1) << 23


BOXED = """\
.shared .align 128 .b8 box[1024];
.shared .align 8 .b64 bar;"""

AWAIT_ALL = """\
barrier.cluster.arrive.release;
barrier.cluster.wait.acquire;"""

EXPECT_BOX = f"""\
mbarrier.init.shared::cta.b64 [bar], 1;
fence.mbarrier_init.release.cluster;
fence.proxy.async.shared::cta;
mbarrier.arrive.expect_tx.shared::cta.b64 %rd4, [bar], {4 * BOX};
mov.b64 %rd5, map;
cvta.param.u64 %rd5, %rd5;
mov.u32 %r3, 0;"""

READ_BOX = f"""\
mov.u32 %r4, 0;
mov.u32 %r0, 0;
again:
mbarrier.try_wait.parity.shared::cta.b64 %p1, [bar], 0;
add.u32 %r4, %r4, 1;
setp.gt.u32 %p2, %r4, {TICKS};
@%p2 bra late;
@!%p1 bra again;
ld.shared.u32 %r0, [box];
late:"""

COPY = "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"

TCGEN05 = Probe(
    f"""\
{BOXED}
tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [box], 32;
tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
bar.sync 0;
ld.shared.u32 %r1, [box];
tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r1, 32;
mov.u32 %r0, {SEVEN};""",
    (SEVEN,),
    ptx="8.6",
)

WGMMA = Probe(  # the whole box is ones, so that its layout does not matter
    f"""\
{BOXED}
mov.u32 %r2, box;
mov.u32 %r1, %tid.x;
mad.lo.u32 %r1, %r1, 8, %r2;
mov.b32 %r3, {ONES["bf16"]};
st.shared.v2.b32 [%r1], {{%r3, %r3}};
fence.proxy.async.shared::cta;
bar.sync 0;
cvt.u64.u32 %rd4, %r2;
and.b64 %rd4, %rd4, 0x3FFFF;
shr.u64 %rd4, %rd4, 4;
or.b64 %rd4, %rd4, 0x1000080000;
mov.f32 %f0, 0f00000000;
mov.f32 %f1, %f0;
mov.f32 %f2, %f0;
mov.f32 %f3, %f0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f0, %f1, %f2, %f3}}, {{%r3, %r3, %r3, %r3}}, %rd4, 1, 1, 1, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
mov.b32 %r0, %f0;""",
    (_float(16),),
    threads=128,
)

TMA = Probe(f"{BOXED}\n{EXPECT_BOX}\n{COPY} [box], [%rd5, {{%r3}}], [bar];\n{READ_BOX}", (SEVEN,), threads=1)

MULTICAST = Probe(
    f"""\
.reg .b16 %both;
{BOXED}
{EXPECT_BOX}
{AWAIT_ALL}
mov.b16 %both, 3;
mov.u32 %r5, %cluster_ctarank;
setp.eq.u32 %p1, %r5, 0;
@%p1 {COPY}.multicast::cluster [box], [%rd5, {{%r3}}], [bar], %both;
{READ_BOX}
{AWAIT_ALL}""",
    (SEVEN, SEVEN),
    threads=1,
    cluster=2,
)

DISTRIBUTED = Probe(
    f"""\
{BOXED}
mov.u32 %r1, %cluster_ctarank;
add.u32 %r2, %r1, {SEVEN};
st.shared.u32 [box], %r2;
{AWAIT_ALL}
xor.b32 %r3, %r1, 1;
mov.u32 %r4, box;
mapa.shared::cluster.u32 %r5, %r4, %r3;
ld.shared::cluster.u32 %r0, [%r5];
{AWAIT_ALL}""",
    (SEVEN + 1, SEVEN),
    threads=1,
    cluster=2,
)

CLUSTER = Probe("mov.u32 %r0, %cluster_nctaid.x;", (2, 2), cluster=2)

CP_ASYNC = Probe(
    f"{BOXED}\ncp.async.ca.shared.global [box], [%rd2], 16;\ncp.async.wait_all;\nld.shared.u32 %r0, [box];", (SEVEN,)
)

SHARED_MEMORY = Probe(
    f"mov.u32 %r1, dynamic;\nadd.u32 %r1, %r1, LAST_WORD;\nmov.u32 %r2, {SEVEN};\nst.shared.u32 [%r1], %r2;\n"
    "ld.volatile.shared.u32 %r0, [%r1];",
    (SEVEN,),
    shared=True,
)


def _registers() -> Probe:
    """Values that are all held at once: the last that is loaded is the first that is used, in an order that counts."""
    loads = [f"ld.volatile.global.u32 %v{i}, [%rd2 + {4 * i}];" for i in range(HELD)]
    mixed, lines = 0, ["mov.u32 %r0, 0;"]
    for i in reversed(range(HELD)):
        lines += ["mul.lo.u32 %r0, %r0, 33;", f"xor.b32 %r0, %r0, %v{i};"]
        mixed = (mixed * 33) % WORD ^ SEVEN
    return Probe("\n".join([f".reg .b32 %v<{HELD}>;", *loads, *lines]), (mixed,), threads=256)


REGISTERS = _registers()
MMA_BF16 = _mma("m16n8k16", "", "bf16.bf16", "bf16", 16)
MMA_E4M3 = _mma("m16n8k32", "", "e4m3.e4m3", "e4m3", 32, ptx="8.4")
MMA_FP8 = _mma("m16n8k32", ".kind::f8f6f4", "e4m3.e4m3", "e4m3", 32, ptx="8.7")
MMA_FP4 = _mma("m16n8k32", ".kind::f8f6f4", "e2m1.e2m1", "e2m1 in bytes", 32, ptx="8.7")
MMA_MXFP8 = _mma(
    "m16n8k32", ".kind::mxf8f6f4.block_scale.scale_vec::1X", "e4m3.e4m3", "e4m3", 32, scale="ue8m0", ptx="8.7"
)
MMA_NVFP4 = _mma(
    "m16n8k64", ".kind::mxf4nvf4.block_scale.scale_vec::4X", "e2m1.e2m1", "e2m1", 64, scale="ue4m3", ptx="8.7"
)
