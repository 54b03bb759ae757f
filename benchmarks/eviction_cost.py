"""The cost of an evicting insert, by policy and number of entries. It is constant if eviction is O(1).

    python benchmarks/eviction_cost.py [--sizes 1000 100000 1000000]

The benchmark times `evict` and `admit`; entries are made before. Every third request is a hit, so that the policies
have visits to decrement. Garbage collection is off. The figure is the best of five rounds of 20,000 inserts.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cachebus.adapters.memory.eviction import POLICIES, Entry, make_policy

INSERTS = 20_000
ROUNDS = 5


def seconds(name: str, size: int) -> tuple[float, float]:
    """Return the seconds of an evicting insert with only cold keys, and after hits on a third of the residents."""
    policy = make_policy(name, size)
    held = {f"resident:{number}": Entry(f"resident:{number}", None, 0) for number in range(size)}
    for entry in held.values():
        policy.admit(entry)
    for number in range(2 * size):  # until the ghost queue, if any, is full
        del held[policy.evict().key]
        entry = held[f"before:{number}"] = Entry(f"before:{number}", None, 0)
        policy.admit(entry)
    residents = list(held.values())
    del held
    serial = 0
    best = [float("inf"), float("inf")]
    for _ in range(ROUNDS):
        for kind in (0, 1):
            fresh = [Entry(f"fresh:{serial + number}", None, 0) for number in range(INSERTS)]
            serial += INSERTS
            gone: set[str] = set()
            spent = 0.0
            for start in range(0, INSERTS, 100):
                batch = fresh[start : start + 100]
                if kind:
                    for entry in residents[start % size :: max(1, size // 33)][:33]:
                        if entry.key not in gone:
                            (policy.on_hit or visit)(entry)
                begin = time.perf_counter()
                victims = [policy.evict()]
                policy.admit(batch[0])
                for entry in batch[1:]:
                    victims.append(policy.evict())
                    policy.admit(entry)
                spent += time.perf_counter() - begin
                gone.update(victim.key for victim in victims)
            residents = [entry for entry in residents if entry.key not in gone]
            residents += [entry for entry in fresh if entry.key not in gone]
            best[kind] = min(best[kind], spent / INSERTS)
    return best[0], best[1]


def visit(entry: Entry) -> None:
    """Count a hit as the store does under a lazy policy."""
    entry.visits = min(3, entry.visits + 1)


def main() -> None:
    """Print one row for each policy and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    sizes = parser.parse_args().sizes
    gc.disable()
    print(f"{'policy':8} {'entries':>10} {'cold keys':>12} {'with hits':>12}   us per evict + admit")
    for name in POLICIES:
        for size in sizes:
            cold, warm = seconds(name, size)
            print(f"{name:8} {size:>10,} {cold * 1e6:>12.2f} {warm * 1e6:>12.2f}", flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
