"""Every figure of the benchmark against its definition, worked out by hand or by counting."""

import pytest
import torch

from benchmarks import peaks as peaks_module
from benchmarks.cases import Case
from benchmarks.metrics import Timing, compute_metrics, decode_bytes, floor_tokens_per_second, ratio
from benchmarks.peaks import Peaks, known_peaks, override
from llama3.shapes import shape_config

BF16 = torch.bfloat16
CONFIG_1B, CONFIG_8B = shape_config("1b"), shape_config("8b")
H200 = Peaks(787e12, 4.585e12, "given")


def metrics(case: Case, total: tuple[float, ...], one_token: tuple[float, ...], peaks: Peaks = H200):
    return compute_metrics(CONFIG_1B, BF16, case, Timing(total, one_token), peaks)


def test_times_and_rates_are_medians_of_the_repetitions():
    found = metrics(Case(4, 100, 11), total=(2.0, 1.1, 1.0), one_token=(0.3, 0.1, 0.1))
    assert found.duration == 1.1 and found.ttft == 0.1
    assert found.throughput == pytest.approx(4 * 11 / 1.1)
    assert (found.throughput_low, found.throughput_high) == (pytest.approx(22), pytest.approx(44))
    assert found.tpot_ms == pytest.approx((1.1 - 0.1) / 10 * 1000)
    assert found.decode_tok_s == pytest.approx(4 * 10 / 1.0)
    assert found.prefill_tok_s == pytest.approx(4 * 100 / 0.1)


def test_a_single_token_has_no_decode():
    found = metrics(Case(2, 100, 1), total=(0.5,), one_token=(0.5,))
    assert found.throughput == 4
    assert found.tpot_ms is found.decode_tok_s is found.decode_gb_s is found.decode_floor_tok_s is None


def test_noise_that_leaves_no_time_for_decode_gives_no_figure():
    found = metrics(Case(1, 100, 2), total=(0.5,), one_token=(0.6,))
    assert found.decode_seconds is None and found.decode_floor_fraction is None and found.throughput == 4


def test_missing_runs_are_an_error():
    with pytest.raises(ValueError, match="at least one whole run"):
        metrics(Case(1, 1, 2), total=(), one_token=(0.1,))


@pytest.mark.parametrize(("batch", "prompt", "output"), [(1, 128, 128), (3, 7, 5), (64, 1, 2), (2, 9, 1)])
@pytest.mark.parametrize("config", [CONFIG_1B, CONFIG_8B], ids=["1b", "8b"])
def test_decode_bytes_count_weights_and_contexts_step_by_step(config, batch, prompt, output):
    layer = 2 * config.hidden_size * config.num_heads * config.head_dim  # q and o
    layer += 2 * config.hidden_size * config.num_kv_heads * config.head_dim  # k and v
    layer += 3 * config.hidden_size * config.intermediate_size + 2 * config.hidden_size
    weights = config.num_layers * layer + config.hidden_size + config.vocab_size * config.hidden_size
    expected = 0
    cached = prompt
    for _ in range(output - 1):  # the first token comes out of prefill
        cached += 1  # the token that is fed
        expected += 2 * weights
        expected += batch * cached * config.num_layers * config.num_kv_heads * config.head_dim * 2 * 2
    assert decode_bytes(config, BF16, Case(batch, prompt, output)) == expected


@pytest.mark.parametrize(
    ("prompt", "output", "floor"), [(128, 128, 1850), (128, 2048, 1827), (2048, 128, 1804), (2048, 2048, 1782)]
)
def test_floors_of_the_1b_shape_on_an_h200(prompt, output, floor):
    assert floor_tokens_per_second(CONFIG_1B, BF16, Case(1, prompt, output), H200) == pytest.approx(floor, abs=1)


def test_gigabytes_a_second_and_the_fraction_of_the_floor_agree():
    found = metrics(Case(16, 2048, 128), total=(0.5,), one_token=(0.1,))
    moved = decode_bytes(CONFIG_1B, BF16, Case(16, 2048, 128))
    assert found.decode_gb_s == pytest.approx(moved / 0.4 / 1e9)
    assert found.decode_floor_fraction == pytest.approx(found.decode_gb_s / 4585)


def test_prefill_mfu_counts_model_flops():
    # Llama 3.1 8B: 6.98e9 projection parameters, 16 prompts of 2048, causal attention, the head once a prompt.
    tokens = 16 * 2048
    projections = 32 * (4096 * (4096 + 1024 + 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    attention = 16 * sum(4 * 32 * 128 * context * 32 for context in range(1, 2049))
    flops = 2 * projections * tokens + attention + 16 * 2 * 128256 * 4096
    case = Case(16, 2048, 128)
    found = compute_metrics(CONFIG_8B, BF16, case, Timing((2.0,), (0.777,)), H200)
    assert found.prefill_mfu == pytest.approx(flops / 0.777 / 787e12)
    assert found.prefill_mfu == pytest.approx(0.775, abs=0.005)


def test_without_peaks_there_are_no_fractions():
    found = metrics(Case(1, 10, 10), (1.0,), (0.1,), Peaks(None, None, "unknown"))
    assert found.prefill_mfu is found.decode_floor_tok_s is found.decode_floor_fraction is None
    assert found.decode_gb_s is not None


def test_ratio_is_to_the_best_of_theirs():
    assert ratio(30.0, [10.0, 15.0]) == 2.0
    assert ratio(None, [1.0]) is None and ratio(1.0, []) is None


def test_known_and_given_peaks():
    assert known_peaks("NVIDIA H200").matrix_flops == 787e12 and known_peaks("NVIDIA H200").read_bandwidth == 4.585e12
    assert known_peaks("CPU").read_bandwidth is None
    given = override(known_peaks("NVIDIA H200"), None, 4e12)
    assert (given.matrix_flops, given.read_bandwidth) == (787e12, 4e12) and "read given" in given.source
    assert override(H200, None, None) is H200


def test_measured_peaks_are_plausible_for_this_cpu(monkeypatch):
    monkeypatch.setattr(peaks_module, "REPETITIONS", 2)
    device = torch.device("cpu")
    assert 1e9 < peaks_module.measure_read(device, 2**22) < 1e13
    assert 1e7 < peaks_module.measure_matrix(device, 64) < 1e14
