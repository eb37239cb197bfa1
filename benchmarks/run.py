"""From flags to a finished run: the model, the peaks, every engine, then the tables and files."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import boxed_tables, hardware_csv, plots, throughput_tables
from benchmarks.cases import SAMPLINGS, Case
from benchmarks.csv_file import write_csv
from benchmarks.environment import describe, gpu_state, visible_gpu
from benchmarks.op_table import op_tables
from benchmarks.peaks import Peaks, known_peaks, override
from benchmarks.progress import block_events, progress_events
from benchmarks.record import Record
from benchmarks.session import Session, Suite
from benchmarks.startup import measure_startup
from benchmarks.target import Target
from benchmarks.text_table import number
from benchmarks.worker_client import ROOT, EngineFailed, WorkerDied, with_repository_path
from llama3.device import resolve_device
from llama3.errors import ConfigError, RequestError

PEAKS_TIMEOUT = 300.0
CHECKPOINTS = ROOT / "build" / "benchmark_models"  # random checkpoints for start-up, written once
# Folders of a config.json alone, always the same ones: vLLM finds what it compiled before by the folder's path.
CONFIGS = ROOT / "build" / "benchmark_configs"


class NothingMeasured(RuntimeError):
    """Every engine failed in all that it was asked for; the reasons have been printed."""


def execute(args: argparse.Namespace) -> list[Record]:
    """Carry out what `benchmark_model.parse_args` read. Raises UserError before anything is measured, where it can,
    and NothingMeasured at the end."""
    hardware = hardware_csv.read_hardware_csv(args.hardware_csv) if args.hardware_csv else []
    target = _target(args)
    target.check(tuple(case for chosen in args.suites for case in chosen.cases))
    session = _session(args, target)
    if args.log_folder is not None:
        args.log_folder.mkdir(parents=True, exist_ok=True)
    if args.startup:
        _startup(args, session)
    elif args.profile:
        _profile(args, session)
    else:
        if not args.is_single:
            print(f"peaks: {session.suites[0].record.peaks.source}")
            for suite in session.suites:
                print(f"{throughput_tables.floors_table(suite.record, suite.cases)}\n")
        session.run()
    for suite in session.suites:
        _report(args, suite, hardware)
    for chosen, suite in zip(args.suites, session.suites, strict=True):
        if (path := _path(args.csv, chosen.name)) is not None:
            write_csv(suite.record, path)
        if (path := _path(args.plot, chosen.name)) is not None:
            _draw(suite.record, path)
    if not session.succeeded:
        raise NothingMeasured
    return [suite.record for suite in session.suites]


def _target(args: argparse.Namespace) -> Target:
    if args.shape:
        return Target.from_shape(args.shape, args.dtype, CONFIGS / args.shape)
    return Target.from_model(args.model_name, args.dtype)


def _suites(args: argparse.Namespace, target: Target, device: torch.device) -> list[Suite]:
    """A record for each suite asked for, new or continued."""
    on_gpu = device.type == "cuda"
    environment = describe(on_gpu)
    settings = {"seed": args.random_seed, "repeats": args.repeats, "time_budget": args.time_budget}
    settings |= {"device": args.device, "kernels": args.kernels, "gpu_before": gpu_state() if on_gpu else {}}
    peaks: Peaks | None = None
    suites = []
    for chosen in args.suites:
        path = _path(args.json, chosen.name)
        if args.append and path is not None and path.exists():
            record = _earlier_record(path, target, environment)
            given = override(record.peaks, args.matrix_peak, args.read_bandwidth)
            if replace(given, source=record.peaks.source) != record.peaks:
                raise ConfigError(f"{path} was begun with other peaks: choose another --json file")
        else:
            peaks = peaks or _peaks(args, environment["device"])
            record = Record(
                model=target.name,
                suite=chosen.name,
                config=target.config,
                dtype=target.dtype,
                random_weights=target.random_weights,
                peaks=peaks,
                environment=environment,
                settings=settings,
            )
        suites.append(Suite(record, chosen.cases, chosen.samplings, path))
    return suites


def _path(path: Path | None, suite: str) -> Path | None:
    """The path for one suite: a flag that is given once names the files of several by a part "{suite}"."""
    return None if path is None else Path(str(path).replace("{suite}", suite))


def _earlier_record(path: Path, target: Target, environment: dict[str, Any]) -> Record:
    """The record in `path`, if what is about to be measured may stand beside it."""
    record = Record.load(path)
    if (record.model, record.config, record.dtype) != (target.name, target.config, target.dtype):
        raise ConfigError(f"{path} holds {record.model} in {record.dtype}, not {target.name} in {target.dtype}")
    for key in ("device", "gpu_id"):
        if record.environment.get(key) != environment.get(key):
            raise ConfigError(f"{path} was measured on another GPU: choose another --json file")
    return record


def _peaks(args: argparse.Namespace, device_name: str) -> Peaks:
    found = known_peaks(device_name)
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


def _session(args: argparse.Namespace, target: Target) -> Session:
    device = resolve_device(args.device)
    if device.index:
        raise RequestError(
            f"--device {device}: other engines, and what is said of the GPU, go by the first one that is visible: "
            f"run with CUDA_VISIBLE_DEVICES={visible_gpu(device.index)} and --device cuda"
        )
    return Session(
        target=target,
        modes=args.modes,
        suites=_suites(args, target, device),
        repeats=args.repeats,
        seed=args.random_seed,
        device=str(device),
        kernels=args.kernels,
        timeout=args.timeout,
        time_budget=args.time_budget,
        log_folder=args.log_folder,
        options={"ours": args.ours_options, "vllm": args.vllm_options, "hf": args.hf_options},
        longest=args.longest,
        events=block_events(target.name, device.type) if args.is_single else progress_events(),
    )


def _startup(args: argparse.Namespace, session: Session) -> None:
    """Process start to first token for every engine, from a checkpoint on disk."""
    suite = session.suites[0]
    record = suite.record
    folder = CHECKPOINTS / f"{session.target.name}-{str(record.dtype).removeprefix('torch.')}"
    session.target = session.target.with_weights(folder)
    session.note_memory()  # writing the weights may have left a context of this process's own on the GPU
    for mode in session.modes:
        found = measure_startup(session.starter(mode), session.load_spec(mode), args.repeats, args.random_seed)
        record.add_startup(mode.name, found)
        if "error" in found:
            print(f"{mode.name}: failed: {found['error']}")
        else:
            session.succeeded = True
            print(f"{mode.name}: first token {number(found['median'], 2)} s after process start")
        suite.save()


def _profile(args: argparse.Namespace, session: Session) -> None:
    """A trace and the time per op of every case, on this engine."""
    suite, trace = session.suites[0], Path(args.profile)
    record, sampling = suite.record, suite.samplings[0]
    trace.parent.mkdir(parents=True, exist_ok=True)
    for mode in session.modes:
        try:
            with session.start_worker(mode) as worker:
                worker.load(session.load_spec(mode))
                for index, case in enumerate(suite.cases):
                    path = trace if index == 0 else trace.with_name(f"{index + 1}-{trace.name}")
                    try:
                        worker.prepare(case)
                        tables = worker.profile(case, sampling, f"{args.random_seed}/profile {case}", path)
                    except EngineFailed as error:
                        print(f"\n{mode.name}: {case} failed: {error}")
                        continue
                    session.succeeded = True
                    record.add_profile({"engine": mode.name, "sampling": sampling.name, **tables})
                    suite.save()
                    print(f"\ntrace: {path}\n{op_tables(tables, record.config, record.dtype, record.peaks)}")
        except (EngineFailed, WorkerDied) as error:
            print(f"\n{mode.name}: failed: {error}")


def _report(args: argparse.Namespace, suite: Suite, hardware: list[dict[Case, boxed_tables.Column]]) -> None:
    record = suite.record
    if not args.is_single and record.measurements:
        if record.suite == "profile":
            for sampling in record.samplings():
                print(f"\n{SAMPLINGS[sampling].title}\n{boxed_tables.profile_boxes(record, sampling, hardware)}")
        else:
            print(f"\n{throughput_tables.throughput_tables(record)}")
        print(f"\n{throughput_tables.figures_table(record)}")
    if record.startup:
        print(f"\n{throughput_tables.startup_table(record)}")
    for note in record.notes + record.gaps():
        print(f"note: {note}")
    suite.save()


def _draw(record: Record, path: Path) -> None:
    """One plot for each way of sampling."""
    for index, sampling in enumerate(record.samplings()):
        plots.draw(plots.plot_data(record, sampling), path if index == 0 else path.with_stem(f"{path.stem}-{sampling}"))
