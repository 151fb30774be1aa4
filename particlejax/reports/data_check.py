# SPDX-License-Identifier: Apache-2.0
"""The report of job check_data: tables and figures of the splits, clips that belong together, and
what to do about them.
"""

import csv
import io as text_io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from particlejax.core import io
from particlejax.data import duplicates
from particlejax.data.duplicates import Pair
from particlejax.reports import plots
from particlejax.reports.markdown import table
from particlejax.train.classification_metrics import wilson_interval

MAX_LINES = 20  # lines of a list in the report
_MAX_BARS = 60  # classes of a figure
MAX_HALF_WIDTH = 0.2  # of a 95 % interval, beyond which a recall says little
PAIRS, PROBLEMS = "pairs.csv", "problems.csv"
UNREADABLE = "unreadable"  # the kind of a problem

_ACROSS = {  # kind: what to do about a pair in two splits
    duplicates.SAME_FILE: "delete one of them, or give both one split",
    duplicates.SAME_FRAMES: "delete one of them, or give both one split",
    duplicates.OVERLAP: "give all segments of a film one split",
    duplicates.ALIKE: "give both one split",
    duplicates.SAME_GROUP: "give all clips of a group one split",
    duplicates.SAME_FILM: "give all segments of a film one split",
}
_WITHIN = "delete one of them, unless both are wanted"
_CONTRADICTORY = "correct one of the labels"


class ClipProblem(NamedTuple):
    """Something that does not fit in a clip or its file, or why it is unreadable."""

    split: str
    clip: str
    kind: str
    text: str


class Findings(NamedTuple):
    """All that a check has found. seconds: lengths of the clips by split. statistics: by split, as
    in results.json. notes: sentences about the whole data.
    """

    source: str
    seconds: Mapping[str, Sequence[float]]
    statistics: Mapping[str, Mapping[str, Any]]
    pairs: Sequence[Pair]
    problems: Sequence[ClipProblem]
    notes: Sequence[str]

    @property
    def unreadable(self) -> list[ClipProblem]:
        return [problem for problem in self.problems if problem.kind == UNREADABLE]

    @property
    def misfits(self) -> list[ClipProblem]:
        """The problems of readable clips."""
        return [problem for problem in self.problems if problem.kind != UNREADABLE]


def remedy(pair: Pair) -> str:
    """Returns what to do about a pair."""
    steps = [_CONTRADICTORY] if pair.is_contradictory else []
    if pair.is_across:
        steps.append(_ACROSS[pair.kind])
    condition = "look at both; if they show the same: " if pair.kind == duplicates.ALIKE else ""
    return condition + ("; ".join(steps) or _WITHIN)


def count_pairs(pairs: Iterable[Pair]) -> dict[str, dict[str, int]]:
    """Returns the number of pairs across splits and within one, by kind, and of those with
    contradictory labels.
    """
    counts = {
        place: dict.fromkeys((*duplicates.KINDS, "contradictory labels"), 0)
        for place in ("across_splits", "within_one_split")
    }
    for pair in pairs:
        count = counts["across_splits" if pair.is_across else "within_one_split"]
        count[pair.kind] += 1
        count["contradictory labels"] += pair.is_contradictory
    return counts


def summary(counts: Mapping[str, int]) -> str:
    """Returns '3 (2 same file, 1 overlap; 1 with contradictory labels)' of counts by kind."""
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in duplicates.KINDS if counts[kind])
    contradictory = counts["contradictory labels"]
    labels = f"; {contradictory} with contradictory labels" if contradictory else ""
    total = sum(counts[kind] for kind in duplicates.KINDS)
    return f"{total} ({kinds}{labels})" if kinds else "0"


def write(findings: Findings, workdir: Path) -> Path:
    """Writes report.md, its figures, pairs.csv and problems.csv; returns the path of report.md."""
    _write_csv(
        workdir / PAIRS,
        (
            "kind,place,contradictory_labels,split,path,label,other_split,other_path,other_label,"
            "detail,remedy"
        ).split(","),
        (
            [
                pair.kind,
                "across splits" if pair.is_across else "within one split",
                "yes" if pair.is_contradictory else "no",
                *(
                    value
                    for clip in (pair.one, pair.other)
                    for value in (clip.split, clip.info.name, clip.label)
                ),
                pair.detail,
                remedy(pair),
            ]
            for pair in findings.pairs
        ),
    )
    _write_csv(workdir / PROBLEMS, ["split", "path", "kind", "problem"], findings.problems)
    path = workdir / "report.md"
    io.write_text(path, "\n".join(_report(findings, workdir)))
    return path


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = text_io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    io.write_text(path, text.getvalue())


def _report(findings: Findings, workdir: Path) -> Iterator[str]:
    yield from (f"# {findings.source}", "")
    splits = [split for split, found in findings.statistics.items() if found["num_clips"]]
    if splits:
        yield from _split_table(splits, findings)
        lengths = {split: findings.seconds[split] for split in splits}
        figure = workdir / "report" / "seconds.png"
        plots.histograms(lengths, figure, "length of the clips", "seconds")
        yield from ("", "![lengths](report/seconds.png)", "")
    yield from _pairs(findings.pairs)
    yield from _problems(findings)
    if splits:
        yield from _classes(splits, findings.statistics, workdir)
    unreadable = [(problem.clip, problem.text) for problem in findings.unreadable]
    yield from (f"## {len(unreadable)} unreadable clips", "")
    yield from _limited(["clip", "reason"], unreadable, PROBLEMS)
    yield from ("All figures are in [results.json](results.json).", "")


def _limited(header: list[str], rows: Sequence[Sequence[Any]], file: str) -> Iterator[str]:
    """Yields a table of the first rows, and where the others are."""
    if rows:
        yield from table(header, [list(row) for row in rows[:MAX_LINES]])
        number = "Also" if len(rows) <= MAX_LINES else f"All {len(rows)} are"
        yield from ("", f"{number} in [{file}]({file}).", "")


def _split_table(splits: Sequence[str], findings: Findings) -> Iterator[str]:
    header = [
        "split",
        "clips",
        "hours",
        "seconds: least, median, most",
        "sizes",
        "frames/s",
        "with sound",
        "with caption",
        "unlabelled",
    ]
    yield from table(header, [_split_row(split, findings.statistics[split]) for split in splits])


def _split_row(split: str, statistics: Mapping[str, Any]) -> list[Any]:
    seconds, n = statistics["seconds"], statistics["num_clips"]
    return [
        split,
        n,
        f"{statistics['hours']:.3g}",
        ", ".join(f"{seconds[key]:.2f}" for key in ("least", "median", "most")),
        _most_common(statistics["sizes"]),
        _most_common(statistics["rates"]),
        f"{statistics['audio'] / n:.0%}",
        f"{statistics['captions'] / n:.0%}",
        statistics["unlabelled"],
    ]


def _most_common(counts: Mapping[str, int]) -> str:
    texts = [f"{value} ({count})" for value, count in list(counts.items())[:3]]
    return ", ".join(texts) + (f" and {len(counts) - 3} others" if len(counts) > 3 else "")


# -- pairs


def _pairs(pairs: Sequence[Pair]) -> Iterator[str]:
    across = [pair for pair in pairs if pair.is_across]
    within = [pair for pair in pairs if not pair.is_across]
    counts = count_pairs(pairs)
    yield from (f"## Across splits: {summary(counts['across_splits'])}", "")
    if across:
        yield from (
            "What is in two splits inflates the accuracy. To let a run split anew, give clips that "
            "belong together one value in the column `group` and leave out the column `split`.",
            "",
        )
    yield from _pair_table(across)
    yield from (f"## Within one split: {summary(counts['within_one_split'])}", "")
    if within:
        yield from ("What is in one split twice counts twice.", "")
    yield from _pair_table(within)


def _pair_table(pairs: Sequence[Pair]) -> Iterator[str]:
    rows = [
        [
            f"{pair.kind}{', contradictory labels' if pair.is_contradictory else ''}",
            *(
                f"{clip}{f' ({clip.label})' if clip.label else ''}"
                for clip in (pair.one, pair.other)
            ),
            pair.detail,
            remedy(pair),
        ]
        for pair in pairs[:MAX_LINES]
    ]
    yield from _limited(
        ["finding", "one", "other", "detail", "what to do"],
        [*rows, *pairs[MAX_LINES:]],  # only the number of the others matters
        PAIRS,
    )


# -- problems of files, and of the settings


def count_kinds(problems: Sequence[ClipProblem]) -> str:
    """Returns '3 (2 rate, 1 size)' of problems."""
    counts = Counter(problem.kind for problem in problems).most_common()
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts)
    return f"{len(problems)} ({kinds})" if kinds else "0"


def _problems(findings: Findings) -> Iterator[str]:
    yield from (f"## Files and clips that do not fit: {count_kinds(findings.misfits)}", "")
    yield from (f"- {note}." for note in findings.notes)
    if findings.notes:
        yield ""
    yield from _limited(["split", "clip", "kind", "finding"], findings.misfits, PROBLEMS)


# -- classes


def _classes(
    splits: Sequence[str], statistics: Mapping[str, Mapping[str, Any]], workdir: Path
) -> Iterator[str]:
    counts = {split: statistics[split]["class_counts"] for split in splits}
    classes = sorted({name for split in splits for name in counts[split]})
    if not classes:
        return
    yield from ("## Classes", "")
    fewest = sorted(classes, key=lambda name: sum(counts[s].get(name, 0) for s in splits))
    shown = sorted(fewest[:_MAX_BARS])
    title = "clips of each class" if shown == classes else f"the {len(shown)} rarest classes"
    plots.bars(
        {split: [counts[split].get(name, 0) for name in shown] for split in splits},
        shown,
        workdir / "report" / "classes.png",
        title,
    )
    yield from ("![classes](report/classes.png)", "")
    missing = [f"{name} in {split}" for split in splits for name in statistics[split]["missing"]]
    if missing:
        more = f" and {len(missing) - MAX_LINES} others" if len(missing) > MAX_LINES else ""
        yield from ("No clip of " + ", ".join(missing[:MAX_LINES]) + more + ".", "")
    for split in splits:
        yield from _few_clips(split, statistics[split], len(classes))


def _few_clips(split: str, statistics: Mapping[str, Any], num_classes: int) -> Iterator[str]:
    few = sorted(statistics["few_clips"].items(), key=lambda item: item[1])
    if not few:
        return
    yield from (
        f"In `{split}`, {len(few)} of {num_classes} classes have too few clips to measure: the 95 "
        f"% interval of their recall is wider than ±{MAX_HALF_WIDTH:.0%}. Add clips, or report the "
        "interval.",
        "",
    )
    rows = [[name, count, interval(count)] for name, count in few[:MAX_LINES]]
    yield from table(["class", "clips", "recall if half of them are right"], rows)
    if len(few) > MAX_LINES:
        yield from ("", f"All {len(few)} are in [results.json](results.json).")
    yield ""


def is_measurable(count: int) -> bool:
    """Whether the recall of a class of `count` clips has a narrow interval."""
    low, high = wilson_interval(count // 2, count)
    return (high - low) / 2 <= MAX_HALF_WIDTH


def interval(count: int) -> str:
    """Returns the 95 % interval of half of `count` clips, as 'low to high'."""
    low, high = wilson_interval(count // 2, count)
    return f"{count // 2} of {count}: {low:.0%} to {high:.0%}"
