# SPDX-License-Identifier: Apache-2.0
"""The ARM CPUs that can be asked for, and what each can do."""

from dataclasses import dataclass

from ...ground.errors import TurbopocketError

PREFIX = "arm64:"
_V8 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_V8_2 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs"
_CORES = 2


@dataclass(frozen=True)
class Cpu:
    """One emulated CPU.

    `emulated` is what the emulator calls it; `part` its number in the main ID register, by which libraries choose
    kernels: one that promises more than the emulator gives ends in an illegal instruction. `features` are Linux' names.
    """

    name: str
    emulated: str
    part: int
    features: str

    @property
    def cpuinfo(self) -> str:
        """`/proc/cpuinfo` as an ARM Linux shows it; emulators before QEMU 8 show the host's."""
        lines = (
            f"Features\t: {self.features}\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x0\n"
            f"CPU part\t: {self.part:#05x}\nCPU revision\t: 1\n\n"
        )
        return "".join(f"processor\t: {core}\nBogoMIPS\t: 48.00\n{lines}" for core in range(_CORES))


CPUS = (
    Cpu("cortex-a53", "cortex-a53", 0xD03, _V8),
    Cpu("cortex-a76", "cortex-a76", 0xD0B, _V8_2),
    # As Cortex-A710 without SVE. QEMU's own `max` also has SME, under which 7.2 computes wrong.
    Cpu("i8mm", "max,sme=off,sve=off", 0xD47, f"{_V8_2} i8mm bf16"),
)
"""No dot product; dot product and fp16; also int8 and bfloat16 matrix products."""


def parse_cpu(text: str) -> Cpu:
    """The CPU called `arm64:<name>`. Raises TurbopocketError listing the known ones."""
    for cpu in CPUS:
        if text == PREFIX + cpu.name:
            return cpu
    known = ", ".join(PREFIX + cpu.name for cpu in CPUS)
    raise TurbopocketError(f"`{text}` is not an emulated CPU: known are {known}")
