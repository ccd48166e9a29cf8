"""docs/scaling.md: what it calls measured is measured again, and every row of its tables follows from its formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hornet_lit.bench import held_bytes
from hornet_lit.network import fused
from hornet_lit.network.build import build_network

TEXT = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
P, MACS, PEAK, FILE, CORE = 209_080_987, 34.81e9, 989e12, 112.3e3, 200
F = 6 * MACS
NETWORKS = {"A": 320e9, "B": 80e9, "C": 20e9}
UPDATE_MS = 1e3 * 28 * P / (0.8 * 3.35e12)


@pytest.mark.parametrize("name", ["hornet_large_7x7", "hornet_large_gf"])
def test_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_built", lambda low: False)  # GPUs have no fused operations
    with torch.device("meta"):
        network = build_network(name, num_classes=10_459, in_chans=3, img_size=224, drop_path_rate=0.2, options=None)
    network.train()
    assert f"{sum(p.numel() for p in network.parameters()):,}".replace(",", " ") in TEXT
    if name == "hornet_large_gf":  # FlopCounterMode knows no FFT
        return
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2 == pytest.approx(MACS, rel=1e-4)
    network = network.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    for recompute in (True, False):
        network.set_recompute(recompute)
        held = [held_bytes(lambda n=n: network(torch.zeros(n, 3, 224, 224)))[1] for n in (1, 2)]
        assert f"{(held[1] - held[0]) / 2**20:.0f} MiB" in TEXT


def compute_ms(images: int, use: float) -> float:
    return 1e3 * images * F / (use * PEAK)


def rows() -> list[str]:
    found = []
    for use in (0.1, 0.2, 0.4):
        each = use * PEAK / F
        for gpus in (64, 512):
            total = gpus * each
            found.append(
                f"| {use:.0%} | {gpus} | {each:.0f} | {total / 1e3:.0f} 000 | {total * FILE / 1e9:.1f} "
                f"| {each / CORE:.1f} | {total / CORE:.0f} | {90 * 11.1e6 / total / 3600:.1f} |"
            )
    for name, bandwidth in NETWORKS.items():
        for gpus in (64, 512):
            times = [1e3 * (gpus - 1) / gpus * k * P / bandwidth for k in (8, 12, 8)]
            found.append(f"| {name} | {gpus} | " + " | ".join(f"{t:.1f}" for t in times) + " |")
    for name, bandwidth in NETWORKS.items():
        least = [8 * P / bandwidth * use * PEAK / (2 / 3 * F) for use in (0.1, 0.2, 0.4)]
        found.append(f"| {name} | " + " | ".join(f"{m:.0f}" for m in least) + " |")
    for gpus, batch in ((64, 4096), (512, 4096), (512, 32768)):
        for name, bandwidth in NETWORKS.items():
            shares = []
            for use in (0.1, 0.2, 0.4):
                compute = compute_ms(batch // gpus, use)
                traffic = 1e3 * (gpus - 1) / gpus * 8 * P / bandwidth
                ddp = compute / 3 + max(compute * 2 / 3, traffic) + UPDATE_MS
                fsdp = max(compute / 3, traffic / 4) + max(compute * 2 / 3, traffic * 3 / 4) + UPDATE_MS / gpus
                shares.append(f"{compute / ddp:.0%}, {compute / fsdp:.0%}")
            found.append(f"| {gpus} | {batch} | {batch // gpus} | {name} | " + " | ".join(shares) + " |")
    return found


def test_tables() -> None:
    assert [row for row in rows() if row not in TEXT] == []
