"""Loading: the packed parameters hold transformers' weights bit by bit, a bad file is named, memory stays small."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model
from transformers import LlamaForCausalLM

from llama3 import checkpoint, tensor_stream
from llama3.checkpoint import load_weights
from llama3.config import ModelConfig
from llama3.errors import CheckpointError
from llama3.safetensors_file import read_header
from llama3.shapes import SHAPES
from llama3.tensor_stream import FileRange, stream_ranges
from llama3.weights import ModelWeights, empty_weights, gate_up_groups, random_weights
from tests.model_folders import edit_config, edit_tensors, make_model_folder, read_json, write_json
from tools.make_random_model import make_random_model

EMBED, HEAD, KEY = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.k_proj.weight"


def load(folder: Path, dtype: torch.dtype | None = None) -> ModelWeights:
    return load_weights(folder, ModelConfig.from_folder(folder), "cpu", dtype, progress=False)


def assert_holds(weights: ModelWeights, model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    """Compare row by row with the Hugging Face state dict, by the layout's index arithmetic and no helper of ours."""
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    config = model.config
    torch.testing.assert_close(weights.embed, state[EMBED], rtol=0, atol=0)
    torch.testing.assert_close(weights.lm_head, state[HEAD], rtol=0, atol=0)
    torch.testing.assert_close(weights.final_norm, state["model.norm.weight"], rtol=0, atol=0)
    assert (weights.lm_head is weights.embed) == config.tie_word_embeddings
    assert len(weights.layers) == config.num_hidden_layers
    for number, layer in enumerate(weights.layers):
        part = {
            name.removeprefix(f"model.layers.{number}.").removesuffix(".weight"): tensor
            for name, tensor in state.items()
            if name.startswith(f"model.layers.{number}.")
        }
        rows = torch.arange(config.intermediate_size)
        gate_rows = rows // 8 * 16 + rows % 8
        expected = {
            "attn_norm": part["input_layernorm"],
            "mlp_norm": part["post_attention_layernorm"],
            "o": part["self_attn.o_proj"],
            "down": part["mlp.down_proj"],
            "qkv": torch.cat([part[f"self_attn.{kind}_proj"] for kind in "qkv"]),
        }
        for name, tensor in expected.items():
            torch.testing.assert_close(getattr(layer, name), tensor, rtol=0, atol=0)
        torch.testing.assert_close(layer.gate_up[gate_rows], part["mlp.gate_proj"], rtol=0, atol=0)
        torch.testing.assert_close(layer.gate_up[gate_rows + 8], part["mlp.up_proj"], rtol=0, atol=0)
    assert all(tensor.is_contiguous() for tensor in weights.tensors())


@pytest.mark.parametrize("schema", [4, 5])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("head_dim", "kv_heads"), [(64, 4), (64, 1), (128, 2)])
def test_packs_what_transformers_saved(
    tmp_path: Path, schema: int, sharded: bool, tied: bool, head_dim: int, kv_heads: int
):
    model = make_model_folder(
        tmp_path,
        schema=schema,
        sharded=sharded,
        tie_word_embeddings=tied,
        head_dim=head_dim,
        num_key_value_heads=kv_heads,
        dtype=torch.bfloat16,
    )
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    weights = load(tmp_path)
    assert weights.embed.dtype == torch.bfloat16
    assert_holds(weights, model, torch.bfloat16)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_to_the_asked_dtype(tmp_path: Path, stored: torch.dtype, asked: torch.dtype):
    model = make_model_folder(tmp_path, dtype=stored)
    weights = load(tmp_path, asked)
    assert {tensor.dtype for tensor in weights.tensors()} == {asked}
    assert_holds(weights, model, asked)


@pytest.mark.parametrize(("chunk_bytes", "ring_size"), [(1, 1), (4096, 2), (5000, 3), (1 << 20, 8)])
def test_chunks_of_any_size_through_a_ring_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, ring_size: int
):
    model = make_model_folder(tmp_path, sharded=True)
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(tensor_stream, "RING_SIZE", ring_size)
    assert_holds(load(tmp_path), model, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize(("chunk_bytes", "ring_size"), [(1, 1), (5000, 3), (1 << 20, 8)])
def test_pinned_buffers_are_not_refilled_before_their_copy_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, ring_size: int
):
    make_model_folder(tmp_path, sharded=True, vocab_size=2000)
    config = ModelConfig.from_folder(tmp_path)
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(tensor_stream, "RING_SIZE", ring_size)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_weights(tmp_path, config, "cuda", dtype, progress=False)
        for on_gpu, on_cpu in zip(loaded.tensors(), load(tmp_path, dtype).tensors(), strict=True):
            assert on_gpu.is_cuda and torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.gpu
def test_bad_values_are_found_on_the_gpu(tmp_path: Path):
    make_model_folder(tmp_path)
    poisoned(float("nan"), up=(255, 127))(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"NaN or Inf \(as bfloat16\) in 1 tensor: model\.layers\.0\.mlp\.up_proj"
    ):
        load_weights(tmp_path, ModelConfig.from_folder(tmp_path), "cuda", torch.bfloat16, progress=False)


def test_only_the_files_of_the_index_are_read(tmp_path: Path):
    """A second copy of the weights, Meta's own files and left-over shards lie in many folders."""
    model = make_model_folder(tmp_path, sharded=True)
    (tmp_path / "original").mkdir()
    for name in ("original/consolidated.00.pth", "consolidated.safetensors", "model-00009-of-00009.safetensors"):
        (tmp_path / name).write_bytes(b"not to be read")
    assert_holds(load(tmp_path), model, torch.float32)


def test_a_tied_head_stored_twice_must_say_the_same(tmp_path: Path):
    model = make_model_folder(tmp_path, tie_word_embeddings=True)
    embed = model.state_dict()[EMBED].clone()
    edit_tensors(tmp_path, {HEAD: embed})
    assert_holds(load(tmp_path), model, torch.float32)
    embed[-1, -1] += 1
    edit_tensors(tmp_path, {HEAD: embed})
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'model.safetensors'}: {HEAD} differs from {EMBED}, but tie_word_embeddings is true in"
        " config.json; set it to false if this head is meant to be used"
    )
    edit_config(tmp_path, tie_word_embeddings=False)
    torch.testing.assert_close(load(tmp_path).lm_head, embed, rtol=0, atol=0)


def test_a_shared_matrix_may_be_stored_as_the_head(tmp_path: Path):
    model = make_model_folder(tmp_path, tie_word_embeddings=True)
    save_model(model, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    assert HEAD in load_file(tmp_path / "model.safetensors") and EMBED not in load_file(tmp_path / "model.safetensors")
    assert_holds(load(tmp_path), model, torch.float32)
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=rf"1 tensor missing: {EMBED}"):
        load(tmp_path)


def test_rotary_tables_of_old_converters_are_passed_over(tmp_path: Path):
    model = make_model_folder(tmp_path)
    edit_tensors(tmp_path, {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(32) for i in range(2)})
    assert_holds(load(tmp_path), model, torch.float32)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def lengthen(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"12345")


def drop_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def as_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def as_text(folder: Path) -> None:
    (folder / "model.safetensors").write_text("<html>404 Not Found</html>")


def with_bad_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((7).to_bytes(8, "little") + b'{"a": 1')


def with_bad_entry(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def with_hole(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def tensors(**changes: torch.Tensor | None):
    names = {"key": KEY, "embed": EMBED, "head": HEAD, "bias": "model.layers.0.self_attn.q_proj.bias"}
    return lambda folder: edit_tensors(folder, {names[key]: tensor for key, tensor in changes.items()})


def poisoned(value: float, **where: tuple[int, ...]):
    names = {
        "embed": EMBED,
        "key": KEY,
        "up": "model.layers.0.mlp.up_proj.weight",
        "norm": "model.norm.weight",
    }

    def spoil(folder: Path) -> None:
        weights = LlamaForCausalLM.from_pretrained(folder).state_dict()
        changes = {}
        for key, place in where.items():
            changes[names[key]] = weights[names[key]].clone()
            changes[names[key]][place] = value
        edit_tensors(folder, changes)

    return spoil


FILE = "{folder}/model.safetensors"
BAD_FILES = [
    (truncate, FILE + ": truncated, {short} bytes of {size}; copy or download it again"),
    (lengthen, FILE + ": 5 bytes too long; copy or download it again"),
    (drop_files, "{folder}: holds neither model.safetensors nor model.safetensors.index.json"),
    (as_lfs_pointer, FILE + ": a git-lfs pointer, not the weights; run `git lfs pull` in its folder"),
    (as_text, FILE + ": truncated, or not a safetensors file (26 bytes)"),
    (with_bad_header, FILE + ": the safetensors header is corrupt (Expecting ',' delimiter: line 1 column 8 (char 7))"),
    (with_bad_entry, FILE + ": the safetensors header is corrupt (a: F32 [2] does not take 4 bytes)"),
    (with_hole, FILE + ": the safetensors header is corrupt (a overlaps or leaves a hole)"),
    (tensors(key=None), "{folder}: 1 tensor missing: " + KEY),
    (tensors(key=None, head=None), "{folder}: 2 tensors missing: " + KEY + ", " + HEAD),
    (
        tensors(bias=torch.zeros(256)),
        "{folder}: 1 tensor not part of the model: model.layers.0.self_attn.q_proj.bias in model.safetensors",
    ),
    (
        tensors(key=torch.zeros(128, 256)),
        "{folder}: " + KEY + " in model.safetensors has shape [128, 256], config.json needs [128, 128]",
    ),
    (
        tensors(key=torch.zeros(128, 128, dtype=torch.int8)),
        "{folder}: " + KEY + " in model.safetensors has dtype I8, supported are BF16, F16, F32",
    ),
    (
        tensors(key=torch.zeros(128, 128).to(torch.float8_e4m3fn)),
        "{folder}: " + KEY + " in model.safetensors has dtype F8_E4M3, supported are BF16, F16, F32",
    ),
    (
        tensors(key=None, bias=torch.zeros(1), embed=torch.zeros(1, 128)),
        "{folder}: 1 tensor missing: " + KEY + "; 1 tensor not part of the model:"
        " model.layers.0.self_attn.q_proj.bias in model.safetensors; "
        + EMBED
        + " in model.safetensors has shape [1, 128], config.json needs [320, 128]",
    ),
    (
        poisoned(float("nan"), key=(0, 0)),
        "{folder}: NaN or Inf (as float32) in 1 tensor: " + KEY + " in model.safetensors",
    ),
    (
        poisoned(float("inf"), up=(255, 127), norm=(5,)),
        "{folder}: NaN or Inf (as float32) in 2 tensors: model.layers.0.mlp.up_proj.weight, model.norm.weight"
        " in model.safetensors",
    ),
    (
        poisoned(float("-inf"), embed=(319, 127)),
        "{folder}: NaN or Inf (as float32) in 1 tensor: " + EMBED + " in model.safetensors",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_FILES, ids=[message[:70] for _, message in BAD_FILES])
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, spoil, message: str):
    make_model_folder(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    spoil(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert str(caught.value) == message.format(folder=tmp_path, size=size, short=size - 1000)


def test_weights_beyond_the_asked_dtype_are_named(tmp_path: Path):
    make_model_folder(tmp_path)
    poisoned(1e6, norm=(3,))(tmp_path)
    load(tmp_path)
    with pytest.raises(CheckpointError, match=r"NaN or Inf \(as float16\) in 1 tensor: model\.norm\.weight in model"):
        load(tmp_path, torch.float16)


def remove_shard(folder: Path, index: dict) -> None:
    (folder / index["weight_map"][KEY]).unlink()


def point_outside(folder: Path, index: dict) -> None:
    index["weight_map"][KEY] = "../secret.safetensors"


def point_to_the_wrong_shard(folder: Path, index: dict) -> None:
    index["weight_map"][KEY] = index["weight_map"][EMBED]


def forget_a_tensor(folder: Path, index: dict) -> None:
    del index["weight_map"][KEY]


def store_a_tensor_twice(folder: Path, index: dict) -> None:
    edit_tensors(folder, {KEY: torch.zeros(1)}, index["weight_map"][EMBED])


def drop_the_map(folder: Path, index: dict) -> None:
    del index["weight_map"]


BAD_INDEXES = [
    (remove_shard, "{folder}: 1 shard of {shards} missing: {key_shard}"),
    (
        point_outside,
        "{index}: weight_map." + KEY + " is '../secret.safetensors'; the name of a file in the same folder is needed",
    ),
    (
        point_to_the_wrong_shard,
        "{folder}: model.safetensors.index.json says that " + KEY + " lies in {embed_shard}, but it does not",
    ),
    (forget_a_tensor, "{folder}: model.safetensors.index.json does not list 1 tensor: " + KEY),
    (store_a_tensor_twice, "{folder}: " + KEY + " lies in both {embed_shard} and {key_shard}"),
    (drop_the_map, "{index}: weight_map is missing; it has no default"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_INDEXES, ids=[spoil.__name__ for spoil, _ in BAD_INDEXES])
def test_an_index_that_does_not_fit_its_shards_is_named(tmp_path: Path, spoil, message: str):
    make_model_folder(tmp_path, sharded=True)
    path = tmp_path / "model.safetensors.index.json"
    index = read_json(path)
    shards = {"embed_shard": index["weight_map"][EMBED], "key_shard": index["weight_map"][KEY]}
    count = len(set(index["weight_map"].values()))
    assert count > 2 and shards["embed_shard"] < shards["key_shard"]
    spoil(tmp_path, index)
    write_json(path, index)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert str(caught.value) == message.format(folder=tmp_path, index=path, shards=count, **shards)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16)}, path, metadata={"format": "pt"})
    return path


@given(data=st.data())
@settings(max_examples=100)
def test_every_truncation_is_caught(small_file: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    content = small_file.read_bytes()
    cut = small_file.with_name("cut.safetensors")
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: truncated"):
        read_header(cut)


@given(data=st.data())
@settings(max_examples=200)
def test_a_corrupt_header_is_an_error_or_harmless_and_never_a_crash(small_file: Path, data: st.DataObject):
    content = bytearray(small_file.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    bad = small_file.with_name("bad.safetensors")
    bad.write_bytes(content)
    try:
        tensors = read_header(bad)
    except CheckpointError as error:
        assert "bad.safetensors" in str(error)
    else:
        assert all(header_end <= tensor.offset <= len(content) - tensor.nbytes for tensor in tensors.values())


def test_a_wrong_checkpoint_allocates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_model_folder(tmp_path)
    edit_tensors(tmp_path, {KEY: None})
    devices = []

    def note_device(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> ModelWeights:
        devices.append(device)
        return empty_weights(config, "meta", dtype)

    monkeypatch.setattr(checkpoint, "empty_weights", note_device)
    with pytest.raises(CheckpointError):
        load(tmp_path)
    assert devices == ["meta"]


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(bytes(10))
    assert [item.tolist() for item in stream_ranges([FileRange(path, 6, 4)], torch.device("cpu"))] == [[0] * 4]
    with pytest.raises(CheckpointError, match="file: ended at byte 10 while it was read"):
        list(stream_ranges([FileRange(path, 0, 4), FileRange(path, 8, 4)], torch.device("cpu")))
    with pytest.raises(CheckpointError, match=r"gone: cannot be read \(No such file or directory\)"):
        list(stream_ranges([FileRange(tmp_path / "gone", 0, 4)], torch.device("cpu")))


def test_the_progress_bar_shows_the_rate_on_stderr_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    make_model_folder(tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    capfd.readouterr()
    load_weights(tmp_path, config, "cpu", progress=False)
    assert capfd.readouterr() == ("", "")
    load_weights(tmp_path, config, "cpu")
    out, err = capfd.readouterr()
    assert out == "" and "Loading weights: 100%" in err and "B/s" in err


LOAD_AND_REPORT = """
import sys, torch
from pathlib import Path
from llama3 import checkpoint
from llama3.config import ModelConfig

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

checkpoint.CHUNK_BYTES = 1 << 20
folder = Path(sys.argv[1])
config = ModelConfig.from_folder(folder)
torch.ones(10).add(1)
before = kilobytes("VmRSS")
weights = checkpoint.load_weights(folder, config, "cpu", progress=False)
print((kilobytes("VmHWM") - before) * 1024 - config.weight_bytes())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_host_memory_beyond_the_parameters_is_the_ring_whatever_the_shard(tmp_path: Path):
    """200 MB in shards of 100 MB; neither a shard nor the largest tensor (67 MB) may ever lie in memory twice."""
    config = replace(SHAPES["tiny"], vocab_size=131072, tie_word_embeddings=False)
    make_random_model(tmp_path / "model", config, max_shard_bytes=100_000_000, progress=False)
    command = [sys.executable, "-c", LOAD_AND_REPORT, str(tmp_path / "model")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    ring = tensor_stream.RING_SIZE << 20
    assert int(result.stdout) < ring + (24 << 20)


def test_random_weights_have_the_shapes_of_loaded_ones_and_repeat(tmp_path: Path):
    make_model_folder(tmp_path, tie_word_embeddings=True)
    config = ModelConfig.from_folder(tmp_path)
    loaded, first, again = load(tmp_path), *(random_weights(config, "cpu", seed=3) for _ in range(2))
    other = random_weights(config, "cpu", seed=4)
    assert first.lm_head is first.embed
    pairs = zip(loaded.tensors(), first.tensors(), again.tensors(), other.tensors(), strict=True)
    for mine, one, two, three in pairs:
        assert (one.shape, one.dtype) == (mine.shape, mine.dtype)
        assert torch.equal(one, two)
        assert one.dim() == 1 or not torch.equal(one, three)
    assert sum(tensor.numel() for tensor in first.tensors()) == config.num_parameters


def test_gate_up_groups_is_a_view_of_both_halves():
    packed = torch.arange(32 * 3.0).view(32, 3)
    groups = gate_up_groups(packed)
    assert groups.data_ptr() == packed.data_ptr()
    assert torch.equal(groups[1, 0, 2], packed[18]) and torch.equal(groups[1, 1, 2], packed[26])


def test_random_model_folder_loads_here_and_in_transformers(tmp_path: Path):
    for schema, max_shard_bytes in ((4, 1 << 40), (5, 2_000_000)):
        folder = tmp_path / str(schema)
        make_random_model(folder, SHAPES["tiny"], torch.float32, 7, max_shard_bytes, schema, progress=False)
        theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert_holds(load(folder), theirs, torch.float32)
        shards = sorted(folder.glob("model*.safetensors"))
        assert (len(shards) == 1) == (schema == 4)


def test_random_model_command(tmp_path: Path):
    command = [sys.executable, "tools/make_random_model.py", "--shape", "tiny", "--layers", "1", str(tmp_path / "out")]
    root = Path(__file__).parent.parent
    first = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert first.returncode == 0 and "random parameters" in first.stdout
    again = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (again.returncode, again.stderr) == (2, f"{tmp_path / 'out'}: not empty; give a new folder\n")
