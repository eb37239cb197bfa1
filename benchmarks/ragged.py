"""Jobs of many prompts, unequal in length and in what they are answered with: how well places are kept busy.

    python -m benchmarks.ragged --shape 8b --prompts 1000 --json results/ragged/h200.json

Three jobs over one model of random weights in the real shapes. "equal": all prompts and answers of one length, so that
all places become free at once. "ragged": as many tokens, of lengths that are drawn but known beforehand. "stopping":
the prompts of the second, answers that end by a stop token, which nobody knows before it is drawn. Tokens a second are
of generated tokens, prompts included in the time.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import SAMPLINGS
from benchmarks.engines.ours import sampling_params
from benchmarks.environment import describe
from benchmarks.json_file import write_json
from benchmarks.protocol import random_prompts
from benchmarks.text_table import markdown_table, number
from llama3 import LLM
from llama3.device import resolve_device
from llama3.errors import UserError
from llama3.loaded_model import LoadedModel
from llama3.shapes import shape_config

SPREAD = 0.6  # of the logarithm of an answer's length
LONGEST = 4  # times the median, at most; of answers that stop, times the mean


class Job(NamedTuple):
    """Token ids of each prompt, how many tokens answer it at most, and which token ids end an answer."""

    prompts: list[list[int]]
    lengths: list[int]
    stop_ids: list[int]


def jobs(num_prompts: int, input_len: int, output_len: int, vocab_size: int, seed: int) -> dict[str, Job]:
    """The three jobs by name, of as many prompts.

    Random weights draw any token as likely as another, so if one id in `output_len` ends an answer, it has about that
    many tokens.
    """
    rng = random.Random(seed)
    drawn = [min(rng.lognormvariate(0, SPREAD), LONGEST) for _ in range(num_prompts)]
    scale = output_len / statistics.fmean(drawn)
    ragged = [max(1, round(scale * length)) for length in drawn]
    inputs = [max(1, round(input_len * rng.uniform(0.5, 1.5))) for _ in range(num_prompts)]
    equal_prompts = random_prompts([input_len] * num_prompts, vocab_size, f"{seed}/equal")
    prompts = random_prompts(inputs, vocab_size, f"{seed}/ragged")
    return {
        "equal": Job(equal_prompts, [output_len] * num_prompts, []),
        "ragged": Job(prompts, ragged, []),
        "stopping": Job(prompts, [LONGEST * output_len] * num_prompts, list(range(0, vocab_size, output_len))),
    }


def measure(llm: LLM, job: Job) -> dict[str, float]:
    """One run of a job, at temperature 0.6 and top-p 0.9."""
    params = [sampling_params(SAMPLINGS["mission"], length, stop_token_ids=job.stop_ids) for length in job.lengths]
    start = time.perf_counter()
    outputs = llm.generate(job.prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"seconds": seconds, "tokens": tokens, "tok_s": tokens / seconds}


def run(options: argparse.Namespace) -> dict[str, Any]:
    config = shape_config(options.shape)
    loaded = LoadedModel.random(options.shape, config, resolve_device(options.device), seed=0)
    wanted = jobs(options.prompts, options.input_len, options.output_len, config.vocab_size, seed=0)
    rows = []
    for num_rows in options.rows:
        with LLM(loaded, max_num_seqs=num_rows) as llm:
            for name, job in wanted.items():
                measure(llm, job)  # meets every graph and kernel
                runs = [measure(llm, job) for _ in range(options.repeats)]
                row = {"shape": options.shape, "rows": num_rows, "prompts": options.prompts, "job": name}
                row |= {"input_len": options.input_len, "output_len": options.output_len}
                rows.append(row | {"runs": runs, "tok_s": statistics.median(r["tok_s"] for r in runs)})
                print(table(rows).splitlines()[-1], flush=True)
    return {**describe(), "rows": rows}


def table(rows: list[dict[str, Any]]) -> str:
    """A line a number of places: tokens a second of each job, and the others as a part of the first."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        lengths = f"{row['prompts']} x {row['input_len']}/{row['output_len']}"
        found.setdefault((row["shape"].upper(), lengths, str(row["rows"])), {})[row["job"]] = row["tok_s"]
    lines = []
    for key, rate in found.items():
        cells = [number(rate.get("equal"), 0)]
        for name in ("ragged", "stopping"):
            part = rate[name] / rate["equal"] if rate.keys() >= {name, "equal"} else None
            cells += [number(rate.get(name), 0), number(part, 3)]
        lines.append([*key, *cells])
    header = ["shape", "prompts x input/output", "places", "equal, tok/s", "ragged, tok/s", "part"]
    return markdown_table([*header, "stopping, tok/s", "part"], lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--input_len", type=int, default=100, help="mean (default: %(default)s)")
    parser.add_argument("--output_len", type=int, default=150, help="mean (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 64], help="places, one run each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args(arguments)
    try:
        results = run(options)
    except UserError as error:
        print(f"benchmarks.ragged: {error}", file=sys.stderr)
        return 2
    print(table(results["rows"]))
    if options.json:
        write_json(results, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
