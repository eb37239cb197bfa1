"""Worker processes and the run around them, with an engine that fails on request."""

import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks import environment, worker_client
from benchmarks import record as record_module
from benchmarks.budget import ITEM_SECONDS, Item, TimeBudget
from benchmarks.cases import SAMPLINGS, Case
from benchmarks.engines import MODES, EngineMode, LoadSpec
from benchmarks.measure import Plan, measure_case, warm_up
from benchmarks.protocol import fresh_prompts
from benchmarks.record import Record
from benchmarks.session import Session, Suite
from benchmarks.startup import measure_startup
from benchmarks.target import Target
from benchmarks.worker import Worker
from benchmarks.worker_client import EngineFailed, WorkerClient, WorkerDied
from tests.benchmark_records import make_record

FAKE = EngineMode("fake", "Fake", "ours", "tests.fake_engine:FakeEngine")
GREEDY, MISSION = SAMPLINGS["greedy"], SAMPLINGS["mission"]
CASE = Case(2, 8, 16)
SMALL, LARGE = Case(1, 4, 8), Case(2, 4, 8)


class InProcessClient(WorkerClient):
    """A client whose worker needs no process: for tests of what happens around it."""

    def __init__(self, mode):
        self.mode, self._worker, self.started_at = mode, Worker(mode.target), time.perf_counter()

    def _ask(self, message, expected):
        try:
            return json.loads(json.dumps(self._worker.answer(json.loads(json.dumps(message)))))
        except Exception as error:
            raise EngineFailed(f"{type(error).__name__}: {error}") from error

    def close(self):
        self._worker.close()

    def _kill_group(self):
        pass


@pytest.fixture
def spec(tmp_path) -> LoadSpec:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 50}))
    return LoadSpec("fake model", str(tmp_path), True, max_model_len=64)


def test_a_worker_answers_each_command(spec, tmp_path):
    with WorkerClient(FAKE, timeout=60, log=tmp_path / "log") as worker:
        ready = worker.load(spec)
        assert ready["details"]["loaded"] == "fake model" and ready["seconds"] > 0 and ready["full_warmup"] is False
        assert worker.prepare(CASE)["details"]["prepared"] == "2 x 8/16"
        assert 0 < worker.run(CASE, 16, GREEDY, "seed") < 1
        assert worker.memory() == (123, "made up")
        tables = worker.profile(CASE, GREEDY, "seed", tmp_path / "trace.json")
        assert tables == {"prompts": fresh_prompts(CASE, 50, "seed"), "trace_path": str(tmp_path / "trace.json")}
    assert "a line on stdout that is no answer" in (tmp_path / "log").read_text()


def test_an_error_is_an_answer_and_the_worker_lives(spec, tmp_path):
    with WorkerClient(FAKE, timeout=60, log=tmp_path / "log") as worker:
        worker.load(replace(spec, options={"fail_batch": 2, "short": 1}))
        with pytest.raises(EngineFailed, match=r"^MemoryError: out of memory$"):
            worker.run(CASE, 16, GREEDY, "a")
        with pytest.raises(EngineFailed, match="WrongTokenCount: 47 tokens were generated, not 3 x 16"):
            worker.run(Case(3, 8, 16), 16, GREEDY, "b")
    assert "Traceback" in (tmp_path / "log").read_text()


def test_a_worker_that_ends_or_hangs_is_given_up(spec):
    with WorkerClient(FAKE, timeout=60) as worker:
        worker.load(replace(spec, options={"die_batch": 2}))
        with pytest.raises(WorkerDied, match=r"fake: the worker ended \(exit code 7\)"):
            worker.run(CASE, 16, GREEDY, "a")
    with WorkerClient(FAKE, timeout=60) as worker:
        worker.load(replace(spec, options={"hang_batch": 2}))
        worker._timeout = 0.2
        with pytest.raises(WorkerDied, match=r"no answer within 0\.2 s"):
            worker.run(CASE, 16, GREEDY, "a")


def test_an_engine_that_is_not_installed_says_so(spec):
    worker = InProcessClient(replace(FAKE, target="no_such_engine:Engine"))
    with pytest.raises(EngineFailed, match="ModuleNotFoundError: No module named 'no_such_engine'"):
        worker.load(spec)


def test_interrupting_does_not_wait_for_the_engine(spec):
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), WorkerClient(FAKE, timeout=60):
        raise KeyboardInterrupt
    assert time.monotonic() - start < worker_client.QUIT_SECONDS / 2


def test_prompts_are_fresh_and_the_same_for_every_engine():
    one = fresh_prompts(Case(3, 5, 1), 100, "0/a")
    assert [len(prompt) for prompt in one] == [5, 5, 5] and all(0 <= t < 100 for prompt in one for t in prompt)
    assert one == fresh_prompts(Case(3, 5, 1), 100, "0/a") != fresh_prompts(Case(3, 5, 1), 100, "0/b")
    assert max(t for prompt in fresh_prompts(Case(8, 500, 1), 128256, "x") for t in prompt) < 128000


def unlimited() -> TimeBudget:
    return TimeBudget(None, {"x": Item("e", 0.0, 1.0)}, {"e": 1.0}, {}, 3)


class Runner:
    """Records what is asked of it; a run takes 1 s a token on a clock of its own."""

    def __init__(self):
        self.now, self.runs = 0.0, []

    def run(self, case, output_len, sampling, prompt_seed):
        self.runs.append((output_len, prompt_seed))
        self.now += output_len
        return float(output_len)


def test_a_case_is_measured_by_turns_on_prompts_never_seen_before():
    runner = Runner()
    plan = Plan(repeats=3, seed=7, full_warmup=False)
    allowance = unlimited().begin("x")
    warm_up(runner, Case(1, 8, 100), GREEDY, plan)
    assert [length for length, _ in runner.runs] == [32, 1]
    timing = measure_case(runner, Case(1, 8, 100), GREEDY, plan, allowance)
    assert timing.total == (100.0,) * 3 and timing.one_token == (1.0,) * 3
    assert [length for length, _ in runner.runs[2:]] == [1, 100] * 3
    measure_case(runner, Case(1, 8, 100), MISSION, plan, allowance)
    seeds = [seed for _, seed in runner.runs]
    assert len(set(seeds)) == len(seeds)


def test_a_case_of_one_token_is_its_own_prefill_and_a_full_warm_up_is_full():
    runner = Runner()
    allowance = unlimited().begin("x")
    timing = measure_case(runner, Case(1, 8, 1), GREEDY, Plan(3, 0, False), allowance)
    assert timing.total == timing.one_token == (1.0,) * 3 and len(runner.runs) == 3
    warm_up(runner, Case(1, 8, 100), GREEDY, Plan(3, 0, full_warmup=True))
    assert [length for length, _ in runner.runs[3:]] == [100, 1]


def test_a_time_budget_drops_repetitions_of_the_longest_cases_and_never_a_case():
    runner = Runner()
    costs = {"long": 40.0, "short": 4.0, "middle": 10.0}
    items = {key: Item("e", 0.0, cost) for key, cost in costs.items()}
    # Once each is 54 s and 1 s around them; 25 s more are two of the short and one of the middle.
    budget = TimeBudget(80.0, items, {"e": 9.0}, {"e": 5.0}, 3, clock=lambda: runner.now)
    budget.loaded("e")

    def repetitions(key: str, seconds: int) -> int:
        runner.now += ITEM_SECONDS if key != "long" else 0.0
        return len(measure_case(runner, Case(1, 1, seconds - 1), GREEDY, Plan(3, 0, False), budget.begin(key)).total)

    assert [repetitions("long", 40), repetitions("short", 4), repetitions("middle", 10)] == [1, 3, 2]
    assert runner.now <= 80.0
    late = TimeBudget(0.0, items, {"e": 1.0}, {}, 3, clock=lambda: runner.now)
    assert len(measure_case(runner, Case(1, 1, 3), GREEDY, Plan(3, 0, False), late.begin("short")).total) == 1


def test_a_time_budget_sets_aside_what_other_engines_need():
    items = {"a": Item("one", 0.0, 10.0), "b": Item("two", 5.0, 10.0)}

    def budget(seconds: float) -> TimeBudget:
        return TimeBudget(seconds, items, {"one": 1.0, "two": 2.0}, {"two": 40.0}, 3, clock=lambda: 0.0)

    # The first took three times what was expected, so the second is expected to: its set-up and two repetitions take
    # 6 s a unit, its start 40 s.
    needed = 30.0 + 40.0 + (5.0 + 2 * 10.0) * 6.0 + ITEM_SECONDS
    assert budget(needed).begin("a").another(30.0) and not budget(needed - 1.0).begin("a").another(30.0)
    # Once it is known what the second one takes, that counts.
    known = budget(100.0)
    known.loaded("two")
    assert known.begin("b").another(1.0) and known.begin("a").another(90.0)


@pytest.fixture
def make_session(tmp_path, monkeypatch):
    """Makes a session of fake engines, given the options of each by name."""

    def make(options: dict[str, dict], **changes) -> Session:
        modes = [replace(FAKE, name=name, options=values) for name, values in options.items()]
        monkeypatch.setattr(record_module, "MODES", {mode.name: mode for mode in modes})
        target = Target.from_shape("tiny", "auto", tmp_path / "shape")
        record = replace(make_record({}, shape="tiny"), suite="scenarios")
        suite = Suite(record, (SMALL, LARGE), (GREEDY,), tmp_path / "r.json")
        return Session(target, modes, [suite], timeout=60, **changes)

    return make


def test_failures_stay_alone_and_every_case_is_written_at_once(make_session, tmp_path):
    session = make_session({"one": {"fail_batch": 1}, "dead": {"die_batch": 1}})
    on_disk = []

    def measured(mode, measurement):
        path = tmp_path / "r.json"
        on_disk.append(len(json.loads(path.read_text())["measurements"]) if path.exists() else 0)

    session.events.measured = measured
    (record,) = session.run()
    assert on_disk == [0, 1, 2, 3]  # each case finds those before it
    found = {m.key[:2]: m.error for m in record.measurements}
    assert found["one", SMALL] == "MemoryError: out of memory" and found["one", LARGE] is None
    assert "exit code 7" in found["dead", SMALL] and found["dead", LARGE] is None
    loaded = Record.load(tmp_path / "r.json")
    assert loaded.measurements == record.measurements and loaded.engines["dead"]["version"] == "1.0"
    good = loaded.find("dead", LARGE, "greedy")
    assert good.peak_memory == (123, "made up") and len(good.timing.total) == 3 and good.metrics.throughput > 0
    assert loaded.best("ours", LARGE, "greedy") is not None and loaded.best("ours", SMALL, "greedy") is None


def test_what_is_interrupted_leaves_the_figures_that_there_are(make_session, monkeypatch):
    monkeypatch.setattr(Session, "start_worker", lambda self, mode: InProcessClient(mode))
    (record,) = make_session({"one": {}}).run()
    before = list(record.measurements)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(InProcessClient, "run", interrupt)
    session = make_session({"one": {}})
    session.suites[0].record.measurements = list(before)
    with pytest.raises(KeyboardInterrupt):
        session.run()
    assert len(before) == 2 and session.suites[0].record.measurements == before


def test_an_engine_that_does_not_start_fails_in_every_case_and_the_next_one_runs(make_session, monkeypatch):
    monkeypatch.setattr(Session, "start_worker", lambda self, mode: InProcessClient(mode))
    (record,) = make_session({"refused": {"refuse": True}, "good": {}}).run()
    errors = [m.error for m in record.measurements]
    assert errors == ["the engine did not start: RuntimeError: no such\nluck"] * 2 + [None] * 2


def test_a_run_out_of_time_says_what_it_dropped(make_session, monkeypatch):
    monkeypatch.setattr(Session, "start_worker", lambda self, mode: InProcessClient(mode))
    session, said = make_session({"slow": {}}, time_budget=0.0), []
    session.events.note = said.append
    (record,) = session.run()
    assert said == [
        "time budget: slow ran 1 x 4/8 (greedy) 1 of 3 times",
        "time budget: slow ran 2 x 4/8 (greedy) 1 of 3 times",
    ]
    assert record.notes == ["time budget (slow): repetitions of long cases were dropped, and the figures say which"]
    assert all(m.metrics for m in record.measurements)


def test_suites_share_one_start_and_an_engine_may_be_spared_the_long_cases(make_session, monkeypatch, tmp_path):
    monkeypatch.setattr(Session, "start_worker", lambda self, mode: starts.append(mode.name) or InProcessClient(mode))
    starts: list[str] = []
    session = make_session({"one": {}, "two": {}}, longest={"two": 8}, repeats=1)
    long = Suite(
        replace(make_record({}, shape="tiny"), suite="scenarios", measurements=[], notes=[]), (CASE,), (MISSION,)
    )
    session.suites.append(long)
    first, second = session.run()
    assert starts == ["one", "two"]
    assert [m.key for m in second.measurements] == [("one", CASE, "mission")] and second.notes == []
    assert {m.engine for m in first.measurements} == set(first.engines) == {"one", "two"}
    assert set(second.engines) == {"one"}


def test_the_next_engine_waits_until_the_last_one_has_given_its_memory_back(monkeypatch):
    used = iter([9000, 5000, 1000])
    monkeypatch.setattr(environment, "device_memory_used", lambda: (next(used), "used on the GPU"))
    monkeypatch.setattr(environment.time, "sleep", lambda seconds: None)
    environment.wait_for_memory(1500)
    assert next(used, None) is None
    monkeypatch.setattr(environment, "device_memory_used", lambda: (9000, "used on the GPU"))
    environment.wait_for_memory(1500, seconds=0.0)  # gives up


def test_startup_is_timed_from_before_the_process_exists(spec):
    found = measure_startup(lambda: InProcessClient(FAKE), spec, repeats=3, seed=0)
    assert len(found["seconds"]) == len(found["loads"]) == 3
    assert all(seconds > load > 0 for seconds, load in zip(found["seconds"], found["loads"], strict=True))
    assert min(found["seconds"]) <= found["median"] <= max(found["seconds"])
    failing = replace(spec, options={"refuse": True})
    assert "no such" in measure_startup(lambda: InProcessClient(FAKE), failing, 1, 0)["error"]


def test_the_vllm_engine_passes_on_what_a_fair_comparison_needs(spec, monkeypatch):
    class Llm:
        def __init__(self, **settings):
            self.settings = settings

        def generate(self, prompts, params, use_tqdm):
            calls.append((prompts, params, use_tqdm))
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * params["max_tokens"])]) for _ in prompts]

    calls = []
    fake = SimpleNamespace(__version__="9", LLM=Llm, SamplingParams=dict, TokensPrompt=dict)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.delitem(sys.modules, "benchmarks.engines.vllm", raising=False)
    for name, kind in (("vllm-default", "default"), ("vllm-inprocess", "in-process")):
        mode = MODES[name]
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", mode.environment["VLLM_ENABLE_V1_MULTIPROCESSING"])
        worker = InProcessClient(mode)
        details = worker.load(replace(spec, dtype="bfloat16", options={"max_num_seqs": 8}))["details"]
        assert (details["vllm"], details["mode"]) == ("9", kind)
        assert details["settings"] == {
            "max_model_len": 64, "gpu_memory_utilization": 0.9, "skip_tokenizer_init": True, "load_format": "dummy",
            "dtype": "bfloat16", "seed": 0, "max_num_seqs": 8,
        }  # fmt: skip
        worker.run(CASE, 16, MISSION, "a")
    prompts, params, use_tqdm = calls[-1]
    assert [prompt["prompt_token_ids"] for prompt in prompts] == fresh_prompts(CASE, 50, "a") and use_tqdm is False
    assert params == {"temperature": 0.6, "top_p": 0.9, "max_tokens": 16, "ignore_eos": True, "detokenize": False}
