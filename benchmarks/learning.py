"""Learning curves side by side: the return of each seed, and an interval over seeds.

    python -m benchmarks.learning --after 8000 device=cartpole-seeds host=gymnasium-cartpole-seeds

Each group is NAME=PREFIX: the files `results/learning/PREFIX*.jsonl`, each of them the
`metrics.jsonl` of a run of one or more seeds. Of every seed the episodes that ended after a step
are averaged; of a group, the mean over seeds and its bootstrap interval are given, and whether the
intervals of all groups overlap.
"""

import collections
import json
from pathlib import Path

import numpy as np

from benchmarks.lines import emit, in_words, parser_of
from jaxwm.evaluate.stats import bootstrap

FOLDER = Path(__file__).parent / "results" / "learning"


def returns(file: Path, after: int) -> list[float]:
    """Mean return of the episodes of each of a run's seeds that ended after a step."""
    sums: dict[int, float] = collections.defaultdict(float)
    counts: dict[int, float] = collections.defaultdict(float)
    for text in file.read_text("utf-8").splitlines():
        line = json.loads(text)
        if line["step"] > after and line.get("episode/count"):
            sums[line["seed"]] += line["episode/return"] * line["episode/count"]
            counts[line["seed"]] += line["episode/count"]
    return [round(sums[seed] / counts[seed], 1) for seed in sorted(sums)]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("groups", nargs="+", metavar="NAME=PREFIX")
    parser.add_argument("--after", type=int, default=0, help="count episodes from this step on")
    args = parser.parse_args()
    lines, intervals = [], []
    for group in args.groups:
        name, equals, prefix = group.partition("=")
        if not equals:
            parser.error(f"{group} is no NAME=PREFIX")
        files = sorted(FOLDER.glob(f"{prefix}*.jsonl"))
        if not files:
            parser.error(f"there is no file {FOLDER}/{prefix}*.jsonl")
        seeds = {file.stem: returns(file, args.after) for file in files}
        values = np.array([value for row in seeds.values() for value in row])
        if not values.size:
            parser.error(f"no episode of {prefix} ended after step {args.after:,}")
        interval = bootstrap(values) if len(values) > 1 else (values[0], values[0])
        intervals.append(interval)
        lines.append(
            {
                "group": name,
                "after": args.after,
                "returns": seeds,
                "mean": round(float(values.mean()), 1),
                "interval": [round(float(end), 1) for end in interval],
            }
        )
    overlap = bool(max(low for low, _ in intervals) <= min(high for _, high in intervals))
    lines.append({"intervals_overlap": overlap})
    for line in lines:
        emit(line, args.out)


if __name__ == "__main__":
    in_words(main)
