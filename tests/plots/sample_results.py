"""A small results folder with known numbers, written by pqbench.records.file; some of its text is hostile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pqbench.records.file import Record, RecordFile

EVIL = "<script>document.title='owned'</script>\x1b[31mred\x1b[0m\u202egnp\x00 ../../etc \ud800 | `x` & \"'</script>"
SCORES = {"full": (100.0, 100.0, 50.0, 100.0), "pqcache": (100.0, 0.0, 50.0, 90.0), "h2o": (0.0, 25.0, 0.0, 10.0)}
BYTES_READ = {
    "full": 1000 * 8.0,
    "pqcache": 500 + 100 * 8.0,
    "h2o": 0 + 100 * 8.0,
}  # index + attended * bytes per token
TARGETS = {"full": "methods.full.Full", "pqcache": "methods.pqcache.PQCache", "h2o": "elsewhere.absent.H2O"}


def config(method: str, **settings: Any) -> dict[str, Any]:
    """The settings of a run."""
    node = {"_target_": TARGETS.get(method, "methods"), "budget": {"ratio": 0.1}} | settings
    return {"benchmark": {"_target_": "pqbench.benchmarks.needle.Needle"}, "method": node, "question": "dense"}


def record(method: str, benchmark: str, task: str, sample: str, score: float, **fields: Any) -> Record:
    """One scored record."""
    kept = 100 if method == "h2o" else 1000
    made = {
        "benchmark": benchmark,
        "model": "tiny",
        "task": task,
        "sample_id": sample,
        "method": method,
        "key": "k" + method,
        "budget": "all" if method == "full" else "10 %",
        "question": "dense",
        "status": "ok",
        "prompt_tokens": 1000,
        "new_tokens": 7,
        "prediction": f"{method} says {score}",
        "references": ["42"],
        "score": score,
        "prompt_tail": f"{'begin' * 200} and the end of {sample}",
        "scores": {"score": score},
        "metadata": {"length": 1024, "depth": 50 * (len(sample) % 3)},
        "ttft_s": 1.0,
        "tt2t_s": 1.5,
        "tpot_s": {"full": 0.1, "pqcache": 0.02, "h2o": 0.03}.get(method, 0.05),
        "mass": 0.5,
        "attended_tokens": 1000.0 if method == "full" else 100.0,
        "kv_tokens": float(kept),
        "index_bytes": 500 if method == "pqcache" else 0,
        "device_bytes": kept * 8,
        "host_bytes": 0,
        "link_bytes": 0,
    }
    return made | fields


def write(root: Path) -> Path:
    """Write records of needle (one task) and ruler (two tasks) with three methods; one method, task, sample and
    prediction are hostile."""
    for method, scores in SCORES.items():
        for benchmark, tasks in (("needle", ("number",) * 4), ("ruler", ("vt", "vt", "cwe", "cwe"))):
            store = {"store": {"link": "pcie4"}} if (method, benchmark) == ("pqcache", "ruler") else {}
            file = RecordFile.create(root, benchmark, "tiny", method, config(method) | store)
            for i, (task, score) in enumerate(zip(tasks, scores, strict=True)):
                file.append(record(method, benchmark, task, f"{task}-{'i' * i}", score))
    file = RecordFile.create(root, "../up", EVIL, EVIL, config(EVIL, name=EVIL))
    file.append(
        record(
            EVIL,
            "needle",
            EVIL,
            EVIL,
            1.0,
            prediction=EVIL + "\nsecond line",
            references=[EVIL],
            key="kevil",
            prompt_tail=EVIL,
            metadata={EVIL: EVIL, "length": 1024, "depth": 0},
        )
    )
    return root
