"""
Host to device: runs in vLLM's Python, prints bytes a second in its last line.
"""

from __future__ import annotations

import statistics
import sys

NO_CARD = "torch sees no card"
_BYTES = 2**30
_RUNS = 10


def main() -> None:
    """Copy pinned memory to the first card, timed by the card's own events."""
    import torch

    if not torch.cuda.is_available():
        sys.exit(NO_CARD)
    there = torch.empty(_BYTES, dtype=torch.uint8, device="cuda")
    here = torch.ones(_BYTES, dtype=torch.uint8, pin_memory=True)
    speeds = []
    for _ in range(_RUNS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        there.copy_(here, non_blocking=True)
        ended.record()
        ended.synchronize()
        speeds.append(_BYTES / (began.elapsed_time(ended) / 1000))  # it says milliseconds
    print(statistics.median(speeds))


if __name__ == "__main__":
    main()
