"""From flags to a finished run: the model, the peaks, every engine, then the tables and files."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import boxed_tables, hardware_csv, plots, throughput_tables
from benchmarks.cases import SAMPLINGS, Case
from benchmarks.csv_file import write_csv
from benchmarks.environment import describe, device_name, gpu_state
from benchmarks.op_table import op_tables
from benchmarks.peaks import Peaks, known_peaks, override
from benchmarks.progress import block_events, progress_events
from benchmarks.record import Record
from benchmarks.session import Session
from benchmarks.startup import measure_startup
from benchmarks.target import Target
from benchmarks.text_table import number
from benchmarks.worker_client import ROOT, EngineFailed, WorkerDied, with_repository_path
from llama3.device import resolve_device
from llama3.errors import ConfigError

PEAKS_TIMEOUT = 300.0
CHECKPOINTS = ROOT / "build" / "benchmark_models"  # random checkpoints for start-up, written once


def execute(args: argparse.Namespace) -> Record:
    """Carry out what `benchmark_model.parse_args` read. Raises UserError before anything is measured, where it can."""
    hardware = hardware_csv.read_hardware_csv(args.hardware_csv) if args.hardware_csv else []
    with tempfile.TemporaryDirectory() as scratch:
        target = _target(args, Path(scratch))
        target.check(args.cases)
        session = _session(args, target, _record(args, target))
        if args.log_folder is not None:
            args.log_folder.mkdir(parents=True, exist_ok=True)
        if args.startup:
            _startup(args, session)
        elif args.profile:
            _profile(args, session)
        else:
            if not args.is_single:
                floors = throughput_tables.floors_table(session.record, args.cases)
                print(f"peaks: {session.record.peaks.source}\n{floors}\n")
            session.run()
    _report(args, session.record, hardware)
    return session.record


def _target(args: argparse.Namespace, scratch: Path) -> Target:
    if args.shape:
        return Target.from_shape(args.shape, args.dtype, scratch / args.shape)
    return Target.from_model(args.model_name, args.dtype)


def _record(args: argparse.Namespace, target: Target) -> Record:
    environment = describe()
    if args.append and args.json.exists():
        return _earlier_record(args.json, target, environment)
    settings = {"seed": args.random_seed, "repeats": args.repeats, "time_budget": args.time_budget}
    settings |= {"device": args.device, "kernels": args.kernels, "gpu_before": gpu_state()}
    return Record(
        model=target.name,
        suite=args.suite or ("single" if args.is_single else "scenarios"),
        config=target.config,
        dtype=target.dtype,
        random_weights=target.random_weights,
        peaks=_peaks(args),
        environment=environment,
        settings=settings,
    )


def _earlier_record(path: Path, target: Target, environment: dict[str, Any]) -> Record:
    """The record in `path`, if what is about to be measured may stand beside it."""
    record = Record.load(path)
    if (record.model, record.config, record.dtype) != (target.name, target.config, target.dtype):
        raise ConfigError(f"{path} holds {record.model} in {record.dtype}, not {target.name} in {target.dtype}")
    for key in ("device", "gpu_id"):
        if record.environment.get(key) != environment.get(key):
            raise ConfigError(f"{path} was measured on another GPU: choose another --json file")
    return record


def _peaks(args: argparse.Namespace) -> Peaks:
    found = known_peaks("CPU" if args.device == "cpu" else device_name())
    if args.measure_peaks:
        # In a process of its own, so that its memory is free again.
        command = [sys.executable, "-m", "benchmarks.peaks", args.device]
        environment = with_repository_path(os.environ)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=PEAKS_TIMEOUT, check=True
            )
            found = Peaks(**json.loads(done.stdout.splitlines()[-1]))
        except (subprocess.SubprocessError, ValueError, IndexError) as error:
            print(f"the peaks could not be measured, going on with those {found.source}: {error}", file=sys.stderr)
    return override(found, args.matrix_peak, args.read_bandwidth)


def _session(args: argparse.Namespace, target: Target, record: Record) -> Session:
    device = resolve_device(args.device)
    return Session(
        target=target,
        modes=args.modes,
        cases=args.cases,
        samplings=args.sampling_list,
        record=record,
        repeats=args.repeats,
        seed=args.random_seed,
        device=str(device),
        kernels=args.kernels,
        timeout=args.timeout,
        time_budget=args.time_budget,
        json_path=args.json,
        log_folder=args.log_folder,
        options={"ours": args.ours_options, "vllm": args.vllm_options, "hf": args.hf_options},
        events=block_events(target.name, device.type) if args.is_single else progress_events(),
    )


def _startup(args: argparse.Namespace, session: Session) -> None:
    """Process start to first token for every engine, from a checkpoint on disk."""
    record = session.record
    folder = CHECKPOINTS / f"{session.target.name}-{str(record.dtype).removeprefix('torch.')}"
    session.target = session.target.with_weights(folder)
    session.note_memory()  # writing the weights may have left a context of this process's own on the GPU
    for mode in session.modes:
        found = measure_startup(session.starter(mode), session.load_spec(mode), args.repeats, args.random_seed)
        record.startup[mode.name] = found
        print(
            f"{mode.name}: first token {number(found.get('median'), 2)} s after process start{found.get('error', '')}"
        )
        if args.json:
            record.save(args.json)


def _profile(args: argparse.Namespace, session: Session) -> None:
    """A trace and the time per op of every case, on this engine."""
    sampling, trace = args.sampling_list[0], Path(args.profile)
    trace.parent.mkdir(parents=True, exist_ok=True)
    record = session.record
    for mode in session.modes:
        try:
            with session.start_worker(mode) as worker:
                worker.load(session.load_spec(mode))
                for index, case in enumerate(args.cases):
                    path = trace if index == 0 else trace.with_name(f"{index + 1}-{trace.name}")
                    worker.prepare(case)
                    tables = worker.profile(case, sampling, f"{args.random_seed}/profile {case}", path)
                    record.profiles.append({"engine": mode.name, "sampling": sampling.name, **tables})
                    print(f"\ntrace: {path}\n{op_tables(tables, record.config, record.dtype, record.peaks)}")
        except (EngineFailed, WorkerDied) as error:
            record.notes.append(f"--profile of {mode.name} failed: {error}")


def _report(args: argparse.Namespace, record: Record, hardware: list[dict[Case, boxed_tables.Column]]) -> None:
    if not args.is_single and record.measurements:
        if record.suite == "profile":
            for name in record.samplings():
                print(f"\n{SAMPLINGS[name].title}\n{boxed_tables.profile_boxes(record, name, hardware)}")
        else:
            print(f"\n{throughput_tables.throughput_tables(record)}")
        print(f"\n{throughput_tables.figures_table(record)}")
    if record.startup:
        print(f"\n{throughput_tables.startup_table(record)}")
    for note in record.notes:
        print(f"note: {note}")
    if args.json:
        record.save(args.json)
    if args.csv:
        write_csv(record, args.csv)
    if args.plot and record.measurements:
        for index, name in enumerate(record.samplings()):
            path = args.plot if index == 0 else args.plot.with_stem(f"{args.plot.stem}-{name}")
            plots.draw(plots.plot_data(record, name), path)
