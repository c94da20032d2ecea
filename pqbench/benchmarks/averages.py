"""The data sets of LongBench v1, their groups, and the averages over them that papers report."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

GROUPS: dict[str, tuple[str, ...]] = {
    "single_doc": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "multi_doc": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few_shot": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code": ("lcc", "repobench-p"),
}
TASKS: tuple[str, ...] = tuple(task for group in GROUPS.values() for task in group)

# The columns of Table 2 of the PQCache paper (https://arxiv.org/abs/2407.12820): all but the Chinese and the code sets.
PQCACHE_TABLE2: tuple[str, ...] = tuple(
    task
    for task in TASKS
    if task not in ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh", *GROUPS["code"])
)

# LongBench-E, whose files are named with a trailing ``_e``.
EXTENDED: tuple[str, ...] = tuple(
    task for task in (*PQCACHE_TABLE2, *GROUPS["code"]) if task not in ("narrativeqa", "musique", "qmsum")
)


def averages(scores: Mapping[str, float]) -> dict[str, float]:
    """Averages of per-task scores, not rounded. An average is given only when each of its tasks has a score.

    Args:
        scores: the score of each task; names of LongBench-E tasks end in ``_e``. Unknown tasks are ignored.

    Returns:
        The mean of each group (``single_doc``, ...); ``longbench``, the official mean of the groups' means;
        ``pqcache_table2``, the plain mean over the 14 sets of that table. For LongBench-E the keys end in ``_e``.
    """
    found = _averages(scores, TASKS, "")
    if all(task in scores for task in PQCACHE_TABLE2):
        found["pqcache_table2"] = fmean(scores[task] for task in PQCACHE_TABLE2)
    return found | _averages(scores, EXTENDED, "_e")


def _averages(scores: Mapping[str, float], tasks: tuple[str, ...], suffix: str) -> dict[str, float]:
    means: dict[str, float] = {}
    for group, members in GROUPS.items():
        names = [task + suffix for task in members if task in tasks]
        if all(name in scores for name in names):
            means[group + suffix] = fmean(scores[name] for name in names)
    if len(means) == len(GROUPS):
        means["longbench" + suffix] = fmean(list(means.values()))
    return means
