"""What a captured prefill is given: how a call is packed and padded, and up to which size it pays."""

from array import array

from llama3.prefill_graphs import TOKEN_SIZES, _pack, largest_size
from llama3.shapes import shape_config


def test_packing_pads_tokens_and_sequences() -> None:
    packed = _pack(array("I", [7, 8, 9]), [5, 2], [2, 1], num_tokens=6, num_seqs=4).tolist()
    assert packed[:6] == [7, 8, 9, 0, 0, 0]
    assert packed[6:12] == [5, 5, 2, 0, 0, 0]  # slots
    assert packed[12:18] == [0, 1, 0, -1, -1, -1]  # positions: padding is stored nowhere
    assert packed[18:] == [0, 2, 3, 3, 3, 6]  # two sequences, two empty ones, the padding
    assert _pack(array("I", [7, 8]), [3], [2], num_tokens=2, num_seqs=1).tolist() == [7, 8, 3, 3, 0, 1, 0, 2, 2]


def test_a_larger_model_is_captured_for_fewer_tokens() -> None:
    sizes = {shape: largest_size(shape_config(shape)) for shape in ("tiny", "1b", "3b", "8b", "70b")}
    assert sizes == {"tiny": TOKEN_SIZES[-1], "1b": 2048, "3b": 1024, "8b": 512, "70b": 128}
