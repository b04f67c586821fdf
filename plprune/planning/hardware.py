"""Speed and memory of machines, from data sheets or measured.

Three assumptions turn peak values into usable ones:

- A machine reaches :data:`UTILISATION` of its peak speed. Llama 3 was trained at 0.38 to 0.43
  (https://arxiv.org/abs/2407.21783, table 4).
- A process can use :data:`USABLE` of the memory. The driver and fragmentation take the rest.
- Blocks are copied from main memory to a GPU at :data:`COPY_RATE` bytes per second, the rate of pageable memory.
"""

import dataclasses
import os
import time

import torch

UTILISATION, USABLE, COPY_RATE = 0.4, 0.92, 8e9


@dataclasses.dataclass(frozen=True)
class GPU:
    """Peak values from an accelerator's data sheet, in bytes and operations per second."""

    memory: float
    half: float  # bfloat16 (float16 where that is missing), dense matrices
    single: float  # float32 without TF32, which torch disables by default


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
"""By name, for dense matrices (half of the rates stated with sparsity) and SXM modules. Sources: NVIDIA's data sheets,
the Ampere GA102 and Ada whitepapers for the two GeForce, and AMD's Instinct MI300X data sheet."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The usable speed and memory of the device that computes."""

    name: str  # for display
    memory: float  # bytes
    half: float  # operations per second in bfloat16 or float16
    single: float  # operations per second in float32
    separate: bool  # whether the device has its own memory, apart from the main memory

    def rate(self, dtype: torch.dtype) -> float:
        """Operations per second in a dtype."""
        return self.single if dtype == torch.float32 else self.half


def machine(device: str, seconds: float = 2.0) -> Machine:
    """Looks up a GPU by name, or measures a device of this machine.

    Args:
        device: A key of :data:`GPUS` in any case, or a device like cpu, cuda or cuda:1.
        seconds: The time to measure a device.

    Raises:
        ValueError: The device is unknown.
    """
    names = {name.lower(): name for name in GPUS}
    key = device.lower().replace(" ", "-")
    if key in names:
        gpu = GPUS[names[key]]
        return Machine(names[key], USABLE * gpu.memory, UTILISATION * gpu.half, UTILISATION * gpu.single, True)
    if key.partition(":")[0] not in ("cpu", "cuda") or (key != "cpu" and not torch.cuda.is_available()):
        raise ValueError(f"unknown device {device!r}: give cpu, cuda if there is a GPU, or one of {', '.join(GPUS)}")
    target, is_gpu = torch.device(key), key != "cpu"
    half, single = (_measured(target, dtype, seconds / 2) for dtype in (torch.bfloat16, torch.float32))
    main_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory = torch.cuda.get_device_properties(target).total_memory if is_gpu else main_memory
    return Machine(f"this machine ({key})", USABLE * memory, half, single, is_gpu)


def _measured(device: torch.device, dtype: torch.dtype, seconds: float, size: int = 1024) -> float:
    """Measures matrix products, in operations per second."""
    size = size if device.type == "cpu" else 8 * size
    a, b = (torch.randn(size, size, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.mm(a, b)
    synchronize()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        torch.mm(a, b)
        synchronize()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - start)
