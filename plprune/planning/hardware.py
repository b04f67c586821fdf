"""Machines: what they compute in a second, and what they hold.

No file states these three, so they are assumptions:

- A machine reaches :data:`UTILISATION` of its peak. Llama 3 was trained at 0.38 to 0.43 of it
  (https://arxiv.org/abs/2407.21783, table 4).
- A process can use :data:`USABLE` of a GPU's memory. The driver and fragmentation take the rest.
- A block moves from main memory to a GPU at :data:`CROSSING` bytes a second, the rate of pageable memory.
"""

import dataclasses
import os
import time

import torch

UTILISATION, USABLE, CROSSING = 0.4, 0.92, 8e9


@dataclasses.dataclass(frozen=True)
class GPU:
    """What a data sheet says of an accelerator.

    Args:
        memory: In bytes.
        half: Operations a second in bfloat16 (float16 where there is none), of dense matrices, summed in float32.
        single: Operations a second in float32, without TF32, which torch leaves off.
    """

    memory: float
    half: float
    single: float


GPUS: dict[str, GPU] = {
    name: GPU(memory * 1e9, half * 1e12, single * 1e12)
    for name, (memory, half, single) in {
        "T4": (16, 65, 8.1),
        "L4": (24, 121, 30.3),
        "A10": (24, 125, 31.2),
        "RTX-3090": (24, 71, 35.6),
        "RTX-4090": (24, 165.2, 82.6),
        "L40S": (48, 362, 91.6),
        "A100-40GB": (40, 312, 19.5),
        "A100-80GB": (80, 312, 19.5),
        "H100": (80, 989, 67),
        "H200": (141, 989, 67),
        "B200": (180, 2250, 75),
        "MI300X": (192, 1307, 163.4),
    }.items()
}
"""From the makers' data sheets, dense rates (half of what is given with sparsity), SXM where there is a choice:
nvidia.com: T4, L4, A10, L40S, A100, H100, H200 and HGX B200 data sheets; the Ampere GA102 and Ada architecture
whitepapers for the two GeForce; amd.com: Instinct MI300X data sheet."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where something is to run.

    Args:
        name: What it is called.
        memory: Bytes that can be had where a block is computed.
        half: Operations a second that can be had in bfloat16 or float16.
        single: Those in float32.
        separate: Whether that memory is an accelerator's own, and the model waits in another.
    """

    name: str
    memory: float
    half: float
    single: float
    separate: bool

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second in a dtype."""
        return self.single if dtype == torch.float32 else self.half


def machine(device: str, seconds: float = 2.0) -> Machine:
    """A GPU by its name, or a device of this machine, whose speed is measured.

    Args:
        device: One of :data:`GPUS`, in any case; or cpu, cuda, cuda:1.
        seconds: How long to measure.

    Raises:
        ValueError: There is no such GPU.
    """
    named = {name.lower(): name for name in GPUS}
    key = device.lower().replace(" ", "-")
    if key in named:
        gpu = GPUS[named[key]]
        return Machine(named[key], USABLE * gpu.memory, UTILISATION * gpu.half, UTILISATION * gpu.single, True)
    if key.partition(":")[0] not in ("cpu", "cuda") or (key != "cpu" and not torch.cuda.is_available()):
        here = "cpu, or cuda where there is one"
        raise ValueError(f"nothing is known of the device {device!r}: give {here}, or one of {', '.join(GPUS)}")
    place = torch.device(key)
    half, single = (_measured(place, dtype, seconds / 2) for dtype in (torch.bfloat16, torch.float32))
    own = key != "cpu"
    memory = torch.cuda.get_device_properties(place).total_memory if own else _main_memory()
    return Machine(f"this machine ({key})", USABLE * memory, half, single, own)


def _measured(place: torch.device, dtype: torch.dtype, seconds: float, size: int = 1024) -> float:
    """Operations a second of matrix products."""
    size = size if place.type == "cpu" else 8 * size
    a, b = (torch.randn(size, size, dtype=torch.float32, device=place).to(dtype) for _ in range(2))
    finished = torch.cuda.synchronize if place.type == "cuda" else lambda: None
    torch.mm(a, b)
    finished()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        torch.mm(a, b)
        finished()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)


def _main_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
